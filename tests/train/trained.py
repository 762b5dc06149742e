"""A tiny base that knows something: a random model has nothing to forget.

It is trained for some seconds on Python's documentation (`pydoc_data.topics`), so that text has a loss far below that
of chance, and training on other rows can spoil it.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_model_dir

STEPS, ROWS, LENGTH = 300, 16, 64


def make_trained_base(folder: Path) -> Path:
    """A model folder whose model was trained on general text; returns `folder`."""
    make_model_dir(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer.encode(" ".join(topics[name] for name in sorted(topics)[:20])))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - LENGTH, (ROWS,), generator=generator)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
