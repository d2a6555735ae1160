"""What `weft doctor` says of a lab's hosts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from lab import Host, Lab
from tests.engine.conftest import eventually
from tests.engine.three import Three


@dataclass
class Diagnosis:
    """What the command answered."""

    code: int
    answer: dict[str, Any]

    @property
    def named(self) -> set[tuple[str, str, tuple[str, ...]]]:
        return {(one["check"], one["severity"], tuple(one["hosts"])) for one in self.answer["findings"]}

    def of(self, check: str, *hosts: str) -> dict[str, Any]:
        """The one finding of this check about these hosts."""
        (one,) = (o for o in self.answer["findings"] if o["check"] == check and o["hosts"] == list(hosts))
        return dict(one)


@dataclass
class Clinic(Three):
    lab: Lab
    last: Diagnosis = field(init=False)

    def __post_init__(self) -> None:
        super().__init__(self.lab)

    def doctor(self, host: Host, *options: str) -> tuple[int, str]:
        """Exit code and output."""
        text = host.run(
            "sh", "-c", '"$0" "$@"; echo $?', *host._weft_command(), "doctor", *options,
            env=host._weft_environment(), timeout=60,
        )  # fmt: skip
        shown, _, code = text.strip().rpartition("\n")
        return int(code), shown

    def examine(self, host: Host, *options: str) -> Diagnosis:
        code, shown = self.doctor(host, "--json", *options)
        self.last = Diagnosis(code, json.loads(shown))
        return self.last

    def finds(
        self, expected: set[tuple[str, str, tuple[str, ...]]], words: str = "", on: Host | None = None
    ) -> Diagnosis:
        """Examine until exactly this is named, in these words: probes, elections and signs of life take their time."""

        def found() -> bool:
            named = self.examine(on or self.h1).named
            return named == expected and words in str([one["cause"] for one in self.last.answer["findings"]])

        try:
            eventually(found, "exactly these faults", timeout=45)
        except Exception as error:
            raise AssertionError(f"{self.last.named} instead of {expected}: {self.last.answer['findings']}") from error
        assert self.last.code == (2 if any(s == "error" for _, s, _ in expected) else 1 if expected else 0)
        return self.last
