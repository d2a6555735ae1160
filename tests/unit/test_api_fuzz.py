"""The API under fire: arbitrary bytes, arbitrary JSON, and conversations with an engine that has gone astray.

Whatever comes, the answer is JSON and never a bug's, a refusal changes nothing, and once the engine has deleted what
it made, nothing is left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from tests.fakes import FakeKernel, OpenGate
from tests.unit.conftest import FakeHost
from weft.api import MAX_BODY, create_app
from weft.dataplane import Port
from weft.errors import KernelError
from weft.ipam import GLOBAL_SPACE, LOCAL_SPACE
from weft.model import ADDRESSES, PENDING, TOPOLOGY
from weft.names.sandboxes import ResolverRoutes
from weft.store.sqlite import SqliteStore


def bounded(examples: int) -> settings:
    """The same examples every time, reported as they come: shrinking a conversation takes minutes."""
    checks = list(HealthCheck)
    return settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=examples,
        phases=[Phase.generate],
        suppress_health_check=checks,
    )


GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}
NETWORK_CALLS = """
    GetCapabilities GwAllocCheck AllocateNetwork FreeNetwork CreateNetwork DeleteNetwork CreateEndpoint DeleteEndpoint
    EndpointOperInfo Join Leave DiscoverNew DiscoverDelete ProgramExternalConnectivity RevokeExternalConnectivity
"""
IPAM_CALLS = "GetCapabilities GetDefaultAddressSpaces RequestPool ReleasePool RequestAddress ReleaseAddress"
FIELDS = """
    NetworkID EndpointID Interface Options IPv4Data IPv6Data Pool SubPool PoolID Address AddressSpace V6 Gateway
    AuxAddresses MacAddress AddressIPv6 RequestAddressType com.docker.network.generic
"""


class Engine:
    """A Docker Engine that calls one host's API, judges every answer, and remembers what it was given."""

    def __init__(self, host: FakeHost, client: FlaskClient) -> None:
        self._host = host
        self._client = client
        self._faults = 0
        self._given: dict[str, list[Any]] = {"pools": [], "addresses": [], "networks": [], "endpoints": []}

    def send(self, path: str, body: bytes, method: str = "POST") -> dict[str, Any] | None:
        """The answer, or None if it was a refusal."""
        before = self.state()
        response = self._client.open(path, method=method, data=body)
        answer = judge(response)
        if response.status_code == 200 and not answer.get("Err"):
            return answer
        after = self.state()
        if self._faults:
            before, after = essence(before), essence(after)
        # A delete goes as far as it can, since the engine forgets the object in any case.
        assert after == before or (self._faults and "Driver.Delete" in path)
        return None

    def fail(self, method: str) -> None:
        """Let the kernel refuse one thing from now on."""
        self._faults += 1
        self._host.kernel.fail(method)

    def call(self, name: str, body: Any) -> None:
        """Send a call, in plain JSON with text as it is, and note what it made."""
        answer = self.send(f"/{name}", json.dumps(body).encode() + b"\n")
        if answer is None or not isinstance(body, dict):
            return
        match name.partition(".")[2]:
            case "RequestPool":
                self._given["pools"].append(answer["PoolID"])
            case "RequestAddress":
                self._given["addresses"].append((body["PoolID"], answer["Address"].split("/")[0]))
            case "CreateNetwork":
                self._given["networks"].append(body["NetworkID"])
            case "CreateEndpoint":
                self._given["endpoints"].append({"NetworkID": body["NetworkID"], "EndpointID": body["EndpointID"]})

    def delete_everything(self) -> None:
        """In the engine's order; again where the kernel refuses, as the collector does."""
        for _ in range(self._faults + 1):
            self._delete_everything()

    def _delete_everything(self) -> None:
        for endpoint in self._given["endpoints"]:
            self.call("NetworkDriver.Leave", endpoint)
            self.call("NetworkDriver.DeleteEndpoint", endpoint)
        for pool, address in self._given["addresses"]:
            self.call("IpamDriver.ReleaseAddress", {"PoolID": pool, "Address": address})
        for pool in self._given["pools"]:
            self.call("IpamDriver.ReleasePool", {"PoolID": pool})
        for network in self._given["networks"]:
            self.call("NetworkDriver.DeleteNetwork", {"NetworkID": network})

    def settle(self) -> None:
        """Let the agent compare kernel and store, and try again where the kernel refuses."""
        self._host.cluster.load(self._host.store.list(TOPOLOGY).entries)
        for _ in range(self._faults + 1):
            with suppress(KernelError):
                self._host.agent.resync()

    def state(self) -> dict[str, Any]:
        """Every key of the store, every link and row of the kernel."""
        kernel = self._host.kernel
        entries = {entry.key: entry.value for entry in self._host.store.list("").entries}
        return {**entries, **kernel.links, **{str(row): row for row in kernel.rows}}


