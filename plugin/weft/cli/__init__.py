"""The `weft` command for people and scripts: asks the daemon on this host, and shows the answer.

Every command takes `--json`. Exit codes: 0 done, 1 it failed, 2 the command line is wrong, 4 no daemon runs here and
what is shown was read without it.

    ask         the daemon's socket
    show        tables, and what commands have in common
    daemon      this host's daemon: version, status, plan, events, garbage
    hosts       hosts and peers
    networks    networks: making them, too
    endpoints   endpoints and addresses
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from weft.cli import daemon, endpoints, hosts, networks
from weft.cli.ask import NoDaemon, answers, ask
from weft.cli.show import console

__all__ = ["NoDaemon", "add_commands", "answers", "ask", "run"]

WITHOUT_DAEMON = 4


def add_commands(commands: Any) -> None:
    """Add what this package does to `weft`'s parser; each command sets `run` (ask the daemon) and `show`."""
    daemon.add_commands(commands)
    hosts.add_commands(commands)
    networks.add_commands(commands)
    endpoints.add_commands(commands)


def run(options: argparse.Namespace, socket_path: Path) -> int:
    """Do one command, print its answer, and return the exit code.

    A command that sets `without` is done by that if no daemon runs: it is given the options, with `offline()` to ask.
    One that sets `code` decides by its answer.
    """
    decide = getattr(options, "code", lambda _: 0)
    try:
        answer = options.run(options, socket_path)
        code = decide(answer)
    except NoDaemon as error:
        if not hasattr(options, "without"):
            raise
        answer, code = options.without(options), WITHOUT_DAEMON
        print(f"weft {options.command}: {error}; {options.offline().source}", file=sys.stderr)
    if answer is None:  # it has shown everything already
        return int(code)
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        options.show(answer, console())
    return int(code)
