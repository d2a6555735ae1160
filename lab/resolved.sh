#!/bin/sh
# Prints where systemd-resolved is: the machine's own, or Debian's package, only unpacked and into build/resolved. To install
# that would make it the machine's resolver.
set -eu
cd "$(dirname "$0")/.."
. lab/apt.sh
tree=build/resolved

find_program() {
    for folder in /lib/systemd /usr/lib/systemd "$PWD/$tree/lib/systemd" "$PWD/$tree/usr/lib/systemd"; do
        [ ! -x "$folder/systemd-resolved" ] || { echo "$folder/systemd-resolved"; return; }
    done
    false
}

unpack() {
    rm -rf "$tree"
    mkdir -p "$tree"
    (cd "$tree" && apt-get download -qq -o APT::Sandbox::User=root systemd-resolved && dpkg-deb -x ./*.deb . && rm ./*.deb)
}

find_program && exit
has apt-get || die "please install systemd-resolved yourself, this is no Debian or Ubuntu"
say "unpacking systemd-resolved into $tree" >&2
unpack 2>/dev/null || { as_root apt-get update -qq && unpack; } >&2
find_program
