"""Tables of rows as chance has them, one put over the other.

Not in `test_rows`, of which a part runs by emulation: that would take seconds to import Hypothesis.
"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.netns.test_rows import DEVICES
from tests.netns.world import Host
from weft.dataplane import FLOOD_MAC, Fdb, Neighbour, Row, Station, pack_address, pack_mac

_MACS = st.sampled_from([FLOOD_MAC, *(pack_mac(f"02:42:0a:00:00:0{n}") for n in range(4))])
_VTEPS = st.sampled_from([pack_address(f"192.0.2.{n}") for n in range(2, 5)])
_ADDRESSES = st.sampled_from([pack_address(text) for text in ("10.0.0.2", "10.0.0.3", "fd00::2", "fd00::3")])
_OWNERS = _MACS.filter(lambda mac: mac != FLOOD_MAC)
_ROWS = st.one_of(
    st.builds(Fdb, st.just("vx7"), _MACS, _VTEPS),
    st.builds(Station, st.just("vx7"), _OWNERS, st.just(False)),
    st.builds(Neighbour, st.just("br7"), _ADDRESSES, _OWNERS),
)
_TABLES = st.lists(_ROWS, unique_by=lambda row: row.key).map(set)


@given(before=_TABLES, after=_TABLES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_put_over_any_others_end_in_exactly_those(host: Host, before: set[Row], after: set[Row]) -> None:
    host.apply(*host.network(7))
    host.set_rows(before, *DEVICES)
    host.set_rows(after, *DEVICES)
    assert host.observe(*DEVICES) == after
    assert not host.set_rows(after, *DEVICES)
