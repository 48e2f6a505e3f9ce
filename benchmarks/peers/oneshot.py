"""What everything made by llm-compressor has in common: the scheme, one run of `oneshot`, W4A16 on disk."""

import time
from pathlib import Path
from typing import Any

from benchmarks.peers.base import Setting
from srd_modifier.calibration import as_dataset


def w4a16(setting: Setting) -> dict[str, Any]:
    """The scheme in all recipes, as keywords of a modifier: symmetric int4 in groups, the output head left alone."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": setting.group_size,
    }
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def run_oneshot(setting: Setting, recipe: list[Any], output: Path) -> float:
    """Quantize by llm-compressor and save.

    Args:
        setting: model and samples.
        recipe: the modifiers.
        output: the directory to make.

    Returns:
        The seconds it took, those of reading and writing included.
    """
    import transformers
    from llmcompressor import oneshot

    transformers.set_seed(setting.seed)
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(setting.model, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(setting.model)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=as_dataset(setting.samples),
        num_calibration_samples=len(setting.samples),
        max_seq_length=setting.max_seq_length,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)
    seconds = time.perf_counter() - started
    _empty(model)
    return seconds


def _empty(model: Any) -> None:
    """Let go of the weights: torch.fx keeps every model that llm-compressor has traced until the process ends."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
