"""The store that the settings name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from socket import SOCK_STREAM, getaddrinfo
from urllib.parse import urlsplit

from weft.config import Settings
from weft.store import Store
from weft.store.connections import Access, Connections
from weft.store.etcd import EtcdStore
from weft.store.sqlite import SqliteStore

HANDLER_PATIENCE = 1.3
"""Somebody waits for `docker run`: better a clear error soon."""


def open_store(settings: Settings, *, patience: float = HANDLER_PATIENCE) -> Store:
    """See `open_stores`."""
    (store,) = open_stores(settings, patience)
    return store


def open_stores(settings: Settings, *patiences: float) -> list[Store]:
    """The store that the settings name, once for each patience. Hosts begin with different members of an etcd cluster,
    to share its load.

    :param patiences: seconds that one call may take while etcd is away.
    """
    endpoints = settings.etcd_endpoints
    if not endpoints:
        return [SqliteStore(settings.sqlite_path) for _ in patiences]
    access = Access(
        ca=settings.store_ca,
        cert=settings.store_cert,
        key=settings.store_key,
        user=settings.store_user,
        password_file=settings.store_password_file,
    )
    order, root, shared = random.sample(endpoints, len(endpoints)), settings.etcd_root, Connections(access)
    return [EtcdStore(order, root=root, access=access, patience=one, connections=shared) for one in patiences]


def store_addresses(settings: Settings) -> Iterator[str]:
    """Addresses of etcd's members, as far as their names can be resolved."""
    for endpoint in settings.etcd_endpoints:
        with suppress(OSError):
            yield from (str(found[4][0]) for found in getaddrinfo(urlsplit(endpoint).hostname, None, type=SOCK_STREAM))
