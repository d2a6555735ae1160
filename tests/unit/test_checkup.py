"""What this host finds out of itself, part by part."""

from __future__ import annotations

from errno import EPERM
from types import SimpleNamespace
from typing import Any

from weft.config import from_environment
from weft.doctor import checkup
from weft.doctor.checkup import Checkup, Place
from weft.errors import KernelError


class Refusing:
    """A kernel of which nothing can be had."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object) -> None:
            raise KernelError(name, EPERM)

        return refuse


def test_what_the_kernel_refuses_hides_nothing_that_the_daemon_knows() -> None:
    """As on a host without the namespace of the WireGuard device."""
    settings = from_environment({})
    known: Any = SimpleNamespace(problem="not registered")
    kernel: Any = Refusing()
    parts = checkup.of_daemon(settings, kernel, known, known, known, known, None, None)
    facts = Checkup(settings, kernel, lambda: Place("", ()), parts).look()
    assert (facts.registered, facts.encryption, facts.intruders) == ("not registered", "not registered", ())
