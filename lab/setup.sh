#!/bin/sh
# Installs what weft and its lab need on Debian or Ubuntu, and only what is missing. It may be run at any time.
# lab/setup.sh lab leaves out what only the tests and the benchmarks need, which is most of it.
# PYTHON=python3.12 chooses the Python that .venv is made with.
set -eu
cd "$(dirname "$0")/.."
. lab/apt.sh
python=${PYTHON:-python3}
purpose=${1:-tests}
case $purpose in
    lab) library=. ;;
    tests) library='.[test]' ;;
    *) die "there is only lab/setup.sh, or lab/setup.sh lab" ;;
esac
policy=/usr/sbin/policy-rc.d

# Lines of "program package".
programs() {
    cat <<-PROGRAMS
		dockerd docker.io
		ip iproute2
		iptables iptables
		nft nftables
		iperf3 iperf3
		tcpdump tcpdump
		wireguard-go wireguard-go
		nsenter util-linux
		make make
		$python $(basename "$python")
	PROGRAMS
    [ "$purpose" = lab ] || cat <<-PROGRAMS
		docker-compose docker-compose
		etcd etcd-server
		etcdctl etcd-client
		debootstrap debootstrap
		systemd-analyze systemd
		pgrep procps
		keepalived keepalived
		avahi-daemon avahi-daemon
		dnsmasq dnsmasq-base
		socat socat
		docker-registry docker-registry
		ufw ufw
		firewalld firewalld
		dbus-daemon dbus
		dnsperf dnsperf
		chromium chromium
	PROGRAMS
}

missing_packages() {
    programs | while read -r program package; do has "$program" || echo "$package"; done
    busybox --list 2>/dev/null | grep -qx httpd || echo busybox-static
    [ -x .venv/bin/python ] || "$python" -c 'import ensurepip' 2>/dev/null || echo "$(basename "$python")-venv"
}

# Of Docker, etcd and others only the programs are wanted. Their services must not start, now or at the next boot:
# Docker's would change the machine's own network.
forbid_services() {
    trap allow_services EXIT
    trap 'exit 130' INT TERM
    as_root sh -c "[ ! -e $policy ] || mv $policy $policy.before-weft
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy"
}

allow_services() {
    as_root sh -c "rm -f $policy; [ ! -e $policy.before-weft ] || mv $policy.before-weft $policy"
}

disable() {
    if has systemctl; then as_root systemctl --quiet disable "$@"; fi
}

install_docker() {
    apt_install docker.io
    has docker || apt_install docker-cli # a package of its own since Debian 13
    disable docker.service docker.socket containerd.service
}

install_etcd() {
    apt_install etcd-server
    disable etcd.service
}

install_registry() {
    apt_install docker-registry
    disable docker-registry.service
}

install_packages() {
    has apt-get || die "please install these yourself, this is no Debian or Ubuntu: $*"
    say "installing $*"
    as_root apt-get update -qq
    forbid_services
    case " $* " in *" docker.io "*) install_docker ;; esac
    case " $* " in *" etcd-server "*) install_etcd ;; esac
    case " $* " in *" docker-registry "*) install_registry ;; esac
    apt_install "$@"
    case " $* " in *" keepalived "*) disable keepalived.service ;; esac
    case " $* " in *" ufw "*) disable ufw.service ;; esac
    case " $* " in *" firewalld "*) disable firewalld.service ;; esac
    case " $* " in *" avahi-daemon "*) disable avahi-daemon.service avahi-daemon.socket ;; esac
}

check_python() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "weft needs Python 3.11 or newer, and $python is $("$python" -V); name another: PYTHON=python3.12 $0"
}

is_done() {
    [ ".venv/.setup-$1" -nt setup.cfg ] && [ ".venv/.setup-$1" -nt lab/setup.sh ]
}

if is_done tests || is_done "$purpose"; then exit 0; fi
! has "$python" || check_python
packages=$(missing_packages)
# shellcheck disable=SC2086 # one argument for each package
[ -z "$packages" ] || install_packages $packages
check_python
[ -x .venv/bin/python ] || "$python" -m venv .venv
say "installing weft and its libraries into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$library"
touch ".venv/.setup-$purpose"
say "done"
