# shellcheck shell=bash
# What both packages are made with; source it in the repository.

VERSION=$(sed -n 's/^  "version": "\(.*\)",$/\1/p' package.json)
MAINTAINER="${DEBFULLNAME:-virtiofsd-ts maintainers} <${DEBEMAIL:-maintainers@virtiofsd-ts.invalid}>"
# The same contents make the same package.
SOURCE_DATE_EPOCH=$(date -u -d "$(sed -n "s/^## \[$VERSION\] - //p" CHANGELOG.md)" +%s)
export SOURCE_DATE_EPOCH

# documents ROOT PACKAGE LICENCE: copyright and changelog; man pages are compressed.
documents() {
    local doc=$1/usr/share/doc/$2
    install -d "$doc"
    {
        echo 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/'
        echo
        echo 'Files: *'
        echo 'Copyright: 2026 the virtiofsd-ts authors'
        echo "License: $3"
        case $3 in
        Apache-2.0) printf ' On Debian systems the text is in /usr/share/common-licenses/Apache-2.0.\n' ;;
        GPL-2.0) printf ' On Debian systems the text is in /usr/share/common-licenses/GPL-2.\n' ;;
        esac
        echo 'Comment: libraries below node_modules have their licences beside them.'
    } >"$doc/copyright"
    {
        echo "$2 ($VERSION) unstable; urgency=medium"
        echo
        echo '  * See CHANGELOG.md.gz.'
        echo
        echo " -- $MAINTAINER  $(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")"
    } | gzip -9n >"$doc/changelog.gz"
    gzip -9n <CHANGELOG.md >"$doc/CHANGELOG.md.gz"
    ! [ -d "$1/usr/share/man" ] || find "$1/usr/share/man" -type f ! -name '*.gz' -exec gzip -9n {} +
}

# shlibs FILE...: the packages of the libraries that they need.
shlibs() {
    local work
    work=$(mktemp -d)
    mkdir "$work/debian"
    printf 'Source: x\n\nPackage: x\nArchitecture: any\n' >"$work/debian/control"
    (cd "$work" && dpkg-shlibdeps -O "$@" 2>/dev/null) | sed -n 's/^shlibs:Depends=//p'
    rm -rf "$work"
}

# control ROOT: DEBIAN/control from standard input, and the rest that follows from it.
control() {
    install -d "$1/DEBIAN"
    {
        # The description, which comes last there, goes on until the end.
        echo "Maintainer: $MAINTAINER"
        echo 'Priority: optional'
        echo "Installed-Size: $(du -k -s --apparent-size "$1" | cut -f1)"
        cat
    } >"$1/DEBIAN/control"
}

# pack ROOT: the .deb beside it.
pack() {
    find "$1" -type d -exec chmod 755 {} +
    (cd "$1" && find . -type f ! -path './DEBIAN/*' -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' md5sum) >"$1/DEBIAN/md5sums"
    dpkg-deb --root-owner-group -Zxz --build "$1" build/deb >/dev/null
}
