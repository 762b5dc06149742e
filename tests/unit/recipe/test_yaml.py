"""Strict YAML: what the reader refuses, and how it says where."""

from __future__ import annotations

import pytest

from launcher.recipe.load import recipe_from_text
from tests.unit.recipe.material import GOOD, problems


def test_a_duplicate_key_names_both_lines() -> None:
    """YAML readers usually keep the last one in silence."""
    (problem,) = problems(GOOD + "method: lora\nmethod: qlora\n")
    assert problem.startswith("r.yaml:5:1: key 'method' stands twice; first at line 4")


@pytest.mark.parametrize(
    ("line", "place", "word"),
    [
        ("x: !!python/object/apply:os.system [ls]", "r.yaml:4:4", "tag"),
        ("x: !!int 3", "r.yaml:4:4", "tag"),
        ("<<: {method: lora}", "r.yaml:4:1", "merge keys"),
        ("? [a, b]\n: 1", "r.yaml:4:3", "plain word"),
        ("a: b: c", "r.yaml:4:5", "second ': '"),
        ("a: [1", "r.yaml:5:1", "not valid YAML"),
        ("\ta: 1", "r.yaml:4:1", "tab"),
        ("--- \nb: 2", "r.yaml:4:1", "second document"),
        ("a: *nowhere", "r.yaml:4:4", "undefined alias"),
        ("method: %x", "r.yaml:4:9", "not valid YAML"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_place(line: str, place: str, word: str) -> None:
    """One document of mappings, lists and plain scalars; nothing that builds objects."""
    found = problems(GOOD + line + "\n")
    assert any(problem.startswith(f"{place}: ") and word in problem for problem in found), found


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n- b\n", "just text\n"])
def test_a_recipe_is_a_mapping(text: str) -> None:
    """An empty file and a list are told what a recipe is."""
    (problem,) = problems(text)
    assert problem.startswith("r.yaml") and "recipe" in problem


def test_aliases_cannot_explode() -> None:
    """Ten levels of ten aliases are ten billion values; the reader stops at ten thousand."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    (problem,) = problems(GOOD + bomb)
    assert "more than 10000 values" in problem


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: " + "[" * 60 + "]" * 60 + "\n", "[" * 50_000])
def test_endless_nesting_is_refused(text: str) -> None:
    """A list that holds itself, and depths no recipe has."""
    (problem,) = problems(text)
    assert "nested too deeply" in problem


def test_an_anchor_may_be_used_again() -> None:
    """Writing one value once and naming it twice is fine."""
    text = "name: demo\nmodel: {name_or_path: m/m}\ndata: {train: [&rows a.jsonl], retention: *rows}\n"
    data = recipe_from_text(text, "r.yaml").recipe.data
    assert data.retention is not None and data.retention.path == data.train[0].path == "a.jsonl"


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x85", "\u2028", "\u2029", "\u202e"])
def test_no_control_character_may_stand_in_the_file(character: str) -> None:
    """Also in comments: YAML ends a line at U+2028, an editor does not."""
    found = problems(GOOD + f"# comment{character}method: full\n")
    assert found == (f"r.yaml:4:10: control character U+{ord(character):04X} is not allowed in a recipe",)


@pytest.mark.parametrize("escape", [r"\n", r"\r", r"\0", r"\t", r"\u2028", r"\x7f", r"\N"])
def test_no_control_character_may_be_escaped_into_a_value(escape: str) -> None:
    """sbatch's parser honours backslashes inside quotes: a newline in a value would be a new line of its script."""
    (problem,) = problems(GOOD + f'slurm: {{partition: "gpu{escape}x"}}\n')
    assert problem.startswith("r.yaml:4:20: slurm.partition: control character U+")


def test_keys_of_free_mappings_are_looked_at_too() -> None:
    """slurm.extra's keys reach sbatch as well."""
    found = problems(GOOD + 'slurm: {extra: {"a\\nb": 1}}\n')
    assert "control character U+000A in a key" in found[0]


@pytest.mark.parametrize("value", ["${name}", "${oc.env:HOME}", "a${b}c"])
def test_interpolation_is_refused(value: str) -> None:
    """A recipe cannot read the environment, and never means something else tomorrow."""
    (problem,) = problems(GOOD + f"output_dir: {value}\n")
    assert problem.startswith("r.yaml:4:13: output_dir: ${…} is not filled in")


SECRETS = [
    ("wandb: {project: hf_abcdefghijklmnopqrstuvwxyz}", "hf_abc"),
    ("wandb: {api_key: 0123456789abcdef0123456789abcdef01234567}", "0123456789abcdef"),
    ("wandb: {group: 0123456789abcdef0123456789abcdef01234567}", "0123456789abcdef"),
    ("wandb_key: swordfish", "swordfish"),
    ("hf_token: swordfish", "swordfish"),
    ("slurm: {extra: {comment: sk-abcdefghijklmnopqrstuvwxyz}}", "sk-abc"),
    ("output_dir: https://me:swordfish@host/x", "swordfish"),
]


@pytest.mark.parametrize(("line", "secret"), SECRETS)
def test_secrets_are_refused_and_never_shown(line: str, secret: str) -> None:
    """Recipes are copied into run folders, logs and trackers."""
    found = problems(GOOD + line + "\n")
    assert any("looks like a secret" in problem for problem in found)
    assert secret not in "\n".join(found)


@pytest.mark.parametrize(
    ("override", "secret"),
    [
        ("wandb.api_key=swordfish", "swordfish"),
        ("wandb={api_key: swordfish}", "swordfish"),
        ("name=hf_abcdefghijklmnopqrstuvwxyz", "hf_abc"),
        ("slurm.extra.comment=[hf_abcdefghijklmnopqrstuvwxyz", "hf_abc"),
    ],
)
def test_a_secret_in_an_override_is_not_repeated(override: str, secret: str) -> None:
    """The origin of an override quotes it, except for secrets."""
    assert secret not in "\n".join(problems(GOOD, override))


def test_a_commit_hash_is_a_revision_not_a_secret() -> None:
    """Forty hex digits are what staging pins a model to."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert recipe_from_text(GOOD, "r.yaml", [f"model.revision={commit}"]).recipe.model.revision == commit
