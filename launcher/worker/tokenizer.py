"""The tokenizer a run trains with: right-padded, with a pad token and the recipe's chat template.

Beside model.py, because looking at data needs a tokenizer and no model.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from launcher.errors import ModelError, RecipeError
from launcher.recipe.schema import ModelSection, Recipe
from launcher.worker.base import reading

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Tokenizer of the base, right-padded, with a pad token and the recipe's chat template.

    The pad token is one the model has an embedding for (its own, else end-of-sequence, else unknown):
    adding a row to the embeddings would silently change what is saved.

    Raises:
        ModelError: no tokenizer in the folder, or none of the three tokens exists.
        RecipeError: `data.chat_template` names a file that cannot be read.
    """
    model = recipe.model
    _check_tokenizer_files(model)
    with reading(model):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        rows = _embedding_rows(model)
    tokenizer.padding_side = "right"
    _ensure_pad_token(tokenizer, rows, model)
    if recipe.data.chat_template != "tokenizer":
        tokenizer.chat_template = _read_template(recipe.data.chat_template)
    return tokenizer


def _check_tokenizer_files(model: ModelSection) -> None:
    folder = Path(model.name_or_path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ModelError(
            f"model.name_or_path: {folder} has no tokenizer (one of {', '.join(TOKENIZER_FILES)}); found {found}"
        )


def _embedding_rows(model: ModelSection) -> int:
    config = AutoConfig.from_pretrained(
        model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return int(config.get_text_config().vocab_size)


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase, rows: int, model: ModelSection) -> None:
    for token in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token):
        if token is not None and tokenizer.convert_tokens_to_ids(token) < rows:
            tokenizer.pad_token = token
            return
    raise ModelError(
        f"model.name_or_path: the tokenizer of {model.name_or_path} has no pad, end-of-sequence or unknown token "
        f"among the model's {rows} embeddings; set pad_token in its tokenizer_config.json"
    )


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"data.chat_template: {path} cannot be read: {error}") from error
