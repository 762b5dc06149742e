"""Runs a recipe inside a network namespace without a route, between two listeners that must hear nothing.

`python -m tests.train.offline RECIPE OUT.json`: the one listener is where the hub would be, the other the proxy through
which every HTTP library would go to anything else. What they heard is written to OUT.json.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tests.hub import FakeHub


class Listener:
    """Accepts connections on loopback, keeps what they ask for first and hangs up."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            connection.settimeout(10)
            with contextlib.suppress(OSError), connection:
                self.asked.append("")
                self.asked[-1] = connection.recv(200).decode(errors="replace").split("\r\n")[0]


def unreachable() -> bool:
    """Whether the rest of the world is: the kernel has no route to a documentation address."""
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=5).close()
    except OSError as error:
        return error.errno == errno.ENETUNREACH
    return False


def main(recipe: str, out: str) -> int:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    proxy, hub = Listener(), FakeHub()
    with hub.serving():
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy.url)
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", "submit", recipe],
            env=os.environ | proxies | {"HF_ENDPOINT": hub.url, "NO_PROXY": "", "no_proxy": ""},
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        heard = {"proxy": list(proxy.asked), "hub": [path for _, path, _ in hub.asked]}
        # The listeners do hear what there is to be heard.
        for one in (proxy, hub):
            with socket.create_connection(("127.0.0.1", int(one.url.rsplit(":", 1)[1]))) as connection:
                connection.sendall(b"GET /api/models/a/b/revision/main HTTP/1.0\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):
                    connection.recv(100)
        control = {"proxy": len(proxy.asked) - len(heard["proxy"]), "hub": len(hub.asked) - len(heard["hub"])}
    document = {"unreachable": unreachable(), "exit_code": done.returncode, "output": done.stdout + done.stderr}
    Path(out).write_text(json.dumps(document | {"heard": heard, "control": control}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
