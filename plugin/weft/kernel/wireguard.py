"""The WireGuard device of this host, in a namespace where nothing else is: see `dataplane.Tunnel`.

The device is born in the host's namespace, where its UDP socket stays for good, and lives in the other one (WireGuard
is made for that: wireguard.com/netns). What is in there can neither be reached by a route, a firewall rule or a
fragment of the host's, nor leave by any: with the device gone or down there is no other way out.

There are two implementations of WireGuard, which differ in how keys and peers are set. `_InKernel` speaks generic
netlink through pyroute2: one message for each peer, and a peer that is cut over two messages of a dump comes twice.
The other is `userspace.py`. All the rest, that is addresses, MTU and state of the link, is the same for both.

Of two hosts, one may begin a handshake at a time. If both do, each answers the other's and forgets its own, so neither
is ever done; and each tries again after five seconds only, whatever there is to send (REKEY_TIMEOUT in the kernel's
messages.h). A new key makes that likely: its owner begins with its next packet, and so does each peer that learns of
the key. So the owner begins at once, when nobody knows the key: that comes to nothing, and binds it for five seconds.
Whoever learns of the key then begins as well, and is known already. It is the same with a host that is new. Should that
go amiss nevertheless, another private key, and then the right one again, free the owner from the five seconds
(`shake_hands`). Nothing is lost by it, for packets to send wait, and those of old sessions are still received.
"""

from __future__ import annotations

import socket
import time
from base64 import b64encode
from collections.abc import Iterable
from contextlib import suppress
from errno import EADDRINUSE, EOPNOTSUPP
from functools import partial
from ipaddress import ip_address
from socket import AF_INET
from typing import Any, Protocol

from weft.dataplane import Peer, Shaper, Tunnel
from weft.errors import IN_USE, KernelError
from weft.kernel.connection import Connection
from weft.kernel.namespace import NamespaceThread
from weft.kernel.netlink import Rtnetlink
from weft.kernel.observe import kind_of, no_ipv6_address, observe_links
from weft.kernel.userspace import Userspace
from weft.keys import PrivateKey
from weft.reconcile import Contact, ObservedTunnel, TunnelPlan

DEVICE = "weft-wg"
_DISCARD = 9
"""A port where nobody listens (RFC 863)."""
_SETTLE_SECONDS = 0.05
"""In which what is under way arrives: packets of the old sessions, and handshakes that are to come to nothing."""
_INSTALL = (
    "this kernel has no WireGuard (Linux 5.6 and newer do: modprobe wireguard), and wireguard-go, which does without, "
    "is not installed (Debian and Ubuntu: apt install wireguard-go; the managed plugin does not take it, since both "
    "would end together)"
)


class _Implementation(Protocol):
    """How keys and peers of the device are set."""

    name: str

    def read(self) -> tuple[str, int, dict[Peer, Contact]]:
        """Public key, UDP port, and peers. A peer without an endpoint has "" and 0."""
        ...

    def set_key(self, private: PrivateKey, port: int) -> None: ...
    def write(self, put: Iterable[Peer], delete: Iterable[str]) -> None: ...


