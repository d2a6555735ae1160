"""`weft support-bundle`: one file with all that somebody needs who is to find out from afar what is wrong.

Every part is collected by itself, and what cannot be had is named in its place: a bundle is made when things are
broken. Secrets are taken out of each part (`redact`): by what they look like, and those of this host by what they are.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import which
from time import strftime, time
from typing import Any

from weft import __version__, config
from weft.cli import NoDaemon, ask
from weft.cli.show import add, progress
from weft.config import Settings
from weft.errors import ConfigError, WeftError
from weft.redact import redact

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin"
_COMMAND_SECONDS = 15
_ASK_SECONDS = 40.0
_MOST = 8 << 20
"""Characters of one part: what is longer is cut."""
_LINES = "5000"
_README = """This is what weft {version} on host {host} knew at {when}.

Secrets (private keys, passwords, tokens) were taken out. Keys of WireGuard, public ones too, are shown as
<key 1a2b3c4d>, equal ones alike. Names and addresses of hosts, networks and containers are in here: look through it
before you send it.

daemon/    what the running weft says; without one, what its last snapshot says
kernel/    the network of the host, of the data plane (dp) and of encrypted networks (wg)
docker/    what the Docker Engine says
log/       the last {lines} lines of the services' logs
"""
_ASKED = {
    "status": "status",
    "settings": "settings",
    "hosts": "hosts",
    "networks": "networks",
    "endpoints": "endpoints",
    "addresses": "addresses",
    "peers": "peers",
    "plan": "plan",
    "garbage": "gc",
    "links": "links",
    "events": "events",
    "doctor": "doctor",
}
"""By the part's name, what the daemon is asked."""
_IN_EACH = {
    "link": ("ip", "-details", "-statistics", "link"),
    "address": ("ip", "address"),
    "route": ("ip", "route", "show", "table", "all"),
    "rule": ("ip", "rule"),
    "neighbour": ("ip", "neighbour"),
    "fdb": ("bridge", "fdb"),
    "ports": ("bridge", "-details", "link"),
    "nft": ("nft", "list", "ruleset"),
    "sockets": ("ss", "--all", "--numeric", "--udp", "--tcp", "--processes"),
    "wireguard": ("wg", "show"),
    "sysctl": ("sysctl", "--all", "--pattern", r"^net\.(bridge|ipv[46]\.(conf\.(all|default)|ip_forward))"),
}
"""What is asked in each namespace. `wg show` hides private keys."""
_OF_HOST = {
    "kernel/uname": ("uname", "-a"),
    "kernel/modules": ("lsmod",),
    "kernel/mounts": ("cat", "/proc/self/mountinfo"),
    "kernel/host/iptables": ("iptables-save",),
    "kernel/host/ip6tables": ("ip6tables-save",),
    "log/weft": ("journalctl", "--unit", "weft", "--lines", _LINES, "--no-pager"),
    "log/docker": ("journalctl", "--unit", "docker", "--lines", _LINES, "--no-pager"),
    "docker/daemon.json": ("cat", "/etc/docker/daemon.json"),
}

Part = Callable[[], str]


def add_command(commands: Any) -> None:
    """Add `support-bundle` to the parser of `weft`."""
    meaning = "pack logs, state, plan and the kernel's tables into one file, without secrets, for whoever is to help"
    parser = add(commands, "support-bundle", _run, _show, meaning)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: weft-support-HOST-TIME.tar.gz, here")


def parts(options: argparse.Namespace, socket_path: Path) -> dict[str, Part]:
    """What a bundle consists of, by name."""
    settings: Settings = options.settings
    namespaces = {
        "host": (),
        "dp": ("nsenter", f"--net={settings.run}/dp"),
        "wg": ("nsenter", f"--net={settings.run}/wg"),
    }
    docker: dict[str, Part] = {}
    if settings.docker != "off":
        from weft.engine.client import DockerEngine

        docker["docker/engine.json"] = partial(_as_json, DockerEngine(settings.docker, settings.driver).report)
    return {
        "settings.json": partial(_as_json, lambda: config.view(settings)),
        "snapshot.json": lambda: _read(options.offline().state / "snapshot.json"),
        **{f"daemon/{name}.json": partial(_ask, options, socket_path, name, path) for name, path in _ASKED.items()},
        **{f"{name}.txt": partial(_output, argv) for name, argv in _OF_HOST.items()},
        **{
            f"kernel/{namespace}/{name}.txt": partial(_output, (*enter, *argv))
            for namespace, enter in namespaces.items()
            for name, argv in _IN_EACH.items()
        },
        **docker,
    }


