"""Create once, use everywhere: a network that one engine has is made on all, and removed on all.

A new network is *published* under its name by the host that made it; every other host's engine then makes the same
through its Docker API. Who removes a published network *retires* it: each engine drops it when no container there uses
it any more, and the last one takes it out of the store. Creating it again (the same subnet) makes it wanted again.

A name has one network in the cluster: `names/<name>`, made if absent, decides. Docker never tells a driver the name,
so two hosts that create one name at once get two networks first. The loser, if no container uses it, is replaced by the
winner; if one does, that is a conflict, which is reported, never merged, and ends when one side is no longer used.

What to do is planned purely, from the cluster and what Docker has here; planning again after it was done gives nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

from weft.cluster import Cluster, Touched
from weft.engine.inventory import DockerNetwork, Engine, Inventory
from weft.engine.sweeper import Outcome
from weft.errors import EngineError, WeftError
from weft.model import Host, Network, name_key, network_key, reading
from weft.networks import Networks
from weft.store import Entry, KeyIs, Put, Store

log = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0
"""Until what could not be done is tried again, if nothing happens that may help: twice as long after each time."""
_RETRY_MOST = 120.0


@dataclass(frozen=True, slots=True)
class Learn:
    """Record Docker's name of a network that is not to be published."""

    vni: int
    name: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Let the name be this network's, and all hosts make it."""

    vni: int
    found: DockerNetwork


@dataclass(frozen=True, slots=True)
class Replace:
    """Remove an unused network whose name is another's, and make that one in its place."""

    vni: int
    found: DockerNetwork
    winner: Network


@dataclass(frozen=True, slots=True)
class Create:
    """Make a published network that this engine lacks."""

    network: Network

    @property
    def vni(self) -> int:
        return self.network.vni


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove a network that nobody wants and no container uses here."""

    vni: int
    found: DockerNetwork


Step = Learn | Publish | Replace | Create | Remove


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order, and by VNI what cannot be done now, for a person."""

    steps: list[Step] = field(default_factory=list)
    conflicts: dict[int, str] = field(default_factory=dict)


def plan(cluster: Cluster, me: Host, networks: Sequence[DockerNetwork], *, driver: str, mirror: bool) -> Plan:
    """What is to be done on this host, whose engine has these networks.

    :param driver: our name on this engine.
    :param mirror: False: only learn names.
    """
    return _Planner(cluster, me, networks, driver, mirror).plan()


class _Planner:
    def __init__(
        self, cluster: Cluster, me: Host, networks: Sequence[DockerNetwork], driver: str, mirror: bool
    ) -> None:
        self._cluster = cluster
        self._me = me
        self._networks = networks
        self._driver = driver
        self._mirror = mirror
        self._bound = cluster.memberships(me.id)
        self._known = dict(cluster.networks)  # the agent goes on changing it
        self._holders = {network.name: network for network in self._known.values() if network.published}
        self._plan = Plan()

    def plan(self) -> Plan:
        for found in sorted(self._networks, key=lambda found: (found.name, found.id)):
            if network := self._known.get(self._bound.get(found.id, 0)):
                self._follow(network, found)
        if self._mirror:
            for vni in sorted(self._known.keys() - set(self._bound.values())):
                if self._known[vni].wanted:
                    self._make(self._known[vni])
        return self._plan

    def _follow(self, network: Network, found: DockerNetwork) -> None:
        """A network that the engine has."""
        if network.published:
            if self._mirror and network.retired and not found.endpoints:
                self._plan.steps.append(Remove(network.vni, found))
        elif not self._mirror or found.scope != "local" or network.name not in ("", found.name):
            if not network.name:
                self._plan.steps.append(Learn(network.vni, found.name))
        elif winner := self._holders.get(found.name):
            self._yield_to(winner, network, found)
        else:
            self._plan.steps.append(Publish(network.vni, found))

    def _yield_to(self, winner: Network, network: Network, found: DockerNetwork) -> None:
        names = [n.name for n in self._networks if self._bound.get(n.id) == winner.vni]
        if names and names[0] != found.name:
            self._plan.conflicts[network.vni] = (
                f"this engine has {winner.title} as Docker network {names[0]}, and another network, with VNI "
                f"{network.vni}, as {found.name}: remove one of the two with docker network rm"
            )
        elif found.endpoints or self._cluster.endpoints.get(network.vni):
            self._plan.conflicts[network.vni] = (
                f"two networks are called {found.name}: {self._where(network)}, and {self._where(winner)}, which has "
                f"the name. Stop the containers on VNI {network.vni} and it is replaced by VNI {winner.vni} here; or "
                f"stop those on VNI {winner.vni} and type docker network rm {found.name} on one of its hosts"
            )
        elif names:  # Docker allows two networks one name if they are made at the same moment
            self._plan.steps.append(Remove(network.vni, found))
        elif winner.vni not in self._bound.values():  # else the engine has lost it, which is soon collected
            self._plan.steps.append(Replace(network.vni, found, winner))

    def _where(self, network: Network) -> str:
        hosts = {*self._cluster.members.get(network.vni, ()), *self._cluster.hosts_of(network.vni)}
        names = sorted(host.name for host in list(self._cluster.hosts.values()) if host.id in hosts)
        return f"VNI {network.vni} on {', '.join(names) or 'no host'}"

    def _make(self, network: Network) -> None:
        """A network that the engine lacks."""
        rival = next((found for found in self._networks if found.name == network.name), None)
        if rival is None:
            self._plan.steps.append(Create(network))
        elif rival.driver != self._driver:
            self._plan.conflicts[network.vni] = (
                f"{network.title}, made on host {network.creator}, cannot be made here: Docker has another network of "
                f"that name, of driver {rival.driver}. Type docker network rm {rival.name}, and it is made; or give "
                "one of the two another name"
            )
        elif (other := self._known.get(self._bound.get(rival.id, 0))) and other.published:
            self._plan.conflicts[network.vni] = (
                f"{network.title}, made on host {network.creator}, cannot be made here: Docker has {other.title} under "
                f"that name. Type docker network rm {rival.name}, and both are made under their own names"
            )


