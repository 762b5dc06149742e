"""retention: text that the untrained base writes itself, sampled once per run, to see later what it has forgotten.

Rows are sampled before step 0 and kept in the run folder, so that every attempt and every rank measures on the same
ones. Openings are fixed, the seed is fixed, tokens are drawn from the base's whole distribution (temperature 1, no
top-k, no nucleus): then the loss on the rows is the base's own entropy, and its rise an estimate of how far the
trained model is from the base (forgetting.py). Every row has the same number of tokens and no row ends early, so
under ZeRO-3, where each forward pass gathers the weights on all ranks, the ranks stay in step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import GenerationConfig

from launcher.errors import JobFailedError
from launcher.planning.plan import Candidate
from launcher.runs.folder import write_atomic
from launcher.worker.packing import IGNORED, Row
from launcher.worker.rendezvous import after_rank_zero
from launcher.worker.tokens import Document

SEED = 20_260_101
NEW_TOKENS = 128
"""Tokens sampled per row; fewer where data.max_seq_length is shorter."""
OPENING_TOKENS = 4
"""Tokens of an opening that are used, behind the beginning-of-sequence token; they are not measured."""
TIMEOUT_S = 2 * 3600.0
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
OPENINGS = (
    "The history of the city begins",
    "In the early morning the",
    "Scientists have found that the",
    "The most important thing about",
    "She opened the door and saw",
    "According to the report, the",
    "There are three reasons why",
    "To make the soup, first",
    "The president said on Monday that",
    "def read_file(path):",
    "Once upon a time there was",
    "The company was founded in",
    "A triangle has three sides and",
    "Question: What is the capital of",
    "Dear Sir or Madam, I am",
    "The river flows from the mountains",
    "During the war, many people",
    "In this paper we study the",
    "My favourite book is about a",
    "The law requires that every",
    "import numpy as np",
    "He was born in a small",
    "The patient was treated with",
    "If the temperature rises above",
    "The team won the match after",
    "Children learn to speak by",
    "The first step is to install",
    "Most of the energy comes from",
    "Let x be a real number",
    "The film tells the story of",
    "Prices rose last year because",
    "How does a computer store",
)
"""Of news, fiction, science, code, letters, recipes and questions; one row is sampled for each."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """A table of sampled rows, as the loop evaluates it."""

    sampled: tuple[Document, ...]
    packed: bool
    """Whether rows carry position_ids, as the run's other tables do."""

    @property
    def trained_tokens(self) -> np.ndarray:
        """Measured tokens per row (int64)."""
        return np.asarray([document.trained for document in self.sampled], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sampled)

    def documents(self) -> tuple[Document, ...]:
        """Every row."""
        return self.sampled

    def row(self, index: int) -> Row:
        """Row `index`, a document of its own."""
        one = self.sampled[index]
        positions = np.arange(len(one.input_ids), dtype=np.int32) if self.packed else None
        return Row(one.input_ids, one.labels, positions)


def sampled_rows(
    path: Path,
    model: Any,
    tokenizer: Any,
    candidate: Candidate,
    *,
    rank: int,
    name: str,
    alive: Callable[[], None],
) -> SampledRows:
    """The rows in `path`, or newly sampled ones, which are written there; collective, the same on every rank.

    `model` must hold the untrained base: before a checkpoint is loaded. An adapter may sit on it (low-rank factors
    start at zero, virtual tokens are left out). `name` is new in this attempt.

    Raises:
        JobFailedError: the file in the run folder is damaged.
    """
    lines = _from_rank_zero(_read(path) if rank == 0 and path.exists() else None)
    if lines is None:

        def draw() -> list[dict[str, Any]]:
            return _lines(sample(model, tokenizer, candidate, alive=alive), tokenizer)

        # Under ZeRO-3 every forward pass gathers weights on all ranks, so all of them draw; rank 0's rows count.
        together = candidate.zero_stage == 3
        drawn = draw() if together else after_rank_zero(name, draw, rank=rank, timeout_s=TIMEOUT_S)
        if rank == 0:
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in drawn))
        lines = _from_rank_zero(drawn)
    return SampledRows(tuple(_document(line) for line in lines or ()), packed=candidate.packing)


def _from_rank_zero(value: Any) -> Any:
    told = [value]
    dist.broadcast_object_list(told)
    return told[0]


def sample(model: Any, tokenizer: Any, candidate: Candidate, *, alive: Callable[[], None]) -> torch.Tensor:
    """Token ids (rows, opening + sampled) on the CPU; leaves the model's mode and every random stream as they were."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prompts = openings(tokenizer, candidate.seq_len).to(base.device)
    new_tokens = min(NEW_TOKENS, candidate.seq_len - prompts.shape[1])
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    autocast = _AUTOCAST.get(candidate.precision) if candidate.zero_stage == 0 else None
    kind, own, training = prompts.device.type, base.generation_config, model.training
    devices = [prompts.device] if kind == "cuda" else []
    try:
        model.eval()
        base.generation_config = config  # what the model brings along (temperature, penalties) would be merged in
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.autocast(kind, dtype=autocast, enabled=autocast is not None),
        ):
            torch.manual_seed(SEED)
            found = base.generate(prompts, attention_mask=torch.ones_like(prompts), stopping_criteria=[_Beat(alive)])
    finally:
        base.generation_config = own
        model.train(training)
    return torch.as_tensor(found).cpu()


class _Beat:
    """Tells the supervisor after every token that the rank goes on; ends nothing."""

    def __init__(self, alive: Callable[[], None]) -> None:
        self._alive = alive

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        self._alive()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def openings(tokenizer: Any, seq_len: int) -> torch.Tensor:
    """Token ids of all openings, equally long, so that nothing is padded: (rows, opening)."""
    found = [tokenizer.encode(text, add_special_tokens=False) for text in OPENINGS]
    length = min(OPENING_TOKENS, seq_len // 2, *(len(ids) for ids in found))
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return torch.tensor([first + ids[:length] for ids in found])


def _lines(ids: torch.Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    """What is kept of each row; the text is for people."""
    opening = openings(tokenizer, ids.shape[1]).shape[1]
    return [{"input_ids": row, "opening_tokens": opening, "text": tokenizer.decode(row)} for row in ids.tolist()]


def _document(line: dict[str, Any]) -> Document:
    ids = np.asarray(line["input_ids"], dtype=np.int32)
    labels = ids.copy()
    labels[: max(1, int(line["opening_tokens"]))] = IGNORED
    return Document(ids, labels)


def _read(path: Path) -> Sequence[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            _document(line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobFailedError(
            f"{path}: the retention sample of this run cannot be read ({error}); remove the file to sample it again "
            "from the base with the same seed"
        ) from error
    return lines
