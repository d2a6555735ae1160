"""Tiers that cannot run here say why, loudly; with NO_SKIP=1 a skipped test fails the run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lab.kernel import GUEST

_TIERS = Path(__file__).parent


def _obstacle(tier: str) -> str:
    """Why tests of a tier cannot run on this machine, or ''."""
    if tier != "unit" and os.geteuid() != 0:
        return f"the {tier} tier makes network namespaces: run it as root"
    if tier == "kernel" and GUEST not in os.environ:
        return "the kernel tier runs on a kernel of its own: make test-kernel"
    if tier == "engine" and not shutil.which("dockerd"):
        return "the engine tier needs dockerd: run lab/setup.sh"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(_TIERS).parts[0]
        if reason := _obstacle(tier):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped and os.environ.get("NO_SKIP"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nNO_SKIP: {len(skipped)} tests were skipped, which counts as a failure here")
