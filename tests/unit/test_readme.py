"""The README is true: its tree is the checkout, its links lead somewhere, its outputs are what the commands print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("**/*.md"))]


def tree() -> set[str]:
    """Folders named in the README's tree, as paths from the top."""
    text = (TOP / "README.md").read_text(encoding="utf-8")
    block = next(
        block for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL) if block.startswith("launcher/  ")
    )
    found, parent = set(), ""
    for line in block.splitlines():
        name = line.split()[0].rstrip("/")
        parent = parent if line.startswith(" ") else name
        found.add(f"{parent}/{name}" if line.startswith(" ") else name)
    return found


def tracked_folders() -> set[str]:
    """Top-level folders and the package's rooms, as git knows them."""
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"], cwd=TOP, check=True, capture_output=True, text=True
    )
    paths = [Path(line) for line in done.stdout.splitlines()]
    top = {path.parts[0] for path in paths if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    return top | {f"launcher/{path.parts[1]}" for path in paths if path.parts[0] == "launcher" and len(path.parts) > 2}


def test_the_tree_is_the_checkouts() -> None:
    """Every folder has its line, and no line names a folder that is gone."""
    assert tree() == tracked_folders()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_links_lead_to_files(page: Path) -> None:
    """A relative link that is renamed away is found here, not by a reader."""
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_commands_still_print_what_the_pages_show() -> None:
    """`scripts/readme-blocks` rewrites the blocks when a change was meant."""
    done = subprocess.run(
        [sys.executable, str(TOP / "scripts" / "readme-blocks"), "--check"],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
