"""signing: an adapter or model folder with the sha256 of every file, and a signature over that list.

SHA256SUMS is in the form of coreutils (`sha256sum -c` reads it); SHA256SUMS.sig is made and checked by ssh-keygen
(OpenSSH 8.0 or newer), so that the key people already have will do, an agent's or a hardware key's included. Nothing
here sees a private key.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ClusterError, ConflictError, ModelError, RecipeError, raise_all
from launcher.runs.folder import write_atomic

SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
NAMESPACE = "finetune-launcher"
"""What the signature is for: ssh-keygen accepts it for nothing else."""
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_TIMEOUT_S = 300.0
"""A hardware key waits to be touched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What was found right."""

    files: int
    signer: str | None
    """Who of the allowed signers signed; None: signatures were not asked for."""


def sign(folder: Path, *, key: Path | None) -> int:
    """Write SHA256SUMS over every file of `folder`, and sign it; returns how many files.

    What was there stays until the new signature is made: a wrong passphrase takes nothing away.

    Raises:
        RecipeError: no such folder, or nothing in it. ModelError: a link, or a name that the list cannot hold.
        ClusterError: ssh-keygen is not here, or did not sign.
    """
    names = _names(folder)
    if not names:
        raise RecipeError(f"{folder}: no files to sign")
    sums = "".join(f"{_sha256(folder / name)}  {name}\n" for name in names)
    words = ["-Y", "sign", "-n", NAMESPACE, "-f", str(key)]
    signature = None if key is None else _keygen("sign", words, sums.encode())
    (folder / SIGNATURE).unlink(missing_ok=True)
    write_atomic(folder / SUMS, sums)
    _readable_like(folder / SUMS, folder / names[0])
    if signature is not None:
        write_atomic(folder / SIGNATURE, signature)
        _readable_like(folder / SIGNATURE, folder / names[0])
    return len(names)


def verify(folder: Path, *, signers: Path | None) -> Verified:
    """Compare every file with SHA256SUMS, and its signature with the allowed signers (ssh-keygen's file of that name).

    Raises:
        ModelError: there is no list. ConflictError: files differ, are missing or too many, or the signature is nobody's
            of `signers`; every problem.
        ClusterError: ssh-keygen is not here.
    """
    try:
        listed = _listed((folder / SUMS).read_text(encoding="utf-8"), folder)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder}: has no {SUMS} that can be read; it was not signed ({error})") from error
    there = set(_names(folder))
    problems = [f"{folder / name}: is listed in {SUMS} and not there" for name in sorted(set(listed) - there)]
    problems += [f"{folder / name}: is not listed in {SUMS}" for name in sorted(there - set(listed))]
    problems += [
        f"{folder / name}: is not the file that was signed"
        for name in sorted(set(listed) & there)
        if _sha256(folder / name) != listed[name]
    ]
    raise_all(ConflictError, problems)
    return Verified(files=len(listed), signer=None if signers is None else _signer(folder, signers))


def _names(folder: Path) -> list[str]:
    """Relative paths of all files but the list and its signature.

    Raises:
        RecipeError: no such folder. ModelError: a link, which could lead anywhere, or a line break in a name.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder")
    found, problems = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            problems.append(f"{path}: is no plain file; nothing but files can be signed")
        elif not name.isprintable() or "\\" in name:
            problems.append(f"{folder}: holds a file whose name {SUMS} cannot hold: {name!r}")
        elif path.is_file() and name not in (SUMS, SIGNATURE):
            found.append(name)
    raise_all(ModelError, problems)
    return found


def _listed(text: str, folder: Path) -> dict[str, str]:
    """Name -> sha256.

    Raises:
        ConflictError: a line is no such pair, or leads out of the folder.
    """
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2].startswith("/") or ".." in Path(match[2]).parts:
            raise ConflictError(f"{folder / SUMS}:{number}: is not a sum and the name of a file in the folder")
        found[match[2]] = match[1]
    return found


def _signer(folder: Path, signers: Path) -> str:
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise ConflictError(f"{folder}: was not signed, only listed: there is no {SIGNATURE}")
    asked = ["-f", str(signers), "-s", str(signature)]
    who = _keygen("find-principals", ["-Y", "find-principals", *asked], refusal=ConflictError).splitlines()[0].strip()
    content = (folder / SUMS).read_bytes()
    _keygen("verify", ["-Y", "verify", "-n", NAMESPACE, "-I", who, *asked], content, refusal=ConflictError)
    return who


def _keygen(
    what: str,
    words: list[str],
    content: bytes | None = None,
    *,
    refusal: type[ClusterError | ConflictError] = ClusterError,
) -> str:
    """Run ssh-keygen; its words in the error."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise ClusterError("ssh-keygen is not on this machine; it comes with OpenSSH (openssh-client)")
    try:
        ran = subprocess.run([program, *words], input=content, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"ssh-keygen -Y {what}: no answer within {_TIMEOUT_S:.0f} s") from error
    if ran.returncode != 0:
        said = ran.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        if what == "find-principals":
            said = [f"its key is none of the allowed signers ({said[-1]})"]
        raise refusal(f"ssh-keygen -Y {what}: {said[-1]}")
    return ran.stdout.decode(errors="replace")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _readable_like(path: Path, other: Path) -> None:
    """Whoever may read the files may read the list of them."""
    path.chmod(other.stat().st_mode & 0o666)
