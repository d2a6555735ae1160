"""`weft doctor`: what is wrong with this host and the others, as the daemon finds; without it, with this host alone.

Exit codes: 0 no fault, 1 warnings, 2 faults.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from time import time
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from weft import __version__, cli
from weft.cli.show import progress
from weft.config import Settings
from weft.doctor import local, verdict
from weft.doctor.facts import Report
from weft.doctor.findings import listed
from weft.doctor.verdict import Examination
from weft.doctor.view import View
from weft.errors import ConfigError, StoreError, WeftError
from weft.model import HOSTS, Host, readable
from weft.store import Store

_SHOWN = {"ok": "[green]ok[/]", "warning": "[yellow]warn[/]", "error": "[red]FAULT[/]", "unknown": "[dim]-[/]"}
_CODES = {"warning": 1, "error": 2}
_PATIENCE = 3.0
_FEW = 20
"""Hosts that all have a row of the table."""


def add_command(commands: Any) -> None:
    """Add `doctor` to the parser of `weft`."""
    meaning = "find what is wrong with hosts, network, store and Docker, and say what to do"
    codes = "exit codes: 0 no fault, 1 warnings, 2 faults (or it could not be found out)"
    parser = commands.add_parser("doctor", help=meaning, description=meaning, epilog=codes)
    parser.add_argument("--peer", default="", metavar="HOST", help="only what concerns this other host")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run, show=_show, code=_code)


def _run(options: argparse.Namespace, socket_path: Path) -> Any:
    """:return: `findings`, and `hosts`: for each what was found by check."""
    try:
        with progress("all hosts look at themselves and probe each other, which takes some seconds"):
            return cli.ask(socket_path, "GET", f"/weft/doctor?peer={quote(options.peer)}")
    except WeftError as error:
        if not (isinstance(error, ConfigError) or "does not answer" in str(error)):
            raise  # the daemon has refused
        with progress("this host looks at itself"):
            return _alone(options.settings, str(error)).to_json()


def _alone(settings: Settings, problem: str) -> Examination:
    """What this host can find out by itself."""
    from weft.doctor.checkup import Checkup, Place, of_store
    from weft.kernel import Inspection
    from weft.store.opening import open_store

    with ExitStack() as opened:
        host = opened.enter_context(closing(Inspection(settings.run)))
        store = opened.enter_context(closing(open_store(settings, patience=_PATIENCE))) if _is_there(settings) else None
        others, me = _hosts(settings, store) if store else ([], None)
        underlay = host.address(settings.underlay, [other.underlay for other in others]) or (me.underlay if me else "")
        place = Place(underlay, [other.underlay for other in others], bool(me and me.wg_key))
        facts = Checkup(settings, host, lambda: place, [of_store(store)] if store else []).look()
    facts = replace(facts, daemon=problem)
    if rival := next((other for other in others if underlay and other.underlay == underlay), None):
        facts = replace(facts, registered=f"the underlay address {underlay} of this host is {rival.title}'s")
    identity = me.id if me else "this host"
    findings = tuple(local.of_host(facts))
    report = Report(
        identity, settings.hostname, "", time(), __version__, underlay, facts.device, facts.mtu, facts.towards,
        drops=facts.drops, findings=findings,
    )  # fmt: skip
    return verdict.examine(View(identity, {me.id: me} if me else {}, set(), {identity: report}, port=settings.port))


def _is_there(settings: Settings) -> bool:
    """A file that is not there would be made: which store a managed plugin has, this command does not know."""
    return bool(settings.etcd_endpoints) or settings.sqlite_path.exists()


def _hosts(settings: Settings, store: Store) -> tuple[list[Host], Host | None]:
    """The other hosts, and this one if it is registered, as far as the store tells."""
    try:
        identity = (settings.state / "host-id").read_text().strip()
    except OSError:
        identity = ""
    try:
        hosts = [host for _, host in readable(Host.read, store.list(HOSTS).entries)]
    except StoreError:
        return [], None
    me = next((host for host in hosts if host.id == identity), None)
    return [host for host in hosts if host.id != identity], me


def _code(answer: Any) -> int:
    return max((_CODES[one["severity"]] for one in answer["findings"]), default=0)


def _show(answer: Any, console: Console) -> None:
    hosts, checks = _telling(answer["hosts"])
    if checks:
        table = Table("HOST", *checks, box=None, pad_edge=False, header_style="bold")
        for row in hosts:
            table.add_row(row["host"], *(_SHOWN[row["checks"].get(check, "unknown")] for check in checks))
        console.print(table)
        others = len(answer["hosts"]) - len(hosts)
        more = f"; {others} hosts more, where all is ok" if others else ""
        console.print(f"ok on all hosts: {', '.join(c for c in verdict.CHECKS if c not in checks)}{more}", style="dim")
    for one in answer["findings"]:
        _show_finding(one, console)
    if not answer["findings"]:
        count = len(answer["hosts"])
        console.print(f"no fault: {count} host{'s' * (count != 1)}, {len(verdict.CHECKS)} checks", highlight=False)


def _telling(hosts: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The rows and columns that fit a terminal: checks that are not ok everywhere, and of many hosts those of which not
    all is ok."""
    checks = [check for check in verdict.CHECKS if any(row["checks"].get(check) != verdict.OK for row in hosts)]
    ill = [row for row in hosts if any(row["checks"].get(check) != verdict.OK for check in checks)]
    return list(hosts) if len(hosts) <= _FEW else ill, checks


def _show_finding(one: Mapping[str, Any], console: Console) -> None:
    title = "[red]FAULT[/]" if one["severity"] == "error" else "[yellow]WARNING[/]"
    where = f" on {listed(one['hosts'])}" if one["hosts"] else ""
    console.print(f"\n{title} [bold]{one['check']}[/]{where}:", end=" ", highlight=False)
    console.print(one["cause"], markup=False, highlight=False)
    console.print(f"  seen:   {one['evidence']}", markup=False, highlight=False)
    if one["command"]:
        console.print(f"  repair: {one['command']}", markup=False, highlight=False)
