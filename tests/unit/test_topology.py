"""Names of devices: fit for the kernel, and never one for two."""

from __future__ import annotations

import random
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeKernel
from tests.unit.conftest import FakeHost
from weft.dataplane import bridge_name, device_names, vni_of, vxlan_name
from weft.errors import Conflict
from weft.model import VNI_MAX
from weft.store.sqlite import SqliteStore
from weft.topology import is_port_name, peer_name, port_name

CIDRS = ["10.1.0.0/24", "10.2.0.0/24"]
INTERFACE = re.compile(r"[a-z0-9]{1,15}")
"""What the kernel takes for a name at most (IFNAMSIZ), and what nobody has to quote."""

vnis = st.integers(1, VNI_MAX)
engine_ids = st.text("0123456789abcdef", min_size=64, max_size=64)
ids = engine_ids | st.text(min_size=1, max_size=80)
rivals = st.builds(lambda short, rest: short + rest, st.sampled_from("ab").map(lambda c: c * 12), engine_ids).map(
    lambda text: text[:64]
)
"""Ids of the engine of which many begin alike."""


@given(one=vnis, other=vnis)
def test_networks_share_no_device(one: int, other: int) -> None:
    assert all(INTERFACE.fullmatch(name) and not is_port_name(name) for name in device_names(one))
    assert vni_of(bridge_name(one)) == vni_of(vxlan_name(one)) == one
    assert (one == other) or not set(device_names(one)) & set(device_names(other))


@given(one=ids)
def test_the_ends_of_a_veth_are_told_from_all_else(one: str) -> None:
    host_end, container_end = port_name(one), peer_name(one)
    assert INTERFACE.fullmatch(host_end)
    assert INTERFACE.fullmatch(container_end)
    assert vni_of(host_end) is vni_of(container_end) is None
    assert is_port_name(host_end)
    assert not is_port_name(container_end)


def test_a_hundred_thousand_endpoints_share_no_port() -> None:
    rng = random.Random(4)
    assert len({port_name(f"{rng.getrandbits(256):064x}") for _ in range(100_000)}) == 100_000


@settings(max_examples=25, deadline=None, derandomize=True)
@given(steps=st.lists(st.tuples(rivals, st.sampled_from([0, 1]), st.booleans()), min_size=2, max_size=12))
def test_two_containers_never_have_one_device(steps: list[tuple[str, int, bool]]) -> None:
    """Whatever comes and goes in whichever network: who is refused leaves nothing, and takes nothing along."""
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "weft.db")
        host = FakeHost(store, 1, FakeKernel())
        vnis = [host.create_network(f"n{index}", cidr).vni for index, cidr in enumerate(CIDRS)]
        holders: dict[str, tuple[str, int]] = {}
        for endpoint, network, stays in steps:
            holder = holders.setdefault(port_name(endpoint), (endpoint, network))
            if holder[0] == endpoint and not (holder[1] == network and stays):
                host.driver.delete_endpoint(f"n{holder[1]}", endpoint)
                del holders[port_name(endpoint)]
            elif holder[0] == endpoint:
                if host.driver._attachments.attached(endpoint) is None:
                    host.run(f"n{network}", endpoint, CIDRS[network])
            else:
                with pytest.raises(Conflict, match="start the container again"):
                    host.run(f"n{network}", endpoint, CIDRS[network])
                host.driver.delete_endpoint(f"n{network}", endpoint)  # what an engine may send after the refusal
            host.cluster.load(store.list("topology/").entries)
            host.agent.resync()
            ports = {name: link.bridge for name, link in host.kernel.links.items() if is_port_name(name)}  # type: ignore[union-attr]
            assert ports == {name: bridge_name(vnis[n]) for name, (_, n) in holders.items()}
            recorded = {key.rsplit("/", 1)[1] for key in (e.key for e in store.list("topology/endpoints/").entries)}
            assert recorded == {endpoint for endpoint, _ in holders.values()}
        store.close()
