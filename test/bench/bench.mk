# Measurements side by side with the other daemons; included by the root Makefile.
#
#   make bench [LEVEL=a|b|c] [QUICK=1] [ONLY=regex] [DAEMONS=ours,rust,rust-never,c] [ROUNDS=n] [RESULTS=dir]
#              [KERNEL=7.2]
#
# Level a drives the daemons' sockets, level b works in a guest, level c measures events. A whole run writes its tables and
# plots into test/bench/results; with QUICK, ONLY, DAEMONS or ROUNDS they go to build/bench.
BENCH_VARIABLES := LEVEL QUICK ONLY DAEMONS ROUNDS RESULTS KERNEL

build/bench-client: test/bench/client.cc
	@qemu/setup.sh packages "to compile the bench's client" g++ libc6-dev
	@mkdir -p $(@D)
	@g++ -std=c++20 -O2 -fno-strict-aliasing -Wall -Wextra -Werror -o $@ $<

.PHONY: bench
bench: all build/bench-client
	@qemu/setup.sh packages "to count system calls" strace
	@$(foreach v,$(BENCH_VARIABLES),$(v)='$($(v))') $(NODE) --no-warnings build/js/test/bench/main.js
