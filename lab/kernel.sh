#!/bin/sh
# Gets what `make test-kernel` boots: QEMU, and the kernel that Debian would install here, only unpacked and into
# build/kernel/RELEASE. Says nothing but that folder on stdout; or why there is no such kernel for this machine, and exits
# with 77.
set -eu
cd "$(dirname "$0")/.."
. lab/apt.sh
exec 3>&1 >&2
meta=linux-image-amd64
# Of the 400 MB of modules, those that a machine without a screen, sound or real network cards may need.
unwanted="*/kernel/sound */kernel/drivers/[!nv]* */kernel/drivers/net/ethernet */kernel/drivers/net/wireless"
# What the guest needs before it has this machine's files.
boot_modules="virtio_pci 9p 9pnet_virtio overlay"

skip() { echo "$*" >&3; exit 77; }
update() { as_root apt-get update -qq; }

# Such as linux-image-6.1.0-56-amd64.
kernel_package() {
    apt-cache depends "$meta" 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1
}

install_programs() {
    missing=
    has qemu-system-x86_64 || missing="$missing qemu-system-x86"
    has modprobe || missing="$missing kmod"
    has cpio || missing="$missing cpio"
    # shellcheck disable=SC2086 # one argument for each package
    [ -z "$missing" ] || { say "installing$missing"; apt_install $missing; }
}

unpack() {
    say "unpacking $package into build/kernel"
    new=build/kernel/new
    rm -rf "$new"
    mkdir -p "$new"
    download="apt-get download -qq -o APT::Sandbox::User=root $package"
    (cd "$new" && $download)
    deb=$(echo "$new"/*.deb)
    set -f # these are patterns for tar
    # shellcheck disable=SC2046,SC2086 # one argument for each
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$new" $(printf -- '--exclude=%s ' $unwanted)
    set +f
    rm "$deb"
    [ -d "$new/lib" ] || ln -s usr/lib "$new/lib" # since Debian 13
    depmod -b "$new" "$release"
    mv "$new/boot/vmlinuz-$release" "$new/vmlinuz"
    mv "$new" "$tree"
}

# Made at each run, as that takes no time and what is in it is part of the project.
make_initramfs() {
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    mkdir "$root/modules"
    cp "$(command -v busybox)" lab/guest/init "$root"
    for module in $boot_modules; do
        modprobe -d "$PWD/$tree" -S "$release" --show-depends "$module"
    done | while read -r _ file _; do
        grep -qsx "${file##*/}" "$root/modules/order" || echo "${file##*/}" >>"$root/modules/order"
        cp "$file" "$root/modules"
    done
    (cd "$root" && find . | cpio --quiet -o -H newc) | gzip -1 >"$tree/initramfs"
}

[ "$(uname -m)" = x86_64 ] || skip "the kernel to test on is emulated for x86_64, and this machine is $(uname -m)"
has apt-cache || skip "the kernel to test on is Debian's package $meta, and there is no apt here"
choose() {
    package=$(kernel_package)
    release=${package#linux-image-}
    tree=build/kernel/$release
}
choose
[ -n "$package" ] && [ -d "$tree" ] || { update; choose; } # what old lists name may be gone from the archive
[ -n "$package" ] || skip "the kernel to test on is Debian's package $meta, which apt does not find here"
install_programs
[ -d "$tree" ] || unpack
make_initramfs
echo "$PWD/$tree" >&3
