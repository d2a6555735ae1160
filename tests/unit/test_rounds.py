"""Counting probes between two hosts over a path that a test makes as bad as it likes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from weft.probes.echo import SMALL_SIZE, Probe, Purpose
from weft.probes.links import ProbeLink
from weft.probes.rounds import PLAN, Heard, Round

A, B = "a" * 32, "b" * 32
SIZE = 1450

Path = Callable[[Probe], bool | None]
"""Whether a probe arrives; None: otherwise than it was sent."""


def fine(probe: Probe) -> bool:
    return True


def nothing(probe: Probe) -> bool:
    return False


def up_to(size: int) -> Path:
    return lambda probe: probe.size <= size


class Pair:
    """A measures, B answers."""

    def __init__(self, forth: Path = fine, back: Path = fine) -> None:
        self.forth, self.back = forth, back
        self.round = Round(A, B, "plain", SIZE, 1000.0)
        self.heard = Heard()

    def run(self) -> dict[str, ProbeLink]:
        probes = self.round.probes()
        while probes:
            for probe in probes:
                self.round.sent(probe, 0.0)
                self.pass_on(probe)
            probes = self.round.ladder()
        links = self.round.links()
        assert {(link.sender, link.receiver) for link in links} <= {(A, B), (B, A)}
        return {"forth" if link.sender == A else "back": link for link in links}

    def pass_on(self, probe: Probe) -> None:
        arrives = self.forth(probe)
        if arrives is False:
            return
        counts = self.heard.take(probe, arrives is True, 1000.5)
        large = probe.purpose in (Purpose.FULL, Purpose.LADDER)
        if large or not arrives:
            self.answer(replace(probe, answer=True, purpose=Purpose.REPORT, size=SMALL_SIZE, counts=counts))
        if arrives:
            self.answer(replace(probe, answer=True, counts=counts))

    def answer(self, probe: Probe) -> None:
        arrives = self.back(probe)
        if arrives is not False:
            self.round.receive(probe, arrives is True, 0.001)


def test_a_good_path_loses_nothing() -> None:
    pair = Pair()
    links = pair.run()
    measured = {(one.small, one.full, one.offloaded, one.mtu, one.corrupt, one.rtt) for one in links.values()}
    assert measured == {(0, 0, 0, SIZE, 0, 0.001)}
    assert not any(link.faulty for link in links.values())
    assert pair.round.complete


@pytest.mark.parametrize("path", [Pair(forth=nothing), Pair(back=nothing)])
def test_without_an_answer_the_direction_is_not_known(path: Pair) -> None:
    (link,) = path.run().values()
    assert (link.sender, link.small, link.full, link.attested) == (A, 1, 1, False)


def test_what_arrived_is_known_where_it_arrived() -> None:
    pair = Pair(back=nothing)
    (unanswered,) = pair.run().values()
    heard = pair.heard.link(A, B, "plain", SIZE)
    assert (heard.small, heard.full, heard.mtu, heard.attested) == (0, 0, SIZE, True)
    assert heard.round == unanswered.round


@pytest.mark.parametrize("mtu", [SMALL_SIZE, 129, 576, 1279, 1448, 1449])
def test_the_largest_size_that_passes_is_found(mtu: int) -> None:
    links = Pair(forth=up_to(mtu)).run()
    assert (links["forth"].small, links["forth"].full, links["forth"].mtu) == (0, 1, mtu)
    assert (links["back"].small, links["back"].full) == (0, None), "no full probe was there to answer"
    back = Pair(back=up_to(mtu)).run()
    assert (back["forth"].full, back["back"].full, back["back"].mtu) == (0, 1, mtu)


def test_each_direction_has_a_loss_of_its_own() -> None:
    links = Pair(forth=lambda probe: probe.number % 2 == 0, back=lambda probe: probe.number % 6 == 0).run()
    assert links["forth"].small == 0.5
    assert links["back"].small == pytest.approx(2 / 3)


def test_what_changes_on_the_way_is_corrupt_in_its_direction() -> None:
    links = Pair(forth=lambda probe: None).run()
    assert links["forth"].corrupt == PLAN.small + PLAN.full + PLAN.offloaded
    assert links["forth"].small == 1
    back = Pair(back=lambda probe: None).run()
    assert (back["forth"].corrupt, back["forth"].small) == (0, 0)
    assert back["back"].corrupt > 0


def test_a_loss_of_just_those_whose_checksum_the_card_makes_is_the_cards() -> None:
    links = Pair(forth=lambda probe: probe.purpose is not Purpose.OFFLOADED).run()
    assert (links["forth"].offloaded, links["forth"].corrupt) == (1, PLAN.offloaded)
    assert links["back"].corrupt == 0
    lossy = Pair(forth=lambda probe: probe.number % 2 == 0).run()
    assert lossy["forth"].corrupt == 0, "chance"


def test_what_comes_twice_counts_once() -> None:
    pair = Pair()
    pair.run()
    before = pair.round.links()
    probe = Probe(False, Purpose.SMALL, pair.round.nonce, 18, SMALL_SIZE, PLAN)
    for _ in range(3):
        counts = pair.heard.take(probe, True, 1001.0)
        pair.round.receive(replace(probe, answer=True, counts=counts), True, 0.001)
    assert pair.round.links() == before


def test_an_answer_that_nobody_asked_for_counts_for_nothing() -> None:
    round_ = Round(A, B, "plain", SIZE, 1000.0)
    round_.receive(Probe(True, Purpose.SMALL, round_.nonce, 1, SMALL_SIZE, PLAN), True, 0.0)
    assert not round_.answered


def test_few_rounds_of_one_host_are_remembered() -> None:
    heard = Heard()
    for number in range(100):
        heard.take(Probe(False, Purpose.SMALL, number.to_bytes(8), 1, SMALL_SIZE, PLAN), True, 1000.0)
    assert heard.knows((99).to_bytes(8))
    assert not heard.knows((50).to_bytes(8))
