"""A Recipe back to YAML that any YAML reader understands and that loads to an equal Recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from launcher.recipe.scalars import format_minutes, read_any
from launcher.recipe.schema import Recipe, ValidationSpec


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper without anchors that quotes every string another reading could take for something else."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        """Write every value out, however often it stands in the recipe."""
        return True


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    ambiguous = not isinstance(read_any(text, quoted=False), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if ambiguous else None)


RecipeDumper.add_representer(str, _represent_string)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, sections in the order of the schema."""
    doc = {field.name: _plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
    if doc["data"].pop("retention_builtin"):
        doc["data"]["retention"] = "builtin"
    minutes = recipe.slurm.time
    if isinstance(minutes, int):
        doc["slurm"]["time"] = format_minutes(minutes)
    dumper = RecipeDumper
    return yaml.dump(doc, Dumper=dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10_000)


def _plain(value: Any) -> Any:
    """Sections as mappings, tuples as lists, validation in its short form."""
    if isinstance(value, ValidationSpec):
        short = (part for part in (value.share, value.count, value.source) if part is not None)
        return _plain(next(short, None))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
