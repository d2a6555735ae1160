"""What hosts say of their links: as records, and put together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weft.errors import Unreadable
from weft.probes.links import ProbeLink, Results, merge
from weft.store import Entry

A, B = "a" * 32, "b" * 32
GOOD = ProbeLink(A, B, "plain", 1450, 1000.0, "r1", 0.0, 0.0, 0.0, 1450, 0, 0.001)
UNANSWERED = ProbeLink(A, B, "plain", 1450, 1010.0, "r2", 1.0, 1.0, 1.0, attested=False)


def read(value: str) -> Results:
    return Results.read(Entry(f"probes/results/{A}", value, 1))


def test_a_record_is_read_as_it_was_written() -> None:
    results = Results(A, (GOOD, UNANSWERED))
    assert read(results.encode()) == results


def test_json_names_the_ends_from_and_to() -> None:
    assert GOOD.to_json() == {
        "from": A,
        "to": B,
        "kind": "plain",
        "size": 1450,
        "when": 1000.0,
        "round": "r1",
        "small": 0.0,
        "full": 0.0,
        "offloaded": 0.0,
        "mtu": 1450,
        "corrupt": 0,
        "rtt": 0.001,
        "attested": True,
    }


def test_fields_of_a_newer_weft_are_left_out() -> None:
    text = Results(A, (GOOD,)).encode().replace('"from"', '"color":"green","from"')
    assert read(text).links == (GOOD,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"host":"a"}',
        '{"host":"a","links":[{}]}',
        '{"host":"a","links":[{"from":"a","to":"b","kind":"plain","size":"big","when":1}]}',
        '{"host":"a","links":[{"from":"a","to":"b","kind":"other","size":1,"when":1}]}',
        '{"host":"a","links":[{"from":"a","to":"","kind":"plain","size":1,"when":1}]}',
        '{"host":"a","links":[{"from":"a","to":"b","kind":"plain","size":1,"when":1,"small":"none"}]}',
    ],
)
def test_what_is_no_record_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        read(text)


def test_what_the_receiver_says_counts_although_the_sender_got_no_answer() -> None:
    heard = replace(GOOD, when=1002.0, round="r2")
    assert merge([UNANSWERED, heard]) == [heard]


def test_what_the_receiver_said_of_an_earlier_measurement_does_not_count() -> None:
    assert merge([replace(GOOD, when=1009.0), UNANSWERED]) == [UNANSWERED]


def test_what_one_measurement_does_not_know_another_of_that_time_completes() -> None:
    newest = replace(GOOD, when=1001.0, full=None, mtu=1300)
    assert merge([newest, GOOD]) == [replace(newest, full=0.0)]
    assert merge([newest, replace(GOOD, when=900.0)]) == [newest]


def test_of_two_attestations_the_newer_counts() -> None:
    newer = replace(GOOD, when=1001.0, small=0.5)
    assert merge([newer, GOOD]) == [newer]


def test_each_direction_and_each_kind_is_a_link_of_its_own() -> None:
    others = [replace(GOOD, sender=B, receiver=A), replace(GOOD, kind="encrypted")]
    assert len(merge([GOOD, *others])) == 3