class WireGuard:
    """Implements `reconcile.Tunnels`, but for the underlay's MTU. Any thread may call.

    :param name: the device's.
    :param thread: lives in the device's namespace; so do the sockets of `inside`, `generic` (generic netlink) and
        `reader`, and `fd` is its file descriptor.
    :param host_thread: lives in the host's, as does the socket of `outside`.
    """

    def __init__(
        self,
        name: str,
        *,
        thread: NamespaceThread,
        inside: Connection,
        generic: Connection,
        reader: Rtnetlink,
        fd: int,
        host_thread: NamespaceThread,
        outside: Connection,
    ) -> None:
        self._name = name
        self._thread = thread
        self._inside = inside
        self._reader = reader
        self._fd = fd
        self._outside = outside
        self._kernel = _InKernel(generic, name)
        self._userspace = Userspace(host_thread, name)

    def intruders(self) -> list[str]:
        return sorted(observe_links(self._reader, None).keys() - {self._name})

    def ensure_tunnel(self) -> None:
        match kind_of(self._reader, self._name):
            case "wireguard":
                return
            case "tun" if self._userspace.answers():
                return
            case "":
                pass
            case _:  # no WireGuard device, or one whose process is stuck
                self._remove()
        if self._userspace.answers() and self._take_in():  # we were killed before we did that
            return
        self._userspace.stop()  # it may live on without its device
        try:
            self._create()
        except KernelError as error:
            if error.errno != EOPNOTSUPP:
                raise
            if not Userspace.installed():
                raise KernelError(f"create WireGuard device {self._name}", EOPNOTSUPP, _INSTALL) from None
            self._userspace.start()
            self._take_in()

    def observe_tunnel(self) -> ObservedTunnel | None:
        link = observe_links(self._reader, [self._name]).get(self._name)
        implementation = self._implementation()
        if link is None or implementation is None or isinstance(link.link, Shaper):
            return None
        key, port, contacts = implementation.read()
        addresses = self._addresses()
        return ObservedTunnel(
            Tunnel(key, ", ".join(addresses), port, link.link.mtu, frozenset(contacts)),
            implementation.name,
            link.faults,
            {peer.key: contact for peer, contact in contacts.items()},
        )

    def has_tunnel(self, address: str) -> bool:
        link = observe_links(self._reader, [self._name]).get(self._name)
        if link is None or self._implementation() is None:
            return False
        return "down" not in link.faults and address in self._addresses()

    def configure_tunnel(self, tunnel: Tunnel, private: PrivateKey) -> None:
        implementation = self._implementation()
        index = self._index()
        if implementation is None:
            raise self._gone()
        what = f"set up WireGuard device {self._name}"
        try:
            self._inside.call(what, partial(self._set_up, index=index, tunnel=tunnel))
            before, _, peers = implementation.read()
            implementation.set_key(private, tunnel.port)  # at last, since from then on what is sent may have to wait
            if peers and before != tunnel.key:
                self._greet(peers)
        except KernelError as error:
            if error.errno != EADDRINUSE:
                raise
            hint = f"UDP port {tunnel.port} {IN_USE}: choose another with WEFT_WG_PORT"
            raise KernelError(what, EADDRINUSE, hint) from error

    def write_peers(self, plan: TunnelPlan) -> None:
        implementation = self._implementation()
        if implementation is None:
            raise self._gone()
        if plan.put:
            implementation.write(plan.put, ())
            self._greet(plan.put)
        implementation.write((), plan.delete)

    def shake_hands(self, private: PrivateKey) -> None:
        implementation = self._implementation()
        if implementation is None:
            raise self._gone()
        _, port, peers = implementation.read()
        for key in (PrivateKey.generate(), private):
            implementation.set_key(key, port)
        self._greet(peers)

    def _greet(self, peers: Iterable[Peer]) -> None:
        """Begin handshakes with them, and let what was under way before arrive."""
        self._thread.run(partial(_send, [peer.address for peer in peers]))
        time.sleep(_SETTLE_SECONDS)

    def _implementation(self) -> _Implementation | None:
        kind = kind_of(self._reader, self._name)
        return {"wireguard": self._kernel, "tun": self._userspace}.get(kind)  # type: ignore[return-value]

    def _create(self) -> None:
        """By one request, as for VXLAN devices: where it is made from is where its UDP socket will be."""
        self._outside.call(
            f"create WireGuard device {self._name}",
            lambda route: route.link("add", ifname=self._name, kind="wireguard", net_ns_fd=self._fd),
        )

    def _take_in(self) -> bool:
        """Move the device that wireguard-go has made in the host's namespace; False if there is none."""

        def move(route: Any) -> bool:
            found = route.link_lookup(ifname=self._name)
            for index in found:
                route.link("set", index=index, net_ns_fd=self._fd)
            return bool(found)

        return self._outside.call(f"move {self._name} away from the host's own links", move)

    def _remove(self) -> None:
        index = self._index()
        self._inside.call(f"remove link {self._name}", lambda route: route.link("del", index=index))

    def _set_up(self, route: Any, index: int, tunnel: Tunnel) -> None:
        for present in set(self._addresses_by(route, index)) - {tunnel.address}:
            route.addr("del", index=index, **_split(present))
        if tunnel.address not in self._addresses_by(route, index):
            route.addr("add", index=index, **_split(tunnel.address))
        route.link("set", index=index, mtu=tunnel.mtu)  # by itself: it may be what lets the device have IPv6
        if settings := no_ipv6_address(tunnel.mtu):
            route.link("set", index=index, **settings)
        route.link("set", index=index, state="up")

    def _addresses(self) -> list[str]:
        index = self._index()
        return self._inside.call(f"read addresses of {self._name}", lambda route: self._addresses_by(route, index))

    @staticmethod
    def _addresses_by(route: Any, index: int) -> list[str]:
        found = route.addr("dump", index=index, family=AF_INET)
        return [f"{one.get_attr('IFA_LOCAL')}/{one['prefixlen']}" for one in found]

    def _index(self) -> int:
        device = self._reader.find(name=self._name)
        if device is None:
            raise self._gone()
        return device.ifindex

    def _gone(self) -> KernelError:
        return KernelError(f"find WireGuard device {self._name}", 0, "it is gone")


