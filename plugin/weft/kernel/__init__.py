"""This host's kernel: the `Kernel` port of `weft.reconcile`. Nothing else in weft speaks netlink or imports pyroute2.

    namespace     the data-plane namespace, and a thread for each namespace
    netlink       plain rtnetlink: batches, dumps, looking up a link
    rows          the bulk tables, over netlink
    monitor       events, over netlink
    connection    pyroute2, in a namespace's thread
    links         doing link steps, over connections to both namespaces
    observe       reading links, over netlink
    shaping       limits of rates, over netlink
    offload       who computes checksums, over ethtool's ioctl
    probe         sockets for probes, on the tunnel devices of the data-plane namespace
    underlay      the host's addresses and routes, over a connection
    mounts        whether a mount made here is there for the host too
    modules       loading kernel modules
    inspection    what the doctor looks at in the host's namespace, with or without the daemon
    detour        a rule for questions to a resolver that is not there, over nft
    wireguard     the device that encrypts, over generic netlink, or
    userspace     its stand-in wireguard-go, over a unix socket

Links, row writes, row dumps and lookups have a socket each and no lock in common: a bulk write of seconds delays the
creation of a veth by no more than the kernel's own lock.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pyroute2 import WireGuard as GenericWireGuard

from weft.dataplane import News, Row, Tunnel
from weft.errors import KernelError
from weft.kernel import detour
from weft.kernel.connection import Connection
from weft.kernel.inspection import Inspection
from weft.kernel.links import Links
from weft.kernel.modules import DEVICE_MODULES, load_module
from weft.kernel.monitor import Monitor, TunnelMonitor, open_events, open_tunnel_events
from weft.kernel.namespace import (
    NamespaceThread,
    ensure_namespace,
    find_namespace,
    forbid_routing,
    open_namespace,
    set_switches,
)
from weft.kernel.netlink import Rtnetlink, open_socket
from weft.kernel.observe import observe_links
from weft.kernel.probe import ProbeSocket, open_probe
from weft.kernel.rows import Rows
from weft.kernel.shaping import Shaping
from weft.kernel.underlay import Underlay, has_free_port
from weft.kernel.wireguard import DEVICE, WireGuard
from weft.keys import PrivateKey
from weft.model import IPNetwork
from weft.reconcile import ObservedLink, ObservedTunnel, RowPlan, Step, TunnelPlan

__all__ = ["DEVICE_MODULES", "Inspection", "LinuxKernel", "Monitor", "has_namespaces", "load_module"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_RECEIVE_BUFFER = 4 << 20
"""Room for an error to each message of a batch, several times over."""


@dataclass(frozen=True, slots=True)
class _Secured:
    """What lives in the namespace of the WireGuard device, and that as a file descriptor."""

    fd: int
    thread: NamespaceThread
    inside: Connection
    reader: Rtnetlink
    wireguard: WireGuard


def has_namespaces(run: Path) -> bool:
    """Whether the namespaces are there that `LinuxKernel.open` would make otherwise."""
    found = [find_namespace(run / name) for name in ("dp", "wg")]
    for fd in found:
        if fd is not None:
            os.close(fd)
    return None not in found


class LinuxKernel:
    """The data-plane namespace at `run`/dp, that of WireGuard at `run`/wg, and the host's beside them. Any thread may
    call, between `open()` and `close()`; the namespaces with all that is in them outlive both.

    :param run: the folder of weft below /run.
    :param host: the namespace that is the host's; by default that of this process.
    :param wireguard: name of the WireGuard device.
    """

    def __init__(self, run: Path, host: Path = Path("/proc/self/ns/net"), wireguard: str = DEVICE) -> None:
        self._path = run / "dp"
        self._tunnel_path = run / "wg"
        self._tunnel_name = wireguard
        self._host_path = host
        self._resources = ExitStack()
        self._secured: _Secured | None = None
        self._securing = threading.Lock()

    def open(self) -> None:
        with ExitStack() as resources:
            host_fd = open_namespace(self._host_path)
            resources.callback(os.close, host_fd)
            dp_fd = ensure_namespace(self._path)
            resources.callback(os.close, dp_fd)
            self._dp = resources.enter_context(closing(NamespaceThread("weft-dp", dp_fd)))
            removing = resources.enter_context(closing(NamespaceThread("weft-dp-remove", dp_fd)))
            self._host = resources.enter_context(closing(NamespaceThread("weft-host", host_fd)))
            self._dp.run(forbid_routing)
            self._dp.run(set_switches)
            opened = partial(self._dp.run, partial(open_socket, receive_buffer=_RECEIVE_BUFFER))
            self._lookup = resources.enter_context(closing(Rtnetlink(opened)))
            self._reader = resources.enter_context(closing(Rtnetlink(opened)))
            self._plain = resources.enter_context(
                self._dp.run(partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM))
            )
            shaping = resources.enter_context(closing(Rtnetlink(opened)))
            self._rows = resources.enter_context(closing(Rows(opened, self._lookup.find)))
            in_dp = resources.enter_context(closing(Connection(self._dp)))
            self._in_host = in_host = resources.enter_context(closing(Connection(self._host)))
            removals = resources.enter_context(closing(Connection(removing)))
            opened_in_host = partial(self._host.run, partial(open_socket, receive_buffer=_RECEIVE_BUFFER))
            self._underlay = Underlay(in_host, resources.enter_context(closing(Rtnetlink(opened_in_host))))
            self._links = Links(
                in_dp,
                removals,
                in_host,
                lambda: self._secure().inside,
                self._lookup.find,
                Shaping(shaping),
                self._plain,
                dp_fd=dp_fd,
                host_fd=host_fd,
            )
            self._resources = resources.pop_all()
        try:
            self._secure()
        except KernelError as error:
            log.error("no encrypted network works on this host: %s", error)

    def _secure(self) -> _Secured:
        """Plain networks do without it, so `KernelError` if it cannot be had is for whoever needs it."""
        with self._securing:
            if self._secured is None:
                with ExitStack() as resources:
                    self._secured = self._open_secured(resources)
                    self._resources.push(resources.pop_all())
            return self._secured

    def _open_secured(self, resources: ExitStack) -> _Secured:
        fd = ensure_namespace(self._tunnel_path)
        resources.callback(os.close, fd)
        thread = resources.enter_context(closing(NamespaceThread("weft-wg", fd)))
        thread.run(forbid_routing)
        inside = resources.enter_context(closing(Connection(thread)))
        generic = resources.enter_context(closing(Connection(thread, GenericWireGuard)))
        opened = partial(thread.run, partial(open_socket, receive_buffer=_RECEIVE_BUFFER))
        reader = resources.enter_context(closing(Rtnetlink(opened)))
        wireguard = WireGuard(
            self._tunnel_name,
            thread=thread,
            inside=inside,
            generic=generic,
            reader=reader,
            fd=fd,
            host_thread=self._host,
            outside=self._in_host,
        )
        return _Secured(fd, thread, inside, reader, wireguard)

    def close(self) -> None:
        self._secured = None
        self._resources.close()

    def monitor(self, news: News | None = None) -> Monitor:
        """Events from now on. It is closed on its own."""
        try:
            return Monitor(self._dp.run(open_events), self._lookup.find, news)
        except OSError as error:
            raise KernelError("follow kernel events", error.errno or 0) from error

    def tunnel_monitor(self) -> TunnelMonitor:
        """The same of the WireGuard device's namespace."""
        secured = self._secure()
        try:
            return TunnelMonitor(secured.thread.run(open_tunnel_events), secured.reader.find)
        except OSError as error:
            raise KernelError("follow kernel events", error.errno or 0) from error

    def check(self) -> None:
        self._links.check()

    def observe_links(self, names: Iterable[str] | None = None) -> dict[str, ObservedLink]:
        return observe_links(
            self._reader, names, plain=self._plain, tunnel_fd=self._secured.fd if self._secured else -1
        )

    def perform(self, step: Step) -> None:
        self._links.perform(step)

    def has_links(self, names: Iterable[str]) -> bool:
        return all(self._lookup.find(name=name) for name in names)

    def observe_rows(self, devices: Iterable[str]) -> set[Row]:
        return self._rows.observe(devices)

    def write_rows(self, plan: RowPlan) -> None:
        self._rows.write(plan)

    def intruders(self) -> list[str]:
        return self._secure().wireguard.intruders()

    def ensure_tunnel(self) -> None:
        self._secure().wireguard.ensure_tunnel()

    def observe_tunnel(self) -> ObservedTunnel | None:
        return self._secured.wireguard.observe_tunnel() if self._secured else None

    def has_tunnel(self, address: str) -> bool:
        return self._secure().wireguard.has_tunnel(address)

    def configure_tunnel(self, tunnel: Tunnel, private: PrivateKey) -> None:
        self._secure().wireguard.configure_tunnel(tunnel, private)

    def write_peers(self, plan: TunnelPlan) -> None:
        self._secure().wireguard.write_peers(plan)

    def shake_hands(self, private: PrivateKey) -> None:
        self._secure().wireguard.shake_hands(private)

    def routes(self) -> list[IPNetwork]:
        return self._underlay.routes()

    def route_within(self, pool: IPNetwork) -> str:
        return self._underlay.route_within(pool)

    def own(self, address: str) -> None:
        """Put an address on the host's loopback interface."""
        self._underlay.own(address)

    def open_sockets(self, make: Callable[[], Sequence[socket.socket]]) -> list[socket.socket]:
        """What `make` returns in the host's namespace, and then in the data plane's."""
        return [*self._host.run(make), *self._dp.run(make)]

    def open_probe(self, device: str) -> ProbeSocket:
        """A socket on a device of the data-plane namespace, which is closed on its own."""
        return self._dp.run(partial(open_probe, device))

    def open_detour(self, address: str, server: str, seconds: int) -> None:
        """See `kernel.detour`; this and the next two are about the host's namespace."""
        self._host.run(partial(detour.open_detour, address, server, seconds))

    def keep_shut(self, address: str, seconds: int) -> None:
        self._host.run(partial(detour.keep_shut, address, seconds))

    def let_pass(self, address: str) -> None:
        self._host.run(partial(detour.let_pass, address))

    def work_in(self, namespace: Path, work: Callable[[], T]) -> T:
        """Do `work` in another network namespace, in a thread made for it."""
        fd = open_namespace(namespace)
        try:
            with closing(NamespaceThread("weft-visit", fd)) as thread:
                return thread.run(work)
        finally:
            os.close(fd)

    def has_free_port(self, address: str, port: int) -> bool:
        return self._host.run(partial(has_free_port, address, port))

    def underlay_mtu(self, address: str, towards: Iterable[str] = ()) -> int:
        return self._underlay.mtu(address, towards)

    def has_address(self, address: str) -> bool:
        """Whether one of the host's interfaces has it."""
        return self._underlay.has(address)

    def underlay_address(self, spec: str, *, family: int = 0, present: str = "", towards: Iterable[str] = ()) -> str:
        """The address that the setting WEFT_UNDERLAY means; `ConfigError` names the candidates if it means none.

        :param family: its IP version; 0: either.
        :param present: the address until now, which stays while it can be meant.
        :param towards: addresses of other hosts or of the store: without a setting, the route to them decides.
        """
        return self._underlay.address(spec, family=family, present=present, towards=towards)
