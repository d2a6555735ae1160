"""A host's own firewall, as its administrator may have it: ufw, and firewalld with the system bus that it needs.

Both find what they write in the host's own /etc and /run, and filter in its own network. Docker joins a firewalld that
runs when it starts, and not a later one.
"""

from collections.abc import Mapping

from lab.host import Host
from lab.process import wait_until

# Debian's firewalld logs to a file of the machine's otherwise.
_FIREWALLD = """
mkdir -p /run/dbus
dbus-daemon --system --fork
setsid --fork firewalld --nofork --log-target=console > /run/firewalld.log 2>&1 < /dev/null
"""


_BASE = """
map filter-forward-in-jumps {{
    type ifname : verdict
    elements = {{ {filter_forward_in} }}
}}
map filter-forward-out-jumps {{
    type ifname : verdict
    elements = {{ {filter_forward_out} }}
}}
map nat-postrouting-out-jumps {{
    type ifname : verdict
    elements = {{ {nat_postrouting_out} }}
}}
chain filter-FORWARD {{
    type filter hook forward priority filter; policy accept;
    oifname vmap @filter-forward-in-jumps
    iifname vmap @filter-forward-out-jumps
}}
chain raw-PREROUTING {{
    type filter hook prerouting priority raw; policy accept;
}}
chain nat-prerouting-and-output {{
}}
chain nat-PREROUTING {{
    type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local counter jump nat-prerouting-and-output
}}
chain nat-OUTPUT {{
    type nat hook output priority -100; policy accept;
    ip daddr != 127.0.0.0/8 fib daddr type local counter jump nat-prerouting-and-output
}}
chain nat-POSTROUTING {{
    type nat hook postrouting priority srcnat; policy accept;
    iifname vmap @nat-postrouting-out-jumps
}}
"""
_OF_BRIDGE = """
chain filter-forward-in__{bridge} {{
    ct state established,related counter accept
    iifname "{bridge}" counter {icc}
    counter drop
}}
chain filter-forward-out__{bridge} {{
    ct state established,related counter accept
    counter accept
}}
chain nat-postrouting-out__{bridge} {{
    oifname != "{bridge}" ip saddr {subnet} counter masquerade
}}
"""


def replace_docker_rules(host: Host, bridges: Mapping[str, str]) -> None:
    """What Engine 29 makes with `firewall-backend: nftables`, for the IPv4 subnets of its bridges.

    The engine is started anew and makes none itself. Source of their form: moby's documentation of its nftables,
    integration/network/bridge/nftablesdoc.
    """
    host.stop_engine()
    host.engine_options["iptables"] = False
    for family, table in (("ip", "filter"), ("ip", "nat"), ("ip6", "filter"), ("ip6", "nat")):
        host.run("nft", f"add table {family} {table}; delete table {family} {table}")
    rules = [
        _OF_BRIDGE.format(bridge=bridge, subnet=subnet, icc="drop" if bridge == "docker_gwbridge" else "accept")
        for bridge, subnet in bridges.items()
    ]
    chains = ("filter-forward-in", "filter-forward-out", "nat-postrouting-out")
    jumps = {c.replace("-", "_"): ", ".join(f'"{b}" : jump {c}__{b}' for b in bridges) for c in chains}
    host.write("run/docker-bridges.nft", f"table ip docker-bridges {{{''.join(rules)}{_BASE.format(**jumps)}}}\n")
    host.run("nft", "-f", "/run/docker-bridges.nft")
    host.start_engine()


def use_legacy_iptables(host: Host) -> None:
    """The kernel's older ones, as an administrator may choose by update-alternatives. The engine is started anew."""
    host.stop_engine()
    for program in ("iptables", "ip6tables"):
        host.run("ln", "-sf", f"/usr/sbin/{program}-legacy", f"/etc/alternatives/{program}")
        for tool in ("save", "restore"):
            host.run("ln", "-sf", f"/usr/sbin/{program}-legacy-{tool}", f"/etc/alternatives/{program}-{tool}")
    for family, table in (("ip", "filter"), ("ip", "nat"), ("ip6", "filter"), ("ip6", "nat")):
        host.run("nft", f"add table {family} {table}; delete table {family} {table}")
    host.start_engine()


def enable_ufw(host: Host) -> None:
    """With its defaults: nothing may come in."""
    host.run("ufw", "--force", "enable")


def disable_ufw(host: Host) -> None:
    host.run("ufw", "disable")


def start_firewalld(host: Host) -> None:
    """With its default zone, `public`, where eth0 is put, as NetworkManager would. The engine is started anew."""
    host.stop_engine()
    host.run("sh", "-ec", _FIREWALLD)
    wait_until(
        lambda: host.run("firewall-cmd", "--state", check=False) == "running", f"firewalld on {host.name}", timeout=30
    )
    host.run("firewall-cmd", "--zone=public", "--change-interface=eth0")
    host.start_engine()


def stop_firewalld(host: Host) -> None:
    """Docker's rules end with it, as far as it has seen them."""
    host.run("sh", "-c", 'kill "$(cat /run/firewalld.pid)"')
    wait_until(lambda: "firewalld" not in host.run("nft", "list", "tables"), f"end of firewalld on {host.name}")
