"""Encrypted networks of this host: what makes them possible, and whether they are.

The WireGuard device, its key and its address are made when this host gets its first encrypted network, and published
with the host's record; from then on peers follow the records of the others. The rule is that an encrypted network
which cannot be shown to be one is refused. The proof is where the sockets are, not what a packet filter says (see
`dataplane.Tunnel`), so there are two degrees of failure:

- the device is missing, down or without key: nothing passes, nothing is attached, and it is repaired;
- somebody put another link beside the device: packets might leave by that. Then the networks' tunnel devices are
  taken away, until the link is gone.

A new key is given to the device first and published then; told before us, the peers would offer us handshakes that we
cannot answer. Until they have learned of it and begun the next session (`Tunnels.write_peers`), for a round trip of the
store or so, the device receives under the old sessions but keeps what it should send: up to 128 packets for each peer
(MAX_STAGED_PACKETS in the kernel's drivers/net/wireguard/messages.h). Where no session begins, it is tried again in
time (`Tunnels.shake_hands`). If the new key cannot be published, the old one, which the file holds until then, is taken
back, for the others know no other.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Network
from time import monotonic, sleep, time

from weft import topology
from weft.cluster import Cluster
from weft.dataplane import Peer, Tunnel
from weft.errors import ConfigError, Exhausted, KernelError, WeftError
from weft.hosts import LEASE_SECONDS, TunnelInUse, TunnelKeyInUse
from weft.identity import LocalHost
from weft.keys import KeyFile, PrivateKey
from weft.model import WIREGUARD_POOL, Host
from weft.reconcile import ObservedTunnel, TunnelPlan, Tunnels, plan_tunnel

log = logging.getLogger(__name__)

_ATTEMPTS = 50
_LOST_SECONDS = LEASE_SECONDS + 5
"""In which a host that lives has registered again in a store that was lost."""
_SESSION_SECONDS = 180.0
"""For which a WireGuard session may be used without a new handshake (REJECT_AFTER_TIME in messages.h)."""
_HANDSHAKE_SECONDS = 0.3
"""After which they are begun anew; or after up to twice that, lest two hosts that change their keys at once collide."""
_HANDSHAKES = 3
_POLL_SECONDS = 0.02
_SLOW = "slow, with about a thirtieth of the throughput of plain ones"
"""Through wireguard-go; docs/benchmarks.md has the figures."""


class Encryption:
    """Any thread may call.

    :param keys: where this host's private key is.
    :param port: UDP port of WireGuard.
    :param refusal: why this host's settings forbid encrypted networks; "" if they do not.
    :param publish: registers this host's record with the others now; `TunnelInUse` if one has the address or the key.
    :param rotation: seconds after which the key is replaced; 0: never.
    :param occupied: a route of this host that overlaps a pool, or ""; None: nobody asks. See `_prepare_address`.
    """

    def __init__(
        self,
        kernel: Tunnels,
        cluster: Cluster,
        me: LocalHost,
        keys: KeyFile,
        *,
        port: int,
        refusal: str = "",
        publish: Callable[[], None],
        rotation: float = 0.0,
        occupied: Callable[[IPv4Network], str] | None = None,
    ) -> None:
        self.problem = ""
        """Why encrypted networks do not work here now; "" if they do, or if there are none."""
        self.backend = ""
        """`kernel` or `wireguard-go`, once the device is there."""
        self.breached = False
        """True if packets may have another way than through the device."""
        self._kernel = kernel
        self._cluster = cluster
        self._me = me
        self._keys = keys
        self.port = port
        self._refusal = refusal
        self._publish = publish
        self._rotation = rotation
        self._occupied = occupied
        self._told: dict[str, Peer] = {}
        """By key, the peers as the device was last told of them."""
        self._seen = (False, "")
        """`breached`, and this host's address, at the last `sync`: a handler may have found out first."""
        self._lock = threading.RLock()
        self._random = random.Random()

    def resume(self, record: Host) -> None:
        """Be, after a start, what this host's record says, which may be an older one.

        Its key is the file's. If that is the device's as well, the address is the device's: with another, what runs
        here would be cut off, without the store for good.
        """
        with suppress(WeftError):  # whoever needs them will say it
            kept, seen = self._keys.read(), self._kernel.observe_tunnel()
            if kept and record.wg_key:
                record = replace(record, wg_key=kept.public)
            if kept and seen and seen.tunnel.key == kept.public:
                address = seen.tunnel.address.partition("/")[0]
                device = replace(self._me.host, wg_key=kept.public, wg_address=address, wg_port=self.port)
                record = device if device.can_encrypt else record
        self._me.encrypt(record.wg_key, record.wg_address, record.wg_port)

    @property
    def slow(self) -> str:
        """How slow encrypted networks are here, if they work and are."""
        return "" if self._refusal or self.problem or self.backend in ("", "kernel") else _SLOW

    @property
    def unsettled(self) -> bool:
        """True if `sync` has something to mend yet."""
        return bool(self.problem or self._lost_keys()) and self._wanted()

    def require(self) -> None:
        """Make all that an encrypted network needs, or raise why there can be none."""
        with self._lock:
            if self._refusal:
                raise ConfigError(self._refusal)
            if not self.problem and self._proven():
                return
            self._establish()

    def sync(self) -> bool:
        """Correct what is otherwise than it should be; True if encrypted networks' links have to follow."""
        with self._lock:
            if self._wanted() and not self._refusal:
                with suppress(WeftError):  # it is noted
                    self._establish()
                    self._rotate_if_due()
            before, self._seen = self._seen, (self.breached, self._me.host.wg_address)
            return before != self._seen

    def rotate(self) -> str:
        """Replace this host's key; return the new public one. The old one is nowhere when the others have followed."""
        with self._lock:
            if self._refusal:
                raise ConfigError(self._refusal)
            if not self._me.host.wg_key:
                raise ConfigError("this host has had no encrypted network yet, hence no key")
            self._publish()  # the others must be able to learn of it
            self._establish()
            key, address = PrivateKey.generate(), self._me.host.wg_address
            peers = self._sessions(time() - _SESSION_SECONDS)
            began = monotonic()
            try:
                self._configure(key, address)
                since = time()
                self._me.encrypt(key.public, address, self.port)
                self._publish()
                self._keys.write(key)
            except WeftError:
                with suppress(WeftError):  # it is noted
                    self._establish()
                raise
            log.warning("the WireGuard key of this host was replaced; the new one is %s", key.public)
            patience = max(_HANDSHAKE_SECONDS, monotonic() - began)  # a slow host's peers may be slow
            self._begin_sessions(key, peers, since, patience)
            return key.public

    def plan(self) -> TunnelPlan:
        """What `sync` would change at the device now."""
        key, seen = self._keys.read(), self._kernel.observe_tunnel()
        if self._refusal or not (self._wanted() and key and seen):
            return TunnelPlan()
        return plan_tunnel(self._tunnel(key, self._me.host.wg_address, seen), seen)

    def observe(self) -> ObservedTunnel | None:
        """The device as it is, for people."""
        return self._kernel.observe_tunnel()

    def describe(self) -> str:
        """The state of encrypted networks on this host, in words."""
        if self._refusal or self.problem:
            return f"refused: {self._refusal or self.problem}"
        return f"active ({self.backend})" if self.backend else "no encrypted network yet"

    def _begin_sessions(self, private: PrivateKey, peers: set[str], since: float, patience: float) -> None:
        """Those peers had sessions under the old key, and have followed in a moment; see to it."""
        with suppress(KernelError):  # the agent finds that, too
            for _ in range(_HANDSHAKES):
                deadline = monotonic() + self._random.uniform(1, 2) * patience
                while missing := peers - self._sessions(since):
                    if monotonic() > deadline:
                        break
                    sleep(_POLL_SECONDS)
                else:
                    return
                self._kernel.shake_hands(private)
            log.warning("no WireGuard session under the new key yet with %s", ", ".join(sorted(missing)))

    def _sessions(self, since: float) -> set[str]:
        """Addresses of the peers with which there was a handshake since (Unix time)."""
        seen = self._kernel.observe_tunnel()
        if seen is None:
            return set()
        recent = {key for key, contact in seen.contacts.items() if contact.handshake > since}
        return {peer.address for peer in seen.tunnel.peers if peer.key in recent}

    def _wanted(self) -> bool:
        """True if this host has, or had, an encrypted network."""
        if self._me.host.wg_key:
            return True
        mine = {*self._cluster.memberships(self._me.id).values(), *self._cluster.local_networks(self._me.id)}
        networks = (self._cluster.networks.get(vni) for vni in mine)
        return any(network.encrypted for network in networks if network)

    def _proven(self) -> bool:
        return (
            bool(self.backend) and not self._kernel.intruders() and self._kernel.has_tunnel(self._me.host.wg_interface)
        )

    def _establish(self) -> None:
        try:
            self._refuse_intruders()
            if not self._me.host.can_encrypt:
                self._prepare_address()
            self._kernel.ensure_tunnel()
            for _ in range(_ATTEMPTS):
                key = self._key()
                address = self._me.host.wg_address if self._me.host.can_encrypt else self._free_address()
                self._configure(key, address)
                if self._announce(key, address):
                    break
            else:
                raise Exhausted("too many hosts take WireGuard addresses at once: try again")
        except WeftError as error:
            self._note(str(error))
            raise
        self._note("")

    def _refuse_intruders(self) -> None:
        intruders = self._kernel.intruders()
        self.breached = bool(intruders)
        if intruders:
            raise ConfigError(
                f"encrypted networks are shut: {', '.join(intruders)} is in the namespace of the WireGuard device, and "
                "packets could pass that by: take it out (nsenter --net=/run/docker/weft/wg ip link)"
            )

    def _prepare_address(self) -> None:
        """Before this host takes one: see that it may, and that others can learn of it.

        A pool that was chosen must not be that of one of the host's routes. Those could not come in its way, so once
        there is an address a new route changes nothing, and of weft's own choice nobody asks: a host whose underlay or
        VPN is in there works as well as any. But who chooses one means addresses that are free.
        """
        pool = IPv4Network(self._me.host.wg_pool)
        if self._occupied and (route := self._occupied(pool)):
            raise ConfigError(
                f"WEFT_WG_POOL={pool} overlaps the route {route} of this host: choose another range, the same on all "
                f"hosts, or none, and {WIREGUARD_POOL} is taken, whatever routes there are"
            )
        if self._me.host.wg_address:  # of another pool, which was the setting until now
            self._publish()

    def _key(self) -> PrivateKey:
        key = self._keys.read()
        if key is None:
            key = PrivateKey.generate()
            self._keys.write(key)
        return key

    def _free_address(self) -> str:
        pool = IPv4Network(self._me.host.wg_pool)
        taken = {other.wg_address for other in list(self._cluster.hosts.values())} - {""}
        if len(taken) >= pool.num_addresses - 2:
            raise Exhausted(f"the WireGuard pool {pool} has no address for this host: set a larger WEFT_WG_POOL")
        while True:
            address = str(pool[self._random.randrange(1, pool.num_addresses - 1)])
            if address not in taken:
                return address

    def _configure(self, key: PrivateKey, address: str) -> None:
        seen = self._kernel.observe_tunnel()
        if seen is None:
            raise KernelError("find the WireGuard device", 0, "it is gone again")
        wanted = self._tunnel(key, address, seen)
        plan = plan_tunnel(wanted, seen)
        if plan.reasons:
            log.info("update WireGuard device (%s)", ", ".join(plan.reasons))
            self._kernel.configure_tunnel(wanted, key)
        if plan.put or plan.delete:
            self._kernel.write_peers(plan)
            self._told = {key: peer for key, peer in self._told.items() if key not in plan.delete}
            self._told |= {peer.key: peer for peer in plan.put}
            log.info("WireGuard peers: %d put, %d deleted", len(plan.put), len(plan.delete))
        if self.backend != seen.backend:
            self.backend = seen.backend
            if self.backend == "kernel":
                log.info("encrypted networks go through WireGuard")
            else:
                why = "since this kernel has no WireGuard"
                log.warning("encrypted networks go through %s, %s: they are %s", self.backend, why, _SLOW)

    def _tunnel(self, key: PrivateKey, address: str, seen: ObservedTunnel) -> Tunnel:
        """The device as it should be."""
        me = replace(self._me.host, wg_key=key.public, wg_address=address)
        mtu = (me.mtu or self._kernel.underlay_mtu(me.underlay)) - topology.wireguard_overhead(me.underlay)
        peers = topology.peers(self._cluster, me)
        if not self._cluster.loaded:  # what is there may be newer than what was last known
            present = {peer.address for peer in seen.tunnel.peers}
            peers = seen.tunnel.peers | {peer for peer in peers if peer.address not in present}
        elif lost := self._lost_keys():
            taken = {value for peer in peers for value in (peer.key, peer.address)}
            peers |= {peer for peer in seen.tunnel.peers if peer.key in lost and taken.isdisjoint(peer[:2])}
        return Tunnel(key.public, me.wg_interface, self.port, mtu, self._whereabouts(peers, seen))

    def _whereabouts(self, peers: frozenset[Peer], seen: ObservedTunnel) -> frozenset[Peer]:
        """The peers, those with a session at the underlay address from which they answer.

        WireGuard sends from the address that the route chooses, which is another than the VTEP's where that is on the
        loopback interface or is one of two, and follows the other end to wherever its packets come from. That is put
        right only if it leads nowhere, or if the host has said anew where it is.
        """
        since = time() - _SESSION_SECONDS
        found = {
            (peer.key, peer.address): peer
            for peer in seen.tunnel.peers
            if peer.key in seen.contacts and seen.contacts[peer.key].handshake > since
        }
        return frozenset(
            found.get(peer[:2], peer) if self._told.get(peer.key) == peer else peer  # as told, but it went elsewhere
            for peer in peers
        )

    def _lost_keys(self) -> set[str]:
        """Those of hosts that the store has just lost: their sessions outlast that, as all of the data plane does."""
        since = monotonic() - _LOST_SECONDS
        return {host.wg_key for host, lost in list(self._cluster.lost.values()) if lost > since}

    def _announce(self, key: PrivateKey, address: str) -> bool:
        """Let the others know; False if another host has the address, or the key, and it takes another."""
        before = self._me.host
        self._me.encrypt(key.public, address, self.port)
        if self._me.host == before:
            return True
        try:
            self._publish()
        except WeftError as error:
            if before.can_encrypt and not isinstance(error, TunnelInUse):
                log.warning("the WireGuard key is not published yet: %s", error)  # every beat tries again
                return True
            self._me.encrypt("", "", 0)
            if not isinstance(error, TunnelInUse):
                raise
            if isinstance(error, TunnelKeyInUse):
                log.warning("%s; this host makes a new one", error)
                self._keys.write(PrivateKey.generate())
            return False
        return True

    def _rotate_if_due(self) -> None:
        if not self._rotation or self._keys.age() <= self._rotation:
            return
        try:
            self.rotate()
        except WeftError as error:
            log.warning("the WireGuard key of this host is due, but cannot be replaced now: %s", error)

    def _note(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.error("no encrypted network works on this host: %s", problem)
        if self.problem and not problem:
            log.info("encrypted networks work again")
        self.problem = problem
