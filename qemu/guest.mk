# Guests; included by the root Makefile.
#
#   make run [SHARE=dir] [CMD='ls -l /mnt'] [GUEST=qemu|uml] [OPTS='daemon options']
#            [KERNEL=..] [MODULES='a.ko ..'] [HOSTROOT=1] [MEM=MiB] [CPUS=n] [ACCEL=kvm|tcg] [TIMEOUT=s] [VERBOSE=1]
#
# RUN_NEEDS names the target that builds the daemon and this runner.
RUN_NEEDS ?= all

RUN_VARIABLES := SHARE GUEST OPTS KERNEL MODULES HOSTROOT MEM CPUS ACCEL TIMEOUT VERBOSE DAEMON QEMU
export $(RUN_VARIABLES)

# stdout belongs to the command in the guest: what is built is told on stderr. The command reaches the guest's shell as it
# was written, $ and all.
.PHONY: run
run: export CMD_TEXT = $(value CMD)
run:
	@$(MAKE) --silent --no-print-directory $(RUN_NEEDS) >&2
	@CMD="$$CMD_TEXT" node build/js/qemu/run.js
