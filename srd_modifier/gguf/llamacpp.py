"""llama.cpp itself, in this process: what it makes of a GGUF file.

The wheel of `xllamacpp` has no call to tokenize or to generate; it has llama.cpp's server. It is started on a free
port of this machine alone and answers over HTTP, without a proxy between.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from http.client import HTTPConnection, HTTPException
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from typing_extensions import Self

from srd_modifier._extras import require
from srd_modifier.errors import SRDError

_SILENT, _ERRORS = -1, 1
_ERROR_MARK = " E "
_REFUSAL_SECONDS = 600
_SEPARATOR = -1  # no token's id


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, on the CPU and without a word on stdout or stderr.

    Leaving the `with` block, or `close`, ends its server and frees its port and memory.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 512,
        lora: Path | None = None,
        threads: int = 1,
        exact: bool = False,
    ) -> None:
        """Load a file.

        Args:
            path: The GGUF file.
            context: How many tokens a text and its continuation may have together; the context of the model's
                training is the limit.
            lora: A GGUF LoRA adapter, applied with scale 1.
            threads: How many threads compute. They wait for one another by spinning, so more of them than there
                are free processors is slower than one by far.
            exact: Keep keys and values in float32 instead of half precision, to compare with another computation:
                log probabilities then agree to about 1e-4, otherwise to about 0.1.

        Raises:
            MissingExtraError: xllamacpp is not installed.
            SRDError: there is no such file, or llama.cpp refuses it; the message gives llama.cpp's reason.
        """
        require("xllamacpp", extra="gguf")
        for file in (path, lora):
            if file is not None and not Path(file).is_file():
                raise SRDError(f"{file}: there is no such file")
        self.path = Path(path)
        settings = (str(path), context, None if lora is None else str(lora), threads, exact)
        try:
            self._server = _start(*settings, _SILENT)
        except RuntimeError as error:
            files = str(path) if lora is None else f"{path} with the adapter {lora}"
            raise SRDError(f"{files}: llama.cpp refuses to load it: {_reason(*settings)}") from error
        # The answer comes from the loop that `close` ends. Ended before it began, it would run, and be waited for,
        # for ever.
        self._ask("GET", "/slots")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server; nothing can be asked afterwards."""
        self._server = None

    @property
    def address(self) -> str:
        """Where its server answers, on this machine alone: `http://127.0.0.1:PORT`."""
        if self._server is None:
            raise ValueError(f"{self.path} is closed")
        return self._server.listening_address

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The token ids of `text`.

        Args:
            text: Any text that UTF-8 can hold.
            add_special: Add what the file says belongs at the start and the end of a text.
            parse_special: Read a special token's own text as that token, as Transformers does.

        Raises:
            SRDError: llama.cpp cannot tokenize it.
        """
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return self._ask("POST", "/tokenize", body)["tokens"]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids.

        Raises:
            SRDError: one of them is not of this vocabulary.
        """
        return self._ask("POST", "/detokenize", {"tokens": list(tokens)})["content"]

    def tokenize_all(self, texts: Iterable[str]) -> list[list[int]]:
        """The token ids of each text by itself, nothing added and special tokens parsed, in one request.

        Raises:
            SRDError: llama.cpp cannot tokenize one of them.
        """
        # it takes ids between texts, and gives them back where they were
        content = [part for text in texts for part in (text, _SEPARATOR)]
        body = {"content": content, "add_special": False, "parse_special": True}
        found: list[list[int]] = [[]]
        for token in self._ask("POST", "/tokenize", body)["tokens"]:
            if token == _SEPARATOR:
                found.append([])
            else:
                found[-1].append(token)
        return found[:-1]

    def complete(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest next tokens, one after the other; fewer where the model ends its text.

        Args:
            tokens: The prompt's token ids, at least one; nothing is added to them.
            count: How many tokens to generate.

        Raises:
            SRDError: the prompt does not fit the context, or llama.cpp fails.
        """
        body = {
            "prompt": list(tokens),
            "n_predict": count,
            "temperature": 0,
            "top_k": 1,
            "cache_prompt": False,
            "return_tokens": True,
        }
        return self._ask("POST", "/completion", body)["tokens"]

    def _ask(self, method: str, where: str, body: dict[str, Any] | None = None) -> Any:
        connection = HTTPConnection(urlsplit(self.address).netloc)
        try:
            connection.request(method, where, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, HTTPException, ValueError) as error:
            raise SRDError(f"{self.path}: llama.cpp does not answer {where}: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise SRDError(f"{self.path}: llama.cpp refuses {where}: {answer['error']['message']}")
        return answer


def _start(path: str, context: int, lora: str | None, threads: int, exact: bool, verbosity: int) -> Any:
    xllamacpp = import_module("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = context
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.fit_params = False  # it would load the model once more, to see how much memory that takes
    parameters.warmup = False
    parameters.verbosity = verbosity
    parameters.ui = False
    parameters.endpoint_slots = True
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    if exact:
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    return xllamacpp.Server(parameters)


def _reason(*settings: Any) -> str:
    """Why llama.cpp refuses: it says so on stderr only, so it is asked once more, in a process of its own."""
    code = f"from {__name__} import _start; _start(*{settings!r}, {_ERRORS})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=_REFUSAL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "it gave no reason"
    said = [line.split(_ERROR_MARK, 1)[1] for line in done.stderr.splitlines() if _ERROR_MARK in line]
    # the first is the cause, and begins with the name of a C function; the others pass it on
    return said[0].split(": ", 1)[-1].strip() if said else "it gave no reason"
