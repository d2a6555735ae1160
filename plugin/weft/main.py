"""The `weft` command. All but `weft serve` start quickly: what brings in the daemon's libraries (flask, pyroute2, …) is
imported by the function that needs it, here and in the commands' modules."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from weft import cli, commandline, config, logs
from weft.errors import WeftError
from weft.watchdog import Manager

if TYPE_CHECKING:
    from weft.cli.offline import Offline


def main(arguments: Sequence[str] | None = None) -> int:
    """The `weft` command. Exit codes: 0 done, 1 it failed, 2 the command line is wrong, 3 the server did not start;
    those of `weft doctor` are its own."""
    options = commandline.parser().parse_args(arguments)
    if options.command == "completion":
        print(commandline.completion(options.shell))
        return 0
    try:
        settings = config.from_environment(os.environ)
        logs.configure(settings.log, structured=settings.log_format == "json")
        if options.command == "serve":
            from weft import daemon

            os.environ.setdefault("RES_OPTIONS", daemon.NAME_SERVERS)
            daemon.run(settings, Manager.take(os.environ))
        else:
            options.settings, options.offline = settings, cache(lambda: _offline(settings))
            return cli.run(options, settings.socket)
    except WeftError as error:
        print(f"weft {options.command}: {error}", file=sys.stderr)
        return 2 if options.command == "doctor" else 1
    return 0


def _offline(settings: config.Settings) -> Offline:
    from weft.cli.offline import Offline

    return Offline(settings)
