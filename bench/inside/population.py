"""A cluster with one large network: one endpoint here, all others evenly on a hundred other hosts."""

from collections.abc import Iterator
from ipaddress import IPv4Address

from weft.model import Endpoint, Host, Network, Pool
from weft.store import Put

VNI = 424242
UNDERLAY = "192.0.2.1"
MTU = 1450
PEERS = 100

_POOL = "10.64.0.0/10"
_FIRST = IPv4Address("10.64.0.2")


def myself(host_id: str) -> Host:
    return Host(host_id, "here", UNDERLAY)


def network() -> Network:
    return Network(VNI, "large", (Pool(_POOL, "10.64.0.1"),), MTU, False, "here")


def records(host_id: str, size: int) -> Iterator[Put]:
    """What the store has of it."""
    me, net = myself(host_id), network()
    yield Put(me.key, me.encode())
    yield Put(net.key, net.encode())
    peers = [
        Host(f"{number:032x}", f"peer{number}", str(IPv4Address("198.51.100.1") + number)) for number in range(PEERS)
    ]
    yield from (Put(peer.key, peer.encode()) for peer in peers)
    for number in range(size + 1):
        host = peers[number % PEERS] if number < size else me
        endpoint = _endpoint(number, host.id)
        yield Put(endpoint.key, endpoint.encode())


def row_count(size: int) -> int:
    """Three of each remote endpoint, and a flood entry of each other host."""
    return 3 * size + PEERS


def _endpoint(number: int, host_id: str) -> Endpoint:
    address = _FIRST + number
    return Endpoint(f"{number:064x}", VNI, f"02:42:{address.packed.hex(':')}", (str(address),), host_id)
