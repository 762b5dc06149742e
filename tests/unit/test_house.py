"""House rules that a machine can check: who imports whom, how long a file may be, what every module says of itself."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sorted(
    path for folder in ("launcher", "tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
LONGEST_FILE = 500
MODULES = sorted((ROOT / "launcher").rglob("*.py"))


def test_the_import_contracts_hold() -> None:
    """The layers of docs/architecture.md, as import-linter reads them from pyproject.toml."""
    beside = Path(sys.executable).parent / "lint-imports"
    tool = str(beside) if beside.exists() else shutil.which("lint-imports")
    assert tool, "lint-imports is missing; install the dev extra"
    run = subprocess.run([tool, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_file_is_longer_than_five_hundred_lines() -> None:
    """One noun per file."""
    long = {
        str(path.relative_to(ROOT)): n for path in PYTHON if (n := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert not long


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_starts_by_saying_what_it_owns(path: Path) -> None:
    """A newcomer reads the first line of each file and knows where to go."""
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_user_input_is_never_checked_with_assert() -> None:
    """`python -O` removes assertions, and an AssertionError tells the user nothing."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_every_dependency_is_pinned() -> None:
    """constraints.txt names one version of everything pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    pins = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {_normal(name): version for name, _, version in pins}
    for line in asked:
        name, _, least = line.partition(">=")
        assert _normal(name) in pinned, f"{name} is not pinned"
        assert _numbers(pinned[_normal(name)]) >= _numbers(least), f"{name} {pinned[_normal(name)]} is below {least}"


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
