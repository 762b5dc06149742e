"""job: one question about adapters, asked by a light process; one JSON answer as the last line of stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from launcher.errors import LauncherError
from launcher.runs.process import end_with


def _merge(request: dict[str, Any]) -> dict[str, Any]:
    from launcher.adapters.merging import merge

    return merge(request)


def _export(request: dict[str, Any]) -> dict[str, Any]:
    from launcher.adapters.export import export

    return export(request)


def _export_checkpoint(request: dict[str, Any]) -> dict[str, Any]:
    from launcher.adapters.from_checkpoint import export_checkpoint

    return export_checkpoint(request)


def _combine(request: dict[str, Any]) -> dict[str, Any]:
    from launcher.adapters.combine import combine

    return combine(request)


def _reduce(request: dict[str, Any]) -> dict[str, Any]:
    from launcher.adapters.reduce import reduce

    return reduce(request)


def _compare(request: dict[str, Any]) -> dict[str, Any]:
    from launcher.adapters.comparing import compare

    return compare(request)


def _score(request: dict[str, Any]) -> dict[str, Any]:
    from launcher.adapters.scoring import score

    return score(request)


ASKED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "merge": _merge,
    "export": _export,
    "export_checkpoint": _export_checkpoint,
    "compare": _compare,
    "combine": _combine,
    "reduce": _reduce,
    "score": _score,
}


def main() -> int:
    """Read the request, answer it; a user's error is an answer too.

    Ended by a signal, or because whoever asked is gone, it removes what it was writing.
    """
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    end_with(os.getppid(), signal.SIGTERM)
    request = json.load(sys.stdin)
    try:
        told = ASKED[request["ask"]](request)
    except LauncherError as error:
        told = {"error": type(error).__name__, "problems": list(error.problems)}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