class _InKernel:
    """:param generic: a connection that speaks generic netlink in the device's namespace."""

    name = "kernel"

    def __init__(self, generic: Connection, device: str) -> None:
        self._generic = generic
        self._device = device

    def read(self) -> tuple[str, int, dict[Peer, Contact]]:
        messages = self._generic.call(f"read {self._device}", lambda wg: list(wg.info(self._device)))
        key, port = "", 0
        found: dict[str, tuple[str, int, list[str], Contact]] = {}
        for message in messages:
            key = _key(message.get_attr("WGDEVICE_A_PUBLIC_KEY")) or key
            port = message.get_attr("WGDEVICE_A_LISTEN_PORT") or port
            for peer in message.get_attr("WGDEVICE_A_PEERS") or ():
                name = _key(peer.get_attr("WGPEER_A_PUBLIC_KEY"))
                allowed = [one["addr"] for one in peer.get_attr("WGPEER_A_ALLOWEDIPS") or ()]
                if name in found:  # the rest of one that did not fit into the last message
                    found[name][2].extend(allowed)
                    continue
                endpoint = peer.get_attr("WGPEER_A_ENDPOINT")
                address, place = (str(ip_address(endpoint["addr"])), endpoint["port"]) if endpoint else ("", 0)
                handshake = peer.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME")
                contact = Contact(
                    handshake["tv_sec"] + handshake["tv_nsec"] / 1e9 if handshake else 0.0,
                    peer.get_attr("WGPEER_A_RX_BYTES") or 0,
                    peer.get_attr("WGPEER_A_TX_BYTES") or 0,
                )
                found[name] = address, place, allowed, contact
        peers = {
            Peer(name, ",".join(allowed).removesuffix("/32"), address, place): contact
            for name, (address, place, allowed, contact) in found.items()
        }
        return key, port, peers

    def set_key(self, private: PrivateKey, port: int) -> None:
        secret = b64encode(private.secret).decode()
        self._set("set the key of", private_key=secret, listen_port=port)

    def write(self, put: Iterable[Peer], delete: Iterable[str]) -> None:
        for peer in put:
            self._set(
                "put a peer of",
                peer={
                    "public_key": peer.key,
                    "endpoint_addr": peer.endpoint,
                    "endpoint_port": peer.port,
                    "replace_allowed_ips": True,
                    "allowed_ips": [f"{peer.address}/32"],
                },
            )
        for key in delete:
            self._set("remove a peer of", peer={"public_key": key, "remove": True})

    def _set(self, what: str, **settings: Any) -> None:
        self._generic.call(f"{what} {self._device}", lambda wg: wg.set(self._device, **settings))


def _split(interface: str) -> dict[str, Any]:
    address, _, prefix = interface.partition("/")
    return {"address": address, "prefixlen": int(prefix)}


def _key(value: Any) -> str:
    """pyroute2 gives a key as base64 in bytes."""
    return value.decode() if isinstance(value, bytes) else value or ""


def _send(addresses: Iterable[str]) -> None:
    """A packet to each, from the calling thread's namespace: WireGuard shakes hands if it has no session."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for address in addresses:
            with suppress(OSError):  # there may be no route to its underlay now
                udp.sendto(b"", (address, _DISCARD))
