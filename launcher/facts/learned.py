"""Learned: what a site's own finished runs taught, kept beside its profile as <site>.learned.yaml.

`launcher score --calibrate SITE` writes it, every plan of the site reads it. Deleting the file forgets it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

from launcher.recipe.shipped import shipped_folder

SUFFIX = ".learned"


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """A site's coefficients; factors are measured over predicted."""

    runs: int
    """Finished runs they were fitted to."""
    step_factor: float = 1.0
    """On the time of everything that is not communication."""
    memory_factor: float = 1.0
    """On the peak that the allocator reports."""
    intra_node_bw_bytes_s: float | None = None
    """All-reduce bandwidth per GPU inside a node that explains the runs; None: nothing depended on it."""
    inter_node_bw_bytes_s: float | None = None
    step_error_pct: float | None = None
    """Median error of the step time of each run, predicted from the others; None with one run."""
    memory_error_pct: float | None = None

    @property
    def sentence(self) -> str:
        """Such as: learned from 12 runs, past error 4.1 % in time, 1.2 % in memory."""
        errors = [
            f"{error:.1f} % in {what}"
            for what, error in (("time", self.step_error_pct), ("memory", self.memory_error_pct))
            if error is not None
        ]
        past = f", past error {', '.join(errors)}" if errors else ", past error not known from one run"
        return f"learned from {self.runs} run{'' if self.runs == 1 else 's'}{past}"


def learned_path(profile: Path) -> Path:
    """Where calibration is written: beside the profile, or in ./slurm for profiles that came with the package."""
    packaged = profile.parent == shipped_folder("slurm") and "site-packages" in profile.parts
    folder = Path("slurm") if packaged or not os.access(profile.parent, os.W_OK) else profile.parent
    return folder / f"{profile.stem}{SUFFIX}.yaml"


def to_yaml(learned: Learned, site: str) -> str:
    """The file's text: what it is, then one line per coefficient that was learned."""
    lines = [f"# {site}: {learned.sentence}. Written by `launcher score --calibrate {site}`; delete it to forget."]
    for field in fields(Learned):
        value = getattr(learned, field.name)
        if value is not None:
            lines.append(f"{field.name}: {round(value, 4) if isinstance(value, float) else value}")
    return "\n".join(lines) + "\n"
