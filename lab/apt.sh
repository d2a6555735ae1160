# What lab/setup.sh and lab/kernel.sh share; sourced by them.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "setup: $*"; }
die() { say "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif has sudo; then sudo "$@"
    else die "this needs root, and there is no sudo: $*"
    fi
}

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}
