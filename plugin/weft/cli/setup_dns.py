"""`weft setup dns`: puts the resolver first among the DNS servers in dockerd's daemon.json.

Only the value of `dns` is touched; the rest of the file stays as it is, byte for byte. dockerd's list replaces the
host's own, so where there is none yet the host's servers follow ours: what is not a container's name is theirs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from time import strftime
from typing import Any, NoReturn

from rich.console import Console

from weft.config import RESOLVER
from weft.errors import ConfigError

DAEMON_JSON = Path("/etc/docker/daemon.json")
_BEHIND = "systemd/resolve/resolv.conf"
"""In /run: the servers behind systemd-resolved's stub, which listens on the host's loopback only."""
_PLUGIN_RUN = Path("/host/api")
"""Where the managed plugin, and nobody else, has the host's /run (config.json)."""
_RESOLV_CONFS = (Path("/etc/resolv.conf"), Path("/run", _BEHIND), _PLUGIN_RUN / _BEHIND)
_PROC = Path("/proc")
_MOST = 3
"""Docker asks no more servers than that (moby daemon/libnetwork/resolver.go)."""
_INDENT = 2
_WHITESPACE = tuple(" \t\r\n")


@dataclass(frozen=True, slots=True)
class Edit:
    """What is to become of a file. `before` is None if there is none."""

    path: Path
    before: str | None
    after: str
    servers: tuple[str, ...]

    @property
    def changed(self) -> bool:
        return self.before != self.after

    @property
    def diff(self) -> str:
        before, after = (self.before or "").splitlines(), self.after.splitlines()
        was = str(self.path) if self.before is not None else "/dev/null"
        return "\n".join(difflib.unified_diff(before, after, was, str(self.path), lineterm=""))


