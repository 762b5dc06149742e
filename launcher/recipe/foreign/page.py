"""docs/import.md, out of the converters' own tables: `python -m launcher.recipe.foreign.page > docs/import.md`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from launcher.recipe.foreign import axolotl, llamafactory, llamafactory1, torchtune, trl

_HEAD = """# Configurations of other tools

Written by `python -m launcher.recipe.foreign.page` from the converters' tables; do not edit by hand.

`launcher import FILE -o recipe.yaml` makes a recipe of a training configuration of Axolotl, LLaMA-Factory, TRL
(`trl sft`, and the alignment handbook's recipes) or torchtune. The tool is recognised by its keys; `--tool` says it.
Merge keys and `${references}` are followed. Files that a configuration names (DeepSpeed's JSON, `dataset_info.json`)
are looked up from its folder and the folders above it.

- **Every key is accounted for**: it set a field, or it is listed with the reason, in the recipe's head, on stderr and
  in `--json` (`carried`, `left_out`, `notes`). A key that was read and set nothing is listed, too.
- **What a file does not say** is written as the other tool would do it where ours would differ: a table below per tool.
- **The global batch** is micro-batch x accumulation x GPUs, and no file says how many GPUs: `--gpus N`, else 1.
- **Warm-up in steps** becomes a share where the file says how many steps the run has; else 0.03 is written and listed.
- **A slice of a split** such as `train[:5%]` becomes a weight (0.05); which rows are taken then follows from the seed.
- **Another objective is refused** (exit 2): preferences, rewards, distillation, images, and files for evaluation,
  generation or export. None of them becomes a supervised run in silence.
"""
_TOOLS = (
    ("Axolotl", axolotl.SAME, axolotl.READ, axolotl.WHY, axolotl.DEFAULTS),
    ("LLaMA-Factory", llamafactory.SAME, llamafactory.READ, llamafactory.WHY, llamafactory.DEFAULTS),
    ("LLaMA-Factory v1", llamafactory1.SAME, llamafactory1.READ, llamafactory1.WHY, llamafactory1.DEFAULTS),
    ("TRL", trl.SAME, trl.READ, trl.WHY, trl.DEFAULTS),
    ("torchtune", torchtune.SAME, torchtune.READ, torchtune.WHY, torchtune.DEFAULTS),
)


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for name, same, read, why, defaults in _TOOLS:
        parts += [
            f"## {name}\n",
            _carried(same, read),
            _defaults(defaults),
            "Listed, not carried over:\n",
            _listed(why),
        ]
    return "\n".join(parts)


def _carried(same: Mapping[str, str], read: Mapping[str, str]) -> str:
    rows = [f"| {_code(keys)} | `{path}` |" for keys, path in (*same.items(), *read.items())]
    return "\n".join(["| its key | the recipe's field |", "|---|---|", *rows, ""])


def _defaults(values: Mapping[str, object]) -> str:
    told = ", ".join(f"`{path}: {value}`" for path, value in values.items())
    return f"Written where the file does not say: {told}.\n"


def _listed(why: Mapping[str, str]) -> str:
    keys: dict[str, list[str]] = defaultdict(list)
    for key, reason in why.items():
        keys[reason].append(key.removesuffix(".*"))
    rows = [f"| {_code(', '.join(names))} | {reason} |" for reason, names in keys.items()]
    return "\n".join(["| its key | because |", "|---|---|", *rows, ""])


def _code(keys: str) -> str:
    return ", ".join(f"`{key}`" for key in keys.split(", "))


if __name__ == "__main__":
    print(page(), end="")
