"""Finding out what runs at an address, and every way in which that fails."""

import socket
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.evaluation.servers import connect
from srd_modifier.evaluation.servers.llamacpp import LlamaCppServer
from srd_modifier.evaluation.servers.openai import VLLMServer


def refusal(address: str, **settings: Any) -> str:
    """The sentence in which connecting ends."""
    with pytest.raises(SRDError) as raised:
        connect(address, **settings)
    message = str(raised.value)
    assert message.startswith(f"{address}: ")
    assert "\n" not in message
    return message


def test_the_kind_of_server_is_found_out(fake_llamacpp: Any) -> None:
    scorer = connect(fake_llamacpp.address)
    assert isinstance(scorer, LlamaCppServer)
    assert scorer.name == fake_llamacpp.address
    assert scorer.max_length == 15


def test_a_vllm_server_is_found_out(fake_vllm: Any) -> None:
    scorer = connect(fake_vllm.address)
    assert isinstance(scorer, VLLMServer)
    assert scorer.name == fake_vllm.address
    assert scorer.max_length == 14


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_as_openai_s_clients_want_it(fake_vllm: Any, end: str) -> None:
    assert connect(fake_vllm.address + end).encode("ab") == [0, 1, 2]


def test_the_server_may_be_below_a_path(fake_vllm: Any) -> None:
    fake_vllm.answers = {f"/deep/down{path}": answer for path, answer in fake_vllm.answers.items()}
    assert connect(fake_vllm.address + "/deep/down/v1").encode("ab") == [0, 1, 2]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:8000",
        "localhost:8000",
        "ftp://localhost:8000",
        "http://",
        "http://:8000",
        "http://localhost:port",
        "http://localhost:99999",
        "http://[::1",
        "http://me:secret@localhost:8000",
        "http://localhost:8000/?model=x",
    ],
)
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(ConfigError) as raised:
        connect(address)
    assert str(raised.value) == f"{address}: expected the address of a server, such as http://127.0.0.1:8000"


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_must_be_some_time(timeout: float) -> None:
    with pytest.raises(ConfigError, match="timeout must be above 0 seconds"):
        connect("http://localhost:8000", timeout=timeout)


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    message = refusal(address)
    assert "no HTTP server answers /props there (" in message
    assert "refused" in message
    assert message.endswith("; start it, or correct the address")