@dataclass(frozen=True, slots=True)
class _Refused:
    """A step that could not be done: why, and when it is tried again, by the monotonic clock."""

    step: Step
    why: str
    pause: float
    due: float


class Mirror:
    """Carries out the plan of one host; see `sweeper.Sweep`.

    :param enabled: False: networks are neither published nor made nor removed.
    """

    def __init__(
        self, store: Store, host: Host, cluster: Cluster, networks: Networks, engine: Engine, *, enabled: bool
    ) -> None:
        self._store = store
        self._me = host
        self._cluster = cluster
        self._networks = networks
        self._engine = engine
        self._enabled = enabled
        self._failing: dict[str, str] = {}
        self._refused: dict[int, _Refused] = {}
        self._present: set[str] = set()
        """Ids of the engine's networks at the last sweep: one that went may have been in the way."""

    def forget(self) -> None:
        self._refused.clear()

    def concerns(self, touched: Touched | None) -> bool:
        """True if a change of the cluster may ask for something here. (None: everything was read anew.)"""
        return touched is None or any(map(self._is_unlike, touched.networks))

    def _is_unlike(self, vni: int) -> bool:
        network = self._cluster.networks.get(vni)
        if network is None:
            return bool(self._failing)  # its name is free now
        return (self._me.id in self._cluster.members.get(vni, ())) != network.wanted

    def sweep(self, inventory: Inventory, pools: Sequence[Entry]) -> Outcome:
        planned = plan(
            self._cluster, self._me, inventory.networks, driver=self._networks.driver_name, mirror=self._enabled
        )
        present = {found.id for found in inventory.networks}
        refused = self._refused if present == self._present else {}
        self._present = present
        tried = (self._try(step, refused.get(step.vni)) for step in planned.steps)
        self._refused = {one.step.vni: one for one in tried if one}
        failing = {**planned.conflicts, **{vni: one.why for vni, one in self._refused.items()}}
        self._failing = {f"VNI {vni}": text for vni, text in failing.items()}
        due = [one.due - monotonic() for one in self._refused.values()]
        if planned.conflicts:
            due.append(_RETRY_SECONDS)
        return Outcome(max(0.0, min(due)) if due else None, self._failing)

    def _try(self, step: Step, before: _Refused | None) -> _Refused | None:
        """Perform a step, unless it was refused just now: it may never succeed here, as without WireGuard."""
        again = before if before and before.step == step else None
        if again and monotonic() < again.due:
            return again
        try:
            self._perform(step)
        except WeftError as error:
            pause = min(again.pause * 2, _RETRY_MOST) if again else _RETRY_SECONDS
            return _Refused(step, str(error), pause, monotonic() + pause)
        return None

    def _perform(self, step: Step) -> None:
        match step:
            case Learn(vni, name):
                self._change(vni, lambda network: replace(network, name=network.name or name))
            case Publish(vni, found):
                self._publish(vni, found)
            case Replace(_, found, winner):
                self._replace(found, winner)
            case Create(network):
                self._create(network)
            case Remove(vni, found):
                if (present := self._read(vni)) and not present.wanted:
                    self._remove(found)

    def _read(self, vni: int) -> Network | None:
        entry = self._store.get(network_key(vni))
        return Network.read(entry) if entry else None

    def _change(self, vni: int, change: Callable[[Network], Network]) -> bool:
        """False if the network is gone, or somebody else was quicker: then it is planned again."""
        entry = self._store.get(network_key(vni))
        if entry is None:
            return False
        changed = change(Network.read(entry)).encode()
        unchanged = KeyIs(entry.key, entry.revision)
        return changed == entry.value or self._store.transact([unchanged], [Put(entry.key, changed)])

    def _publish(self, vni: int, found: DockerNetwork) -> None:
        entry, name = self._store.get(network_key(vni)), self._store.get(name_key(found.name))
        if entry is None or (network := Network.read(entry)).published:
            return
        if name:
            with reading(name.key):
                holder = int(name.value)
            if self._read(holder):
                return  # another was quicker: it is planned again when that is seen
        network = replace(network, name=found.name, published=found.published)
        conditions = [KeyIs(entry.key, entry.revision), KeyIs(name_key(found.name), name.revision if name else 0)]
        if self._store.transact(conditions, [Put(entry.key, network.encode()), Put(name_key(found.name), str(vni))]):
            log.info("%s is published", network.title)

    def _replace(self, found: DockerNetwork, winner: Network) -> None:
        """The winner may be retired: somebody wants it again."""
        if not self._change(winner.vni, Network.revived):
            return
        if self._remove(found):
            log.warning("Docker network %s (%s) gives way to %s", found.name, found.id[:12], winner.title)
            self._create(winner)

    def _remove(self, found: DockerNetwork) -> bool:
        with self._networks.removing(found.id):
            return self._engine.remove(found.id)

    def _create(self, network: Network) -> None:
        try:
            with self._networks.expecting(network):
                self._engine.create(network)
        except EngineError:
            if (now := self._read(network.vni)) and now.wanted:
                raise
        else:
            log.info("%s is made here too", network.title)
