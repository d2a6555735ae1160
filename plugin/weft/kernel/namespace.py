"""The data-plane network namespace, and threads that live in one namespace.

The namespace is a bind mount of itself: it stays, with all its devices and rows, when we end, and is found again when
we start. Mounts do not survive a reboot but the file under them may, so a path is a namespace only if the kernel says
so; otherwise a new one is mounted over it.

A namespace belongs to a thread, not to a process. A thread that wanders between namespaces is one forgotten return
away from doing its work in the wrong place, and pyroute2 forks to open a socket elsewhere, which is unsafe beside
threads. So there is one thread per namespace which enters it once and never leaves. Its sockets and its view of
/proc/sys/net are the namespace's. A socket made there may be used by any thread: it stays in its namespace.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from errno import EPERM, EROFS
from fcntl import ioctl
from pathlib import Path
from typing import TypeVar

from weft.errors import KernelError
from weft.kernel.mounts import outlives_us

log = logging.getLogger(__name__)

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MS_REMOUNT = 0x20
_NS_GET_NSTYPE = 0xB703
_PROC = Path("/proc/sys/net")

_CAPABILITY = "weft must run as root, with the capability CAP_SYS_ADMIN"
_NOT_SHARED = (
    "it would end with weft, and all containers' connections with it, since mounts made here do not reach the host: "
    "give weft's container -v /run/docker:/run/docker:rshared and, if Docker says that this is no shared mount, do "
    "mount --make-rshared /run on the host first; or do weft setup host on the host, before weft starts"
)

_libc = ctypes.CDLL(None, use_errno=True)


def ensure_namespace(path: Path) -> int:
    """A file descriptor of the network namespace mounted at `path`, which is made if it is not there."""
    what = f"mount a network namespace at {path}"
    try:
        fd = find_namespace(path)
        if fd is None:
            if not outlives_us(path):
                raise KernelError(what, 0, _NOT_SHARED)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(_mount_new, what, path).result()
            fd = find_namespace(path)
    except OSError as error:
        raise KernelError(what, error.errno or 0) from error
    if fd is None:
        raise KernelError(what, 0, "it is not visible afterwards: look at the mounts of this path")
    return fd


def open_namespace(path: Path) -> int:
    """A file descriptor of a namespace that has to be there."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"open the network namespace {path}", error.errno or 0) from error


def find_namespace(path: Path) -> int | None:
    """A file descriptor of the network namespace at `path`; None if that is something else or nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET:
            return fd
    except OSError:
        log.warning(
            "%s is no namespace: this host was rebooted, or the mount went with the plugin and containers are cut off: "
            "then type mount --make-rshared /run on the host, and start them again",
            path,
        )
    os.close(fd)
    return None


def _mount_new(what: str, path: Path) -> None:
    """Runs in a thread that ends afterwards, for it has left the host's namespace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    _call(what, _libc.unshare(_CLONE_NEWNET))
    _call(what, _libc.mount(b"/proc/thread-self/ns/net", os.fsencode(path), None, _MS_BIND, None))


def _call(what: str, result: int) -> None:
    if result < 0:
        errno = ctypes.get_errno()
        raise KernelError(what, errno, _CAPABILITY if errno == EPERM else "")


class NamespaceThread:
    """Runs callables, one at a time, in a thread that lives in the network namespace of a file descriptor."""

    def __init__(self, name: str, fd: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        try:
            self.run(lambda: _call("enter a network namespace", _libc.setns(fd, _CLONE_NEWNET)))
        except BaseException:
            self.close()
            raise

    def run(self, work: Callable[[], T]) -> T:
        """Do `work` there and wait for its result or error."""
        return self._pool.submit(work).result()

    def close(self) -> None:
        self._pool.shutdown()


ROUTING = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
"""The switches by which a namespace forwards packets; writing them is writing those of all its devices."""


def forbid_routing() -> None:
    """Make the calling thread's namespace no router.

    The kernel gives a new namespace the IPv4 switches of the host's (devconf_inherit_init_net), and a host with Docker
    forwards. The bridges of `--internal` networks have an address and one MAC that everybody knows; by them a container
    could send to all other internal networks of the host.
    """
    for name in ROUTING:
        switch = _PROC.parent / name.replace(".", "/")
        try:
            _set(switch, "0")
        except OSError as error:
            raise KernelError(f"write 0 to {switch} in a namespace of weft's", error.errno or 0) from error


def set_switches() -> None:
    """Set what a namespace has to have otherwise than the kernel gives it, in the calling thread's namespace.

    br_netfilter would have each frame pass iptables and conntrack; its switches exist only while it is loaded. Where
    IPv6 is off by default, a bridge would not take the neighbours of an IPv6 network. A link that gets IPv6 while it is
    up, since its MTU has grown, would at once make an address and speak (addr_gen_mode; 1 is `none`). Whoever asks a
    resolver that is not there shall be told so each time (icmp_ratelimit). What cannot be set is slower, or without
    IPv6, but right.
    """
    values = dict.fromkeys(_PROC.glob("bridge/bridge-nf-call-*"), "0") | {
        _PROC / "ipv6/conf/default/disable_ipv6": "0",
        _PROC / "ipv6/conf/default/addr_gen_mode": "1",
        _PROC / "ipv4/icmp_ratelimit": "0",
    }
    for switch, value in values.items():
        try:
            _set(switch, value)
        except OSError as error:
            log.warning("cannot write %s to %s in the data plane: %s", value, switch, error.strerror)


def _set(switch: Path, value: str) -> None:
    """Unless it is so, or the kernel has no such switch."""
    if switch.exists() and switch.read_text().strip() != value:
        _write(switch, value)


def _write(switch: Path, value: str) -> None:
    """A managed plugin has a /proc/sys of its own that is read-only at first."""
    try:
        switch.write_text(value)
    except OSError as error:
        if error.errno != EROFS:
            raise
        _libc.mount(None, b"/proc/sys", None, _MS_REMOUNT | _MS_BIND, None)  # if it fails, so does what follows
        switch.write_text(value)
