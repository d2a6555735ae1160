"""How this host's weft is, in one view: what the `weft` command, the page and the metrics show. It only reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from time import time
from typing import Any, Protocol

from weft import __version__, topology
from weft.agent import Agent
from weft.cluster import Cluster
from weft.encryption import Encryption
from weft.engine.sweeper import Sweeper
from weft.foreign import Foreign
from weft.health import Health
from weft.identity import LocalHost
from weft.ipam import usable_bounds
from weft.model import ADDRESSES, POOLS, Allocation, Endpoint, Host, Network, PoolClaim, readable
from weft.options import chosen_options, rate_text
from weft.presence import Presence
from weft.store import Store

_MOST_FOREIGN = 10


class Names(Protocol):
    """What answers this host's containers; see `names.service.NameService`."""

    problem: str

    @property
    def answers(self) -> bool: ...


class Listener(Protocol):
    """See `web.listener.Listener`."""

    problem: str


@dataclass(slots=True)
class Status:
    """Any thread may call.

    :param driver: the name users type after -d.
    :param origin: where the store is.
    :param resolver: address at which containers ask for names; "" if there shall be none.
    :param sweeper: None if Docker's API is not used.
    :param listener: None if nobody is to ask over HTTP; it shows what is here, so it comes later.
    """

    me: LocalHost
    cluster: Cluster
    agent: Agent
    presence: Presence
    encryption: Encryption
    health: Health
    sweeper: Sweeper | None
    names: Names | None
    driver: str
    origin: str
    resolver: str
    foreign: Foreign
    listener: Listener | None = None
    started: float = field(default_factory=time)

    @property
    def unheard(self) -> str:
        """Why nobody can ask over HTTP; "" if one can, or nobody is to."""
        return self.listener.problem if self.listener else ""

    def view(self) -> dict[str, Any]:
        """Times are in Unix seconds, durations in seconds; what is not known is None, what is well is ""."""
        cluster, agent, me = self.cluster, self.agent, self.me.host
        return {
            "host": {
                "id": me.id,
                "name": me.name,
                "underlay": me.underlay,
                "version": __version__,
                "driver": self.driver,
                "started": self.started,
            },
            "store": {"origin": self.origin, "problem": self.presence.problem, "seconds": self.presence.seconds},
            "engine": {
                "problem": self.sweeper.problem if self.sweeper else "",
                "version": self.sweeper.version if self.sweeper else "",
            },
            "agent": {
                "synced": cluster.loaded and agent.resynced is not None and not agent.problem,
                "resynced": agent.resynced,
                "seconds": agent.seconds,
                "repaired": agent.repaired,
                "links": agent.links.count,
                "rows": sum(agent.rows.counts.values()),
                "problem": agent.problem,
            },
            "encryption": ": ".join(filter(None, (self.encryption.describe(), self.encryption.slow))),
            "names": {
                "address": self.resolver,
                "answers": bool(self.names and self.names.answers),
                "problem": self.names.problem if self.names else "",
            },
            "hosts": len(cluster.hosts),
            "alive": len(cluster.alive & cluster.hosts.keys()),
            "networks": len(cluster.networks),
            "endpoints": sum(map(len, list(cluster.endpoints.values()))),
            "problems": list(self.problems()),
        }

    def problems(self) -> Iterator[str]:
        """All that keeps something from working here, each in one line for a person."""
        yield from self.health.hindered()
        if self.sweeper:
            if self.sweeper.problem:
                yield f"Docker: {self.sweeper.problem}"
            yield from (f"conflict: {text}" for _, text in sorted(self.sweeper.conflicts.items()))
        if self.names and self.names.problem:
            yield f"names: {self.names.problem}"
        yield from sorted(self.foreign.known.values())[:_MOST_FOREIGN]
        if self.unheard:
            yield f"health and metrics: {self.unheard}"
        for host in sorted(self.cluster.hosts.values(), key=lambda host: host.name):
            if host.id not in self.cluster.alive and host.id != self.me.id:
                yield f"{host.title} is silent"


def host_view(host: Host, cluster: Cluster) -> dict[str, Any]:
    """One host of the cluster."""
    local = (cluster.local_endpoints(vni, host.id) for vni in cluster.local_networks(host.id))
    return {
        "id": host.id,
        "name": host.name,
        "underlay": host.underlay,
        "version": host.version,
        "alive": host.id in cluster.alive,
        "endpoints": sum(map(len, local)),
    }


