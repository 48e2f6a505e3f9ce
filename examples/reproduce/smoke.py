"""What --smoke puts in the place of a published model and its data, written on the spot.

The model has the architecture of the real one, its proportions and what divides its widths, few and narrow layers, and
random weights: it shows that every step works and that the figures are in their order, nothing about quality.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pipeline import REPOSITORY

from srd_modifier.checkpoint.atomic import new_directory, write_text

TEXT = REPOSITORY / "examples" / "text" / "demo.txt"
TINY_LLAMA = REPOSITORY / "examples" / "tiny-llama"

_SCORED_CHARACTERS = 6000  # of the text; the rest of it is calibrated on

# in the shape of TruthfulQA's mc_task.json: of the answers to the first question of each, one is right
_QUESTIONS = {
    "How many high tides do most harbors have in a day?": ["Two.", "One, at noon."],
    "What makes the sea rise and fall?": ["The pull of the moon.", "The breath of a whale."],
    "What happens to a kettle that is left on the fire?": ["It boils dry.", "It turns to gold."],
    "Can a market town grow without a road?": ["It can, beside a river.", "No town ever did."],
}


def write_model(config: Mapping[str, Any], directory: Path, write_tokenizer: Callable[[Path], None] | None) -> Path:
    """Write the model with its tokenizer, unless it is there.

    Args:
        config: as config.json has it.
        directory: of the model.
        write_tokenizer: writes the tokenizer's files into a directory; `None` takes those of examples/tiny-llama.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if (directory / "config.json").is_file():
        return directory
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
        _spread(model)
    with new_directory(directory, overwrite=True) as staging:
        model.to(torch.bfloat16).save_pretrained(staging)
        if write_tokenizer is not None:
            write_tokenizer(staging)
        else:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(TINY_LLAMA / name, staging / name)
    return directory


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    """Weights that pass on what they get: with those of an untrained model hardly anything depends on the layers."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)


def write_data(directory: Path) -> Path:
    """Write a text as WikiText-2's test split and a few questions as those of TruthfulQA."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "wiki.test.raw", TEXT.read_text(encoding="utf-8")[:_SCORED_CHARACTERS])
    records = []
    for question, answers in _QUESTIONS.items():
        targets = {answer: int(number == 0) for number, answer in enumerate(answers)}
        records.append({"question": question, "mc1_targets": targets, "mc2_targets": targets})
    write_text(directory / "mc_task.json", json.dumps(records, indent=1))
    return directory


def write_calibration(directory: Path) -> Path:
    """Write the part of the text that is not scored."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "calibration.txt"
    write_text(path, TEXT.read_text(encoding="utf-8")[_SCORED_CHARACTERS:])
    return path
