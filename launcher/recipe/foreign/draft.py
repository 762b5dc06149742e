"""Draft: a recipe being made of another tool's configuration, and an account of every key of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.recipe.foreign.telling import safe, shown

_ABSENT = object()

SWITCHED_OFF = "empty or switched off"
"""Why a key is left out that carries nothing."""
NOT_USED = "changes nothing beside the other keys"
"""Why a key is left out that was read, and set no field."""
NO_COUNTERPART = "has no counterpart here"
FOLLOWED = "counts where other keys name it"


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """One key that the recipe does not carry."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """One key that set a field of the recipe."""

    key: str
    value: Any
    field: str
    """Dotted name of the field."""


@dataclass(slots=True)
class Draft:
    """The foreign keys (dotted where nested), taken one by one, and the recipe they make.

    A key that is taken and then sets no field, is in no note and in no list is listed by `settle`: that a key is
    read is no proof that it is carried.
    """

    source: Mapping[str, Any]
    folder: Path
    """Where the foreign file lies; the files it names are looked up from here."""
    gpus: int | None
    """GPUs it was trained on; None = nobody said."""
    referred_to: frozenset[str] = frozenset()
    """Keys that other keys name as `${key}`."""
    recipe: dict[str, Any] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Why this can be no recipe at all, such as another objective."""
    last_taken: str = ""
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Field -> the foreign keys that set it; defaults of the other tool have none."""
    taken: set[str] = field(default_factory=set)
    _told: set[str] = field(default_factory=set)

    # --- reading ----------------------------------------------------------------------------------

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a foreign key, which counts as read."""
        self.taken.add(key)
        self.last_taken = key
        return self.look(key, default)

    def look(self, key: str, default: Any = None) -> Any:
        """The value of a foreign key, which stays to be dealt with."""
        value: Any = self.source.get(key, _ABSENT)
        if value is _ABSENT:
            value = self.source
            for part in key.split("."):
                value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        return default if value is _ABSENT or value is None else value

    # --- writing ----------------------------------------------------------------------------------

    def put(self, path: str, value: Any, *, of: Iterable[str] | None = None) -> None:
        """Set a recipe field by its dotted name, out of the foreign keys `of` [the last taken]; None sets nothing."""
        if value is None:
            return
        section, _, name = path.rpartition(".")
        target = self.recipe
        for part in filter(None, section.split(".")):
            target = target.setdefault(part, {})
        target[name] = value
        keys = tuple(of) if of is not None else (self.last_taken,)
        self.origins[path] = tuple(key for key in keys if self.look(key, _ABSENT) is not _ABSENT)

    def get(self, path: str) -> Any:
        """A recipe field that was set, or None."""
        value: Any = self.recipe
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def same(self, names: Mapping[str, str]) -> None:
        """Fields that mean the same: foreign key -> recipe field."""
        for key, path in names.items():
            self.put(path, self.take(key))

    def defaults(self, tool: str, values: Mapping[str, Any]) -> None:
        """What the other tool does where its file says nothing, and ours would do something else."""
        missing = {path: value for path, value in values.items() if self.get(path) is None}
        if self.get("train.max_steps") is not None:
            missing.pop("train.num_train_epochs", None)  # steps count, not epochs
        for path, value in missing.items():
            self.put(path, value, of=())
        if missing:
            told = ", ".join(f"{path}: {value}" for path, value in missing.items())
            self.note(f"the file does not say, so {tool}'s own defaults are written: {told}")

    def choose(self, key: str, path: str, ours: Mapping[str, str]) -> None:
        """A field with a few values: foreign value -> ours; another one is listed."""
        value = self.take(key)
        if str(value) in ours:
            self.put(path, ours[str(value)])
        elif value not in (None, "auto"):
            self.leave(key, value, f"is not offered; {path} takes {', '.join(sorted(set(ours.values())))}")

    # --- the account ------------------------------------------------------------------------------

    def leave(self, key: str, value: Any, why: str) -> None:
        """List a key that the recipe does not carry."""
        self.taken.add(key)
        self.left_out.append(LeftOut(key=key, value=safe(key, value), why=why))

    def drop(self, key: str, why: str) -> None:
        """Deal with a foreign key by listing it; switched-off and missing ones need no word."""
        value = self.take(key)
        if not is_off(value):
            self.leave(key, value, why)

    def refuse(self, key: str, why: str) -> None:
        """No recipe can be made: this key asks for something that is no supervised training on text."""
        value = self.take(key)
        told = "" if isinstance(value, dict | list) else f" {shown(safe(key, value))}"
        self.problems.append(f"{key}:{told} {why}")

    def agree(self, *keys: str) -> None:
        """Keys whose values are the case here anyway."""
        self._told.update(keys)

    def note(self, text: str, *, of: Iterable[str] = ()) -> None:
        """One sentence about how something was read; `of` are the keys it accounts for."""
        self._told.update(of)
        if text not in self.notes:
            self.notes.append(text)

    def unused(self, section: str, why: str) -> None:
        """Take a section out of the recipe again, and list the keys that set it."""
        self.recipe.pop(section, None)
        for path in [path for path in self.origins if path.partition(".")[0] == section]:
            for key in self.origins.pop(path):
                if key not in {one.key for one in self.left_out}:
                    self.leave(key, self.look(key), SWITCHED_OFF if is_off(self.look(key)) else why)

    def carried(self) -> tuple[Carried, ...]:
        """Every key that set a field, in the order of the fields."""
        return tuple(
            Carried(key=key, value=self.look(key), field=path) for path, keys in self.origins.items() for key in keys
        )

    def settle(self, reasons: Mapping[str, str]) -> None:
        """Account for every key that set no field; `reasons` say why known ones are not carried.

        A reason for `section.*` lists a whole section in one line.
        """
        done = {key for keys in self.origins.values() for key in keys} | self._told
        done |= {one.key.partition("[")[0] for one in self.left_out}
        for section, whole in self.source.items():
            if f"{section}.*" in reasons and not is_off(whole) and section not in self.taken:
                self.leave(section, whole, reasons[f"{section}.*"])
                done.add(section)
        for key, value in leaves(self.source):
            if key in done or any(key.startswith(f"{one}.") for one in done):
                continue
            if is_off(value):
                self.left_out.append(LeftOut(key=key, value=value, why=SWITCHED_OFF))
                continue
            read = any(key == one or key.startswith(f"{one}.") for one in self.taken)
            unknown = FOLLOWED if key in self.referred_to else NOT_USED if read else NO_COUNTERPART
            why = reasons.get(key) or reasons.get(key.split(".")[0]) or unknown
            self.left_out.append(LeftOut(key=key, value=safe(key, value), why=why))


def is_off(value: Any) -> bool:
    """Whether a value says nothing: null, false, zero or empty."""
    return value is None or value is False or value == 0 or value in ("", [], {})


def leaves(source: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every key with its value, dotted; lists and empty mappings are values."""
    found: list[tuple[str, Any]] = []
    for key, value in source.items():
        name = f"{prefix}{key}"
        found += leaves(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return found
