"""Host memory for saves in the background: where the copy lies, and whether the plan allows it."""

from dataclasses import replace

import pytest

from launcher.facts.model import model_shape
from launcher.planning.host import checkpoint_bytes, host_ram_bytes_per_node, snapshot_bytes_per_node
from launcher.planning.resolve import resolve
from launcher.recipe.schema import CheckpointSection, DeepSpeedSection
from tests.unit.planning.examples import A100, LLAMA_8B, a_recipe, on, plan_of


@pytest.mark.parametrize(("stage", "nodes"), [(1, 1), (2, 2), (3, 1), (3, 2)])
def test_the_copy_is_shared_by_the_nodes_as_the_states_are(stage, nodes):
    """Full fine-tuning in bf16: 12 bytes per parameter spread over the nodes, 2 more on rank 0's at stages 1 and 2."""
    recipe = a_recipe(LLAMA_8B, "full", slurm=on(nodes, 8), deepspeed=DeepSpeedSection(stage=stage))
    candidate, shape = plan_of(recipe).chosen.candidate, model_shape(recipe.model)
    whole = checkpoint_bytes(shape, candidate)
    weights = 0 if stage == 3 else 2 * shape.params
    assert snapshot_bytes_per_node(shape, candidate) == weights + (whole - weights) // nodes


def test_saves_are_in_the_background_where_the_node_holds_the_copy():
    """A node that holds everything but the copy saves while training waits; the recipe may insist either way."""
    recipe = a_recipe(LLAMA_8B, "full", slurm=on(1, 8))
    roomy = plan_of(recipe)
    needed = host_ram_bytes_per_node(model_shape(recipe.model), roomy.chosen.candidate)
    tight = plan_of(recipe, replace(A100, mem_bytes_per_node=needed + 10**9))
    assert tight.chosen.candidate == roomy.chosen.candidate
    assert [resolve(recipe, plan).checkpoint.background for plan in (roomy, tight)] == [True, False]
    for asked in (True, False):
        told = replace(recipe, checkpoint=CheckpointSection(background=asked))
        assert [resolve(told, plan).checkpoint.background for plan in (roomy, tight)] == [asked, asked]
