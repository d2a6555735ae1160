"""What `make release` builds: the same bytes each time, and a weft that is installed without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest

import weft
from lab.plan import PROJECT
from tests import wheel
from tests.netns.plugin import Plugin


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=weft", "-c", "user.email=weft@example.org"]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": str(_anybodys(folder))}
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, env=environment)


def _anybodys(folder: Path) -> Path:
    """Settings with which the checkout may be another user's; those of `git -c` do not reach what a clone starts."""
    file = folder / "gitconfig"
    file.write_text("[safe]\n\tdirectory = *\n")
    return file


def build(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WHEEL_PYTHON": sys.executable}
    argv = [str(source / "deploy/build-wheel.sh"), str(folder)]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout of its own, with something in it that is not committed."""
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{PROJECT}", "clone")
    clone = tmp_path / "clone"
    (clone / "plugin/weft/forgotten.py").write_text("print('not committed')\n")
    return clone


def test_the_wheel_of_a_commit_is_the_same_each_time(clone: Path, tmp_path: Path) -> None:
    digests = set()
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert build(clone, folder).returncode == 0
        (made,) = folder.iterdir()
        assert made.name == f"weft-{weft.__version__}-py3-none-any.whl"
        digests.add(sha256(made.read_bytes()).hexdigest())
    assert len(digests) == 1
    assert b"forgotten" not in made.read_bytes()


def test_a_tag_of_another_version_is_refused(clone: Path, tmp_path: Path) -> None:
    git(clone, "tag", "v99.0.0")
    refused = build(clone, tmp_path / "none")
    assert refused.returncode == 1
    assert refused.stderr == f"the commit has the tag v99.0.0, and weft.__version__ is {weft.__version__}\n"
    assert not list((tmp_path / "none").iterdir())
    git(clone, "tag", "--delete", "v99.0.0")
    git(clone, "tag", f"v{weft.__version__}")
    assert build(clone, tmp_path / "some").returncode == 0


class Installed(Plugin):
    """weft from a wheel, on a host without a network to the world."""

    program = Path()

    def command(self, wrapper: Sequence[str] = (), arguments: Sequence[str] = ("serve",)) -> list[str]:
        return self.host.enter([*wrapper, str(self.program), *arguments])

    def environment(self, **settings: str) -> dict[str, str]:
        return {k: v for k, v in super().environment(**settings).items() if not k.startswith("PYTHON")}


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Installed]:
    made = Installed(tmp_path / "h1")
    made.program = tmp_path / "venv/bin/weft"
    yield made
    made.close()


def test_weft_from_the_wheel_is_installed_without_a_network_and_serves(installed: Installed, tmp_path: Path) -> None:
    wheels = wheel.wheelhouse(tmp_path / "wheel")
    wheel.install(wheels, tmp_path / "venv", enter=installed.host.enter([]))
    assert installed.run_command("--version") == f"weft {weft.__version__}\n"
    installed.start()
    network = installed.network()
    assert installed.join(installed.endpoint(network)) in installed.links()
    assert installed.run_command("version").count(f"weft {weft.__version__}") == 2
