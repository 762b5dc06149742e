"""Text of a row as the model will see it: the tokenizer folder's chat template, rendered without transformers.

Used to count tokens before anything heavy is loaded. The worker renders through transformers; a test holds the
two to the same count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import ModelError
from launcher.facts.formats import Example

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def find_template(tokenizer_dir: Path | None, chat_template: str) -> str | None:
    """Source of the chat template: the recipe's .jinja file, or what the tokenizer folder carries (None: nothing).

    Raises:
        ModelError: the recipe names a template file that cannot be read.
    """
    if chat_template != "tokenizer":
        return _read_template(Path(chat_template).expanduser())
    if tokenizer_dir is None:
        return None
    beside = tokenizer_dir / "chat_template.jinja"
    if beside.is_file():
        return _read_template(beside)
    stored = tokenizer_config(tokenizer_dir).get("chat_template")
    if isinstance(stored, list):  # several named templates
        stored = {entry["name"]: entry["template"] for entry in stored}.get("default")
    return stored if isinstance(stored, str) else None


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"data.chat_template: cannot read {path} ({error})") from error


def tokenizer_config(tokenizer_dir: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing where the folder has none."""
    try:
        loaded = json.loads((tokenizer_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, whether stored as text or as added-token objects."""
    found = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            found[name] = value
    return found


class TemplateRefusedError(Exception):
    """The template's own words on a chat that it does not accept."""


class Renderer:
    """Renders examples to the text that is tokenized.

    Chats go through the template (sandboxed, with the helpers templates expect); other examples are their own text.
    """

    def __init__(self, template: str | None, specials: Mapping[str, str]) -> None:
        self._specials = dict(specials)
        self._template: Any = None if template is None else _compile(template)

    @property
    def has_template(self) -> bool:
        """Whether chats can be rendered."""
        return self._template is not None

    def text(self, example: Example) -> str:
        """The whole text of the example, special tokens of the template included.

        Without a template a chat is its contents, one a line.

        Raises:
            TemplateRefusedError: the template does not accept the chat, or fails on it.
        """
        if not example.messages or (self._template is None and not example.only_chat):
            return example.text if example.text is not None else f"{example.prompt}{example.completion}"
        if self._template is None:
            return "\n".join(message["content"] for message in example.messages)
        return self._render(example)

    def _render(self, example: Example) -> str:
        import jinja2

        try:
            rendered: str = self._template.render(
                messages=list(example.messages),
                tools=list(example.tools) or None,
                documents=None,
                add_generation_prompt=False,
                **self._specials,
            )
        except jinja2.TemplateError as error:
            raise TemplateRefusedError(str(error)) from error
        return rendered


def _compile(template: str) -> Any:
    import jinja2

    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"data.chat_template: line {error.lineno}: {error.message}") from error


def _environment() -> Any:
    from datetime import datetime

    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMarks(jinja2.ext.Extension):
        """Accepts transformers' generation block and renders what is inside."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

        def parse(self, parser: jinja2.parser.Parser) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
