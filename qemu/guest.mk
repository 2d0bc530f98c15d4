# Guests; included by the root Makefile.
#
#   make run [SHARE=dir] [CMD='ls -l /mnt'] [GUEST=qemu|uml] [OPTS='daemon options']
#            [EVENTS=1|only] [KERNEL=..] [MODULES='a.ko ..'] [HOSTROOT=1] [MEM=MiB] [CPUS=n] [ACCEL=kvm|tcg] [TIMEOUT=s] [VERBOSE=1]
#
# stdout belongs to the command in the guest: what is built is told on stderr. The command reaches the guest's shell as it
# was written, $ and all. RUN_NEEDS names the target that builds the daemon and the runner.
RUN_NEEDS ?= all
RUN_VARIABLES := SHARE CMD GUEST OPTS EVENTS KERNEL MODULES HOSTROOT MEM CPUS ACCEL TIMEOUT VERBOSE DAEMON QEMU
NODE ?= node

# As the last goal, and not under -n, `run` takes make's place, so that the status is the command's (see become.c).
ifeq ($(lastword $(MAKECMDGOALS))$(findstring n,$(firstword -$(MAKEFLAGS))),run)
-load build/become.so
RUN_BECOMES = $(and $(filter build/become.so,$(.LOADED)),$(become $(NODE) build/js/qemu/run.js,$(RUN_VARIABLES)))
endif

build/become.so: qemu/become.c
	@mkdir -p $(@D)
	@qemu/setup.sh packages "to end with the status of the command in the guest" gcc libc6-dev
	@gcc -shared -fPIC -O2 -Wall -Wextra -o $@ $< || echo "make run will end with status 2 where the command has another" >&2

.PHONY: run run-needs
run-needs:
	@$(MAKE) --silent --no-print-directory $(RUN_NEEDS) >&2

run: export CMD_TEXT = $(value CMD)
run: run-needs
	$(RUN_BECOMES)
	@CMD="$$CMD_TEXT" $(NODE) build/js/qemu/run.js

# Events over the notification queue of the virtio specification, in a QEMU built for it and in Debian's newest. The first
# time this builds and fetches for ten minutes, and it is no part of `make test`.
.PHONY: test-notification-queue
test-notification-queue: run-needs
	@$(NODE) build/js/qemu/notification-queue.js

# The domains of libvirt/ in Debian 12's libvirt, apart from the machine's own. Needs root. Those with a notification queue
# build or fetch a QEMU: make test-libvirt DOMAINS='notification-queue generic-device'
.PHONY: test-libvirt
test-libvirt: run-needs
	@$(NODE) build/js/qemu/libvirt.js $(DOMAINS)
