"""The version of the records in the store, so that an older weft does not damage what a newer one wrote."""

from __future__ import annotations

from weft.errors import ConfigError
from weft.model import SCHEMA, SCHEMA_KEY, reading
from weft.store import KeyIs, Put, Store


def check_schema(store: Store) -> None:
    """Make the store one of our version if it is new; `ConfigError` if it belongs to another version."""
    while (entry := store.get(SCHEMA_KEY)) is None:
        store.transact([KeyIs(SCHEMA_KEY, 0)], [Put(SCHEMA_KEY, str(SCHEMA))])
    with reading(entry.key):
        found = int(entry.value)
    if found > SCHEMA:
        raise ConfigError(
            f"the store was written by a newer weft (schema {found}, this one knows {SCHEMA}): upgrade weft here"
        )
