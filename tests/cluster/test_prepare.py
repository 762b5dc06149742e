"""`launcher data prepare --job`: tokens made by a CPU job of their own, found by the run that waits for it."""

from __future__ import annotations

import json
import time

from tests.cluster.bed import JOB_LIMIT_S, Bed


def test_a_run_that_waits_for_its_data_finds_the_prepared_cache(bed: Bed) -> None:
    """The run starts after the job (afterok) and builds no second cache."""
    recipe = bed.recipe("prepared", train={"max_steps": 2, "seed": 4711})
    job = json.loads(bed.launcher("data", "prepare", recipe, "--job", "--json").expect().out)["job_id"]
    run = bed.submit(recipe, f"slurm.extra.dependency=afterok:{job}")
    folder = next(path.parent for path in (run.path.parent / ".prepare").glob("*/request.json"))
    bed.wait(run).expect()
    made = json.loads((folder / "result.json").read_text())
    deadline = time.monotonic() + JOB_LIMIT_S
    while not (folder / "result.json").exists():
        assert time.monotonic() < deadline, (folder / "job.out").read_text()
        time.sleep(0.2)
    assert made["reused"] is False
    again = json.loads(bed.launcher("data", "prepare", recipe, "--json").expect().out)
    assert (again["reused"], again["key"]) == (True, made["key"])
    caches = [path.name for path in (run.path.parent / ".cache" / "tokens").iterdir() if (path / "meta.json").exists()]
    assert caches.count(made["key"]) == 1