def add_command(setup: Any) -> None:
    """Add `dns` to the parser of `weft setup`."""
    meaning = "let Docker ask weft for the names of containers on other hosts: sets dns in daemon.json"
    parser = setup.add_parser("dns", help=meaning, description=meaning)
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    parser.add_argument("--address", default=RESOLVER, help="the resolver's, as in WEFT_DNS (default: %(default)s)")
    parser.add_argument(
        "--upstream",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a server for all other names; may be repeated (default: the host's own)",
    )
    parser.add_argument("--file", type=Path, default=DAEMON_JSON, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, show=_show)


def run(options: argparse.Namespace, socket_path: Path) -> Any:
    """Do it, unless it is only to be shown."""
    resolver, upstream = _address(options.address), [_address(text) for text in options.upstream]
    if options.file == DAEMON_JSON and _PLUGIN_RUN.is_dir():
        _refuse_plugin(resolver, upstream)
    _refuse_flag(_PROC)
    edit = plan(options.file, resolver, upstream)
    backup = write(edit) if edit.changed and not options.dry_run else None
    return {
        "file": str(edit.path),
        "dns": edit.servers,
        "changed": edit.changed and not options.dry_run,
        "diff": edit.diff,
        "backup": str(backup) if backup else None,
    }


def plan(path: Path, resolver: str, upstream: Sequence[str] = ()) -> Edit:
    """What `dns` has to be, with everything else as it is. `ConfigError` if the file cannot be understood."""
    path = path.resolve()  # a link stays one
    try:
        before = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        before = None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    text = before if before is not None and before.strip() else "{}\n"
    members = {name: (start, end) for name, start, end in _members(path, text)}
    has: Any = json.loads(text[slice(*members["dns"])]) if "dns" in members else []
    if not isinstance(has, list) or not all(isinstance(server, str) for server in has):
        raise ConfigError(f"{path}: dns must be a list of addresses: correct it first")
    others = [server for server in upstream or has if server != resolver] or host_servers()[: _MOST - 1]
    if loopback := [server for server in others if _is_loopback(server)]:
        raise ConfigError(
            f"no container can ask {loopback[0]}, which is on the host's own loopback: give the servers of your "
            "network instead (with systemd-resolved, resolvectl dns shows them), --upstream ADDRESS"
        )
    servers = (resolver, *others)
    if list(servers) == has:
        return Edit(path, before, before or "", servers)
    return Edit(path, before, _with_dns(text, members, servers), servers)


def host_servers(files: Sequence[Path] = _RESOLV_CONFS) -> list[str]:
    """The host's own DNS servers, of the first file that has any that containers can ask; IPv4 first."""
    for path in files:
        if found := [server for server in _nameservers(path) if not _is_loopback(server)]:
            return sorted(found, key=lambda server: ip_address(server).version)
    raise ConfigError(
        f"{files[0]} names no DNS server that containers could ask: give those of your network, --upstream ADDRESS"
    )


def _is_loopback(server: str) -> bool:
    """What is no address is for dockerd to refuse."""
    try:
        return ip_address(server).is_loopback
    except ValueError:
        return False


def _nameservers(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        match line.split():
            case ["nameserver", address, *_] if "%" not in address:  # one with a zone is of use on this host only
                try:
                    yield str(ip_address(address))
                except ValueError:
                    continue


def write(edit: Edit) -> Path | None:
    """Replace the file at once; it keeps its mode and owner. Returns where the old one is."""
    backup = None
    fresh = edit.path.with_name(f".{edit.path.name}.weft")
    try:
        edit.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with fresh.open("w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            if edit.before is not None:
                status = edit.path.stat()
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), status.st_mode & 0o7777)
                backup = edit.path.with_name(f"{edit.path.name}.{strftime('%Y%m%d-%H%M%S')}")
                shutil.copy2(edit.path, backup)
            file.write(edit.after)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(edit.path)
    except OSError as error:
        raise ConfigError(f"{edit.path} cannot be written: {error}; this needs root") from error
    finally:
        fresh.unlink(missing_ok=True)
    return backup


def _members(path: Path, text: str) -> Iterator[tuple[str, int, int]]:
    """Names of the top-level object's members, and where their values begin and end."""
    try:
        whole = json.loads(text)
        if not isinstance(whole, dict):
            raise ConfigError(f"{path} is not a JSON object: correct it first")
        decoder = json.JSONDecoder()
        at, seen = _skip(text, 0) + 1, set[str]()
        while text[at := _skip(text, at)] != "}":
            name, at = decoder.raw_decode(text, at)
            start = _skip(text, _skip(text, at) + 1)
            _, end = decoder.raw_decode(text, start)
            if name in seen:
                raise ConfigError(f"{path} has {name} twice: correct it first")
            seen.add(name)
            yield name, start, end
            at = _skip(text, end)
            at += text[at] == ","
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; dockerd would not start with it either") from error


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in _WHITESPACE:
        at += 1
    return at


def _with_dns(text: str, members: dict[str, tuple[int, int]], servers: Sequence[str]) -> str:
    value = json.dumps(servers)
    if "dns" in members:
        start, end = members["dns"]
        return text[:start] + value + text[end:]
    if not members:
        opening, closing = text.index("{"), text.rindex("}")
        return f'{text[:opening]}{{\n{" " * _INDENT}"dns": {value}\n{text[closing:]}'
    first, (_, last) = text.index('"'), max(members.values())
    before = text[text.index("{") + 1 : first]  # between members is what stands before the first one
    return f'{text[:last]},{before or " "}"dns": {value}{text[last:]}'


def _refuse_plugin(resolver: str, upstream: Sequence[str]) -> NoReturn:
    """The file that is seen here would be the plugin's own, which dockerd never reads."""
    line = json.dumps({"dns": [resolver, *(upstream or host_servers()[: _MOST - 1])]})[1:-1]
    raise ConfigError(
        f"the managed plugin does not see the host's {DAEMON_JSON}, so nothing was changed. Put this line into it "
        f"(if it has dns already, only {resolver} before the others) and restart Docker, systemctl restart docker:\n"
        f"  {line}"
    )


def _refuse_flag(proc: Path) -> None:
    """dockerd does not start with `dns` both in its file and on its command line."""
    for entry in proc.glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if Path(os.fsdecode(words[0])).name == "dockerd" and any(w.partition(b"=")[0] == b"--dns" for w in words):
            raise ConfigError(
                "dockerd was started with --dns, beside which it takes no dns in its file: move those servers from its "
                "command line (systemctl edit docker) into daemon.json first"
            )


def _address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise ConfigError(f"{text!r} is not an IP address") from None


def _show(answer: Any, console: Console) -> None:
    if not answer["diff"]:
        console.print(f"{answer['file']} is right as it is: Docker asks {', '.join(answer['dns'])}")
        return
    console.print(answer["diff"], markup=False, highlight=False)
    if not answer["changed"]:
        console.print("nothing was changed")
        return
    saved = f" (the old one is {answer['backup']})" if answer["backup"] else ""
    console.print(f"{answer['file']} is written{saved}", highlight=False)
    console.print(
        "dockerd reads it when it starts: systemctl restart docker. Without live-restore that restarts all containers; "
        "with it they keep their servers until each is restarted.",
        highlight=False,
    )
