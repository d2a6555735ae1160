"""A cluster with large networks: one endpoint here, on the first network, and all others on other hosts.

One network is on all hosts, evenly. Of several, each is on a tenth of the hosts, and each host has an equal share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from weft.model import Endpoint, Host, Member, Network, Pool
from weft.store import Put

VNI = 424242
UNDERLAY = "192.0.2.1"
MTU = 1450
PEERS = 100

_FIRST = IPv4Address("10.64.0.0")
_FIRST_VTEP = IPv4Address("198.18.0.1")
_POOL_BITS = 22
_POOL_BITS_OF_MANY = 12


@dataclass(frozen=True)
class Population:
    """
    :param size: all remote endpoints.
    :param hosts: remote hosts; they have names and addresses, but nothing runs there.
    """

    size: int
    hosts: int = PEERS
    networks: int = 1

    @property
    def local_size(self) -> int:
        """Remote endpoints of the one network that has a local one."""
        return self.size // self.networks

    @property
    def row_count(self) -> int:
        """Rows in the kernel: three of each remote endpoint of that network, and a flood entry of each host on it."""
        return 3 * self.local_size + min(self._spread, self.local_size)

    def records(self, host_id: str) -> Iterator[Put]:
        """What the store has of it."""
        me = myself(host_id)
        peers = self.peers()
        yield from (Put(host.key, host.encode()) for host in (me, *peers))
        for number in range(self.networks):
            record = self.network(number)
            members = [self._host(number, place) for place in range(min(self._spread, self.local_size))]
            yield Put(record.key, record.encode())
            yield from (self._member(record.vni, peers[member].id) for member in members)
            for place in range(self.local_size):
                yield self._endpoint(number, place, peers[self._host(number, place)].id)
        yield self._member(VNI, me.id)
        yield self._endpoint(0, self.local_size, me.id)

    def peers(self) -> list[Host]:
        return [Host(f"{n:032x}", f"peer{n}", str(_FIRST_VTEP + n)) for n in range(self.hosts)]

    def network(self, number: int = 0) -> Network:
        pool = Pool(f"{self._base(number)}/{32 - self._pool_bits}", str(self._base(number) + 1))
        return Network(VNI + number, f"large{number}", (pool,), MTU, False, "here")

    @property
    def _spread(self) -> int:
        """Hosts that a network is on."""
        return self.hosts if self.networks == 1 else self.hosts // 10

    @property
    def _pool_bits(self) -> int:
        return _POOL_BITS if self.networks == 1 else _POOL_BITS_OF_MANY

    def _base(self, number: int) -> IPv4Address:
        return _FIRST + (number << self._pool_bits)

    def _host(self, number: int, place: int) -> int:
        return (number * self.hosts // self.networks + place % self._spread) % self.hosts

    def _member(self, vni: int, host: str) -> Put:
        member = Member(vni, host, f"{vni:064x}")
        return Put(member.key, member.encode())

    def _endpoint(self, number: int, place: int, host: str) -> Put:
        address = self._base(number) + 2 + place
        mac = f"02:42:{address.packed.hex(':')}"
        endpoint = Endpoint(f"{int(address):064x}", VNI + number, mac, (str(address),), host)
        return Put(endpoint.key, endpoint.encode())


def myself(host_id: str) -> Host:
    return Host(host_id, "here", UNDERLAY)
