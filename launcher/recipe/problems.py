"""What was found while a recipe was read: problems to raise together, and notices to show."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from launcher.errors import RecipeError
from launcher.recipe.tree import Where


@dataclass(slots=True)
class Findings:
    """Collects every problem and notice of one recipe; raises the problems at once, in reading order."""

    problems: list[tuple[Where, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    """Fields that have a problem already: they are not reported as missing on top."""

    def refuse(self, where: Where, message: str, *, path: str = "") -> None:
        """Add one problem; with `path`, that of the field, which then starts the message."""
        self.problems.append((where, f"{path}: {message}" if path else message))
        self.paths.add(path)

    def note(self, where: Where, message: str) -> None:
        """Add one line that the user should see although the recipe is accepted."""
        self.notices.append(f"{where}: {message}")

    def settle(self) -> None:
        """Raise RecipeError with every problem, sorted by place; return when there is none."""
        if self.problems:
            found = sorted(self.problems, key=lambda problem: (problem[0].line, problem[0].column))
            raise RecipeError(*dict.fromkeys(f"{where}: {message}" for where, message in found))


def nearest(word: str, choices: Iterable[str], *, n: int = 1) -> list[str]:
    """The choices a misspelt `word` may have meant, best first."""
    by_fold = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(word.casefold().replace("-", "_"), by_fold, n=n, cutoff=0.6)
    return [by_fold[fold] for fold in close]


def one_of(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
