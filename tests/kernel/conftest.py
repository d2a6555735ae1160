"""The netns tier's fixtures are also for tests of the real kernel."""

from tests.netns.conftest import host, own_mounts, world

__all__ = ["host", "own_mounts", "world"]
