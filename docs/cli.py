"""Writes docs/cli.md from the command line's parser: `make docs`. A test holds the file to it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from weft.commandline import parser
from weft.config import SETTINGS, variable

FILE = Path(__file__).with_name("cli.md")
_HEAD = """# The `weft` command

Generated from the program by `make docs`; `weft COMMAND --help` says the same.

All commands but `serve`, `setup` and `completion` ask the daemon on this host, as root, over the driver's socket. With
`--json` they print what scripts can read. Exit codes: 0 done, 1 it failed and says why, 2 the command line is wrong,
3 the server did not start and says why in its log, 4 no daemon runs here: what is shown (by `status`, `plan`,
`host ls`, `network ls`, `endpoint ls`, `addresses`) was read without it. `version`, `doctor` and `support-bundle` do
without a daemon, too. The exit codes of `doctor` are its own, below.
"""
_JSON = """## What `--json` prints

Times are in Unix seconds, durations in seconds; what is not known is `null`, what is well is an empty text. A later
weft may add names.

| command | prints |
| --- | --- |
| `weft version` | `version`, `schema` (of the store's records); `daemon`: the same of the one that runs, or `null` |
| `weft status` | `host` (`id`, `name`, `underlay`, `version`, `driver`, `started`); `store` (`origin`, `problem`, \
`seconds` that it took to answer); `engine` (`version`, `problem`); `agent`: the kernel (`synced`, `resynced`: when \
it was last compared, in how many `seconds`, `repaired`, `links`, `rows`, `problem`); `encryption`; `names` \
(`address`, `answers`, `problem`); how many `hosts`, `alive`, `networks`, `endpoints` there are; `problems`: all \
that does not work, as texts |
| `weft plan` | a list: `kind` and `change`, as a text |
| `weft events` | a list, with `--follow` a line for each: `id`, `when`, `severity`, `source`, `text` |
| `weft gc` | a list: `what`, `why`, in how many `seconds` |
| `weft host ls` | a list: `id`, `name`, `underlay`, `version`, `alive`, `endpoints` (how many) |
| `weft host forget` | that host |
| `weft peers` | a list: `host`, `id`, `address` and `key` in WireGuard, `endpoint`, `state`, `handshake` (0: none \
yet), `received` and `sent` bytes, `backend` |
| `weft rotate-key` | `key`: the new one, as others see it |
| `weft network ls` | a list of what `network inspect` prints |
| `weft network inspect` | `name`, `vni`, `subnets`, `mtu` (that was asked for, or 0), `fitting_mtu` (of new \
containers), `other_mtu` (by name, of those started when it was another), `options` (that are not the \
default), `internal`, `creator` (a host's name), `retired` (being removed), `encrypted`, `endpoints` (how many), \
`hosts` (where they are), `members` (hosts whose Docker has it), `unencryptable` (hosts that encrypted packets cannot \
be sent to) |
| `weft network create`, `rm` | that network; `rm` with `removed` |
| `weft endpoint ls` | a list: `id`, `network`, `vni`, `host`, `addresses`, `mac`, `mtu`, `rate` (`null`: no \
limit), `names` |
| `weft addresses` | `pools`: a list of `pool`, `network`, `used`, `free`; `addresses`: a list of `pool`, `address`, \
`holder`, `host` |
| `weft doctor` | `findings`: a list of `check`, `severity` (`error`, `warning`), `hosts`, `cause`, `evidence`, \
`command` (or an empty text); `hosts`: a list of `host` and `checks`, by name `ok`, `warning`, `error` or `unknown` \
|
| `weft support-bundle` | `file`, its `parts`, and of those that are `missing`, why |
| `weft setup dns` | `file`, `dns` (the servers that it names then), whether it was `changed`, the `diff`, \
the `backup` of the old one |
| `weft setup host` | `namespace`: where the data plane is mounted |
"""


def render() -> str:
    settings = (f"| `{variable(name)}` | {_code(s.default)} | {_cell(s.meaning)} |" for name, s in SETTINGS.items())
    return "\n".join(
        [
            _HEAD,
            *(
                line
                for name, command, meaning in _commands("weft", parser())
                for line in _command(name, command, meaning)
            ),
            _JSON,
            "## Settings, from the environment",
            "",
            "| variable | default | meaning |",
            "| --- | --- | --- |",
            *settings,
            "",
        ]
    )


def _commands(name: str, command: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Those that can be typed, with their meanings, in the order in which they were added."""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            meanings = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for word, below in action.choices.items():
                inner = list(_commands(f"{name} {word}", below))
                yield from inner or [(f"{name} {word}", below, meanings[word])]


def _command(name: str, command: argparse.ArgumentParser, meaning: str) -> Iterator[str]:
    actions = [action for action in command._actions if action.dest != "help"]
    yield from (f"## `{' '.join([name, *map(_usage, actions)])}`", "", f"{meaning[0].upper()}{meaning[1:]}.", "")
    if actions:
        yield from ("| argument | meaning |", "| --- | --- |")
        yield from (f"| `{_cell(_words(action))}` | {_meaning(action)} |" for action in actions)
        yield ""
    if command.epilog:
        yield from (f"{command.epilog[0].upper()}{command.epilog[1:]}.", "")


def _usage(action: argparse.Action) -> str:
    return f"[{_words(action)}]" if action.option_strings else _words(action)


def _words(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else "|".join(action.choices or [action.metavar or action.dest.upper()])
    return " ".join(filter(None, [*action.option_strings[:1], value]))


def _meaning(action: argparse.Action) -> str:
    return _cell((action.help or "") % {"default": action.default})


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    FILE.write_text(render())