def pack(path: Path, host: str, found: Mapping[str, Part], secrets: Iterable[str], say: Callable[[str], None]) -> Any:
    """Collect the parts into a new file that only its owner may read.

    :return: the file, its parts, and why others are missing.
    """
    secrets, folder = tuple(secrets), path.name.removesuffix(".tar.gz")
    missing: dict[str, str] = {}
    try:
        opened = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    except OSError as error:
        raise ConfigError(f"{path} cannot be made: {error.strerror}; choose another with --output") from error
    with opened as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        when = strftime("%Y-%m-%d %H:%M:%S")
        _put(archive, f"{folder}/README.txt", _README.format(version=__version__, host=host, when=when, lines=_LINES))
        for name, part in found.items():
            say(f"collecting {name}")
            try:
                text = part()
            except (WeftError, OSError, ValueError, subprocess.SubprocessError) as error:
                text = f"this part is missing: {error}\n"
                missing[name] = redact(str(error), secrets, keys=True)
            _put(archive, f"{folder}/{name}", redact(text[:_MOST], secrets, keys=True))
    return {"file": str(path), "parts": sorted(found), "missing": missing}


def _run(options: argparse.Namespace, socket_path: Path) -> Any:
    settings: Settings = options.settings
    name = f"weft-support-{settings.hostname}-{strftime('%Y%m%dT%H%M%S')}.tar.gz"
    path = (options.output or Path(name)).absolute()
    with progress("collecting") as say:
        secrets = _secrets(_secret_files(options, socket_path))
        return pack(path, settings.hostname, parts(options, socket_path), secrets, say)


def _show(answer: Any, console: Any) -> None:
    for name, why in answer["missing"].items():
        console.print(f"without {name}: {why}", markup=False, highlight=False)
    console.print(f"{answer['file']}: look through it before you send it", markup=False, highlight=False)


def _secret_files(options: argparse.Namespace, socket_path: Path) -> Iterator[Path]:
    """Of this command's settings, and of the daemon's, which may be others; a managed plugin sees other paths."""
    yield options.offline().state / "wireguard.key"
    views = [config.view(options.settings)]
    with suppress(WeftError):
        views.append(ask(socket_path, "GET", "/weft/settings"))
    for view in views:
        yield Path(view["state"]) / "wireguard.key"
        yield from (Path(view[name]) for name in ("store_key", "store_password_file") if view[name] != "None")


def _secrets(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        try:
            yield file.read_text(errors="replace")
        except OSError:
            continue


def _ask(options: argparse.Namespace, socket_path: Path, name: str, path: str) -> str:
    try:
        answer = ask(socket_path, "GET", f"/weft/{path}", timeout=_ASK_SECONDS)
    except NoDaemon:
        without = getattr(options.offline(), name, None)
        if without is None:
            raise
        answer = without()
    return json.dumps(answer, indent=1)


def _as_json(view: Callable[[], Any]) -> str:
    return json.dumps(view(), indent=1, default=str)


def _read(path: Path) -> str:
    return path.read_text(errors="replace")


def _output(argv: tuple[str, ...]) -> str:
    """What a command of the host prints."""
    program = which(argv[0], path=_PATH)
    if program is None:
        raise FileNotFoundError(f"{argv[0]} is not installed")
    done = subprocess.run([program, *argv[1:]], capture_output=True, timeout=_COMMAND_SECONDS, env={"PATH": _PATH})
    if done.returncode and not done.stdout:
        raise OSError(f"{' '.join(argv)}: {done.stderr.decode(errors='replace').strip() or done.returncode}")
    return (done.stdout + done.stderr).decode(errors="replace")


def _put(archive: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = len(data), int(time()), 0o600
    archive.addfile(entry, io.BytesIO(data))
