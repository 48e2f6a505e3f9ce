"""AutoRound: W4A16 through llm-compressor's modifier, and its own Q4_K_M for llama.cpp.

The modifier hands layer after layer to the auto-round package, and what comes back is saved like every other W4A16
here. auto-round's own export of that format (`llm_compressor`) loads too, and diverges as much: 3.37e-3 where this is
3.34e-3, each ± 5e-5 (tiny-llama, 64 samples, 200 iterations). But on a CPU it stores embeddings and norms in float32.
"""

import logging
import time
from collections.abc import Iterator

from benchmarks.peers.base import Made, Setting, Unavailable, require, versions
from benchmarks.peers.oneshot import run_oneshot, w4a16

ITERATIONS = 200
"""auto-round's own default for W4A16. For GGUF its default is 0, which is round-to-nearest with a search for scales."""


def make(setting: Setting, *, iterations: int = ITERATIONS, gguf_iterations: int = ITERATIONS) -> Iterator[Made]:
    """A W4A16 checkpoint and a Q4_K_M file, each tuned for so many iterations per decoder layer."""
    require("auto_round")
    require("llmcompressor")
    import auto_round  # noqa: F401 - sets the level of its log, which is hundreds of lines for a small model
    from llmcompressor.modifiers.autoround import AutoRoundModifier

    logging.getLogger("autoround").setLevel(logging.ERROR)
    # compiling layer after layer takes longer on a CPU than it saves
    modifier = AutoRoundModifier(**w4a16(setting), iters=iterations, enable_torch_compile=False)
    checkpoint = setting.folder / "autoround"
    seconds = run_oneshot(setting, [modifier], checkpoint)
    label = f"AutoRound W4 g{setting.group_size}, {iterations} iterations"
    yield Made(label, "AutoRound", checkpoint, versions("auto-round", "llmcompressor"), seconds)
    yield _gguf(setting, gguf_iterations)


def _gguf(setting: Setting, iterations: int) -> Made:
    require("gguf")
    from transformers import set_seed

    from benchmarks.gguf_quality import autoround
    from srd_modifier.gguf.calibration.text import Calibration

    lengths = sorted(set(map(len, setting.samples)))
    if len(lengths) > 1:
        raise Unavailable(
            "auto-round leaves out samples that are shorter than the longest; "
            f"these have {lengths[0]} to {lengths[-1]} tokens."
        )
    calibration = Calibration(
        "calibration samples",
        num_samples=len(setting.samples),
        max_seq_length=lengths[0],
        samples=setting.samples,
    )
    folder = setting.folder / "autoround-gguf"
    folder.mkdir()
    set_seed(setting.seed)
    started = time.perf_counter()
    file = autoround(setting.model, calibration, iterations, folder)
    return Made(
        f"AutoRound Q4_K_M, {iterations} iterations",
        "AutoRound",
        file,
        versions("auto-round"),
        time.perf_counter() - started,
        note="AutoRound's converter knows few tokenizers: its tensors are put into a file with the head that "
        "srd-modifier writes.",
    )
