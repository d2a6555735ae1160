"""When a path between hosts is believed to carry less, and when to carry all again."""

from __future__ import annotations

from dataclasses import replace

from weft import topology
from weft.model import PROBE_VNI, Host, Network, Pool
from weft.probes.links import ProbeLink
from weft.probes.pathmtu import PathMtu

A, B, C = "a" * 32, "b" * 32, "c" * 32
HOSTS = {A, B, C}
LINK = ProbeLink(A, B, "plain", 1450, 1000.0, "r", 0.0, 0.0, 0.0, 1450)


class Measuring:
    """Every link is of another measurement."""

    def __init__(self) -> None:
        self.paths = PathMtu({"plain": 50, "encrypted": 110})
        self.number = 0

    def __call__(self, mtu: int | None, link: ProbeLink = LINK) -> int:
        self.number += 1
        return self.paths.take([replace(link, mtu=mtu, round=str(self.number))], HOSTS)


def test_less_is_believed_when_it_was_measured_twice_and_so_is_all() -> None:
    measure = Measuring()
    assert [measure(mtu) for mtu in (1450, 1350, 1350, 1350, 1450, 1450)] == [0, 0, 1400, 1400, 1400, 0]


def test_what_changes_with_each_measurement_changes_nothing() -> None:
    measure = Measuring()
    assert [measure(mtu) for mtu in (1450, 1350, 1450, 1340, 1330, 1450)] == [0] * 6
    assert [measure(mtu) for mtu in (1350, 1350, 1450, 1350, 1450, 1350)] == [0, *[1400] * 5]


def test_one_measurement_counts_once() -> None:
    paths = PathMtu({"plain": 50, "encrypted": 110})
    link = replace(LINK, mtu=1350)
    assert [paths.take([link], HOSTS) for _ in range(3)] == [0, 0, 0]


def test_what_was_lost_for_another_reason_is_no_size() -> None:
    """No answer at all, only tiny packets, corrupt ones."""
    measure = Measuring()
    assert [measure(mtu) for mtu in (None, None, 100, 100)] == [0] * 4
    assert [measure(1350, replace(LINK, corrupt=1)) for _ in range(2)] == [0, 0]


def test_the_narrowest_path_counts_until_its_host_is_gone() -> None:
    measure = Measuring()
    there = replace(LINK, sender=C, receiver=A, kind="encrypted", size=1390)
    for _ in range(2):
        measure(1350)
        found = measure(1230, there)
    assert found == 1340
    assert measure.paths.take([], {A, B}) == 1400
    assert measure.paths.take([], {A}) == 0


def network(vni: int = 5000, *, subnet: str = "10.77.0.0/24", mtu: int = 0, encrypted: bool = False) -> Network:
    return Network(vni, "app", (Pool(subnet),), mtu, False, "", encrypted=encrypted)


def test_networks_get_what_the_narrowest_path_carries() -> None:
    hosts = [Host(A, "h1", "192.0.2.1", mtu=1500), Host(B, "h2", "192.0.2.2", mtu=1500, path_mtu=1400)]
    assert topology.fitting_mtu(network(), hosts) == 1350
    assert topology.fitting_mtu(network(mtu=1450), hosts) == 1450
    # WireGuard fills up 1278 + 50 to no more than 1328, which is 83 * 16.
    assert topology.fitting_mtu(network(encrypted=True), hosts) == 1278
    assert topology.fitting_mtu(network(subnet="fd00::/64", encrypted=True), hosts) == 1280
    assert topology.fitting_mtu(topology.PROBE_NETWORKS[PROBE_VNI], hosts) == 1450
    assert topology.limit(hosts).mtu == 1450


def test_a_path_that_carries_more_than_the_hosts_changes_nothing() -> None:
    hosts = [Host(A, "h1", "192.0.2.1", mtu=1300, path_mtu=1400)]
    assert topology.fitting_mtu(network(), hosts) == 1250
