"""A fake site: Slurm's commands on a PATH of their own, each answering with the recorded output of one version."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SAMPLES = Path(__file__).parent / "slurm_samples"
VERSIONS = sorted(folder.name for folder in SAMPLES.iterdir() if folder.is_dir())
_ASKED = {
    "config": ("scontrol", "show config"),
    "partition": ("scontrol", "show partition"),
    "sinfo": ("sinfo", "--format"),
    "accounts": ("sacctmgr", "show associations account="),
    "associations": ("sacctmgr", "show associations user="),
    "qos": ("sacctmgr", "show qos"),
    "help": ("srun", "--help"),
}
NO_ACCOUNTING = "You are not running a supported accounting_storage plugin"


@dataclass
class FakeSite:
    """`answers`: what is asked (see _ASKED) -> what is printed; a missing one fails with `refusal`."""

    folder: Path
    answers: dict[str, str] = field(default_factory=dict)
    refusal: str = NO_ACCOUNTING

    def write(self) -> None:
        """Put the commands in place."""
        self.folder.mkdir(exist_ok=True)
        for name, text in self.answers.items():
            (self.folder / f"{name}.txt").write_text(text)
        for program in {program for program, _ in _ASKED.values()}:
            cases = "\n".join(
                f"  *'{words}'*) exec cat '{self.folder}/{name}.txt' ;;"
                for name, (asked, words) in _ASKED.items()
                if asked == program and name in self.answers
            )
            script = f"#!/bin/bash\ncase \"$*\" in\n{cases}\nesac\necho '{program}: {self.refusal}' >&2\nexit 1\n"
            path = self.folder / program
            path.write_text(script)
            path.chmod(0o755)


def recorded(version: str, folder: Path) -> FakeSite:
    """The site that the samples of one version tell of."""
    answers = {file.stem: file.read_text() for file in sorted((SAMPLES / version).glob("*.txt"))}
    return FakeSite(folder=folder, answers={"help": "Usage: srun\n"} | answers)
