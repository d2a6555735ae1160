"""The IP network under the hosts: a switch in a network namespace of its own, one cable to each host.

The switch is not in the machine's own namespace, where the iptables rules of a Docker (FORWARD DROP, with
br_netfilter) would filter it. Its address is the hosts' default gateway and resolver. Behind it is
nothing, and it says so at once.
"""

import sys
from collections.abc import Iterable
from itertools import permutations

from lab import resolver
from lab.namespaces import Namespaces
from lab.plan import Plan
from lab.process import run, spawn, wait_until

_SWITCH = """
ip link set lo up
ip link add switch type bridge
ip addr add "$0" dev switch
ip link set switch up
echo 1 > /proc/sys/net/ipv4/ip_forward
for call in /proc/sys/net/bridge/bridge-nf-call-*; do [ ! -e "$call" ] || echo 0 > "$call"; done
nft -f - <<END
table bridge lab {
    set parted { type ether_addr . ether_addr; }
    set blocked { type ether_addr . ether_addr . inet_service; }
    chain forward {
        type filter hook forward priority 0;
        ether type { ip, ip6 } ether saddr . ether daddr @parted drop
        ether type ip meta l4proto udp ether saddr . ether daddr . udp dport @blocked drop
    }
}
END
"""
# An address that is still being checked for duplicates (IPv6) cannot be used yet.
_CABLE = """
ip link set lo up
echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad || true
ip link set eth0 up
"""
_ADDRESS = """
ip addr flush dev eth0 scope global
ip addr add "$0" dev eth0
ip route replace default via "$1"
"""

_ROUTER = """
for family in ipv4 ipv6; do echo 1 > /proc/sys/net/$family/conf/all/forwarding; done
for link in all switch; do echo 0 > /proc/sys/net/ipv4/conf/$link/send_redirects; done
ip route replace "$0" dev switch mtu "$1"
"""
_ROUTE = """
for link in all eth0; do echo 0 > /proc/sys/net/ipv6/conf/$link/accept_redirects; done
ip route replace "$0" via "$1" dev eth0
"""


class Underlay(Namespaces):
    def __init__(self, plan: Plan) -> None:
        super().__init__(f"{plan.name}/switch", plan.runtime / "switch")
        self._plan = plan

    def create(self) -> None:
        super().create()
        self.run(["sh", "-ec", _SWITCH, self._with_prefix(self._plan.gateway)])
        server = [sys.executable, resolver.__file__, self._plan.gateway]
        spawn(self.enter(["setsid", "--fork", *server]), log=self._plan.runtime / "resolver.log")

    def plug_in(self, host: Namespaces, index: int, address: str) -> None:
        """The card's own address never changes, so that a host is no stranger when it comes back."""
        self.unplug(index)
        mtu = ["mtu", str(self._plan.mtu)]
        card = ["name", "eth0", "address", _mac(index), *mtu, "netns", str(host.pid)]
        self._ip_link("add", f"port{index}", *mtu, "type", "veth", "peer", *card)
        self.set_port(index, "master", "switch")
        host.run(["sh", "-ec", _CABLE])
        self.readdress(host, address)
        self.connect(host, index, True)

    def readdress(self, host: Namespaces, address: str) -> None:
        host.run(["sh", "-ec", _ADDRESS, self._with_prefix(address), self._plan.gateway])

    def unplug(self, index: int) -> None:
        """At once, both ends: the kernel removes those of a dead namespace only some time later."""
        self._ip_link("del", f"port{index}", check=False)

    def connect(self, host: Namespaces, index: int, connected: bool) -> None:
        """Returns when both ends have noticed, for which the kernel takes up to a second."""
        self.set_port(index, "up" if connected else "down")
        show_port = self._in_switch("bridge", "link", "show", "dev", f"port{index}")
        card = host.root / "sys/class/net/eth0/operstate"
        wait_until(lambda: ("state forwarding" in run(show_port)) == connected, f"port{index} of the switch")
        wait_until(lambda: (card.read_text() == "up\n") == connected, f"carrier of eth0 on {host.name}")

    def part(self, index: int, others: Iterable[int]) -> None:
        """The switch drops IP between these ports, by cards and not by addresses, which may change."""
        self._change_parted("add", index, others)

    def join(self, index: int, others: Iterable[int]) -> None:
        self._change_parted("add", index, others)  # deleting what is not there is an error
        self._change_parted("delete", index, others)

    def block(self, index: int, other: int, port: int) -> None:
        """The switch drops a UDP port from one to the other, and not back."""
        element = f"{_mac(index)} . {_mac(other)} . {port}"
        run(self._in_switch("nft", f"add element bridge lab blocked {{ {element} }}"))

    def mend(self) -> None:
        run(self._in_switch("nft", "flush set bridge lab parted; flush set bridge lab blocked"))

    def _change_parted(self, verb: str, index: int, others: Iterable[int]) -> None:
        pairs = [pair for other in others for pair in permutations((_mac(index), _mac(other)))]
        elements = ", ".join(" . ".join(pair) for pair in pairs)
        run(self._in_switch("nft", f"{verb} element bridge lab parted {{ {elements} }}"))

    def route(self, host: Namespaces, destination: str, mtu: int) -> None:
        """From the host by way of the switch, then a router whose next link carries no more than `mtu`. It says so to
        those who forbid fragments; nobody is redirected to the shorter way."""
        self.run(["sh", "-ec", _ROUTER, destination, str(mtu)])
        host.run(["sh", "-ec", _ROUTE, destination, self._plan.gateway])

    def unroute(self, host: Namespaces, destination: str) -> None:
        for machine in (self, host):
            machine.run(["ip", "route", "del", destination])

    def set_port(self, index: int, *settings: str) -> None:
        self._ip_link("set", f"port{index}", *settings)

    def _ip_link(self, *args: str, check: bool = True) -> None:
        run(self._in_switch("ip", "link", *args), check=check)

    def _in_switch(self, *argv: str) -> list[str]:
        """In its network namespace alone: a host's pid means nothing in the switch's PID namespace."""
        return ["nsenter", "-t", str(self.pid), "-n", "--", *argv]

    def _with_prefix(self, address: str) -> str:
        return f"{address}/{self._plan.network.prefixlen}"


def _mac(index: int) -> str:
    return f"02:78:00:00:00:{index:02x}"
