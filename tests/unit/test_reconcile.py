"""Plans are minimal, sorted, and empty once they were applied."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeKernel
from weft.dataplane import FLOOD_MAC, Bridge, Fdb, Link, Neighbour, Port, Row, Station, Vxlan
from weft.reconcile import Create, ObservedLink, Remove, Update, plan_links, plan_rows

BRIDGE = Bridge("br1", 1450)
TUNNEL = Vxlan("vx1", 1, "192.168.1.1", 4789, 1450, "br1")
PORT = Port("wp1", "br1", 1450, peer="wc1", mac="02:00:00:00:00:01")
MAC = bytes.fromhex("02420a010002")
HERE, THERE = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])


def seen(*links: Link, **faults: str) -> dict[str, ObservedLink]:
    return {link.name: ObservedLink(link, tuple(filter(None, [faults.get(link.name, "")]))) for link in links}


def test_bridges_are_made_before_what_they_hold() -> None:
    steps = plan_links([PORT, TUNNEL, BRIDGE], {})
    assert steps == [Create(BRIDGE), Create(TUNNEL), Create(PORT)]


def test_what_is_there_needs_nothing() -> None:
    assert plan_links([PORT, TUNNEL, BRIDGE], seen(PORT, TUNNEL, BRIDGE)) == []


def test_a_change_in_place_names_its_reasons() -> None:
    wrong = Port("wp1", "", 1400)
    assert plan_links([BRIDGE, PORT], seen(BRIDGE, wrong, wp1="down")) == [
        Update(PORT, "mtu is 1400, bridge is none, down")
    ]


def test_what_cannot_be_changed_is_made_anew_with_the_reason() -> None:
    moved = Vxlan("vx1", 1, "192.168.1.9", 4789, 1450, "br1")
    reason = "local is 192.168.1.9, not 192.168.1.1"
    assert plan_links([BRIDGE, TUNNEL], seen(BRIDGE, moved)) == [Remove("vx1", reason), Create(TUNNEL, reason)]
    assert plan_links([TUNNEL], seen(Port("vx1", "br1", 1450)))[0] == Remove("vx1", "is a port")


def test_what_is_not_wanted_goes_first() -> None:
    assert plan_links([BRIDGE], seen(Port("stray", "", 1500)))[0] == Remove("stray", "not wanted")


def test_a_moved_mac_is_put_over_and_only_its_old_tunnel_entry_deleted() -> None:
    old: set[Row] = {Fdb("vx1", MAC, HERE), Station("vx1", MAC), Neighbour("br1", b"\n\0\0\5", MAC)}
    new: set[Row] = {Fdb("vx1", MAC, THERE), Station("vx1", MAC), Neighbour("br1", b"\n\0\0\5", MAC)}
    plan = plan_rows(new, old)
    assert plan.put == (Fdb("vx1", MAC, THERE),)
    assert plan.delete == (Fdb("vx1", MAC, HERE),)


def test_a_neighbour_whose_mac_changes_is_only_put() -> None:
    plan = plan_rows({Neighbour("br1", b"\n\0\0\5", MAC)}, {Neighbour("br1", b"\n\0\0\5", bytes(6))})
    assert (len(plan.put), len(plan.delete)) == (1, 0)


def test_flood_entries_share_a_mac_and_are_apart() -> None:
    plan = plan_rows({Fdb("vx1", FLOOD_MAC, HERE)}, {Fdb("vx1", FLOOD_MAC, THERE)})
    assert plan.put == (Fdb("vx1", FLOOD_MAC, HERE),)
    assert plan.delete == (Fdb("vx1", FLOOD_MAC, THERE),)


MACS = st.sampled_from([FLOOD_MAC, MAC, b"\2\0\0\0\0\1"])
VTEPS = st.sampled_from([HERE, THERE])
ROWS = st.one_of(
    st.builds(Fdb, st.just("vx1"), MACS, VTEPS),
    st.builds(Station, st.just("vx1"), MACS),
    st.builds(Neighbour, st.just("br1"), VTEPS, MACS),
)


def one_per_key(rows: set[Row]) -> set[Row]:
    return set({row.key: row for row in sorted(rows, key=str)}.values())


@settings(deadline=None, derandomize=True)
@given(st.sets(ROWS).map(one_per_key), st.sets(ROWS).map(one_per_key))
def test_any_rows_become_any_others_and_then_nothing_is_left_to_do(desired: set[Row], observed: set[Row]) -> None:
    kernel = FakeKernel()
    kernel.links = {"br1": BRIDGE, "vx1": TUNNEL}
    kernel.rows = set(observed)
    kernel.write_rows(plan_rows(desired, observed))
    assert kernel.rows == desired
    assert not plan_rows(desired, kernel.rows)
