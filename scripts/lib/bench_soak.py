"""scripts/bench soak: many random faults over one run, whose numbers must be those of a run that nothing disturbed."""

from __future__ import annotations

import argparse
import datetime
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from faults_table import machine

from launcher.runs.folder import RunFolder
from tests.faults.bed import SAVE_STEPS, LocalBed, make_local_bed
from tests.faults.invariants import assert_no_orphans, assert_one_artifact
from tests.faults.story import lost_steps, marks, seconds_to_resume, sequence, story

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
HANG_S = 20.0
POSSIBLE = (
    (35, "at=step", "kill"),
    (10, "at=after_step", "kill"),
    (15, "at=step", "killall"),
    (10, "at=step", "exit0"),
    (10, "at=step", "segv"),
    (5, "at=after_step", "abort"),
    (4, "at=after_share", "kill"),
    (3, "at=before_manifest", "killall"),
    (3, "at=before_rename", "killall"),
    (2, "at=in_prune", "killall"),
    (2, "at=step", "stop"),
    (1, "at=step", "gil"),
)
"""Weight, place and action: what happens to processes often happens often."""
IN_SAVES = ("after_share", "before_manifest", "before_rename", "in_prune")


def clauses(count: int, seed: int) -> list[str]:
    """One random fault between any two checkpoints, so that a run makes progress between two of them."""
    chance = random.Random(seed)
    told = []
    for index in range(count):
        checkpoint = SAVE_STEPS * (index + 2)
        _, place, action = chance.choices(POSSIBLE, weights=[weight for weight, _, _ in POSSIBLE])[0]
        in_save = place.removeprefix("at=") in IN_SAVES
        step = checkpoint if in_save else checkpoint - chance.randrange(SAVE_STEPS)
        rank = 0 if in_save and place != "at=after_share" else chance.randrange(RANKS)
        told.append(f"{place},rank={rank},step={step},do={action}")
    return told


def start(bed: LocalBed, name: str, steps: int, faults: list[str]) -> RunFolder:
    """Submit the run of `steps` steps; returns at once."""
    return bed.inject(
        name,
        ";".join(faults),
        train={"max_steps": steps, "eval_steps": 10**6},
        slurm={"nodes": 1, "gpus_per_node": RANKS, "max_restarts": len(faults) + 50},
        survival={"hang_minutes": HANG_S / 60},
    )


def follow(bed: LocalBed, run: RunFolder, count: int, limit_s: float) -> bool:
    """Say how far it is until the run has ended; whether it did in time."""
    began, said = time.monotonic(), -1
    while time.monotonic() - began < limit_s:
        answer = bed.launcher("wait", run.run_id, "--timeout", "5")
        if (done := len(marks(run))) != said:
            said = done
            print(f"{done} of {count} faults, {time.monotonic() - began:.0f} s", flush=True)
        if answer.code != 75:
            return True
    return False


def trouble(run: RunFolder) -> str:
    """What is wrong with how the run ended, on one line; nothing when it ended well."""
    if not run.result.exists():
        return "not finished"
    try:
        assert_one_artifact(run)
        assert_no_orphans(run)
    except AssertionError as error:
        return " ".join(str(error).split())[:200] or "a check of the artifact failed"
    return ""


def page(run: RunFolder, reference: RunFolder, count: int, seed: int, command: str, seconds: float) -> tuple[str, bool]:
    """The page, and whether nothing differed."""
    found, expected = sequence(run), sequence(reference)
    different = [step for step in expected if found.get(step) != expected[step]]
    happened, lost, resumed = marks(run), lost_steps(run), seconds_to_resume(run)
    kinds = Counter(f"{mark['do']} at {mark['at']}" for mark in happened)
    broken = trouble(run)
    whole = not broken and not different and found.keys() == expected.keys()
    lines = [
        f"# Soak on {machine()}, {datetime.date.today().isoformat()}",
        "",
        f"Written by `{command}` (seed {seed}, {RANKS} ranks, LoRA with dropout, fp32, a checkpoint every",
        f"{SAVE_STEPS} steps).",
        "",
        "| | |",
        "|---|---:|",
        f"| faults asked for | {count} |",
        f"| faults that happened | {len(happened)} |",
        f"| attempts | {len(story(run))} |",
        f"| one artifact, its bytes as recorded, no process and no temporary file left | {broken or 'yes'} |",
        f"| steps of the run | {len(expected)} |",
        f"| steps whose loss, learning rate or rows differ from the uninterrupted run's | {len(different)} |",
        f"| steps trained twice, in all | {sum(lost)} |",
        f"| steps trained twice, worst interruption | {max(lost, default=0)} |",
        f"| median time to resume, imports included | {statistics.median(resumed) if resumed else 0:.1f} s |",
        f"| the whole soak | {seconds / 60:.0f} min |",
        "",
        "| fault | times |",
        "|---|---:|",
        *(f"| {kind} | {times} |" for kind, times in kinds.most_common()),
    ]
    return "\n".join(lines) + "\n", whole


def main(arguments: list[str]) -> int:
    """Run the soak; 0 when every fault happened and nothing differs."""
    parser = argparse.ArgumentParser(prog="scripts/bench soak", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=240, help="give up after so long, and report what was done")
    parser.add_argument("--home", type=Path, help="where the runs are kept; a temporary folder without it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        home = options.home or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        os.environ["PYTHONPATH"] = str(ROOT)
        bed = make_local_bed(home)
        steps = SAVE_STEPS * (options.faults + 3)
        try:
            reference = start(bed, "lora-reference", steps, [])
            bed.finished(reference)
            run = start(bed, "lora-soak", steps, clauses(options.faults, options.seed))
            ended = follow(bed, run, options.faults, options.minutes * 60)
        finally:
            bed.cancel_everything()
        command = f"scripts/bench soak --faults {options.faults} --seed {options.seed}"
        text, whole = page(run, reference, options.faults, options.seed, command, time.monotonic() - began)
        done = len(marks(run))
    target = options.out / f"soak-{machine()}-{datetime.date.today().isoformat()}.md"
    target.write_text(text, encoding="utf-8")
    print(text)
    if not ended:
        print(f"given up after {options.minutes:g} min", file=sys.stderr)
    return 0 if ended and whole and done == options.faults else 1
