"""Models that run behind a server's address, as scorers: llama.cpp's server and vLLM's.

    scorer = connect("http://127.0.0.1:8000")
    scorer.score([Request((5, 17, 3), scored=2)])

`connect` asks the server what it is. `openai` scores with vLLM, whole batches of sequences in a request; `llamacpp`
scores with llama.cpp, one token in a request. A server that gives only the text it generates cannot be used.
"""

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.scorer import Scorer
from srd_modifier.evaluation.servers import llamacpp, openai
from srd_modifier.evaluation.servers._http import Server

__all__ = ["connect"]


def connect(address: str, *, timeout: float = 600.0) -> Scorer:
    """Find out which server runs at an address, and make a scorer of it.

    Nothing is held open: every request has a connection of its own, and no proxy is used.

    Args:
        address: `http://HOST:PORT` or `https://HOST:PORT`, with or without `/v1` behind it. `#MODEL` at the end names
            the model where a vLLM server has several.
        timeout: Seconds of silence after which a request has failed. A vLLM server is silent until a whole batch is
            scored, either server until a whole text is generated.

    Raises:
        ConfigError: The address or the timeout cannot be meant.
        SRDError: No server answers there, it is of another kind, it answers with an error, or the model that was named
            is not served.
    """
    server = Server(address, timeout=timeout)
    found = llamacpp.find(server) or openai.find(server)
    if found is None:
        raise SRDError(
            f"{server.name}: neither llama.cpp's server nor vLLM's runs there, since it has no /props of llama.cpp and "
            "no /v1/models; give the address of one of them"
        )
    return found
