# What belongs to an installed daemon beside the program; included by the root Makefile.

.PHONY: man completions
man: build/man/virtiofsd-ts.1
completions: build/completions/virtiofsd-ts build/completions/_virtiofsd-ts build/completions/virtiofsd-ts.fish

build/man/virtiofsd-ts.1: build/js/.stamp CHANGELOG.md
	@mkdir -p $(@D)
	@$(NODE) build/js/packaging/man.js > $@.new && mv $@.new $@

build/completions/virtiofsd-ts: SHELL_OF = bash
build/completions/_virtiofsd-ts: SHELL_OF = zsh
build/completions/virtiofsd-ts.fish: SHELL_OF = fish
build/completions/virtiofsd-ts build/completions/_virtiofsd-ts build/completions/virtiofsd-ts.fish: build/js/.stamp
	@mkdir -p $(@D)
	@$(NODE) build/js/packaging/completions.js $(SHELL_OF) > $@.new && mv $@.new $@

# Below /usr the folders that Debian keeps for packages, elsewhere those for everybody else.
ZSH_DIR = $(if $(filter /usr,$(PREFIX)),vendor-completions,site-functions)

.PHONY: install-pages
install-pages: man completions
	install -d $(addprefix $(DESTDIR)$(PREFIX)/share/,man/man1 bash-completion/completions zsh/$(ZSH_DIR) fish/vendor_completions.d)
	install -m 644 build/man/virtiofsd-ts.1 $(DESTDIR)$(PREFIX)/share/man/man1/
	install -m 644 build/completions/virtiofsd-ts $(DESTDIR)$(PREFIX)/share/bash-completion/completions/
	install -m 644 build/completions/_virtiofsd-ts $(DESTDIR)$(PREFIX)/share/zsh/$(ZSH_DIR)/
	install -m 644 build/completions/virtiofsd-ts.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/

# systemd looks for units here, too.
UNIT_DIR = $(PREFIX)/lib/systemd/system

.PHONY: install-units
install-units:
	install -d $(DESTDIR)$(UNIT_DIR) $(DESTDIR)$(PREFIX)/share/doc/virtiofsd-ts
	sed 's|/usr/local/bin|$(PREFIX)/bin|' packaging/systemd/virtiofsd-ts@.service > $(DESTDIR)$(UNIT_DIR)/virtiofsd-ts@.service
	install -m 644 packaging/systemd/virtiofsd-ts@.socket $(DESTDIR)$(UNIT_DIR)
	install -m 644 packaging/systemd/example.conf $(DESTDIR)$(PREFIX)/share/doc/virtiofsd-ts

# The dashboard over three minutes of a guest at work, drawn by Grafana's components, for monitoring/README.md. They are some 400 npm
# packages, for this alone; none of their scripts is run.
.PHONY: monitoring-picture
monitoring-picture: all build/grafana/page.js
	$(call need,chromium,chromium,to draw the dashboard)
	$(call need,git,git,to work in the guest)
	@qemu/setup.sh packages "to watch files in the guest" inotify-tools
	$(NODE) build/js/monitoring/picture.js $(CURDIR)/build/grafana $(CURDIR)/monitoring/dashboard.png

build/grafana/node_modules: monitoring/grafana/package.json
	@mkdir -p $(@D) && cp $< $(@D)
	@echo "npm install: Grafana's components" >&2
	@# One of the libraries has not heard of React 19 yet.
	@cd $(@D) && npm install --ignore-scripts --legacy-peer-deps --no-package-lock --no-progress --silent
	@touch $@

build/grafana/page.js: $(wildcard monitoring/grafana/*) monitoring/dashboard.json build/grafana/node_modules
	@cp monitoring/grafana/* monitoring/dashboard.json $(@D)
	npx tsc -p $(@D)
	cd $(@D) && npx esbuild page.tsx --bundle --minify --outdir=. --jsx=automatic --loader:.woff2=dataurl --loader:.woff=dataurl \
	  --loader:.ttf=empty --define:process.env.NODE_ENV='"production"' --log-level=warning

# --- npm packages ---

# build/npm/virtiofsd-ts-VERSION.tgz and vhost-user-ts-VERSION.tgz
.PHONY: npm
npm: all man
	@$(NODE) build/js/packaging/npm.js
	@cd build/npm && npm pack --silent ./vhost-user-ts ./virtiofsd-ts

# What is in them, for whoever has to know: CycloneDX; without what would differ each time.
.PHONY: sbom
sbom: build/sbom.json
build/sbom.json: package-lock.json node_modules/.package-lock.json
	@# With --omit dev npm leaves out what a tool needs, too.
	@mkdir -p build/sbom/src/vhost-user-ts
	@cp package-lock.json build/sbom && cp src/vhost-user-ts/package.json build/sbom/src/vhost-user-ts
	@$(NODE) -e 'const p = JSON.parse(fs.readFileSync("package.json")); delete p.devDependencies; fs.writeFileSync("build/sbom/package.json", JSON.stringify(p))'
	@cd build/sbom && npm install --package-lock-only --offline --silent
	@cd build/sbom && npm sbom --sbom-format cyclonedx --package-lock-only | grep -v '"serialNumber":\|"timestamp":' > ../sbom.json

# --- Debian packages ---

# build/deb/virtiofsd-ts_VERSION_ARCH.deb
.PHONY: deb
deb: all man completions build/sbom.json
	$(call need,dpkg-shlibdeps,dpkg-dev,to build packages)
	@MAKE="$(MAKE)" packaging/deb/daemon.sh
	@ls build/deb/virtiofsd-ts_*.deb

# build/deb/virtiofs-fsnotify-dkms_VERSION_all.deb, for guests; the first time it fetches the source of two kernels.
.PHONY: deb-dkms
deb-dkms:
	@packaging/deb/dkms.sh
	@ls build/deb/virtiofs-fsnotify-dkms_*.deb

.PHONY: test-dkms
test-dkms: all
	$(NODE_TEST) build/js/test/long/dkms.test.js

# The first time a Debian 13 is made by debootstrap, in two minutes.
.PHONY: test-deb13
test-deb13: all man completions build/sbom.json
	$(call need,systemd,systemd,to start services in a machine of their own)
	$(NODE_TEST) build/js/test/long/deb.test.js

# --- documentation ---

docs/options.md: build/js/.stamp
	@$(NODE) build/js/packaging/optionspage.js > $@.new && mv $@.new $@
