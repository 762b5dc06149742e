"""What may be shown of a foreign file: one printable line, and no secrets."""

from __future__ import annotations

import math
import re
from typing import Any

from launcher.recipe.forbidden import is_secret

HIDDEN = "(looks like a secret; not shown)"
_SPECIAL_TOKEN = re.compile(r"(^|\.)((bos|eos|pad|unk|sep|cls|mask|eot|eom)_token|(special_)?tokens\.\w+)$")
_LONGEST = 60


def line(text: str) -> str:
    """`text` in one line, with a question mark for every character that a terminal would act on."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def shown(value: Any) -> str:
    """A value in one line of printable text, shortened."""
    text = line(str(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def safe(key: str, value: Any) -> Any:
    """`value` as plain JSON holds it, without access tokens and passwords; a tokenizer's special tokens are none."""
    if isinstance(value, dict):
        return {name: safe(f"{key}.{name}", child) for name, child in value.items()}
    if isinstance(value, list):
        return [safe(key, child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        return value
    named = "" if _SPECIAL_TOKEN.search(key) else key.partition("[")[0]
    return HIDDEN if is_secret(named, value) else value
