"""`launcher rehearse --slurm`: the same stages as a small job that Slurm itself puts back into the queue."""

from __future__ import annotations

import json

from tests.cluster.bed import Bed


def test_a_small_job_is_killed_requeued_and_judged(bed: Bed) -> None:
    """Two ranks of one node without GPUs; the killed job comes back by Slurm's requeue and ends with an adapter."""
    recipe = bed.recipe("rehearsed", slurm={"nodes": 1, "gpus_per_node": 2, "cpus_per_task": 1})
    answer = bed.launcher("rehearse", recipe, "--slurm", "--json").expect()
    document = json.loads(answer.out)
    assert {each["verdict"] for each in document["verdicts"]} == {"ok"}, answer.out
    assert not list(bed.home.glob("runs/.rehearsals/*"))
    assert not bed.queue()
