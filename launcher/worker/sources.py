"""The recipe's data sources inside the job: files through the light reader, data-set ids through `datasets`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from launcher.errors import DataError
from launcher.facts.files import data_files, described, is_dataset_id
from launcher.facts.formats import Example, read_examples
from launcher.facts.rows import Located
from launcher.recipe.schema import DataSource, Recipe


class Sources:
    """The recipe's sources, local or downloaded."""

    def __init__(self, recipe: Recipe) -> None:
        self.train = recipe.data.train
        self.validation = recipe.data.validation.source
        self.retention = recipe.data.retention
        self._loaded: dict[tuple[str | None, ...], Any] = {}

    @property
    def all(self) -> list[DataSource]:
        """Every source, training first."""
        return [*self.train, *(source for source in (self.validation, self.retention) if source is not None)]

    def fingerprint(self, source: DataSource) -> str:
        """Hash of the source's content."""
        if is_dataset_id(source.path):
            return f"{source.path}:{self._load(source)._fingerprint}"
        hashes = hashlib.sha256()
        for path in data_files(source):
            with path.open("rb") as file:
                hashes.update(hashlib.file_digest(file, "sha256").digest())
            hashes.update(path.suffix.encode())
        return hashes.hexdigest()

    def examples(self, source: DataSource) -> Iterator[tuple[str, Example]]:
        """(place, example) of every row."""
        return ((located.where, example) for located, example in self.located(source))

    def located(self, source: DataSource) -> Iterator[tuple[Located, Example]]:
        """Every row as it was read, with its example."""
        return read_examples(source, self._rows(source) if is_dataset_id(source.path) else None)

    def _rows(self, source: DataSource) -> Iterator[Located]:
        for number, row in enumerate(self._load(source), start=1):
            yield Located(source.path, number, row, by_row=True)

    def _load(self, source: DataSource) -> Any:
        """The data set, from the hub or its cache on this machine. Code that comes with it is never run."""
        import datasets

        name = (source.path, source.split, source.config, source.revision)
        if name not in self._loaded:
            try:
                self._loaded[name] = datasets.load_dataset(
                    source.path, name=source.config, split=source.split, revision=source.revision
                )
            except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
                raise DataError(
                    f"{described(source)}: cannot load this data set ({str(error).strip()}); "
                    "if a file or folder was meant, it does not exist here"
                ) from error
        return self._loaded[name]
