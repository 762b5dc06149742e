"""Row 18 of the security checklist: dependencies locked with hashes, a bill of materials, signed artifacts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main
from launcher.errors import ClusterError, ConflictError, ModelError
from launcher.runs import signing
from tests.privileges import unavailable

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "constraints.txt", "scripts/lock", "locks/login.txt", "locks/train.txt")


# ---------------------------------------------------------------- locks


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the lock is made of, to be spoilt."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def check(root: Path) -> tuple[int, str]:
    """Exit code and words of `scripts/lock --check`."""
    command = [sys.executable, str(root / "scripts" / "lock"), "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stderr


def edit(path: Path, change: Callable[[str], str]) -> None:
    """Rewrite a file, which must change."""
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


def test_s18_the_locks_are_in_step_with_the_project() -> None:
    """Every dependency in its range, at the version that the tests run with, with the hashes of its files."""
    assert check(ROOT) == (0, "")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("pyproject.toml", lambda text: text.replace("click>=8.2", "click>=99"), "click>=99"),
        ("pyproject.toml", lambda text: text.replace('"rich>=', '"richer>='), "lacks richer"),
        ("constraints.txt", lambda text: text.replace("omegaconf==", "omegaconf==9."), "constraints.txt 9."),
        ("locks/login.txt", lambda text: text.replace("--hash=sha256:", "--hash=sha999:"), "has no hash"),
        ("locks/train.txt", lambda text: text.replace("\ntorch==", "\ntorchless=="), "lacks torch"),
    ],
)
def test_s18_a_lock_that_is_out_of_step_is_found(
    copy: Path, name: str, change: Callable[[str], str], words: str
) -> None:
    """Exit 1, and which package it is."""
    edit(copy / name, change)
    code, said = check(copy)
    assert code == 1 and words in said and "type: scripts/lock" in said


# ---------------------------------------------------------------- bill of materials


def test_s18_the_bill_of_materials_names_what_is_installed(tmp_path: Path) -> None:
    """CycloneDX: every package once with version, package URL and needs that exist; the same twice."""
    path = tmp_path / "sbom.json"
    command = [sys.executable, str(ROOT / "scripts" / "sbom"), "-o", str(path)]
    texts = []
    for _ in range(2):
        subprocess.run(command, check=True, env=os.environ | {"SOURCE_DATE_EPOCH": "0"})
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    document = json.loads(texts[0])
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["timestamp"] == "1970-01-01T00:00:00Z"
    found = {one["name"].lower(): one for one in document["components"]}
    assert found["click"]["version"] == importlib.metadata.version("click")
    refs = [one["bom-ref"] for one in document["components"]]
    assert len(refs) == len(set(refs)) and {one["ref"] for one in document["dependencies"]} == set(refs)
    needs = {one["ref"]: one["dependsOn"] for one in document["dependencies"]}
    assert found["markupsafe"]["bom-ref"] in needs[found["jinja2"]["bom-ref"]]
    assert {ref for refs_ in needs.values() for ref in refs_} <= set(refs)


# ---------------------------------------------------------------- signatures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported adapter, as far as a signature sees it."""
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "adapter_model.safetensors").write_bytes(b"weights" * 100)
    (tmp_path / "out" / "serve.sh").write_text("#!/bin/sh\n")
    return tmp_path / "out"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A fresh key, and the file of allowed signers that knows it as mara@example.org."""
    if shutil.which("ssh-keygen") is None:
        unavailable("needs ssh-keygen (openssh-client)")
    return make_key(tmp_path, "mara@example.org")


def make_key(folder: Path, who: str) -> Path:
    """A key without a passphrase; `signers-WHO` allows it."""
    path = folder / f"key-{who}"
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", who, "-f", str(path)]
    subprocess.run(words, check=True, capture_output=True)
    public = path.with_name(f"{path.name}.pub").read_text()
    (folder / f"signers-{who}").write_text(f"{who} {public}")
    return path


def adapters(*words: object) -> Result:
    """The command line."""
    return CliRunner().invoke(main, ["adapters", *map(str, words)])


def test_s18_a_signed_folder_is_verified_with_its_signer(folder: Path, key: Path, tmp_path: Path) -> None:
    """ssh-keygen signs the list of sums, which coreutils read, too; somebody else's list of signers refuses it."""
    done = adapters("sign", folder, "--key", key)
    assert done.exit_code == 0, done.output
    assert subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, check=False).returncode == 0
    signers = tmp_path / "signers-mara@example.org"
    found = json.loads(adapters("verify", folder, "--signers", signers, "--json").stdout)
    assert (found["files"], found["signer"]) == (2, "mara@example.org")
    make_key(tmp_path, "eve@example.org")
    refused = adapters("verify", folder, "--signers", tmp_path / "signers-eve@example.org")
    assert refused.exit_code == 7 and "none of the allowed signers" in refused.stderr


