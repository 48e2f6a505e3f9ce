"""Every quantizer we compare with, and ours: each made by its own package from the same model and the same samples.

A maker is a generator of `Made`: rows come as they are ready. It raises `Unavailable` when it is first asked for a row
and its package is missing or cannot run here. Nothing heavy is imported before that.
"""

from collections.abc import Callable, Iterator
from importlib import import_module

from benchmarks.peers.base import Made, Setting

Maker = Callable[[Setting], Iterator[Made]]


def _maker(module: str) -> Maker:
    def make(setting: Setting) -> Iterator[Made]:
        yield from import_module(f"benchmarks.peers.{module}").make(setting)

    return make


PEERS: dict[str, Maker] = {
    "llm-compressor": _maker("llm_compressor"),
    "autoround": _maker("autoround"),
    "ggml": _maker("ggml"),
    "bitsandbytes": _maker("bitsandbytes"),
    "hqq": _maker("hqq"),
    "low-rank": _maker("low_rank"),
    "srd": _maker("srd"),
}
