"""main: the serving process, `python -m launcher.serving.main REQUEST`; `launcher serve` becomes it.

It runs in the train environment. REQUEST is JSON, as launcher/runs/serving.py makes it; it holds no secret, only the
name of the token's variable.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn

from launcher.errors import ClusterError, LauncherError, RecipeError
from launcher.serving.app import make_app
from launcher.serving.engine import Engine, Limits
from launcher.serving.guard import LOOPBACK, Rules
from launcher.serving.model import Served, load_base
from launcher.serving.names import BASE, Names, new_entry
from launcher.serving.opened import BaseFacts, load_tokenizer, open_adapter
from launcher.serving.problems import ApiError
from launcher.serving.service import Service

_LAST_WORDS_S = 5
"""For clients to take the last of their answers."""


class _Server(uvicorn.Server):
    """Told to end, it gives answers under way their time, and then says to the others that there will be no more."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_s: int, early: Sequence[int]) -> None:
        """`early`: signals that came before uvicorn listened for them."""
        super().__init__(config)
        self._engine, self._grace_s, self._early = engine, grace_s, early

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does; told to end already, it ends."""
        await super().startup(sockets)
        if self._early:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, which alone would tear the connections."""
        asyncio.get_running_loop().call_later(self._grace_s, self._engine.end)
        await super().shutdown(sockets)


def serve(asked: dict[str, Any]) -> int:
    """Serve until told to end; the exit code (0 after SIGTERM, 130 after Ctrl-C).

    Raises:
        LauncherError: it cannot begin.
    """
    rules = Rules(token=_token(asked), body_bytes=asked["body_bytes"])
    listener = _listen(asked["host"], asked["port"])
    service = make_service(asked)
    config = uvicorn.Config(
        make_app(service, rules),
        log_level="warning",
        access_log=False,
        lifespan="off",
        # Beyond its own end there are only connections that never sent their request.
        timeout_graceful_shutdown=asked["grace_s"] + _LAST_WORDS_S,
    )
    # Until here SIGTERM ends a model's loading at once. uvicorn raises it again when it has ended in order.
    early: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: early.append(number))
    _tell(asked, listener, service)
    service.engine.start()
    try:
        _Server(config, service.engine, asked["grace_s"], early).run(sockets=[listener])
    except KeyboardInterrupt:
        return 130
    finally:
        service.engine.stop()
    return 0


def _token(asked: dict[str, Any]) -> str | None:
    name = asked["token_env"]
    token = os.environ.get(name, "").strip() if name else ""
    if name and not token:
        raise RecipeError(f"--token-env: the variable {name} is not set, or empty")
    if not name and asked["host"] not in LOOPBACK:
        raise RecipeError(f"--host {asked['host']}: others can reach it, so a token is needed: --token-env NAME")
    return token or None


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 is replaced by a free one. Nobody is let in before the model is there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = None
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> ClusterError:
    place = f"{f'[{host}]' if ':' in host else host}:{port}"
    said = getattr(error, "strerror", None) or str(error)
    taken = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
    fix = "--port 0 takes a free one" if taken else "--host 127.0.0.1 is this machine alone"
    return ClusterError(f"cannot listen at {place}: {said}; {fix}")


def make_service(asked: dict[str, Any]) -> Service:
    """Base and adapters in memory, none answering yet.

    Raises:
        LauncherError: one of them cannot be served.
    """
    base = asked["base"]
    folder, device = Path(base["folder"]), _device(asked["device"])
    facts = BaseFacts(folder=folder, quantization=base["quantization"], any_rounding=base["chosen"])
    opened = [
        (one["name"], open_adapter(Path(one["folder"]), facts, trusted=asked["trust_base"]))
        for one in asked["adapters"]
    ]
    tokenizer = load_tokenizer(folder)
    model = Served(load_base(folder, dtype=base["dtype"], quantization=base["quantization"], device=device), device)
    names = Names(new_entry(base["name"], BASE, tokenizer, folder))
    service = Service(
        names=names,
        engine=Engine(model, Limits(rows=asked["rows"], waiting=asked["waiting"])),
        model=model,
        base=facts,
        context=_context(asked["context"], model.context),
        trusted=asked["trust_base"],
    )
    for name, one in opened:
        try:
            service.add(name, one)
        except ApiError as error:
            raise RecipeError(error.message) from error
    return service


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _context(wanted: int | None, own: int | None) -> int:
    if wanted is not None and own is not None and wanted > own:
        raise RecipeError(f"--context {wanted}: answers in one batch share {own} positions of this base at most")
    return wanted or own or 2048


def _tell(asked: dict[str, Any], listener: socket.socket, service: Service) -> None:
    """Where it is, on stdout: the one line that scripts wait for."""
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(128)
    except OSError as error:  # another server bound the port while this one's model was loaded, and listens
        raise _cannot_listen(host, port, error) from error
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if asked["json"]:
        print(json.dumps({"schema": 1, "url": url, "models": service.served}), flush=True)
    else:
        print(f"serving {', '.join(service.served)} at {url}", flush=True)
    secret = f' -H "Authorization: Bearer ${asked["token_env"]}"' if asked["token_env"] else ""
    body = json.dumps(
        {"model": service.served[-1], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    )
    print(f"Next: curl {url}/chat/completions{secret} -H 'Content-Type: application/json' -d '{body}'",
          file=sys.stderr, flush=True)  # fmt: skip


def main(text: str) -> int:
    """Serve what is asked; a user's error ends with its exit code."""
    try:
        return serve(json.loads(text))
    except LauncherError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
