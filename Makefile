# virtiofsd-ts. The targets people need:
#   make            build everything; leaves build/virtiofsd-ts
#   make run        a shell in a guest that has a host directory mounted (see qemu/guest.mk)
#   make test       everything that CI runs
#   make install    PREFIX=/usr/local DESTDIR=
# Each target installs or builds what it misses and says why; the second time it is quick.

.DEFAULT_GOAL := all
SHELL := /bin/bash
NODE ?= node
PREFIX ?= /usr/local
LIBDIR = $(PREFIX)/lib/virtiofsd-ts

ADDON = src/vhost-user-ts/dist/addon.node
NATIVE = $(wildcard native/*.cc native/*.h) native/binding.gyp
TYPESCRIPT = $(shell find src qemu test packaging monitoring -name '*.ts' -not -path '*/dist/*') tsconfig.json src/vhost-user-ts/tsconfig.json
export npm_config_fund = false
export npm_config_audit = false
export npm_config_update_notifier = false
# node-gyp fetches Node.js's headers from nodejs.org, unless it is told that they are there: most packages of it bring them.
NODE_ROOT := $(abspath $(dir $(shell command -v $(NODE)))/..)
ifneq ($(wildcard $(NODE_ROOT)/include/node/node_api.h),)
export npm_config_nodedir = $(NODE_ROOT)
endif

include qemu/guest.mk
include test/bench/bench.mk
include packaging/packaging.mk

.PHONY: all
all: build/virtiofsd-ts agent

# --- what is needed to build ---

# $(call install,PACKAGES,WHY): the commands that install Debian packages.
install = qemu/setup.sh packages "$(2)" $(1);

# $(call need,COMMAND,PACKAGES,WHY): installs Debian packages when the command is missing.
define need
	@command -v $(1) >/dev/null || { $(call install,$(2),$(3)) }
endef

node_modules/.package-lock.json: package.json package-lock.json src/vhost-user-ts/package.json
	@$(NODE) -e 'const [a,b]=process.versions.node.split(".").map(Number);process.exit(a>20||a==20&&b>=19?0:1)' 2>/dev/null || \
	  { echo "Node.js 20.19 or newer is needed (found: $$($(NODE) --version 2>/dev/null || echo none))" >&2; exit 1; }
	@echo "npm ci: the libraries and TypeScript, from package-lock.json" >&2
	@npm ci --no-progress >&2
	@touch $@

$(ADDON): $(NATIVE) | node_modules/.package-lock.json
	$(call need,g++,g++,to compile the add-on)
	$(call need,make,make,to compile the add-on)
	$(call need,python3,python3,node-gyp is written in it)
	@echo "node-gyp: the add-on" >&2
	@npm run --silent build:addon >build-addon.log 2>&1 || { cat build-addon.log >&2; exit 1; }
	@rm -f build-addon.log
	@mkdir -p $(@D) && cp native/build/Release/addon.node $@

build/js/.stamp: $(TYPESCRIPT) node_modules/.package-lock.json
	@echo "tsc: TypeScript" >&2
	@npx tsc -b
	@touch $@

# Static: it needs nothing of the host when it starts, and little memory while it stays.
build/virtiofsd-ts-sandbox: native/sandbox.c native/filter.c native/sandbox.h
	$(call need,gcc,gcc libc6-dev,to compile the launcher)
	@[ -f /usr/include/seccomp.h ] || { $(call install,libseccomp-dev,for the filter of system calls) }
	@mkdir -p $(@D)
	@gcc -std=gnu17 -O2 -Wall -Wextra -Werror -static -o $@ native/sandbox.c native/filter.c -lseccomp

# The replay agent for guests with a stock kernel; static, so that one program runs in any guest.
AGENT = $(wildcard qemu/guest/agent/*.c) qemu/guest/agent/agent.h
AGENT_FLAGS = -std=gnu17 -O2 -s -Wall -Wextra -Werror -static
.PHONY: agent agent-arm64
agent: build/virtiofsd-ts-agent
build/virtiofsd-ts-agent: $(AGENT)
	$(call need,gcc,gcc libc6-dev,to compile the agent)
	@mkdir -p $(@D)
	@gcc $(AGENT_FLAGS) -o $@ $(filter %.c,$^)

# For arm64 guests, on a host of another kind.
agent-arm64: build/virtiofsd-ts-agent-arm64
build/virtiofsd-ts-agent-arm64: $(AGENT)
	$(call need,aarch64-linux-gnu-gcc,gcc-aarch64-linux-gnu libc6-dev-arm64-cross,to compile the agent for arm64)
	@mkdir -p $(@D)
	@aarch64-linux-gnu-gcc $(AGENT_FLAGS) -o $@ $(filter %.c,$^)

build/virtiofsd-ts: build/js/.stamp $(ADDON) build/virtiofsd-ts-sandbox Makefile
	@$(call launcher,$(CURDIR)/build/js/src/main.js) > $@.new
	@chmod 755 $@.new && mv $@.new $@

# A launcher that becomes node: no second process, inherited descriptors stay (libvirt passes a socket and a locked pid file).
launcher = printf '%s\n' '\#!/bin/sh' 'exec "$(shell command -v $(NODE))" $(NODE_FLAGS) "$(1)" "$$@"'
NODE_FLAGS = --no-warnings --max-semi-space-size=4

# --- install ---

.PHONY: install
install: all install-pages install-units
	install -d $(DESTDIR)$(LIBDIR) $(DESTDIR)$(PREFIX)/bin
	rm -rf $(DESTDIR)$(LIBDIR)/js $(DESTDIR)$(LIBDIR)/node_modules
	install -d $(DESTDIR)$(LIBDIR)/js
	cp -r build/js/src $(DESTDIR)$(LIBDIR)/js/
	install -m 755 build/virtiofsd-ts-sandbox $(DESTDIR)$(LIBDIR)
	@# To be copied into guests: nothing of it runs here.
	install -d $(DESTDIR)$(LIBDIR)/agent
	install -m 755 build/virtiofsd-ts-agent qemu/guest/agent/virtiofsd-ts-agent.openrc $(DESTDIR)$(LIBDIR)/agent
	install -m 644 qemu/guest/agent/virtiofsd-ts-agent@.service $(DESTDIR)$(LIBDIR)/agent
	install -m 644 package.json package-lock.json $(DESTDIR)$(LIBDIR)
	install -d $(DESTDIR)$(LIBDIR)/src/vhost-user-ts
	cp -r src/vhost-user-ts/package.json src/vhost-user-ts/dist $(DESTDIR)$(LIBDIR)/src/vhost-user-ts/
	cd $(DESTDIR)$(LIBDIR) && npm ci --omit=dev --ignore-scripts --no-progress >&2
	$(call launcher,$(LIBDIR)/js/src/main.js) > $(DESTDIR)$(PREFIX)/bin/virtiofsd-ts
	chmod 755 $(DESTDIR)$(PREFIX)/bin/virtiofsd-ts
	install -d $(DESTDIR)$(PREFIX)/share/qemu/vhost-user
	sed 's|/usr/local/bin|$(PREFIX)/bin|' qemu/libvirt/50-virtiofsd-ts.json > $(DESTDIR)$(PREFIX)/share/qemu/vhost-user/50-virtiofsd-ts.json

.PHONY: clean
clean:
	rm -rf build native/build src/vhost-user-ts/dist

# --- tests ---

# Lists, not patterns: node --test understands globs differently from version to version.
tests_in = $(patsubst test/%.ts,build/js/test/%.js,$(wildcard $(addprefix test/,$(addsuffix /*.test.ts,$(1)))))
NODE_TEST = $(NODE) --no-warnings --test --test-reporter=spec

.PHONY: test
test: lint test-host test-asan test-fuzz test-kernel test-guest test-libvirt

.PHONY: lint
lint: node_modules/.package-lock.json
	@npx biome ci --error-on-warnings .

.PHONY: test-host
# What its tests make, too, is made before: they run side by side.
test-host: all man completions build/sbom.json
	$(call need,strace,strace,to count system calls)
	@qemu/setup.sh packages "shells, man, systemd and lintian, to test completions, man page, units and packages" man-db mandoc bsdutils zsh fish systemd python3 g++ make lintian dpkg-dev
	$(NODE_TEST) $(call tests_in,unit native host)

# --- the add-on under the address sanitizer ---

ASAN_ADDON = build/asan/addon.node
# Leaks of node itself are many: where test/native looks for those of the add-on, it turns the search on.
ASAN_ENV = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so)" VHOST_USER_TS_ADDON="$(CURDIR)/$(ASAN_ADDON)" \
  ASAN_OPTIONS=detect_leaks=0:exitcode=99

$(ASAN_ADDON): $(NATIVE) | $(ADDON)
	@echo "node-gyp: the add-on with -fsanitize=address" >&2
	@mkdir -p $(@D) && cp $(NATIVE) $(@D)
	@npm run --silent build:asan >$(@D)/log 2>&1 || { cat $(@D)/log >&2; exit 1; }
	@cp $(@D)/build/Release/addon.node $@

# Everything that runs on the host, with that add-on; make test runs only test/native so.
.PHONY: asan
asan: test-asan
	$(call need,strace,strace,to count system calls)
	$(ASAN_ENV) $(NODE_TEST) $(call tests_in,host)

.PHONY: test-asan
test-asan: all $(ASAN_ADDON)
	$(ASAN_ENV) $(NODE_TEST) $(call tests_in,native)

include test/fuzz/fuzz.mk

# The guest kernel's half alone: a server on /dev/fuse and a vhost-user device that misbehave on purpose.
.PHONY: test-kernel
test-kernel:
	qemu/guest/kernel/test/run.sh 6.12
	TESTS=cache qemu/guest/kernel/test/run.sh 7.2

# A guest moves between the newest QEMUs, between those of Debian 13, and by its libvirt; they are fetched the first time.
.PHONY: test-migration
test-migration: all
	$(call need,fio,fio,to write and verify files in guests)
	$(NODE_TEST) build/js/test/long/migration.test.js
	QEMU_RELEASE=trixie $(NODE_TEST) build/js/test/long/migration.test.js
	$(NODE_TEST) build/js/test/long/migration-libvirt.test.js

# What docs/newcomer.md says, typed into a clean Debian 12: with libvirt, a guest and events.
.PHONY: test-newcomer
test-newcomer: all
	$(NODE_TEST) build/js/test/long/newcomer.test.js

# A guest for arm64, in QEMU's translator, with the agent for arm64.
.PHONY: test-arm64
test-arm64: all agent-arm64
	@qemu/guest/kernel/stock.sh 6.1-arm64 >/dev/null
	$(NODE_TEST) build/js/test/long/arm64.test.js

# What takes too long for every run.
.PHONY: test-long
test-long: test-notification-queue test-hostile-long test-restart-long test-migration test-dkms test-deb13 test-arm64 test-newcomer
	AGENT_ROUNDS=150000 $(NODE_TEST) build/js/test/host/agent-failclosed.test.js
	@$(MAKE) --no-print-directory test-libvirt DOMAINS='notification-queue generic-device'

# Workers that are killed and replaced for minutes, many open files and inodes. The last results are in test/long-results.md.
.PHONY: test-restart-long
test-restart-long: all
	$(call need,fio,fio,to write and verify files in guests)
	LONG=120 RESTART_TIMES=5 $(NODE_TEST) --test-concurrency=1 $(patsubst %,build/js/test/%/restart.test.js,host guest)

# Races against the share's boundary and against guest memory for a minute each, a daemon that is stopped for a minute.
# The last results are in test/long-results.md.
.PHONY: test-hostile-long
test-hostile-long: all
	$(call need,strace,strace,to make system calls slow)
	HOSTILE_SECONDS=60 STOP_SECONDS=60 $(NODE_TEST) --test-concurrency=1 \
	  $(patsubst %,build/js/test/host/%.test.js,hostile-share hostile-guest hostile-client faults)

# Guests share two cores: one test file at a time.
# FSNOTIFY_DEBUG=1: file events also in a guest kernel that checks locking and memory; it takes some minutes to build.
.PHONY: test-guest
test-guest: all
	$(call need,fio,fio,to write and verify files in guests)
	$(call need,stress-ng,stress-ng,to stress the file system in guests)
	$(call need,git,git,to clone in guests)
	@qemu/setup.sh packages "the agent's units are started in guests" systemd procps inotify-tools
	$(NODE_TEST) --test-concurrency=1 $(call tests_in,guest)
