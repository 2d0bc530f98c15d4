#!/bin/bash
# Builds build/deb/virtiofsd-ts_VERSION_ARCH.deb from `make install`. DEBFULLNAME and DEBEMAIL say who maintains the package.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=common.sh
. packaging/deb/common.sh

root=$PWD/build/deb/virtiofsd-ts
rm -rf "$root"
"${MAKE:-make}" --silent --no-print-directory install DESTDIR="$root" PREFIX=/usr >/dev/null
# Without what only developers read. Of the libraries: what is loaded, and the licences.
lib=$root/usr/lib/virtiofsd-ts
find "$lib" -type f \( -name '*.map' -o -name '*.d.ts' -o -name .tsbuildinfo \) -delete
find "$lib/node_modules" -type f ! -name '*.js' ! -name '*.cjs' ! -name '*.mjs' ! -name '*.json' ! -iname 'licen[cs]e*' -delete
find "$lib/node_modules" -depth -type d \( -name .bin -o -name .github -o -name test -o -name tests -o -name docs -o -name benchmarks -o -name examples \) -exec rm -rf {} +
# Their commands are of no use here.
grep -rlm1 '^#!' "$lib/node_modules" | xargs -r rm
find "$lib/node_modules" -type d -empty -delete
find "$lib" -type f ! -name virtiofsd-ts-sandbox ! -name virtiofsd-ts-agent ! -name '*.openrc' -exec chmod 644 {} +
strip --strip-unneeded --remove-section=.comment "$lib/virtiofsd-ts-sandbox" "$lib/agent/virtiofsd-ts-agent" "$lib/src/vhost-user-ts/dist/addon.node"
# Node.js as Debian and NodeSource install it.
sed -i 's|exec "[^"]*"|exec /usr/bin/node|' "$root/usr/bin/virtiofsd-ts"
install -d "$root/etc/virtiofsd-ts" "$root/usr/share/lintian/overrides"
documents "$root" virtiofsd-ts Apache-2.0
gzip -9n <build/sbom.json >"$root/usr/share/doc/virtiofsd-ts/sbom.json.gz"
cat >"$root/usr/share/lintian/overrides/virtiofsd-ts" <<'OVERRIDES'
# The launcher becomes the first process of namespaces that have no libraries.
virtiofsd-ts: statically-linked-binary [usr/lib/virtiofsd-ts/virtiofsd-ts-sandbox]
# For guests, which may have another libc, or an older one.
virtiofsd-ts: statically-linked-binary [usr/lib/virtiofsd-ts/agent/virtiofsd-ts-agent]
virtiofsd-ts: unusual-interpreter /sbin/openrc-run [usr/lib/virtiofsd-ts/agent/virtiofsd-ts-agent.openrc]
# Libraries as npm has them, each with its licence.
virtiofsd-ts: extra-license-file [usr/lib/virtiofsd-ts/node_modules/*]
virtiofsd-ts: package-contains-documentation-outside-usr-share-doc [usr/lib/virtiofsd-ts/node_modules/*]
virtiofsd-ts: repeated-path-segment * [usr/lib/virtiofsd-ts/node_modules/*]
OVERRIDES

depends=$(shlibs "$lib/src/vhost-user-ts/dist/addon.node")
control "$root" <<CONTROL
Package: virtiofsd-ts
Version: $VERSION
Architecture: $(dpkg --print-architecture)
Depends: nodejs (>= 20.19), $depends
Recommends: uidmap
Suggests: qemu-system-x86, libvirt-daemon-system
Section: admin
Description: virtio-fs daemon that tells the guest of file events
 Shares a host directory with a virtual machine: a virtio-fs device for QEMU,
 libvirt and other VMMs that speak vhost-user. Takes the options of virtiofsd.
 .
 Guests whose kernel has the modules of virtiofs-fsnotify-dkms are told when
 files change on the host, as inotify and fanotify events; others run the
 agent in /usr/lib/virtiofsd-ts/agent for that.
CONTROL
for script in postinst postrm; do
    cat >"$root/DEBIAN/$script" <<'SCRIPT'
#!/bin/sh
set -e
# The units are templates: which of them run is for the administrator to say.
if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
SCRIPT
    chmod 755 "$root/DEBIAN/$script"
done
pack "$root"
