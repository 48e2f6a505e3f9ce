"""An HTTP server that answers what a test tells it to."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

VLLM_MODELS = {"data": [{"id": "tiny", "max_model_len": 16}]}


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hangs up, as some must."""


class FakeServer:
    """Answers by path: a value becomes JSON, bytes stay what they are, a function is called with the request's body.

    Attributes:
        answers: what it answers to each path; any other path is answered with status 404.
        statuses: those other than 200.
        asked: the paths and bodies of all requests.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.statuses: dict[str, int] = {}
        self.asked: list[tuple[str, Any]] = []
        self._server = _QuietServer(("127.0.0.1", 0), self._handler())
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def bodies(self, path: str) -> list[Any]:
        """The bodies of all requests for a path."""
        return [body for asked, body in self.asked if asked == path]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: Any) -> None:
                fake.asked.append((self.path, body))
                found = fake.answers.get(self.path)
                value = found(body) if callable(found) else found
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(fake.statuses.get(self.path, 200 if self.path in fake.answers else 404))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Say nothing."""

        return Handler


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def letters() -> Callable[..., dict[str, list[int]]]:
    """What /tokenize answers where letters are tokens: `a` is 1, and BOS, if there is one, is 0."""

    def make(*, bos: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(body: dict[str, Any]) -> dict[str, Any]:
            text = body.get("content", body.get("prompt"))
            special = body.get("add_special", body.get("add_special_tokens", True))
            return {"tokens": [0] * (bos and special) + [ord(letter) - 96 for letter in text], "max_model_len": 16}

        return answer

    return make


@pytest.fixture
def fake_vllm(fake: FakeServer, letters: Callable[..., Any]) -> FakeServer:
    """A vLLM server of one model, without its completions."""
    fake.answers = {"/v1/models": VLLM_MODELS, "/tokenize": letters(bos=True)}
    return fake


@pytest.fixture
def fake_llamacpp(fake: FakeServer, letters: Callable[..., Any]) -> FakeServer:
    """A llama.cpp server, without its completions."""
    properties = {"default_generation_settings": {"n_ctx": 16}, "bos_token": "", "eos_token": ""}
    fake.answers = {"/props": properties, "/tokenize": letters(bos=False)}
    return fake