def test_something_that_does_not_speak_http_is_a_sentence() -> None:
    def hang_up(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client:
            client.recv(1 << 16)
            client.sendall(b"220 mail.example.org\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=hang_up, args=(listener,))
        thread.start()
        message = refusal(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert "no HTTP server answers /props there (220 mail.example.org" in message


def test_a_server_without_tls_is_a_sentence_of_https(fake_vllm: Any) -> None:
    assert "no HTTP server answers /props there" in refusal(fake_vllm.address.replace("http:", "https:"))


def test_a_server_that_does_not_answer_in_time_is_a_sentence(fake_vllm: Any) -> None:
    fake_vllm.answers["/props"] = lambda body: time.sleep(0.5)
    message = refusal(fake_vllm.address, timeout=0.1)
    assert message.endswith("the server did not answer /props within 0.1 seconds; give it a longer timeout")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": {"message": "out of\nmemory."}}, "out of memory"),
        ({"error": "out of memory"}, "out of memory"),
        ({"message": "out of memory"}, "out of memory"),
        ({"detail": "out of memory"}, "out of memory"),
        ({"detail": [{"loc": "body"}]}, "Internal Server Error"),
        (b"<html>", "Internal Server Error"),
        (b"\xff", "Internal Server Error"),
        (b"", "Internal Server Error"),
    ],
    ids=["vLLM", "text", "message", "FastAPI", "nothing known", "HTML", "bytes", "nothing"],
)
def test_an_http_error_is_a_sentence_with_the_server_s_reason(fake: Any, body: Any, reason: str) -> None:
    fake.answers["/props"] = body
    fake.statuses["/props"] = 500
    assert refusal(fake.address).endswith(
        f": the server answers /props with HTTP 500: {reason}; the server's own log may say more"
    )


def test_a_server_that_is_still_loading_is_a_sentence(fake: Any) -> None:
    fake.answers["/props"] = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    fake.statuses["/props"] = 503
    assert refusal(fake.address).endswith("HTTP 503: Loading model; wait until it is ready and try again")


def test_a_server_that_wants_a_key_is_a_sentence(fake: Any) -> None:
    fake.answers["/v1/models"] = {"error": "Unauthorized"}
    fake.statuses["/v1/models"] = 401
    assert refusal(fake.address).endswith("Unauthorized; no API key is sent, so start the server without one")


@pytest.mark.parametrize("content", [b"<html>It works!</html>", b"[1, 2]", b""], ids=["HTML", "list", "nothing"])
def test_an_answer_that_is_no_json_object_is_a_sentence(fake: Any, content: bytes) -> None:
    fake.answers["/props"] = content
    assert "what answers /props is not a JSON object, so another kind of server runs there" in refusal(fake.address)


@pytest.mark.parametrize("status", [404, 405])
def test_another_kind_of_server_is_a_sentence(fake: Any, status: int) -> None:
    fake.statuses = {"/props": status, "/v1/models": status}
    assert "neither llama.cpp's server nor vLLM's runs there" in refusal(fake.address)


def test_properties_of_another_kind_of_server_are_not_llama_cpp_s(fake: Any) -> None:
    fake.answers["/props"] = {"color": "green"}
    assert "neither llama.cpp's server nor vLLM's runs there" in refusal(fake.address)


@pytest.mark.parametrize(
    "tokenize",
    [None, lambda body: {"tokens": [1]}, lambda body: {"tokens": "a", "max_model_len": 16}],
    ids=["absent", "no length", "no tokens"],
)
def test_an_openai_server_that_is_not_vllm_is_a_sentence(
    fake_vllm: Any, tokenize: Callable[[Any], dict[str, Any]] | None
) -> None:
    del fake_vllm.answers["/tokenize"]
    if tokenize is not None:
        fake_vllm.answers["/tokenize"] = tokenize
    message = refusal(fake_vllm.address)
    assert "/tokenize" in message
    assert "llama.cpp's" in message


@pytest.mark.parametrize("models", [{}, {"data": []}, {"data": [{}]}, {"data": 3}], ids=str)
def test_a_server_without_models_is_a_sentence(fake_vllm: Any, models: dict[str, Any]) -> None:
    fake_vllm.answers["/v1/models"] = models
    assert "the server lists no model" in refusal(fake_vllm.address)


def test_of_several_models_one_must_be_named(fake_vllm: Any) -> None:
    fake_vllm.answers["/v1/models"] = {"data": [{"id": "tiny"}, {"id": "adapter"}]}
    assert refusal(fake_vllm.address).endswith(
        f"the server has 2 models; add one of their names to the address, as in {fake_vllm.address}#tiny: tiny, adapter"
    )


@pytest.mark.parametrize("end", ["#adapter", "/v1#adapter"])
def test_the_model_that_is_named_is_asked(fake_vllm: Any, end: str) -> None:
    fake_vllm.answers["/v1/models"] = {"data": [{"id": "tiny"}, {"id": "adapter"}]}
    scorer = connect(fake_vllm.address + end)
    assert scorer.name == fake_vllm.address + end
    assert {body["model"] for body in fake_vllm.bodies("/tokenize")} == {"adapter"}


def test_a_model_that_is_not_served_is_a_sentence(fake_vllm: Any) -> None:
    assert refusal(f"{fake_vllm.address}#other").endswith(
        "the server has no model 'other', but tiny; name one of these"
    )


def test_llama_cpp_has_one_model_that_needs_no_name(fake_llamacpp: Any) -> None:
    assert refusal(f"{fake_llamacpp.address}#tiny").endswith("has one model; leave '#tiny' out of the address")
