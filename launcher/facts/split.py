"""How many training rows are held out for validation: one rule for the plan and for the job."""

from __future__ import annotations

from launcher.errors import DataError
from launcher.recipe.schema import ValidationSpec


def held_out_rows(validation: ValidationSpec, rows: int) -> int:
    """How many of `rows` training rows are held out; a share holds out at least one.

    Raises:
        DataError: nothing would be left to train on.
    """
    held = validation.count or 0
    if validation.share is not None:
        held = max(1, round(validation.share * rows))
    if held >= rows:
        raise DataError(f"data.validation: holding out {held} of {rows} rows leaves none to train on")
    return held