def judge(response: TestResponse) -> dict[str, Any]:
    """What holds for every answer."""
    text = response.get_data(as_text=True)
    assert response.is_json, text
    assert response.status_code in (200, 400, 404, 405, 413), text
    assert "Traceback" not in text
    assert 'File "' not in text
    answer = json.loads(text)
    assert isinstance(answer, dict)
    if response.status_code != 200:
        assert answer["Err"] == answer["Error"] != ""
    return answer


def essence(state: dict[str, Any]) -> dict[str, Any]:
    """All but what a kernel fault may leave to the next comparison (shared devices) and the collector (addresses)."""
    return {
        key: value
        for key, value in state.items()
        if not key.startswith((ADDRESSES, PENDING)) and (isinstance(value, str | Port))
    }


@contextmanager
def fresh_engine() -> Iterator[Engine]:
    with TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "weft.db")
        host = FakeHost(store, 1, FakeKernel())
        routes = ResolverRoutes(host.agent.cluster, host.record.id, "169.254.77.53", Path(folder) / "routes")
        yield Engine(host, create_app(host.driver, host.ipam, OpenGate(), routes).test_client())
        store.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One for all calls that must change nothing."""
    with fresh_engine() as made:
        yield made


# Arbitrary bytes and JSON

texts = st.text(max_size=20) | st.sampled_from(["", "\ud800", "пул", "0", "a" * 200, "../..", "10.1.0.0/24", "::/0"])
fields = st.sampled_from(FIELDS.split())
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields | texts, inner, max_size=5),
    max_leaves=12,
)
paths = (
    st.sampled_from(NETWORK_CALLS.split()).map("/NetworkDriver.{}".format)
    | st.sampled_from(IPAM_CALLS.split()).map("/IpamDriver.{}".format)
    | st.just("/Plugin.Activate")
)
odd_paths = st.sampled_from(
    ["/", "/NetworkDriver.Foo", "/%00", "/a/b", "http://localhost//x", "/static/x", "/Plugin.Activate/", "/ü"]
)
methods = st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])


@bounded(100)
@given(path=paths | odd_paths, body=st.binary(max_size=200))
def test_arbitrary_bytes_are_answered_in_json(engine: Engine, path: str, body: bytes) -> None:
    engine.send(path, body)


@bounded(100)
@given(path=paths, body=st.dictionaries(fields, values, max_size=6) | values)
def test_arbitrary_json_is_answered_in_json(path: str, body: Any) -> None:
    with fresh_engine() as engine:
        start = engine.state()
        engine.call(path[1:], body)
        engine.delete_everything()
        assert engine.state() == start


@bounded(100)
@given(path=paths | odd_paths, method=methods)
def test_other_methods_are_refused(engine: Engine, path: str, method: str) -> None:
    assert engine.send(path, b"{}", method) is None


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"Options":' * 50_000 + b"0",
        b'{"NetworkID": ' + b"9" * 5000 + b"}",
        b'{"NetworkID": "%s"}' % (b"a" * MAX_BODY),
        b'{"NetworkID": "a", "NetworkID": "\xff"}',
        b'{"NetworkID": NaN, "EndpointID": -Infinity}',
        b"\xef\xbb\xbf{}",
        b"\x00",
        b"null",
        b"{}{}",
    ],
    ids=lambda body: f"{body[:12]!r}-{len(body)}",
)
@pytest.mark.parametrize("name", ["NetworkDriver.CreateNetwork", "NetworkDriver.Join", "IpamDriver.RequestPool"])
def test_hostile_bodies_are_refused(engine: Engine, name: str, body: bytes) -> None:
    assert engine.send(f"/{name}", body) is None


POOL = {"AddressSpace": LOCAL_SPACE, "Pool": "10.1.0.0/24"}
POOL6 = {"AddressSpace": LOCAL_SPACE, "Pool": "fd00:1::/64"}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("IpamDriver.RequestPool", {**POOL6, "Pool": "fd00:2::%0/64", "V6": True}),
        ("IpamDriver.RequestAddress", {"PoolID": f"{LOCAL_SPACE}/fd00:1::/64", "Address": "fd00:1::2%0"}),
        ("NetworkDriver.CreateNetwork", {"NetworkID": "b", "IPv4Data": [{**POOL6, "Gateway": "fd00:1::1%0/64"}]}),
        ("NetworkDriver.CreateNetwork", {"NetworkID": "b", "IPv4Data": [{**POOL, "Gateway": "10.2.0.1/24"}]}),
        ("NetworkDriver.CreateNetwork", {"NetworkID": "b", "IPv4Data": [POOL, {**POOL, "Pool": "10.1.0.0/25"}]}),
        ("NetworkDriver.CreateNetwork", {"NetworkID": "b", "IPv4Data": [{**POOL, "AuxAddresses": {"\ud800": "x"}}]}),
        (
            "NetworkDriver.CreateEndpoint",
            {"NetworkID": "a", "EndpointID": "e", "Interface": {"Address": "10.9.0.0/24"}},
        ),
        (
            "NetworkDriver.CreateEndpoint",
            {"NetworkID": "a", "EndpointID": "e", "Interface": {"Address": "10.9.0.255/24"}},
        ),
        (
            "NetworkDriver.CreateEndpoint",
            {"NetworkID": "a", "EndpointID": "e", "Interface": {"Address": "10.9.1.1/24"}},
        ),
        (
            "NetworkDriver.CreateEndpoint",
            {"NetworkID": "a", "EndpointID": "e/e", "Interface": {"Address": "10.9.0.2/24"}},
        ),
    ],
)
def test_contradictions_are_refused(name: str, body: dict[str, Any]) -> None:
    with fresh_engine() as engine:
        engine.call("IpamDriver.RequestPool", {**POOL6, "V6": True})
        data = [{"AddressSpace": LOCAL_SPACE, "Pool": "10.9.0.0/24"}]
        assert (
            engine.send("/NetworkDriver.CreateNetwork", json.dumps({"NetworkID": "a", "IPv4Data": data}).encode()) == {}
        )
        assert engine.send(f"/{name}", json.dumps(body).encode()) is None


# Conversations

NETWORKS = {
    "a" * 64: ["10.1.0.0/24"],
    "b" * 64: ["10.2.0.0/29"],
    "vbxlcnlvxqyb2xlshsetwdnsd": ["10.3.0.0/30", "fd00:3::/64"],
    "d" * 64: ["10.1.0.0/16"],
    "e" * 64: ["10.1.0.0/24"],
}
"""NetworkIDs with their pools; the last two contradict the first."""
ENDPOINTS = ["1" * 64, "2" * 64, "f00d"]
MAC = "02:42:0a:01:00:02"
JUNK = (
    values
    | st.sampled_from(["10.1.0.1", "10.1.0.2/24", "10.1.0.255/24", "10.1.0.0/24", "10.1.0.128/25", "fe80::1%eth0/64"])
    | st.sampled_from(["::ffff:10.1.0.9", "fd00:3::3%0", "fd00:3::3%0/64", "fd00:3::%x/64", MAC, *NETWORKS, *ENDPOINTS])
    | st.sampled_from([f"{LOCAL_SPACE}/{odd}" for odd in ("10.1.0.0/24/10.2.0.0/24", "fd00:3::%x/64", "::/0", "")])
)
Call = tuple[str, Any]


@st.composite
def lives(draw: st.DrawFn) -> list[Call]:
    """Everything that an engine says about one network, from its creation to its end."""
    network = draw(st.sampled_from(list(NETWORKS)))
    space = draw(st.sampled_from([LOCAL_SPACE, LOCAL_SPACE, LOCAL_SPACE, GLOBAL_SPACE]))
    pools = [ip_network(cidr) for cidr in NETWORKS[network]]
    ids = {pool: f"{space}/{pool}" for pool in pools}
    generic = draw(st.sampled_from([{}, {}, {}, {"weft.vni": "4242"}, {"mtu": "1400"}, {"weft.network": "4242"}]))
    data = [{"AddressSpace": space, "Pool": str(pool), "Gateway": f"{pool[1]}/24"} for pool in pools]
    said: list[Call] = []
    for pool in pools:
        request = {"AddressSpace": space, "Pool": str(pool), "SubPool": "", "Options": {}, "V6": pool.version == 6}
        gateway = {"PoolID": ids[pool], "Address": draw(st.sampled_from(["", str(pool[1])])), "Options": GATEWAY}
        said += [("IpamDriver.RequestPool", request), ("IpamDriver.RequestAddress", gateway)]
    options = {"com.docker.network.generic": generic}
    create = {"NetworkID": network, "Options": options, "IPv4Data": data[:1], "IPv6Data": data[1:]}
    said.append(("NetworkDriver.CreateNetwork", create))
    for offset, endpoint in enumerate(draw(st.permutations(ENDPOINTS))[:2], start=2):
        ends = {"NetworkID": network, "EndpointID": endpoint}
        addresses = [{"PoolID": ids[pool], "Address": str(pool[offset])} for pool in pools]
        given = dict(zip(("Address", "AddressIPv6"), (f"{one['Address']}/24" for one in addresses), strict=False))
        said += [("IpamDriver.RequestAddress", {**one, "Options": None}) for one in addresses]
        interface = {**given, "MacAddress": draw(st.sampled_from(["", "", MAC]))}
        said.append(("NetworkDriver.CreateEndpoint", {**ends, "Interface": interface, "Options": {}}))
        said += [(f"NetworkDriver.{name}", ends) for name in ("Join", "EndpointOperInfo", "Leave", "DeleteEndpoint")]
        said += [("IpamDriver.ReleaseAddress", one) for one in addresses]
    said += [("IpamDriver.ReleasePool", {"PoolID": ids[pool]}) for pool in pools]
    return [*said, ("NetworkDriver.DeleteNetwork", {"NetworkID": network})]


@st.composite
def spoiled(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    """The same with one thing in it wrong, at any depth."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    holder: Any = copy
    key: Any = draw(st.sampled_from(list(copy)))
    while isinstance(holder[key], dict | list) and holder[key] and draw(st.booleans()):
        holder = holder[key]
        key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
    holder[key] = draw(JUNK)
    return copy


