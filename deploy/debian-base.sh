#!/bin/sh
# Makes a base for the Dockerfile without a registry: a Debian (or Ubuntu) of this machine's release with Python and nft.
# It prints the tar file's name, for `docker import`; a second run finds it in place. Needs root.
set -eu
cd "$(dirname "$0")/.."
. /etc/os-release
base=build/base-$VERSION_CODENAME.tar
if [ ! -e "$base" ]; then
    components=main
    [ "$ID" != ubuntu ] || components=main,universe
    mkdir -p build
    root=$(mktemp -d -p build) # /tmp may be in memory, and without device files
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --components=$components --include=python3-pip,python3-venv,nftables \
        "$VERSION_CODENAME" "$root" >&2
    tar -C "$root" --exclude=./var/cache --exclude=./var/lib/apt --exclude=./usr/share/doc --exclude=./usr/share/locale \
        -cf "$base.new" .
    mv "$base.new" "$base"
fi
echo "$base"
