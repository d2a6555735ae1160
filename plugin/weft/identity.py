"""Who this host is: an id made once and kept in the state folder. Name and address may change, the id may not."""

from __future__ import annotations

import os
import threading
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from weft.errors import ConfigError
from weft.model import Host


class LocalHost:
    """This host's record as it is now. What it has may change while weft runs, by several threads."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._changing = threading.Lock()

    @property
    def id(self) -> str:
        return self.host.id

    def move(self, underlay: str) -> None:
        with self._changing:
            self.host = replace(self.host, underlay=underlay)

    def measure(self, mtu: int) -> None:
        """What the underlay carries."""
        with self._changing:
            self.host = replace(self.host, mtu=mtu)

    def narrow(self, path_mtu: int) -> None:
        """What the paths to other hosts carry, if that is less; else 0."""
        with self._changing:
            self.host = replace(self.host, path_mtu=path_mtu)

    def encrypt(self, key: str, address: str, port: int) -> None:
        """What others need to send to this host encrypted; all empty if they cannot."""
        with self._changing:
            self.host = replace(self.host, wg_key=key, wg_address=address, wg_port=port)


def host_id(state: Path) -> str:
    """The id from `<state>/host-id`, made at first use."""
    path = state / "host-id"
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _write_new(path, uuid.uuid4().hex + "\n")
        text = path.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"the state folder {state} cannot be used: {error.strerror}; it must be a folder that weft may write "
            "(WEFT_STATE)"
        ) from error
    if len(text) != 32 or not text.isalnum():
        raise ConfigError(f"{path} does not hold a host id: restore it, or delete it and this host becomes a new one")
    return text


def _write_new(path: Path, text: str) -> None:
    """Make the file with all of its text or not at all, whenever the power fails; another's stays."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):
        os.link(fresh, path)
    fresh.unlink()


def instance() -> str:
    """What tells this machine, as it runs now, from its clone and from itself before a reboot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
