"""The train environment asked a question: a light process cannot import torch, so another one does.

One JSON request on stdin, one JSON answer as the last line of stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher import errors
from launcher.errors import ClusterError, LauncherError
from launcher.facts.offer import Site

_GRACE_S = 30.0


def train_python(site: Site | None = None) -> str:
    """Interpreter of the train environment: the site's, $LAUNCHER_VENV's, or the one that runs now."""
    folder = (site.venv if site is not None else None) or os.environ.get("LAUNCHER_VENV")
    return str(Path(folder).expanduser() / "bin" / "python") if folder else sys.executable


def environment() -> dict[str, str]:
    """Variables of a process there: ours, and the place of this very package."""
    package = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


def ask(module: str, request: Mapping[str, Any], *, python: str, verb: str, timeout_s: float) -> dict[str, Any]:
    """Run `python -m module` with `request` and return its answer; `verb` names the asker in messages.

    Raises:
        ClusterError: there is no such environment, it lacks packages, or it broke.
        LauncherError: what the other side found, in its class and words.
    """
    try:
        done = _run([python, "-m", module], json.dumps(request), timeout_s)
    except OSError as error:
        raise ClusterError(f"{verb}: cannot run {python}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{verb}: no answer within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        raise ClusterError(_failure(verb, python, done.stderr))
    answer = dict(json.loads(done.stdout.splitlines()[-1]))
    if "error" in answer:
        kind = getattr(errors, answer["error"], None)
        if isinstance(kind, type) and issubclass(kind, LauncherError):
            raise kind(*answer["problems"])
        raise ClusterError(f"{verb}: {answer['error']}", *answer["problems"])
    return answer


def _run(words: list[str], text: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """subprocess.run, but what is ended early (time, Ctrl-C) may remove what it was writing before it is killed."""
    pipe = subprocess.PIPE
    variables = environment() | {"TOKENIZERS_PARALLELISM": "true"}
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=variables) as child:
        try:
            out, error = child.communicate(text, timeout=timeout_s)
        except BaseException:
            child.terminate()
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
    return subprocess.CompletedProcess(words, child.returncode, out, error)


def _failure(verb: str, python: str, stderr: str) -> str:
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    if "ModuleNotFoundError" in last:
        return (
            f"{verb}: {python} has no train environment ({last}); install finetune-launcher[train] there, "
            "or name the environment in LAUNCHER_VENV"
        )
    return f"{verb}: the train environment failed: {last}"
