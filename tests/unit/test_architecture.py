"""Who may import what: each outside library has one importer, and imports point down the module map."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import weft

ROOT = Path(weft.__file__).parent
LAYERS = [
    {"errors", "model", "dataplane", "config", "store", "inventory", "findings", "packetfilter", "redact", "bucket"},
    {"keys", "links", "facts", "logs", "echo"},
    {"rounds", "pathmtu"},
    {"options", "reconcile", "cluster", "identity", "schema", "topology", "ipam", "snapshot", "unfinished", "names"},
    {"journal", "doctor"},
    {
        "attachments",
        "encryption",
        "driver",
        "agent",
        "sweeper",
        "collector",
        "adoption",
        "mirror",
        "hosts",
        "presence",
        "prober",
        "probes",
        "garbage",
        "restarts",
        "containers",
        "sandboxes",
        "status",
    },
    {"askers", "publisher", "health", "checkup", "examination"},
    {
        "wire",
        "api",
        "admin",
        "cli",
        "setup_dns",
        "engine",
        "kernel",
        "dns",
        "serve",
        "watchdog",
        "setup_host",
        "web",
        "page",
        "metrics",
    },
    {"resolver", "firewall"},
    {"nameservice", "diagnosis", "bundle"},
    {"commandline", "offline"},
    {"daemon"},
    {"main"},
]


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return names


def importers(library: str) -> set[str]:
    return {
        path.relative_to(ROOT).parts[0].removesuffix(".py")
        for path in ROOT.rglob("*.py")
        if any(name.split(".")[0] == library for name in imports(path))
    }


@pytest.mark.parametrize(
    ("library", "module"),
    [
        ("pyroute2", "kernel"),
        ("nacl", "keys"),
        ("flask", {"admin", "api", "daemon", "page", "serve", "web"}),
        ("waitress", "web"),
        ("prometheus_client", "metrics"),
        ("rich", {"cli", "diagnosis", "setup_dns", "setup_host"}),
        ("shtab", "commandline"),
        ("gunicorn", "serve"),
        ("docker", "engine"),
        ("dns", "dns"),
        ("sqlite3", "store"),
        ("requests", {"engine", "store"}),
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
        module = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if module.startswith("__"):
            continue
        for name in imports(path):
            if name.startswith("weft."):
                target = name.split(".")[1]
                assert level[target] <= level[module], f"{path.name} imports {name}"
