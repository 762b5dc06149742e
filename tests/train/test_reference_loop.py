"""The worker's losses are proved right by something else: a plain PyTorch loop that shares none of its code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import make_recipe
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, losses, make_run, train_here

STEPS = 6


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    group = Ranks(2, tmp_path_factory.mktemp("rendezvous"))
    yield group
    group.close()


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "one document per row"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_worker_trains_like_a_plain_pytorch_loop(method: str, packing: bool, tmp_path: Path, ranks: Ranks) -> None:
    """Two ranks with accumulation, batches, padding and packing give the losses of row-by-row training.

    The worker evaluates before the first step and the reference does not: an evaluation must leave no trace
    (bitsandbytes would repack 4-bit weights there, on CPUs with AVX512-BF16, and lose gradients).
    """
    recipe = make_recipe(tmp_path, method=method, train={"max_steps": STEPS, "global_batch_size": 8})
    run = make_run(recipe, candidate_for(2, 0, method=method, packing=packing))
    ranks.run(train_here, run.path)
    expected = ranks.run(_reference, run.path)[0]
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]


def _reference(run_dir: Path) -> list[float]:
    """The reference loop on the run's own model and rows; on both ranks the same."""
    import json

    import torch

    from launcher.planning.plan import plan_from_json
    from launcher.recipe.load import load_recipe
    from launcher.runs.folder import RunFolder
    from launcher.worker.data import build_token_cache
    from launcher.worker.model import build_model
    from launcher.worker.tokenizer import load_tokenizer
    from tests.train.reference import reference_losses

    run = RunFolder(run_dir)
    recipe = load_recipe(run.resolved)
    candidate = plan_from_json(json.loads(run.plan.read_text())).chosen.candidate
    cache = build_token_cache(recipe, candidate, load_tokenizer(recipe), run.path.parent / ".cache" / "tokens")
    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe, candidate, device="cpu", ds_config=None, total_steps=STEPS)
    return reference_losses(model, cache.train, steps=STEPS, global_batch=8, seed=recipe.train.seed)
