"""The rows of this host's networks: what is wanted of them, and the kernel kept like that.

What is wanted is held in memory, by network. So a change in the cluster costs just the rows of what it touched, and of
what the kernel tells just that counts which differs from it.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, KeysView, Set
from dataclasses import dataclass, field

from weft import topology
from weft.cluster import Cluster, Touched
from weft.dataplane import Neighbour, Row, device_names, vni_of
from weft.identity import LocalHost
from weft.reconcile import Kernel, RowPlan, plan_rows

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Wanted:
    """The rows of one network. `neighbours` finds one by address: the event of a deleted one lacks the MAC."""

    rows: set[Row] = field(default_factory=set)
    neighbours: dict[bytes, Neighbour] = field(default_factory=dict)

    def change(self, old: set[Row], new: set[Row]) -> None:
        """A row that stays is never missing, whoever looks meanwhile."""
        gone = old - new
        self.rows |= new
        self.neighbours.update((row.address, row) for row in new if isinstance(row, Neighbour))
        for row in gone:
            if isinstance(row, Neighbour) and self.neighbours.get(row.address) == row:
                del self.neighbours[row.address]
        self.rows -= gone

    def complete(self, row: Row) -> Row:
        """The row that an event means."""
        if isinstance(row, Neighbour) and not row.mac:
            return self.neighbours.get(row.address, row)
        return row


class Rows:
    """For the agent's loop alone, but that the monitor's thread calls `news` and any thread may call `counts`.

    What is wanted changes before the kernel is written to, always: `news` relies on that.
    """

    def __init__(self, kernel: Kernel, cluster: Cluster, me: LocalHost) -> None:
        self.steps = {"put": 0, "delete": 0}
        """What was done to rows."""
        self._kernel = kernel
        self._cluster = cluster
        self._me = me
        self._wanted: dict[int, _Wanted] = {}
        self._told: set[Hashable] = set()
        """Keys of the rows that the kernel's monitor has last told to be otherwise than wanted."""

    @property
    def done(self) -> int:
        """How many that was."""
        return sum(self.steps.values())

    @property
    def networks(self) -> KeysView[int]:
        """VNIs of the networks that have devices here: a view, which changes with them."""
        return self._wanted.keys()

    @property
    def counts(self) -> dict[int, int]:
        """How many rows there should be, by VNI."""
        return {vni: len(wanted.rows) for vni, wanted in list(self._wanted.items())}

    def news(self, rows: Iterable[Row], present: bool) -> Iterable[Row]:
        """Of rows that have come or gone, those that should not have, and what undoes that again.

        The others are echoes of our own writes, 300,000 of them when a large network is programmed. This runs in the
        monitor's thread while the loop works, and misses nothing: what is wanted changes before the kernel is written
        to. So whatever is as it should be now is put right by a later change itself if it is not any more then, and a
        network that nobody wants yet is compared with a dump when somebody does.
        """
        for one in rows:
            if wanted := self._wanted.get(vni_of(one.device) or 0):
                row = wanted.complete(one)
                if present != (row in wanted.rows):
                    self._told.add(row.key)
                    yield row
                elif self._told and row.key in self._told:
                    self._told.remove(row.key)
                    yield row

    def moved(self, touched: Touched) -> set[int]:
        """VNIs of the networks on which a host that has, or until now had, endpoints is at another address."""
        if not touched.hosts:
            return set()
        spread = {vni: self._cluster.hosts_of(vni) | touched.spread.get(vni, set()) for vni in self._wanted}
        return {vni for vni, hosts in spread.items() if not touched.hosts.isdisjoint(hosts)}

    def plan(self, vnis: Iterable[int]) -> RowPlan:
        """What comparing these networks with a dump would do now."""
        wanted, observed = set[Row](), set[Row]()
        for vni in vnis:
            wanted |= topology.network_rows(self._cluster, vni, self._me.host)
            if self._kernel.has_links(device_names(vni)):
                observed |= self._kernel.observe_rows(device_names(vni))
        return plan_rows(self._adopted(wanted, observed), observed)

    def forget(self, vnis: Iterable[int]) -> None:
        """These networks' devices go, and their rows with them."""
        for vni in vnis:
            del self._wanted[vni]

    def sync(self, vnis: Set[int]) -> None:
        """Compute the rows of these networks anew and compare them with a dump."""
        for vni in vnis:
            self._wanted[vni] = _Wanted()
            self._wanted[vni].change(set(), topology.network_rows(self._cluster, vni, self._me.host))
        # A device that could not be made is among the failures already.
        ready = [vni for vni in vnis if self._kernel.has_links(device_names(vni))]
        if not ready:
            return
        observed = self._kernel.observe_rows([name for vni in ready for name in device_names(vni)])
        rows = [self._wanted[vni].rows for vni in ready]
        wanted = rows[0] if len(rows) == 1 else set[Row]().union(*rows)
        self._write(plan_rows(self._adopted(wanted, observed), observed))

    def follow(self, touched: Touched, vnis: Set[int]) -> None:
        """Change what was touched on these networks, without looking at the rest of them or at the kernel."""
        for vni in touched.endpoints.keys() & vnis:
            self._apply_delta(vni, touched)
        if touched.hosts:
            for vni in topology.probe_networks(self._cluster, self._me.host) & vnis:
                rows = topology.network_rows(self._cluster, vni, self._me.host)
                self._change(vni, set(self._wanted[vni].rows), rows)

    def repair(self, events: dict[Row, bool]) -> None:
        """Put right what somebody else changed: a stranger that has gone again may have replaced what is wanted."""
        if not self._cluster.loaded:
            return
        by_network = ((self._wanted.get(vni_of(row.device) or 0), row, present) for row, present in events.items())
        seen = [(wanted, row, present) for wanted, row, present in by_network if wanted]
        keys = {row.key for wanted, row, present in seen if not (present and row in wanted.rows)}
        if not keys:
            return
        networks = {id(wanted): wanted for wanted, row, _ in seen if row.key in keys}
        wanted_rows = {row for wanted in networks.values() for row in wanted.rows if row.key in keys}
        strange = {row for _, row, present in seen if present and row.key in keys} - wanted_rows
        plan = plan_rows(wanted_rows, strange)
        for row in plan.put:
            log.warning("drift repaired: put back %s", row)
        for row in plan.delete:
            log.warning("drift repaired: removed %s", row)
        self._write(plan)

    def _adopted(self, wanted: set[Row], observed: set[Row]) -> set[Row]:
        """The rows that shall be there: before the store's first snapshot, what is there may be newer than what was
        last known."""
        if self._cluster.loaded:
            return wanted
        present = {row.key for row in observed}
        return observed | {row for row in wanted if row.key not in present}

    def _apply_delta(self, vni: int, touched: Touched) -> None:
        before, now = touched.endpoints[vni], self._cluster.endpoints.get(vni, {})
        old = topology.endpoint_rows(self._cluster, (e for e in before.values() if e), self._me.host)
        new = topology.endpoint_rows(self._cluster, (now[i] for i in before if i in now), self._me.host)
        if (hosts := self._cluster.hosts_of(vni)) != touched.spread[vni]:
            old |= topology.flood_rows(self._cluster, vni, touched.spread[vni], self._me.host)
            new |= topology.flood_rows(self._cluster, vni, hosts, self._me.host)
        self._change(vni, old, new)

    def _change(self, vni: int, old: set[Row], new: set[Row]) -> None:
        """Put these rows of a network in the place of those."""
        plan = plan_rows(new, old)
        self._wanted[vni].change(old, new)
        self._write(plan)

    def _write(self, plan: RowPlan) -> None:
        if plan:
            self._kernel.write_rows(plan)
            self.steps["put"] += len(plan.put)
            self.steps["delete"] += len(plan.delete)
            log.info("rows: %d put, %d deleted", len(plan.put), len(plan.delete))