def network_view(network: Network, cluster: Cluster, me: LocalHost, encryption: str) -> dict[str, Any]:
    """One network of the cluster, as this host sees it.

    `mtu` is what the user asked for, 0 if nothing; `fitting_mtu` is that of new containers, `other_mtu` that of those,
    by name, which were started when it was another.

    :param encryption: the state of encrypted networks, see `Encryption.describe`.
    """
    local = list(cluster.endpoints.get(network.vni, {}).values())
    hosts = [me.host, *(host for host in list(cluster.hosts.values()) if host.family == me.host.family)]
    mtu = network.mtu
    if not mtu and any(host.mtu for host in hosts):  # a host's record had none before weft looked
        mtu = topology.fitting_mtu(network, hosts)
    return {
        "name": network.name,
        "vni": network.vni,
        "subnets": [pool.cidr for pool in network.pools],
        "mtu": network.mtu,
        "fitting_mtu": mtu,
        "other_mtu": {cluster.title(e): e.mtu for e in local if e.mtu not in (0, mtu)},
        "options": chosen_options(network),
        "internal": network.internal,
        "creator": network.creator,
        "retired": network.retired,
        "encrypted": encryption if network.encrypted else "no",
        "endpoints": len(local),
        "hosts": sorted({host_name(cluster, endpoint.host) for endpoint in local}),
        "members": sorted(host_name(cluster, host) for host in list(cluster.members.get(network.vni, ()))),
        "unencryptable": sorted(_unencryptable(network, cluster, me)),
    }


def endpoint_views(cluster: Cluster) -> list[dict[str, Any]]:
    """All endpoints of the cluster, by network and address."""
    found = (e for network in list(cluster.endpoints.values()) for e in list(network.values()))
    return sorted((_endpoint(cluster, e) for e in found), key=lambda e: (e["network"], e["vni"], e["addresses"]))


def address_view(store: Store, cluster: Cluster, cidrs: Set[str] | None) -> dict[str, Any]:
    """The pools, and all addresses that are taken, read from the store.

    :param cidrs: only these pools; None: all.
    """
    claims = [claim for _, claim in readable(PoolClaim.read, store.list(POOLS).entries)]
    pools = {claim.cidr: claim for claim in claims if cidrs is None or claim.cidr in cidrs}
    taken = [one for _, one in readable(Allocation.read, store.list(ADDRESSES).entries) if one.cidr in pools]
    return addresses_of(cluster, {cidr: claim.vni for cidr, claim in pools.items()}, taken)


def addresses_of(cluster: Cluster, pools: Mapping[str, int], taken: Iterable[Allocation]) -> dict[str, Any]:
    """What is taken, by pool.

    :param pools: by CIDR, the VNI of the network that has it; 0: none of weft's.
    """
    taken = sorted(taken, key=lambda one: (one.cidr, ip_address(one.address).packed))
    used = Counter(one.cidr for one in taken)
    return {
        "pools": [_pool(cluster, cidr, vni, used[cidr]) for cidr, vni in sorted(pools.items())],
        "addresses": [
            {
                "pool": one.cidr,
                "address": one.address,
                "holder": _holder(cluster, pools[one.cidr], one),
                "host": host_name(cluster, one.host) if one.host else "",
            }
            for one in taken
        ],
    }


def _pool(cluster: Cluster, cidr: str, vni: int, used: int) -> dict[str, Any]:
    first, last = usable_bounds(ip_network(cidr))
    network = cluster.networks.get(vni)
    return {"pool": cidr, "network": network.name if network else "", "used": used, "free": last - first + 1 - used}


def _holder(cluster: Cluster, vni: int, one: Allocation) -> str:
    if one.kind != "endpoint":
        return one.kind
    names = cluster.names.get(vni, {}).get(one.endpoint)
    called = f" ({names.container})" if names else ""
    return f"endpoint {one.endpoint[:12]}{called}" if one.endpoint else "requested, not used yet"


def host_name(cluster: Cluster, host_id: str) -> str:
    """A host's name, or what there is of its id."""
    host = cluster.hosts.get(host_id)
    return host.name if host else host_id[:12]


def _endpoint(cluster: Cluster, endpoint: Endpoint) -> dict[str, Any]:
    network = cluster.networks.get(endpoint.vni)
    names = cluster.names.get(endpoint.vni, {}).get(endpoint.id)
    called = [names.container, *names.aliases, names.hostname] if names else []
    return {
        "id": endpoint.id,
        "network": network.name if network else "",
        "vni": endpoint.vni,
        "host": host_name(cluster, endpoint.host),
        "addresses": list(endpoint.addresses),
        "mac": endpoint.mac,
        "mtu": endpoint.mtu or None,
        "rate": rate_text(endpoint.rate) if endpoint.rate else None,
        # The container's own name first: aliases repeat it.
        "names": list(filter(None, dict.fromkeys(called))),
    }


def _unencryptable(network: Network, cluster: Cluster, me: LocalHost) -> Iterator[str]:
    """Hosts with endpoints of an encrypted network that nothing can be sent to."""
    if network.encrypted:
        keys = {peer.key for peer in topology.peers(cluster, me.host)}
        for one in cluster.hosts_of(network.vni) - {me.id}:
            host = cluster.hosts.get(one)
            if host is None or host.wg_key not in keys:
                yield host_name(cluster, one)
