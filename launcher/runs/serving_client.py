"""serving_client: a running server told to take or to drop an adapter; works with vLLM's servers too."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, RecipeError, TemporaryError
from launcher.runs.serving import find_target

_TIMEOUT_S = 600.0
"""Loading a large adapter from a slow file system takes its time."""


def add(url: str, text: str, parent: Path | None, *, token_env: str | None) -> str:
    """Have `[NAME=]RUN` served; returns its name.

    Raises:
        RecipeError: no adapter, or the server refuses it. ClusterError, TemporaryError: the server does not answer.
    """
    target = find_target(text, parent)
    if target.adapter is None:
        raise RecipeError(f"{target.name} is a whole model; a server takes adapters of its own base while it runs")
    body = {"lora_name": target.name, "lora_path": str(target.folder)}
    _post(url, "load_lora_adapter", body, token_env)
    return target.name


def remove(url: str, name: str, *, token_env: str | None) -> None:
    """Have a name served no longer.

    Raises:
        RecipeError: the server refuses. ClusterError, TemporaryError: it does not answer.
    """
    _post(url, "unload_lora_adapter", {"lora_name": name}, token_env)


def _post(url: str, what: str, body: dict[str, Any], token_env: str | None) -> None:
    place = f"{url.rstrip('/').removesuffix('/v1')}/v1/{what}"
    if not place.startswith(("http://", "https://")):
        raise RecipeError(f"--url {url}: begins with http:// or https://, as the server printed it")
    headers = {"Content-Type": "application/json"} | _authorization(token_env)
    request = urllib.request.Request(place, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        said = _words(error)
        if error.code in (429, 503):
            raise TemporaryError(f"{place}: {said}") from error
        raise (RecipeError if error.code < 500 else ClusterError)(f"{place}: {said}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        raise ClusterError(f"{place}: no server answers ({getattr(error, 'reason', error)})") from error


def _authorization(token_env: str | None) -> dict[str, str]:
    if token_env is None:
        return {}
    token = os.environ.get(token_env)
    if not token:
        raise RecipeError(f"--token-env: the variable {token_env} is not set, or empty")
    return {"Authorization": f"Bearer {token}"}


def _words(error: urllib.error.HTTPError) -> str:
    """What the server says, in OpenAI's form or as it is."""
    text = error.read().decode("utf-8", errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {text[:200]}"
