"""One user, two drivers: the same commands on Docker's own bridge network and on weft, and what is seen of them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lab import CommandFailed, Host
from tests.engine.conftest import IMAGE, eventually, reaches

Seen = dict[str, Any]

OTHERS = {"app": "other", "back": "behind", "inner": "within"}
"""Each side's own networks, and the container on each that others are reached from."""


CHOSEN_MAC = "02:11"
"""How MACs begin that a user chooses. Others follow from the address, but for bridge's from Docker Engine 28 on."""


@dataclass(frozen=True)
class Side:
    """One of the two drivers.

    In commands, `@name` is a name of this side's own, `10.N.` and `fd00:N:` begin its addresses, `5N` its ports, and
    `DRIVER` is what `docker network create` is told. What Docker says is translated back.

    :param outside: another host.
    """

    driver: str
    number: int
    host: Host
    outside: Host
    options: str

    @property
    def far(self) -> Host:
        """Where the others' containers are: for bridge, on the same host."""
        return self.host if self.driver == "bridge" else self.outside

    def text(self, command: str) -> str:
        for word, meaning in self._words():
            command = command.replace(word, meaning)
        return command

    def said(self, text: str) -> str:
        text = re.sub(r"\b(?:[0-9a-f]{64}|[0-9a-f]{12})\b", "ID", text)
        text = re.sub(rf"\b(?!{CHOSEN_MAC})[0-9a-f]{{2}}(?::[0-9a-f]{{2}}){{5}}\b", "MAC", text)
        for word, meaning in self._words():
            text = text.replace(meaning, word)
        return text.strip()

    def _words(self) -> list[tuple[str, str]]:
        addresses = [(f"{start}N{end}", f"{start}{self.number}{end}") for start, end in (("10.", "."), ("fd00:", ":"))]
        return [*addresses, ("50N", f"50{self.number}"), ("DRIVER", self.options), ("@", f"{self.driver}-")]

    def docker(self, command: str, *, host: Host | None = None) -> str:
        return self.said((host or self.host).docker(*shlex.split(self.text(command))))

    def attempt(self, command: str) -> str:
        """What Docker says to somebody whose command fails; "" if it does not."""
        try:
            self.docker(command)
        except CommandFailed as error:
            first = self.said(error.stderr).splitlines()[0]
            return re.sub(r"^(docker: )?(Error response from daemon: )?", "", first)
        return ""

    def run(self, name: str, network: str, options: str = "", *, host: Host | None = None) -> None:
        self.docker(f"run -d --name @{name} --network @{network} {options} {IMAGE}", host=host)

    def enter(self, container: str, *argv: str) -> str:
        return self.said(self.host.exec_in_container_netns(self.text(f"@{container}"), *argv))

    def interfaces(self, container: str) -> list[Seen]:
        """Those of the driver's networks: not that of docker_gwbridge."""
        found = []
        for link in json.loads(self.enter(container, "ip", "-j", "addr")):
            addresses = [f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] == "global"]
            if any("N" in address for address in addresses):
                found.append({"addresses": sorted(addresses), "mac": link["address"]})
        return found

    def default_route(self, container: str, family: str = "-4") -> str:
        """To whom packets for the outside go; "" if nowhere."""
        routes = json.loads(self.enter(container, "ip", "-j", family, "route", "show", "default") or "[]")
        return routes[0]["gateway"] if routes else ""

    def inspect(self, thing: str, what: str) -> Any:
        return json.loads(self.docker(f"inspect -f '{{{{json {what}}}}}' @{thing}"))

    def reaches(self, container: str, address: str, *options: str) -> bool:
        return reaches(self.host, self.text(f"@{container}"), self.text(address), *options)

    def is_reached(self, address: str, *options: str, by: str = "other") -> bool:
        """From one of the others, where a name of another host is known a moment later."""
        asked = self.text(f"@{by}"), self.text(address), *options
        eventually(lambda: reaches(self.far, *asked), f"{address} is reached on {self.driver}", timeout=30)
        return True

    def is_unreached(self, address: str, by: str = "other") -> bool:
        asked = self.text(f"@{by}"), self.text(address)
        eventually(lambda: not reaches(self.far, *asked), f"{address} is not reached on {self.driver}", timeout=30)
        return True

    def clean(self) -> None:
        """Remove what was made beside the furniture."""
        for host in {self.host, self.far}:
            self._remove(host, "ps -a", "{{.Names}}", OTHERS.values(), "rm -f")
        self._remove(self.host, "network ls", "{{.Name}}", OTHERS, "network rm")

    def _remove(self, host: Host, listing: str, names: str, kept: Iterable[str], removal: str) -> None:
        shown = host.docker(*listing.split(), "--filter", self.text("name=^/?@"), "--format", names).split()
        if made := set(shown) - {self.text(f"@{name}") for name in kept}:
            host.docker(*removal.split(), *sorted(made, reverse=True))  # what is made from @config goes before it
