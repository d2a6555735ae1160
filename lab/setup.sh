#!/bin/sh
# Installs what weft and its lab need on Debian or Ubuntu, and only what is missing. It may be run at any time.
# PYTHON=python3.12 chooses the Python that .venv is made with.
set -eu
cd "$(dirname "$0")/.."
. lab/apt.sh
python=${PYTHON:-python3}
stamp=.venv/.setup-done
policy=/usr/sbin/policy-rc.d

# The table is "program package".
missing_packages() {
    while read -r program package; do has "$program" || echo "$package"; done <<-PROGRAMS
		dockerd docker.io
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
		ip iproute2
		iptables iptables
		nft nftables
		ufw ufw
		firewalld firewalld
		dbus-daemon dbus
		iperf3 iperf3
		dnsperf dnsperf
		tcpdump tcpdump
		wireguard-go wireguard-go
		nsenter util-linux
		make make
		chromium chromium
		$python $(basename "$python")
	PROGRAMS
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

[ ! "$stamp" -nt setup.cfg ] || [ ! "$stamp" -nt lab/setup.sh ] || exit 0
! has "$python" || check_python
packages=$(missing_packages)
# shellcheck disable=SC2086 # one argument for each package
[ -z "$packages" ] || install_packages $packages
check_python
[ -x .venv/bin/python ] || "$python" -m venv .venv
say "installing weft and its tests' libraries into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
touch "$stamp"
say "done"
