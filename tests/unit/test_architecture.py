"""Who may import what: each outside library has one importer, and imports point down the module map."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import weft

ROOT = Path(weft.__file__).parent
LAYERS = [
    {
        "errors",
        "model",
        "dataplane",
        "config",
        "store",
        "engine.inventory",
        "doctor.findings",
        "doctor.packetfilter",
        "redact",
        "bucket",
    },
    {"keys", "probes.links", "doctor.facts", "logs", "probes.echo"},
    {"probes.rounds", "probes.pathmtu", "doctor.local", "doctor.view"},
    {
        "options",
        "reconcile",
        "cluster",
        "identity",
        "schema",
        "topology",
        "ipam",
        "snapshot",
        "unfinished",
        "names.lookup",
    },
    {"journal", "doctor.comparison", "doctor.ways"},
    {"doctor.losses", "doctor.sizes", "doctor.tunnels"},
    {"doctor.verdict"},
    {
        "attachments",
        "encryption",
        "networks",
        "driver",
        "agent",
        "engine.sweeper",
        "engine.collector",
        "engine.adoption",
        "engine.mirror",
        "hosts",
        "presence",
        "probes.prober",
        "probes.measurements",
        "garbage",
        "foreign",
        "engine.restarts",
        "engine.containers",
        "names.sandboxes",
    },
    {"health", "names.askers", "names.publisher", "doctor.checkup", "doctor.examination"},
    {"status"},
    {
        "wire",
        "api",
        "admin",
        "cli",
        "cli.setup_dns",
        "engine.client",
        "kernel",
        "names.dns",
        "names.queues",
        "serve",
        "watchdog",
        "cli.setup_host",
        "web.listener",
        "web.page",
        "web.metrics",
    },
    {"names.resolver", "names.firewall"},
    {"names.service", "doctor.diagnosis", "cli.bundle"},
    {"commandline", "cli.offline"},
    {"daemon"},
    {"main"},
]


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def place(path: tuple[str, ...]) -> str:
    """The name in `LAYERS` of a module: its own if it has one, else its package's."""
    known = set[str]().union(*LAYERS)
    return next((name for name in (".".join(path[:2]), path[0]) if name in known), path[0])


def importers(library: str) -> set[str]:
    return {
        place(path.relative_to(ROOT).with_suffix("").parts)
        for path in ROOT.rglob("*.py")
        if any(name.split(".")[0] == library for name in imports(path))
    }


@pytest.mark.parametrize(
    ("library", "module"),
    [
        ("pyroute2", "kernel"),
        ("nacl", "keys"),
        ("flask", {"admin", "api", "daemon", "serve", "web.listener", "web.page"}),
        ("waitress", "web.listener"),
        ("prometheus_client", "web.metrics"),
        ("rich", {"cli", "cli.setup_dns", "cli.setup_host", "doctor.diagnosis"}),
        ("shtab", "commandline"),
        ("gunicorn", "serve"),
        ("docker", "engine.client"),
        ("dns", "names.dns"),
        ("sqlite3", "store"),
        ("msgspec", {"model", "snapshot", "store"}),
        ("requests", {"engine.client", "store"}),
    ],
)
def test_one_importer_for_each_library(library: str, module: str | set[str]) -> None:
    assert importers(library) == ({module} if isinstance(module, str) else module)


def test_only_config_and_main_read_the_environment() -> None:
    readers = {p.stem for p in ROOT.rglob("*.py") if "os.environ" in p.read_text()}
    assert readers == {"config", "main"}


def test_imports_point_down() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in ROOT.rglob("*.py"):
        module = place(path.relative_to(ROOT).with_suffix("").parts)
        if path.stem in {"__init__", "__main__"} and module not in level:
            continue
        for name in imports(path):
            target = place(tuple(name.split(".")[1:])) if name.startswith("weft.") else ""
            if target in level:
                assert level[target] <= level[module], f"{path.name} imports {name}"
