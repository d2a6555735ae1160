"""What becomes of questions to the resolver while nobody answers them: they go to a server of the user.

The kernel itself would say that nobody listens, but not more than about once a second to each container
(net.ipv4.icmp_ratelimit), and Docker waits four seconds for every question that gets no answer at all. So a rule sends
them on unless the resolver's socket is there, which ends with weft however that ends; and unless it is marked as alive,
a mark that goes by itself if it is not renewed, as by a process that hangs. Kernels older than 5.10 and such without
nft_socket have the mark only. Once weft runs again nothing passes it.
"""

from __future__ import annotations

import logging
import subprocess
from functools import partial
from shutil import which

from weft.errors import KernelError

log = logging.getLogger(__name__)

_TABLE = "ip weft_dns"
_RULES = """
add table {table}
delete table {table}
table {table} {{
    set alive {{ type ipv4_addr; flags timeout; }}
    chain prerouting {{
        type nat hook prerouting priority -101; policy accept;
        ip daddr {address} ip daddr @alive {heard} accept
        ip daddr {address} meta l4proto {{ tcp, udp }} th dport 53 dnat to {server}
    }}
}}
add element {table} alive {{ {address} timeout {seconds}s }}
"""
"""-101 is before Docker's own nat rules."""
_HEARD = "meta l4proto { tcp, udp } socket wildcard 0"
"""Somebody listens, and not at every address."""
_RENEWAL = """
add element {table} alive {{ {address} timeout 1s }}
delete element {table} alive {{ {address} }}
add element {table} alive {{ {address} timeout {seconds}s }}
"""
_END = """
add element {table} alive {{ {address} timeout 1s }}
delete element {table} alive {{ {address} }}
"""


def open_detour(address: str, server: str, seconds: int) -> None:
    """Make the rules, and the mark for so many seconds."""
    rules = partial(_RULES.format, table=_TABLE, address=address, server=server, seconds=seconds)
    try:
        _nft(rules(heard=_HEARD))
    except KernelError as error:
        log.debug("%s", error)
        _nft(rules(heard=""))


def keep_shut(address: str, seconds: int) -> None:
    """The resolver is alive for so many seconds from now."""
    _nft(_RENEWAL.format(table=_TABLE, address=address, seconds=seconds))


def let_pass(address: str) -> None:
    """The resolver ends."""
    _nft(_END.format(table=_TABLE, address=address))


def _nft(commands: str) -> None:
    """One transaction, in the network namespace of the calling thread."""
    program = which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    what = "set up a detour for the resolver's questions"
    if program is None:
        raise KernelError(what, 0, "there is no nft on this host: install nftables")
    try:
        done = subprocess.run([program, "-f", "-"], input=commands, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(what, 0, f"nft did not run to its end: {error}") from error
    if done.returncode:
        raise KernelError(what, 0, f"nft says: {' '.join(done.stderr.split())}")
