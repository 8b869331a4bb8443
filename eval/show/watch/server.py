"""Serve a followed log to this machine's browser, at an address that nobody can guess.

It listens on 127.0.0.1 alone. Every path begins with a token of 256 random bits. A request whose Host is not this
address is refused, so that a page from elsewhere cannot reach it through a name of its own that leads here.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rnn_longctx.errors import InputError
from rnn_longctx.eval.show.page.kinds.monitor import BEYOND
from rnn_longctx.eval.show.page.page import Renderer, policy_of, script
from rnn_longctx.eval.show.watch.sources import Source, source_of

ADDRESS = "127.0.0.1"


def hosts_of(port: int) -> set[str]:
    """Return the Hosts that requests at a port may name; 80 is left out by browsers."""
    names = (ADDRESS, "localhost")
    return {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())


class Watch(ThreadingHTTPServer):
    """A server of one source.

    Attributes:
        source: what is followed.
        url: where the page is.
    """

    daemon_threads = True

    def __init__(self, path: Path, port: int = 0):
        """Listen on a port, on any that is free where it is 0. Raises InputError: the path cannot be followed, or the
        port is taken."""
        self.source: Source = source_of(path)
        self.token, self.lock = secrets.token_urlsafe(32), threading.Lock()
        self.html = Renderer(1000).page(self.source.page(), [script("live.js")], "'self'")
        self.policy = f"{policy_of(self.html)}; frame-ancestors 'none'"
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"cannot listen on port {port}: {getattr(error, 'strerror', None) or error}") from None
        self.hosts = hosts_of(self.server_port)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away in the middle of an answer."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def news(self, era: int, since: int) -> dict[str, Any]:
        """Return what came after a row of an era; all that is kept where the era is over."""
        with self.lock:
            source = self.source
            source.read()
            if era != source.follow.era:
                since = 0
            points = source.points.since(since)
            return {
                "era": source.follow.era,
                "fresh": era != source.follow.era,
                "number": source.points.count,
                "count": source.points.count,
                "status": source.status,
                "verdict": source.verdict(),
                "words": source.words(),
                "points": [[p.x, [BEYOND if v == math.inf else v for v in p.values]] for p in points],
                "events": list(source.events),
            }


class _Handler(BaseHTTPRequestHandler):
    server: Watch
    timeout = 30  # seconds that a connection may say nothing
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rnn-longctx", ""

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self.answer(403, b"another host", "text/plain")
            return
        try:
            url = urlsplit(self.path)
        except ValueError:
            self.answer(400, b"no address", "text/plain")
            return
        _, token, *rest = [*url.path.split("/"), ""]
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self.answer(404, b"no such page", "text/plain")
        elif rest[:1] == ["data"]:
            asked = parse_qs(url.query)
            try:
                era, since = (int(asked[name][0]) for name in ("era", "since"))
            except (KeyError, ValueError):
                self.answer(400, b"era and since are whole numbers", "text/plain")
                return
            self.answer(200, json.dumps(self.server.news(era, since)).encode(), "application/json")
        elif rest[:1] == [""]:
            self.answer(200, self.server.html.encode(), "text/html; charset=utf-8")
        else:
            self.answer(404, b"no such page", "text/plain")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """(Nothing is printed a request.)"""
