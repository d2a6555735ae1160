"""Every error weft raises on purpose, named by who must act.

    WeftError
    ├── InvalidRequest   the caller sent something wrong: correct the command
    ├── NotFound         the caller named something that does not exist
    ├── Conflict         what was asked contradicts what exists: choose another value
    │   └── Taken        an address or a MAC that another endpoint has
    ├── Exhausted        nothing left to give: make room or enlarge
    ├── ConfigError      the operator's settings or this host must be corrected
    ├── StoreError       the store is away, damaged or too new
    │   └── Unreadable   one entry of it is
    ├── EngineError      the Docker Engine's API did not answer
    └── KernelError      the kernel refused a step

The text of each says what happened, to which object, and what to do about it: it is shown to the
person who typed the `docker` command, word for word.
"""

from __future__ import annotations

import os

UNKNOWN = "is not known to weft"
"""Part of the message when Docker means an object that the store does not have (any more)."""

IN_USE = "is used by another program on this host"
"""Part of the message when a UDP port is taken."""


class WeftError(Exception):
    """Base of all errors that have a message for a user."""


class InvalidRequest(WeftError):
    """A value in the request is missing, malformed or contradictory."""


class NotFound(WeftError):
    """The request names an object that weft does not know."""


class Conflict(WeftError):
    """The request contradicts something that exists."""


class Taken(Conflict):
    """An address or a MAC address is another endpoint's, as `fact` says; the message also says what to do about it."""

    def __init__(self, fact: str) -> None:
        super().__init__(f"{fact}: choose another, or let weft choose")
        self.fact = fact


class Exhausted(WeftError):
    """No address, pool or VNI is left."""


class ConfigError(WeftError):
    """A setting or a property of this host keeps weft from working."""


class StoreError(WeftError):
    """The store cannot be read or written."""


class Unreadable(StoreError):
    """One entry of the store is damaged or too new; the store itself answers."""


class EngineError(WeftError):
    """The Docker Engine's API cannot be reached, or it refused."""


class KernelError(WeftError):
    """The kernel refused one step.

    :param what: the step, in words (`create VXLAN device vx42`).
    :param errno: the kernel's error number, 0 when there is none.
    :param hint: what to do about it, if that is known.
    """

    def __init__(self, what: str, errno: int, hint: str = "") -> None:
        super().__init__(what, errno, hint)  # all that it was made of, so that it can be passed to another process
        self.errno = errno

    def __str__(self) -> str:
        what, errno, hint = self.args
        reason = os.strerror(errno) if errno else "failed"
        return f"{what}: {reason}" + (f"; {hint}" if hint else "")
