"""What is read of the host's own network."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network

import pytest

from tests.netns.world import Host, World
from weft.errors import ConfigError, KernelError


@pytest.fixture
def host(world: World) -> Host:
    """A host with two interfaces, both IP versions, and a default route by the second one."""
    made = world.host("192.0.2.1/24")
    made.ip("link add eth1 type veth peer name cable1")
    made.ip("link set cable1 up")
    made.ip("link set eth1 mtu 9000 up")
    for address in ("198.51.100.1/24", "198.51.100.2/24", "203.0.113.1/24", "2001:db8:1::1/64 nodad"):
        made.ip(f"addr add {address} dev eth1")
    made.ip("addr add 2001:db8::1/64 dev eth0 nodad")
    made.ip("route add default via 203.0.113.254")
    return made


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        ("", "203.0.113.1"),
        ("eth0", "192.0.2.1"),
        ("eth1", "198.51.100.1"),
        ("198.51.100.2", "198.51.100.2"),
        ("2001:db8:1::1", "2001:db8:1::1"),
        ("198.51.100.0/24", "198.51.100.1"),
        ("2001:db8::/64", "2001:db8::1"),
        ("0.0.0.0/0", "192.0.2.1"),
    ],
)
def test_setting_means_an_address(host: Host, spec: str, address: str) -> None:
    assert host.kernel.underlay_address(spec) == address


@pytest.mark.parametrize("spec", ["eth7", "192.0.2.2", "10.0.0.0/8", "fe80::/10", "127.0.0.1"])
def test_setting_that_means_no_address_names_the_candidates(host: Host, spec: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        host.kernel.underlay_address(spec)
    assert str(wrong.value) == (
        f"WEFT_UNDERLAY={spec} is none of this host's; set WEFT_UNDERLAY to an interface, an address or a CIDR of: "
        "192.0.2.1 (eth0), 198.51.100.1 (eth1), 203.0.113.1 (eth1), 198.51.100.2 (eth1), "
        "2001:db8::1 (eth0), 2001:db8:1::1 (eth1)"
    )


@pytest.mark.parametrize(
    ("pool", "route"),
    [
        ("198.51.0.0/16", "198.51.100.0/24 dev eth1"),
        ("203.0.113.128/25", "203.0.113.0/24 dev eth1"),
        ("10.9.0.0/16", "10.9.8.0/24"),
        ("10.7.0.0/16", "10.7.0.0/16 dev eth0"),
        ("100.64.0.0/10", "100.64.3.2/32 dev eth1"),
        ("172.16.0.0/12", ""),
    ],
)
def test_a_route_within_a_pool(host: Host, pool: str, route: str) -> None:
    """In whatever table, as VPNs have theirs, but not the default route."""
    host.ip("route add blackhole 10.9.8.0/24")
    host.ip("route add 10.7.0.0/16 nexthop via 192.0.2.254 nexthop via 203.0.113.254")
    host.ip("route add 100.64.3.2 dev eth1 table 52")
    assert host.kernel.route_within(ip_network(pool)) == route


def test_default_route_may_name_its_source(host: Host) -> None:
    host.ip("route replace default via 203.0.113.254 src 198.51.100.2")
    assert host.kernel.underlay_address("") == "198.51.100.2"


def test_the_route_to_other_hosts_or_the_store_comes_before_the_default_route(host: Host) -> None:
    """As `weft serve` asks: first where the others are, then where the store is."""
    assert host.kernel.underlay_address("", towards=["192.0.2.9"]) == "192.0.2.1"
    host.ip("route add 198.18.0.0/24 via 192.0.2.254")
    assert host.kernel.underlay_address("", towards=["198.18.0.9", "203.0.113.9"]) == "192.0.2.1"
    assert host.kernel.underlay_address("", towards=["203.0.113.9", "198.18.0.9"]) == "203.0.113.1"
    host.ip("route add unreachable 198.18.1.0/24")
    assert host.kernel.underlay_address("", towards=["198.18.1.9", "198.18.0.9"]) == "192.0.2.1"
    assert host.kernel.underlay_address("", towards=["127.0.0.1", "192.0.2.1"]) == "203.0.113.1"  # itself: no way out
    assert host.kernel.underlay_address("", towards=["192.0.2.9", "2001:db8::9"], family=6) == "2001:db8::1"
    assert host.kernel.underlay_address("eth1", towards=["192.0.2.9"]) == "198.51.100.1"
    assert host.kernel.underlay_address("", towards=["192.0.2.9"], present="203.0.113.1") == "203.0.113.1"


def test_no_more_destinations_are_read_than_are_needed(host: Host) -> None:
    """To resolve the next one may take half a minute."""

    def towards(*known: str) -> Iterator[str]:
        yield from known
        pytest.fail("the next one was asked for")

    assert host.kernel.underlay_address("", towards=towards("192.0.2.9")) == "192.0.2.1"
    assert host.kernel.underlay_address("", towards=towards(), present="203.0.113.1") == "203.0.113.1"
    assert host.kernel.underlay_address("eth1", towards=towards()) == "198.51.100.1"


def test_better_default_route_wins(host: Host) -> None:
    host.ip("route del default")
    host.ip("route add default via 203.0.113.254 metric 100")
    host.ip("route add default via 192.0.2.254 metric 50")
    assert host.kernel.underlay_address("") == "192.0.2.1"


def test_default_route_over_several_paths(host: Host) -> None:
    host.ip("route replace default nexthop via 192.0.2.254 nexthop via 203.0.113.254")
    assert host.kernel.underlay_address("") == "192.0.2.1"


def test_default_route_of_ipv6_only(host: Host) -> None:
    host.ip("route del default")
    host.ip("route add default via 2001:db8::fe")
    assert host.kernel.underlay_address("") == "2001:db8::1"


def test_an_address_of_one_family(host: Host) -> None:
    assert host.kernel.underlay_address("", family=4) == "203.0.113.1"
    host.ip("route add default via 2001:db8::fe")
    assert host.kernel.underlay_address("", family=6) == "2001:db8::1"
    assert host.kernel.underlay_address("eth0", family=6, present="192.0.2.1") == "2001:db8::1"
    with pytest.raises(ConfigError, match=r"192.0.2.1 is none of this host's for IPv6; set .* 2001:db8::1"):
        host.kernel.underlay_address("192.0.2.1", family=6)


def test_no_default_route(host: Host) -> None:
    host.ip("route del default")
    with pytest.raises(ConfigError, match=r"this host has no default route; set WEFT_UNDERLAY .* 192.0.2.1 \(eth0\)"):
        host.kernel.underlay_address("")


def test_mtu_is_of_the_interface_that_holds_the_address(host: Host) -> None:
    assert host.kernel.underlay_mtu("192.0.2.1") == 1500
    assert host.kernel.underlay_mtu("2001:db8:1::1") == 9000
    with pytest.raises(KernelError, match=r"underlay address 192\.0\.2\.77: Cannot assign"):
        host.kernel.underlay_mtu("192.0.2.77")


def test_mtu_of_a_route_counts_if_it_is_less(host: Host) -> None:
    host.ip("route add 10.9.0.0/16 via 192.0.2.254 mtu 1380")
    host.ip("route add 10.9.1.0/24 dev eth1")
    mtu = host.kernel.underlay_mtu
    assert mtu("192.0.2.1", ["192.0.2.7", "10.9.1.7"]) == 1500
    assert mtu("192.0.2.1", ["192.0.2.7", "10.9.0.7"]) == 1380
    assert mtu("203.0.113.1", ["192.0.2.7"]) == 1500
    host.ip("route del default")
    assert mtu("192.0.2.1", ["8.8.8.8"]) == 1500


def test_mtu_of_an_address_on_the_loopback_is_the_default_routes(host: Host) -> None:
    host.ip("addr add 192.0.2.200/32 dev lo")
    assert host.kernel.underlay_mtu("192.0.2.200") == 9000


def test_routes_of_all_tables_but_the_default_ones(host: Host) -> None:
    host.ip("route add 10.1.0.0/16 via 192.0.2.254")
    host.ip("route add 10.2.0.0/16 dev eth0 table 52")
    host.ip("route add blackhole 10.3.0.0/16")
    host.ip("route add 2001:db8:9::/48 via 2001:db8::fe")

    expected = "10.1.0.0/16 10.2.0.0/16 10.3.0.0/16 192.0.2.0/24 198.51.100.0/24 203.0.113.0/24"
    expected6 = "2001:db8::/64 2001:db8:1::/64 2001:db8:9::/48"
    assert host.kernel.routes() == [ip_network(cidr) for cidr in f"{expected} {expected6}".split()]
