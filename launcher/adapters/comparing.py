"""comparing: what loaded models add to a comparison of runs: losses per row, and answers side by side."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch

from launcher.adapters.generations import Prompt, answers_of, of_documents, of_rows, rendered
from launcher.adapters.lineage import read_adapter, refuse_other_base
from launcher.adapters.loaded import Subject, each_model
from launcher.adapters.per_example import Shared, losses_of, shared_documents
from launcher.errors import ConflictError
from launcher.worker.packing import IGNORED
from launcher.worker.tokenizer import load_tokenizer

BASE = "base"


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Answer {"runs": folders, "adapters": folders, "rows", "generations", "max_new_tokens", "prompts": rows | None}.

    Returns: losses (name -> nats per trained token of each row) | None, tokens (trained, per row), generations, notes,
    device.

    Raises:
        ModelError: a base that is not here or does not fit. ConflictError: an adapter of another base.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subjects = [Subject.of(Path(path), device) for path in request["runs"]]
    subjects += [_beside(subjects, Path(path)) for path in request.get("adapters", ())]
    tokenizers = {subject.run.run_id: load_tokenizer(subject.recipe) for subject in subjects}
    first = tokenizers[subjects[0].run.run_id]
    shared = shared_documents([subject for subject in subjects if subject.other is None], request["rows"])
    prompts = _prompts(request, shared.documents, first)
    losses: dict[str, list[float]] = {}
    answers: list[dict[str, str]] = [{} for _ in prompts]
    for name, subject, model in each_model(subjects, device, BASE):
        tokenizer = tokenizers[subject.run.run_id]
        if shared.documents:
            losses[name] = losses_of(
                model,
                shared.documents,
                pad_token_id=tokenizer.pad_token_id,
                device=device,
                arithmetic=subject.arithmetic(device),
            )
        told = answers_of(
            model,
            [rendered(prompt, subject, tokenizer) for prompt in prompts],
            tokenizer,
            max_new_tokens=request["max_new_tokens"],
            device=device,
            arithmetic=subject.arithmetic(device),
        )
        for at, answer in enumerate(told):
            answers[at][name] = answer
    order = [BASE, *(subject.name for subject in subjects)]
    return {
        "losses": {name: losses[name] for name in order} if losses else None,
        "tokens": [int((document.labels != IGNORED).sum()) for document in shared.documents],
        "generations": [
            {
                "prompt": prompt.shown,
                "reference": prompt.reference,
                "answers": {name: answers[at][name] for name in order},
            }
            for at, prompt in enumerate(prompts)
        ],
        "notes": _notes(shared, prompts),
        "device": device,
    }


def _beside(subjects: list[Subject], adapter: Path) -> Subject:
    """An adapter without a run, measured as the first run is whose base is its own.

    Raises:
        ConflictError: it is of another base than all of them. ModelError: no adapter.
    """
    opened = read_adapter(adapter)
    for subject in subjects:
        base = Path(subject.recipe.model.name_or_path)
        if subject.candidate.method != "full" and base.is_dir():
            with contextlib.suppress(ConflictError):
                refuse_other_base(opened, base)
                return dataclasses.replace(subject, other=adapter)
    raise ConflictError(f"{adapter}: none of the runs is an adapter on its base; compare it with a run that is")


def _notes(shared: Shared, prompts: list[Prompt]) -> list[str]:
    notes = [shared.why_not] if shared.why_not else []
    return notes + (
        [] if prompts or not shared.why_not else ["nothing is generated: name a file of prompts with --prompts"]
    )


def _prompts(request: dict[str, Any], documents: Any, tokenizer: Any) -> list[Prompt]:
    if request["prompts"] is not None:
        return of_rows(request["prompts"])[: request["generations"]]
    return of_documents(documents[: request["generations"]], tokenizer)