def test_s18_a_list_that_was_changed_after_signing_is_refused(folder: Path, key: Path, tmp_path: Path) -> None:
    """Whoever changes a file and its sum has not the key; without --signers only the sums are compared."""
    signing.sign(folder, key=key)
    (folder / "serve.sh").write_text("#!/bin/sh\ncurl evil\n")
    signature = (folder / signing.SIGNATURE).read_bytes()
    signing.sign(folder, key=None)
    (folder / signing.SIGNATURE).write_bytes(signature)
    assert signing.verify(folder, signers=None).signer is None
    with pytest.raises(ConflictError, match="verify"):
        signing.verify(folder, signers=tmp_path / "signers-mara@example.org")


def test_s18_a_key_that_fails_leaves_the_old_signature(folder: Path, key: Path, tmp_path: Path) -> None:
    """A file that is no key, or the wrong passphrase: list and signature are those of before, and still right."""
    signing.sign(folder, key=key)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "broken").write_text("no key\n")
    (tmp_path / "broken").chmod(0o600)
    with pytest.raises(ClusterError, match="ssh-keygen -Y sign"):
        signing.sign(folder, key=tmp_path / "broken")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_s18_every_difference_is_named(folder: Path) -> None:
    """A changed, a missing and an added file at once: exit 7."""
    (folder / "third").write_text("3")
    signing.sign(folder, key=None)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    (folder / "third").unlink()
    (folder / "added.py").write_text("import os\n")
    done = adapters("verify", folder)
    assert done.exit_code == 7
    for words in ("adapter_model.safetensors: is not the file", "third: is listed", "added.py: is not listed"):
        assert words in done.stderr


def test_s18_only_plain_files_are_signed(folder: Path) -> None:
    """A link could lead to another file tomorrow; nothing is written."""
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="no plain file"):
        signing.sign(folder, key=None)
    assert not (folder / signing.SUMS).exists()


@pytest.mark.parametrize("line", ["../../etc/passwd", "/etc/passwd"])
def test_s18_a_list_that_leads_out_of_the_folder_is_refused(folder: Path, line: str) -> None:
    """A hostile list is not followed."""
    (folder / signing.SUMS).write_text(f"{'0' * 64}  {line}\n")
    with pytest.raises(ConflictError, match="SHA256SUMS:1"):
        signing.verify(folder, signers=None)


def test_s18_a_folder_without_a_list_and_a_machine_without_ssh(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are said with what is missing; a signature that was asked for and is not there is no success."""
    with pytest.raises(ModelError, match="it was not signed"):
        signing.verify(folder, signers=None)
    signing.sign(folder, key=None)
    (tmp_path / "signers").write_text("")
    with pytest.raises(ConflictError, match="was not signed, only listed"):
        signing.verify(folder, signers=tmp_path / "signers")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="openssh-client"):
        signing.sign(folder, key=tmp_path / "key")


def test_s18_a_dry_run_writes_nothing(folder: Path) -> None:
    """It names the file that would be written."""
    done = adapters("sign", folder, "--dry-run")
    assert done.exit_code == 0 and "SHA256SUMS" in done.stdout
    assert not (folder / signing.SUMS).exists()