@st.composite
def conversations(draw: st.DrawFn, *, kernel_fails: bool) -> list[Call]:
    """Two networks' lives, interleaved: calls get lost, come twice, late or spoiled."""
    waiting, late, said = [draw(lives()), draw(lives())], [], []
    while any(waiting):
        name, body = draw(st.sampled_from([life for life in waiting if life])).pop(0)
        match draw(st.integers(0, 11)):
            case 0:
                said.append((name, draw(spoiled(body))))
            case 1:
                said += [(name, draw(spoiled(body))), (name, body)]
            case 2:
                said += [(name, body), (name, body)]
            case 3:
                late.append((name, body))
            case 4:
                pass
            case 5 if kernel_fails:
                said += [("fail", draw(st.sampled_from(["perform", "observe_links"]))), (name, body)]
            case _:
                said.append((name, body))
    return [*said, *late]


@pytest.mark.parametrize("kernel_fails", [False, True])
@bounded(30)
@given(st.data())
def test_after_all_is_deleted_nothing_is_left(kernel_fails: bool, data: st.DataObject) -> None:
    conversation = data.draw(conversations(kernel_fails=kernel_fails))
    with fresh_engine() as engine:
        start = engine.state()
        for name, body in conversation:
            if name == "fail":
                engine.fail(body)
            else:
                engine.call(name, body)
        engine.delete_everything()
        engine.settle()
        assert engine.state() == start
