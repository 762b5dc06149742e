"""Preflight of tracking: an online W&B run that could not begin, before it ends up offline in silence."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from launcher.facts.offer import Site
from launcher.recipe.schema import Recipe

_NAME = re.compile(r"[^/\\#?%:\s][^/\\#?%:\t\r\n]{0,127}")
"""What W&B takes as a project; entities are stricter."""


def tracking_problems(recipe: Recipe, site: Site, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Why the W&B run that the recipe insists on cannot be had; mode auto falls back to offline by itself."""
    wandb = recipe.wandb
    if wandb.mode == "disabled":
        return
    for key, value in (("wandb.project", wandb.project), ("wandb.entity", wandb.entity)):
        if value is not None and not _NAME.fullmatch(value):
            yield f"{key}: {value!r} is no name that W&B takes; 1 to 128 characters, none of / \\ # ? % :"
    if wandb.mode != "online":
        return
    if not has_key(environ):
        yield (
            "wandb.mode: online, and there is no key here (neither WANDB_API_KEY nor an entry in ~/.netrc); run "
            "`wandb login` once, or set wandb.mode=offline and send the records later with launcher sync"
        )
    if site.internet_on_nodes is False:
        yield (
            f"wandb.mode: online, and compute nodes of {site.name} have no network; set wandb.mode=offline and send "
            "the records from here with launcher sync"
        )


def has_key(environ: Mapping[str, str]) -> bool:
    """Whether wandb can log in without asking; the key itself is not looked at."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    try:
        return host is not None and host in netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return False
