"""A server that is asked over HTTP with JSON, by the standard library's client and without a proxy between.

Every way in which that can fail ends in one sentence that begins with the address.
"""

import json
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from srd_modifier.errors import ConfigError, SRDError

_CONNECTIONS = {"http": HTTPConnection, "https": HTTPSConnection}
_ABSENT = (404, 405)  # what servers answer to a path that they do not have
_LONGEST_REASON = 300
_ADVICE = {
    401: "no API key is sent, so start the server without one",
    403: "no API key is sent, so start the server without one",
    503: "wait until it is ready and try again",
}
_OTHER_ADVICE = "the server's own log may say more"


class ServerError(SRDError):
    """The server answered with an HTTP error, whose number is `status`."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """The address of a server; each request has its own connection.

    Attributes:
        name: The address as the user gave it, under which errors are reported.
        model: The model that stands behind a `#` of the address, `None` if none does.
    """

    def __init__(self, address: str, *, timeout: float) -> None:
        """Take an address apart; nothing is asked yet.

        Raises:
            ConfigError: The address or the timeout cannot be meant.
        """
        if not timeout > 0:
            raise ConfigError(f"timeout must be above 0 seconds, got {timeout}")
        parts = _split(address)
        self.name = address
        self.model = parts.fragment or None
        self._scheme = parts.scheme
        self._netloc = parts.netloc
        self._path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        self._timeout = timeout

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that answers a GET of `path`, or a POST where there is a body.

        Raises:
            ServerError: The server answered with an HTTP error.
            SRDError: Nothing answers there, not in time, or not with a JSON object.
        """
        status, content, reason = self._exchange(path, body)
        if status != 200:
            raise ServerError(
                f"{self.name}: the server answers {path} with HTTP {status}: {_reason(content) or reason}; "
                f"{_ADVICE.get(status, _OTHER_ADVICE)}",
                status=status,
            )
        answer = _parsed(content)
        if not isinstance(answer, dict):
            raise SRDError(
                f"{self.name}: what answers {path} is not a JSON object, so another kind of server runs there; give "
                "the address of llama.cpp's or vLLM's"
            )
        return answer

    def ask_if_any(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The same, `None` from a server that has no such path."""
        try:
            return self.ask(path, body)
        except ServerError as error:
            if error.status in _ABSENT:
                return None
            raise

    def _exchange(self, path: str, body: dict[str, Any] | None) -> tuple[int, bytes, str]:
        connection = _CONNECTIONS[self._scheme](self._netloc, timeout=self._timeout)
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
        try:
            connection.request(method, self._path + path, content, {"Content-Type": "application/json"})
            response: HTTPResponse = connection.getresponse()
            return response.status, response.read(), response.reason
        except TimeoutError as error:
            raise SRDError(
                f"{self.name}: the server did not answer {path} within {self._timeout:g} seconds; give it a longer "
                "timeout"
            ) from error
        except (OSError, HTTPException) as error:
            raise SRDError(
                f"{self.name}: no HTTP server answers {path} there ({_line(str(error)) or type(error).__name__}); "
                "start it, or correct the address"
            ) from error
        finally:
            connection.close()


def lookup(answer: Any, *keys: str | int) -> Any:
    """What lies under `keys`, one inside the other, in a JSON value; `None` where there is nothing."""
    for key in keys:
        try:
            answer = answer[key]
        except (KeyError, IndexError, TypeError):
            return None
    return answer


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number and not NaN, which Python reads too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in _CONNECTIONS and parts.hostname and parts.port != 0
        usable = usable and not parts.query and parts.username is None
    except ValueError:  # a port that is no number, a bracket that is not closed
        usable = False
    if not usable:
        raise ConfigError(f"{address}: expected the address of a server, such as http://127.0.0.1:8000")
    return parts


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _reason(content: bytes) -> str:
    """What the body of an error says, in one line; nothing if it says nothing that is known here."""
    answer = _parsed(content)
    for keys in (("error", "message"), ("message",), ("detail",), ("error",)):
        said = lookup(answer, *keys)
        if isinstance(said, str) and said.strip():
            return _line(said)
    return ""


def _line(text: str) -> str:
    """A text as a part of a sentence."""
    return " ".join(text.split())[:_LONGEST_REASON].rstrip(". ")
