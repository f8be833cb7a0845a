"""An S3 server (moto's) on the loopback whose requests fail at will: 500, 503, lost answers, cut lines."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "wounds"


class Flaky:
    """WSGI middleware: a share of the requests fails, before or after the server did what was asked."""

    def __init__(self, app: Callable[..., Any], seed: int = 0) -> None:
        self.app, self.share = app, 0.0
        self.failed: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []  # method and path with query, of those that reached the server
        self._chance, self._lock = random.Random(seed), threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            way = self._chance.choice(("500", "503", "lost", "cut")) if self._chance.random() < self.share else ""
            if way:
                self.failed[way] += 1
        if way in ("500", "503"):
            length = environ.get("CONTENT_LENGTH")  # what the client still sends is read, or it sees a broken pipe
            chunked = environ.get("wsgi.input_terminated")
            environ["wsgi.input"].read(*([int(length)] if length else [] if chunked else [0]))
            return _error(way, start_response)
        with self._lock:
            self.requests.append((environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"))
        if way == "cut":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("the line is cut")
        if way == "lost":  # done, but nobody hears of it
            for _ in self.app(environ, lambda *_: None):
                pass
            return _error("500", start_response)
        return self.app(environ, start_response)


def _error(status: str, start_response: Callable[..., Any]) -> list[bytes]:
    code = {"500": "InternalError", "503": "SlowDown"}[status]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by chance</Message></Error>".encode()
    start_response(f"{status} {code}", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
    return [body]


@contextmanager
def s3_server(bucket: str = BUCKET) -> Iterator[tuple[str, Flaky]]:
    """Its address, and the middleware that makes requests fail; with one empty bucket."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: object) -> None:
            pass

    flaky = Flaky(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, flaky, threaded=True, request_handler=Quiet)
    server.log = lambda *_: None  # type: ignore[attr-defined]  # a cut line is no news here
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        client = boto3.client(
            "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        )
        client.create_bucket(Bucket=bucket)
        yield address, flaky
    finally:
        server.shutdown()
