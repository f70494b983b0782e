"""Where bytes come from: the network in time and in measure, data URIs in both writings."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from mllm.data.imaging import files as image_files
from mllm.data.imaging.files import describe, download, stream

Serve = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Serve], str]]:
    """Give it what a server does with a request; get the URL."""
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Serve) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.block_on_close = True, False
        servers.append(server)
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/a.png"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def head(request: BaseHTTPRequestHandler, length: int | None, code: int = 200) -> None:
    request.send_response(code)
    if length is not None:
        request.send_header("Content-Length", str(length))
    request.end_headers()


def test_a_url_gives_its_bytes(serve: Callable[[Serve], str]) -> None:
    content = bytes(range(256)) * 2000

    def answer(request: BaseHTTPRequestHandler) -> None:
        head(request, len(content))
        request.wfile.write(content)

    assert download(serve(answer)) == content


def test_a_connection_that_ends_early_is_an_error(serve: Callable[[Serve], str]) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        head(request, 1000)
        request.wfile.write(b"x" * 400)

    with pytest.raises(ValueError, match="600 bytes early"):
        download(serve(answer))


def test_a_server_that_drips_is_not_waited_for(serve: Callable[[Serve], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "URL_SECONDS", 0.1)

    def answer(request: BaseHTTPRequestHandler) -> None:
        head(request, None)
        for _ in range(100):
            request.wfile.write(b"x")
            request.wfile.flush()
            time.sleep(0.05)

    began = time.monotonic()
    with pytest.raises((TimeoutError, ConnectionError), match="more to come"):
        download(serve(answer))
    assert time.monotonic() - began < 2


def test_of_an_endless_answer_no_more_is_read_than_the_limit(
    serve: Callable[[Serve], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MAX_BYTES", 10_000)
    monkeypatch.setattr(image_files, "CHUNK", 1000)

    def answer(request: BaseHTTPRequestHandler) -> None:
        head(request, 10**9)
        request.wfile.write(b"x" * 100_000)

    with pytest.raises(ValueError, match="more than 10000 bytes"):
        stream(serve(answer))


def test_a_page_that_is_not_there_is_an_error(serve: Callable[[Serve], str]) -> None:
    with pytest.raises(OSError, match="404"):
        download(serve(lambda request: head(request, 0, 404)))


def test_data_uris_may_be_base64_or_plain_and_wrapped() -> None:
    content = bytes(range(256))
    packed = base64.b64encode(content).decode()
    for uri in (
        f"data:image/png;base64,{packed}",
        f"data:;base64,{packed[:50]}\n {packed[50:]}",
        f"data:;base64,{packed.replace('+', '%2B')}",
    ):
        assert stream(uri).getvalue() == content
    assert stream("data:image/x,a%20b%ff").getvalue() == b"a b\xff"


def test_descriptions_are_short_and_say_what_was_given(tmp_path: Path) -> None:
    assert describe(b"abc") == describe({"bytes": b"abc", "path": None}) == "(3 bytes)"
    assert describe({"bytes": b"abc", "path": "a.png"}) == "a.png"
    assert len(describe("data:" + "x" * 10**6)) < 100
    assert describe(tmp_path) == str(tmp_path)
