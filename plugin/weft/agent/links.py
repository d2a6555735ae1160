"""The links of this host's data plane: what shall be there, what may stay, and the steps that lead there.

A network is *active* while this host has endpoints on it. Its devices stay for a while after the last one has gone
(until the next timed resync, or until Docker removes the network), since a container that restarts wants them back.

What a running container or a handler needs is not removed, whatever the store says; but tunnels of encrypted networks
are taken from anybody while that cannot be relied on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Set

from weft import topology
from weft.attachments import Attachments
from weft.cluster import Cluster
from weft.dataplane import Link, Port, Shaper, Vxlan, device_names, shaper_names, source_of, vni_of, vnis_of, vxlan_name
from weft.encryption import Encryption
from weft.errors import KernelError
from weft.identity import LocalHost
from weft.reconcile import Create, Kernel, ObservedLink, Remove, Step, plan_links

log = logging.getLogger(__name__)


class Links:
    """For the agent's loop alone, but that any thread may call `count`. Meanwhile handlers make and remove ports, and
    the devices that these need: a step is taken under `Attachments.step_lock`, if no handler has forestalled it.

    :param networks: VNIs of those that have devices here, as it is at any time: these stay, active or not.
    :param failed: told of each step that fails; it keeps no other from being taken.
    :param probes: have the networks for probes as well.
    """

    def __init__(
        self,
        kernel: Kernel,
        cluster: Cluster,
        me: LocalHost,
        attachments: Attachments,
        encryption: Encryption | None,
        networks: Set[int],
        failed: Callable[[KernelError], None],
        *,
        probes: bool,
    ) -> None:
        self.steps = {"create": 0, "update": 0, "remove": 0}
        """What was done to links."""
        self.done = 0
        """How many steps that was, but for devices that went because their last container did: that is no drift."""
        self._kernel = kernel
        self._cluster = cluster
        self._me = me
        self._attachments = attachments
        self._encryption = encryption
        self._networks = networks
        self._failed = failed
        self._with_probes = probes
        self._kept: set[str] = set()
        """Ports that are in use but not in the store, and were reported."""
        self._held: set[str] = set()
        """Tunnel devices that stay encrypted against the store's word, and were reported."""
        self._stale: set[str] = set()
        """Endpoints with an MTU that is not their network's any more, and were reported."""
        self._large: set[tuple[int, int]] = set()
        """Networks whose users chose an MTU that is too large, with what fits; these were reported as well."""

    @property
    def count(self) -> int:
        """How many there should be."""
        vnis = list(self._networks)
        ports = [e for vni in vnis for e in self._cluster.local_endpoints(vni, self._me.id)]
        networks = filter(None, map(self._cluster.networks.get, vnis))
        shapers = sum(e.rate > 0 for e in ports) + sum(network.multicast > 0 for network in networks)
        return 2 * len(vnis) + len(ports) + shapers

    def active(self) -> set[int]:
        """VNIs of the networks that need devices here."""
        pinned = {endpoint.vni for endpoint in self._attachments.pinned()}
        used = {vni for vni in self._cluster.local_networks(self._me.id) | pinned if vni in self._cluster.networks}
        return used | topology.probe_networks(self._cluster, self._me.host) if self._with_probes else used

    def dropped(self, vnis: set[int]) -> set[int]:
        """Of these networks, which are not active, those that this host's engine does not have either."""
        networks, members = self._cluster.networks, self._cluster.members
        return {vni for vni in vnis if vni not in networks or self._me.id not in members.get(vni, ())}

    def names(self, vnis: Set[int]) -> set[str]:
        """Of the devices and ports of these networks; `sync` adds what limits them."""
        ports = {topology.port_name(e.id) for vni in vnis for e in self._cluster.local_endpoints(vni, self._me.id)}
        return ports.union(*map(device_names, vnis))

    def plan(self) -> list[Step]:
        """What comparing all of them would do now."""
        return self._plan(None)[0]

    def sync(self, names: set[str] | None) -> set[int]:
        """Correct the links of these names (None: all); return the VNIs of which a device had to be made."""
        if names is not None and not names:
            return set()
        steps, wrong = self._plan(names)
        self._perform(steps, wrong)
        return vnis_of(step.link.name for step in steps if isinstance(step, Create))

    def shut(self, observed: Mapping[str, ObservedLink]) -> set[str]:
        """Tunnel devices that must not be there: those of encrypted networks while that cannot be relied on."""
        if self._encryption is None or not self._encryption.breached:
            return set()
        networks = {**topology.PROBE_NETWORKS, **self._cluster.networks}
        known = {vxlan_name(vni) for vni, network in networks.items() if network.encrypted}
        return known.union(filter(None, map(_encrypted, observed.values())))  # the store may have lost some

    def report_mtu(self, vnis: set[int]) -> None:
        """Name the containers that keep an MTU which is not the network's any more, once."""
        stale: set[str] = set()
        large: set[tuple[int, int]] = set()
        for network in (topology.network_of(self._cluster, vni) for vni in sorted(vnis)):
            mtu = self._attachments.mtu(network)
            local = self._attachments.with_mtu(self._cluster.local_endpoints(network.vni, self._me.id))
            others = [endpoint for endpoint in local if endpoint.mtu not in (0, mtu)]
            stale.update(endpoint.id for endpoint in others)
            if {endpoint.id for endpoint in others} - self._stale:
                log.warning(
                    "the MTU of %s is %d now; until they are restarted, these containers keep another: %s",
                    network.title,
                    mtu,
                    ", ".join(f"{self._cluster.title(endpoint)} ({endpoint.mtu})" for endpoint in others),
                )
            fits = self._attachments.limit(encrypted=network.encrypted, paths=True).mtu if network.mtu else 0
            if network.mtu > fits:
                large.add((network.vni, fits))
                if (network.vni, fits) not in self._large:
                    log.warning("%s was made with mtu=%d, but only %d gets through", network.title, network.mtu, fits)
        self._stale, self._large = stale, large

    def _plan(self, names: set[str] | None) -> tuple[list[Step], set[str]]:
        """What corrects the links of these names (None: all), and those that no handler needs as they are."""
        if names is not None:  # a link and what limits it belong together, whichever has changed
            names = names | set(filter(None, map(source_of, names)))
            names |= shaper_names(names)
        observed = self._kernel.observe_links(names)
        # Read after the kernel: a port made meanwhile is pinned, hence wanted.
        wanted = {n: link for n, link in self._wanted_links(names).items() if names is None or n in names}
        # A veth that is gone cannot be given to a running container again: only a handler makes one.
        lost = {name for name, link in wanted.items() if isinstance(link, Port) and name not in observed}
        lost |= {name for name, link in wanted.items() if isinstance(link, Shaper) and link.source in lost}
        steps = plan_links([link for name, link in wanted.items() if name not in lost], observed)
        pruned = {step.name for step in steps if isinstance(step, Remove)} - wanted.keys()
        used = pruned if not self._cluster.loaded else self._used(pruned) if pruned else set()
        held = self._held_back(steps, observed)
        shut = self.shut(observed)
        used = (used | held) - shut
        steps = [step for step in steps if not (isinstance(step, Remove) and step.name in used)]
        held |= shaper_names(held)
        steps = [step for step in steps if not (isinstance(step, Create) and step.link.name in held)]
        return steps, shut.union(step.link.name for step in steps if isinstance(step, Create))

    def _wanted_links(self, names: set[str] | None = None) -> dict[str, Link]:
        """Those of these names, with others of the same networks. (None: all)"""
        wanted: dict[str, Link] = {}
        pinned = self._attachments.pinned()
        vnis = self._networks | self.active()
        for vni in vnis if names is None else vnis & self._networks_of(names):
            local = self._cluster.local_endpoints(vni, self._me.id)
            endpoints = [*local, *(e for e in pinned if e.vni == vni)]
            network = topology.network_of(self._cluster, vni)
            wanted.update((link.name, link) for link in self._attachments.links(network, endpoints))
        return wanted

    def _networks_of(self, names: set[str]) -> set[int]:
        """VNIs of the networks whose links have these names, as far as there are such."""
        here = [*self._attachments.pinned(), *self._cluster.endpoints_of(self._me.id)]
        ports = {endpoint.vni for endpoint in here if topology.port_name(endpoint.id) in names}
        return ports | vnis_of(names)

    def _used(self, names: set[str]) -> set[str]:
        """Those of these links that a running container uses, although the store does not know it.

        The store may be another than it was, or restored from a backup. A veth cannot be given back: it is kept.
        """
        used = {name for p in self._used_ports() for name in (p.name, p.bridge, f"vx{p.bridge[2:]}")}
        used |= shaper_names(used)
        if new := {name for name in names & used if topology.is_port_name(name)} - self._kept:
            self._kept |= new
            log.error("%s: in use by a container, but not in the store; kept", ", ".join(sorted(new)))
        return names & used

    def _held_back(self, steps: Iterable[Step], observed: Mapping[str, ObservedLink]) -> set[str]:
        """Encrypted tunnel devices that must not become plain ones, although the store says so.

        A running container uses the network that the store does not know (see `_used`): it would be heard by others.
        """
        creations = (step.link for step in steps if isinstance(step, Create))
        plain = {link.name: link for link in creations if isinstance(link, Vxlan) and not link.encrypted}
        possible = plain.keys() & (self._held | set(filter(None, map(_encrypted, observed.values()))))
        if not possible:
            return set()
        ports, known = self._used_ports(), self._wanted_links()  # in this order, as in `_plan`
        strangers = {port.bridge: port.name for port in ports if port.name not in known}
        held = {name for name in possible if plain[name].bridge in strangers}
        for link in (plain[name] for name in sorted(held - self._held)):
            log.error(
                "%s is a plain one in the store, but a container that is not in there uses it encrypted (%s): it has "
                "no way to other hosts; stop its containers here, and make the network anew with -o encrypted",
                self._cluster.networks[link.vni].title,
                strangers[link.bridge],
            )
        self._held = (self._held - possible) | held
        return held

    def _used_ports(self) -> list[Port]:
        """Those of running containers."""
        links = self._kernel.observe_links().items()
        ports = [seen.link for name, seen in links if seen.carrier and topology.is_port_name(name)]
        return [port for port in ports if isinstance(port, Port)]

    def _perform(self, steps: list[Step], wrong: set[str]) -> None:
        """:param wrong: links that no handler needs as they are."""
        for step in steps:
            with self._attachments.step_lock:
                if self._is_a_handlers(step, wrong):
                    continue
                log.info("%s", step)
                try:
                    self._kernel.perform(step)
                    self.done += not self._lingers(step)
                    self.steps[type(step).__name__.lower()] += 1
                except KernelError as error:
                    self._failed(error)

    def _lingers(self, step: Step) -> bool:
        """True if a device goes because its last container did: that is no drift."""
        return isinstance(step, Remove) and vni_of(source_of(step.name) or step.name) in self._cluster.networks

    def _is_a_handlers(self, step: Step, wrong: set[str]) -> bool:
        """True if a handler, since the plan was made, has begun to need what goes or has made what is missing."""
        match step:
            case Remove(name):
                return name in self._pinned_names() - wrong
            case Create(link):
                return self._kernel.has_links([link.name])
        return False

    def _pinned_names(self) -> set[str]:
        pinned = self._attachments.pinned()
        names = {name for e in pinned for name in (*device_names(e.vni), topology.port_name(e.id))}
        return names | shaper_names(names)


def _encrypted(seen: ObservedLink) -> str:
    """The name of an encrypted network's tunnel device; "" if it is none."""
    return seen.link.name if isinstance(seen.link, Vxlan) and seen.link.encrypted else ""
