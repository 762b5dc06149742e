"""Model shapes from a folder or the shipped catalogue, and what is said when there is none."""

import json

import pytest

from launcher.errors import ModelError
from launcher.facts.architecture import shape_from_config
from launcher.facts.model import catalogue, model_shape
from launcher.recipe.schema import ModelSection
from tests.tiny import make_model_dir

PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-2-9b": 9_241_705_984,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "tiiuae/falcon-7b": 6_921_720_704,
}
"""Parameter counts the models' own pages give."""


def shape(name):
    return model_shape(ModelSection(name_or_path=str(name)))


@pytest.mark.parametrize(("name", "params"), PUBLISHED.items())
def test_catalogue_gives_published_parameter_counts(name, params):
    """The catalogue's shapes add up to the published counts, to the parameter."""
    assert shape(name).params == params


def test_every_catalogue_row_makes_a_shape():
    """No row of the shipped catalogue is unreadable or of an unknown architecture."""
    for row in catalogue().values():
        assert shape_from_config(row, name=row["name"], source="catalogue").params > 1_000_000


def test_names_are_found_whatever_their_case():
    """Hub ids are not case-sensitive on the hub, and not here."""
    assert shape("META-LLAMA/llama-3.1-8b").name == "meta-llama/Llama-3.1-8B"


def test_the_quickstarts_models_are_in_the_catalogue():
    """Both can be planned before the quickstart has made them."""
    assert shape("quickstart/base").params == shape("quickstart/init").params == 12_587_904


def test_routed_experts_count_in_full_and_as_active():
    """A token of Mixtral passes two of eight experts: 12.9 of 46.7 billion parameters."""
    mixtral = shape("mistralai/Mixtral-8x7B-v0.1")
    assert mixtral.active_params == 12_879_925_248
    assert {linear.name for linear in mixtral.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "mixtral"])
def test_a_folder_is_read_from_its_config(tmp_path, family):
    """The shape of a local folder comes from config.json alone."""
    made = shape(make_model_dir(tmp_path / family, family=family))
    assert (made.family, made.layers, made.hidden, made.vocab) == (family, 2, 64, 512)
    assert made.source.endswith("config.json")


def test_multimodal_configs_are_read_for_their_text_part(tmp_path):
    """A text_config inside config.json is the language model."""
    text = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": 100, "intermediate_size": 128, "num_key_value_heads": 1, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert shape(tmp_path).family == "gemma3_text"


def test_an_unknown_name_is_refused_with_near_ones():
    """A typing error gets the names it may have meant, and the way to plan anything else."""
    with pytest.raises(ModelError, match=r"Did you mean meta-llama/Llama-3\.1-8B.*config\.json") as caught:
        shape("meta-llama/Lama-3.1-8B")
    assert caught.value.exit_code == 4


def test_a_folder_without_config_lists_what_is_there(tmp_path):
    """An adapter folder or a wrong level is recognised by its content."""
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ModelError, match=r"no config\.json; found adapter_model\.safetensors"):
        shape(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba3"}, "'mamba3' is not known"),
        ({"architectures": ["NovelForCausalLM"]}, "NovelForCausalLM"),
        ({"model_type": "llama", "hidden_size": 64}, "missing num_attention_heads"),
        ({"model_type": "llama", "hidden_size": "64", "num_attention_heads": 4}, "hidden_size is '64'"),
        ({"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}, "does not divide into 4"),
        ([1], "holds a list"),
    ],
)
def test_unusable_configs_are_refused_by_name(tmp_path, config, said):
    """Unknown architectures and missing or wrong keys name the file, the key and the value."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        shape(tmp_path)


def test_broken_json_names_the_file(tmp_path):
    """A truncated config.json is an error of the model folder, not a traceback."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not readable as JSON"):
        shape(tmp_path)
