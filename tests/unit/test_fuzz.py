"""A small part of the fuzzing, with fixed seeds; `scripts/test --fuzz` runs ten thousand cases with new ones."""

from tests.fuzz.test_fuzz import *  # noqa: F403 - its tests, with the small budget
