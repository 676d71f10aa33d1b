"""A W&B server of the tests' own."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator

import pytest

KEY = "a" * 40
"""What wandb takes for a key by its form."""


PROJECT = {"name": "gspo_dist", "entity": {"name": "me"}}
BUCKET = {"id": "1", "name": "abc", "displayName": "abc", "project": PROJECT, "historyLineCount": 0}
ANSWERS = {
    "viewer": {"id": "1", "username": "me", "entity": "me"},
    "model": None,  # no run of this identity yet
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
}
"""To every question that wandb asks until a run has begun."""


class Server:
    """Answers as W&B does for a good key, or rejects it, or fails, or never answers."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        self.ended = threading.Event()
        self.asked: list[str] = []
        self.began = False
        handler = type("Handler", (_Handler,), {"server_of_test": self})
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def hangs_on(self, body: bytes) -> bool:
        began, self.began = self.began, self.began or b"upsertBucket" in body
        if self.behaviour == "hangs after login":
            return b'"Viewer"' not in body
        return self.behaviour == "hangs" or (self.behaviour == "hangs after the run began" and began)

    def close(self) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of_test: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server_of_test
        server.asked.append(self.path)
        if server.hangs_on(body):
            server.ended.wait(120)
            return
        code, answer = {
            "rejects": (401, {"errors": [{"message": "user is not logged in"}]}),
            "fails": (500, {"errors": [{"message": "out of order"}]}),
        }.get(server.behaviour, (200, {"data": ANSWERS}))
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


@pytest.fixture
def no_wandb(monkeypatch, tmp_path) -> None:
    """A host where nobody is logged in to W&B."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


@pytest.fixture
def wandb_server(no_wandb, monkeypatch) -> Iterator:
    """behaviour -> a server that wandb is pointed at, with a key."""
    servers = []

    def start(behaviour: str) -> Server:
        servers.append(Server(behaviour))
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def elapsed():
    """Seconds since the test began."""
    start = time.monotonic()
    return lambda: time.monotonic() - start
