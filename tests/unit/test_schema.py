"""Hosts of different versions at one store."""

from __future__ import annotations

from functools import partial

import pytest

from tests.unit.conftest import together
from weft.errors import ConfigError, StoreError
from weft.model import SCHEMA, SCHEMA_KEY
from weft.schema import check_schema
from weft.store import Put
from weft.store.sqlite import SqliteStore


def test_the_first_host_writes_the_version_once(store: SqliteStore) -> None:
    together(*[partial(check_schema, store)] * 8)
    check_schema(store)
    assert [(entry.key, entry.value) for entry in store.list("").entries] == [(SCHEMA_KEY, str(SCHEMA))]
    assert store.list("").revision == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (str(SCHEMA + 1), rf"newer weft \(schema {SCHEMA + 1}, this one knows {SCHEMA}\): upgrade weft here"),
        ("v2", f"entry {SCHEMA_KEY} cannot be read .*: was it written by hand or by a newer weft"),
    ],
)
def test_another_version_is_refused_and_stays(store: SqliteStore, value: str, words: str) -> None:
    store.transact([], [Put(SCHEMA_KEY, value)])
    with pytest.raises((ConfigError, StoreError), match=words):
        check_schema(store)
    entry = store.get(SCHEMA_KEY)
    assert entry is not None
    assert entry.value == value
