"""Rebuild SmolLM2-1.7B after scheduled QAT (HuggingFaceTB/SmolLM2-1.7B): train it, export it, measure it.

    python examples/reproduce/smollm2_1_7b_qat.py                  # with the Hugging Face hub and a GPU of 80 GB
    python examples/reproduce/smollm2_1_7b_qat.py --trained MODEL  # measure trained weights: a directory or hub id
    python examples/reproduce/smollm2_1_7b_qat.py --smoke          # every step with a small random model

The training is the published one, recipes/qat/smollm2_1_7b.yaml: 4000 samples of 512 tokens of WikiText-103, one
epoch, AdamW with a learning rate of 2e-5 that falls along a cosine, weight decay 0.01, 64 samples to a step; full
precision for a tenth of the steps, a linear fall to 4 bits (groups of 64), the last tenth at 4 bits; cross-entropy,
every weight trained. Weights, gradients and the two moments of AdamW are float32, 27 GB before anything is computed,
and each of the two checkpoints that are kept takes 20 GB of disk. A run that was interrupted goes on from the last one.

Rebuilt, all of it in one run, "QAT" being the trained model: the untrained bf16 original, which every divergence is
from; its Q4_K_M as llama-quantize makes it without and with importance, and calibrated by us; QAT in bf16; QAT as
W4A16, whose codes are exactly the levels that it was trained to; its Q4_K_M and Q8_0, rounded by ggml; and, as the
published table had them, W4A16 of the trained bf16 weights rounded to nearest, alone, with a residual at 40 to 77 % of
the depth and with the full one. Each with its perplexity on WikiText-2 (windows of 2048 that advance by 512),
divergence, TruthfulQA MC1, bytes, and llama.cpp's own perplexity of the GGUF files.

What to expect. The model learns the text too: WikiText-103 is of the kind that WikiText-2's perplexity is measured on,
so QAT's may be below the original's, which is no sign of a better model, while its divergence counts everything that
was learned. 4.25 bits per weight as trained. W4A16 to nearest is a second rounding, by other scales (float32, 4.5 bits
per weight), and its residual (13.0 in full) leads back to the trained bf16 weights, not to the original; who
serves W4A16 takes the one as trained, which needs none. With --trained that row is left out, since dense weights do
not say their levels.

Distillation is no part of the published setting. `--training-recipe recipes/qat/distilled.yaml` would learn from the
original's distribution instead of the text, begin with the levels of a calibrated quantizer, stay at 4 bits throughout
and train nothing but the quantized weights: the divergence from the original is then what is trained for. It loads the
original a second time.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline

from srd_modifier.errors import SRDError

if TYPE_CHECKING:
    from srd_modifier.evaluation.comparison.candidate import Candidate
    from srd_modifier.qat.settings import TrainingSettings

MODEL = "HuggingFaceTB/SmolLM2-1.7B"
RECIPE = pipeline.REPOSITORY / "recipes" / "qat" / "smollm2_1_7b.yaml"
DATA = "Salesforce/wikitext:wikitext-103-raw-v1"

# what is written of the trained model, and what its rows are called
EXPORTS = {
    "bf16": "QAT, bf16",
    "w4a16": "QAT, W4A16 as trained",
    "gguf:Q4_K_M": "QAT, Q4_K_M, ggml",
    "gguf:Q8_0": "QAT, Q8_0, ggml",
}
AGAIN = "QAT, W4A16 to nearest"
AGAIN_NOTE = "The trained weights rounded once more, to nearest, as those of any model; not the levels of the training."

_SMOKE = {"num_samples": 16, "max_seq_length": 64, "batch_size": 4, "micro_batch_size": 2}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--training-data", help=f"text file, or NAME[:CONFIG[:SPLIT]] of the hub or a data set's directory ({DATA})")
    add("--training-recipe", type=Path, help="settings of the training, YAML (recipes/qat/smollm2_1_7b.yaml)")
    add("--trained", help="directory or hub id of trained dense weights; nothing is trained then")


def made_of(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the trained weights."""
    from srd_modifier.checkpoint.locate import find_model
    from srd_modifier.evaluation.digest import file_digest, model_digest

    if options.trained is None:
        data = _data_name(options)
        content = {"sha256": file_digest(Path(data))} if Path(data).is_file() else {"name": data}
        return {"settings": _settings(options).as_dict(), "data": content}
    if options.training_data is not None or options.training_recipe is not None:
        raise SRDError("--trained names finished weights: leave --training-data and --training-recipe out")
    return {"trained": model_digest(find_model(options.trained, fetch_weights=True))}


def train(model: str, options: argparse.Namespace) -> pipeline.Trained:
    """Train the model, or go on with it; where every export is there already it is only found."""
    if options.trained is not None:
        return _given(options.trained, options.output)
    from srd_modifier.qat.exports.destination import Destination
    from srd_modifier.qat.train import RECORD, Data
    from srd_modifier.qat.train import train as run

    output: Path = options.output / "training"
    exports = {Destination.parse(text): label for text, label in EXPORTS.items()}
    paths = {label: destination.path(output, model) for destination, label in exports.items()}
    if not all(path.exists() for path in paths.values()):
        data = _data_name(options)
        run(
            model,
            Data(text=Path(data)) if Path(data).is_file() else Data(dataset=data),
            _settings(options),
            output,
            exports=list(exports),
            device=options.device,
            resume=(output / RECORD).is_file(),
            progress=pipeline.bar,
            say=pipeline.say,
        )
    record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    return pipeline.Trained(
        paths[EXPORTS["bf16"]],
        AGAIN,
        AGAIN_NOTE,
        tuple(_row(path, label) for label, path in paths.items()),
        f"{record['steps']} steps on {record['samples']} samples of {record['data']} by {_recipe(options).name}",
    )


def _given(trained: str, output: Path) -> pipeline.Trained:
    """The rows of weights that were trained elsewhere; ggml rounds them as it is, and nothing is known of levels."""
    from srd_modifier.checkpoint.locate import find_model
    from srd_modifier.gguf.export import export_gguf
    from srd_modifier.qat.exports.destination import Destination

    model = find_model(trained, fetch_weights=True)
    rows = [_row(model, f"QAT, {pipeline.dtype_of(model)}")]
    for text, label in EXPORTS.items():
        file_type = Destination.parse(text).file_type
        if file_type is None:
            continue
        path = output / "gguf" / f"trained-{file_type.value}.gguf"
        if not path.is_file():
            pipeline.say(f"writing {file_type.value} of the trained weights")
            export_gguf(model, path, file_type=file_type, use_importance=False)
        rows.append(_row(path, label))
    return pipeline.Trained(model, AGAIN, AGAIN_NOTE, tuple(rows), f"{trained}, as it was given")


def _row(path: Path, label: str) -> "Candidate":
    from srd_modifier.evaluation.comparison.candidate import Candidate

    return Candidate(str(path), label, family=label)


def _recipe(options: argparse.Namespace) -> Path:
    return options.training_recipe or RECIPE


def _settings(options: argparse.Namespace) -> "TrainingSettings":
    from srd_modifier.qat.settings import TrainingSettings

    return TrainingSettings.read(_recipe(options), **(_SMOKE if options.smoke else {}))


def _data_name(options: argparse.Namespace) -> str:
    """The data set, or with --smoke the text that everything is calibrated on."""
    if options.training_data is not None or not options.smoke:
        return options.training_data or DATA
    import smoke

    return str(smoke.write_calibration(options.output / "data"))


TABLE = pipeline.Table(
    name="smollm2_1_7b_qat",
    title="SmolLM2-1.7B after QAT",
    model=MODEL,
    recipe=pipeline.NEAREST_IN_GROUPS_OF_64,
    float32_scales=True,
    small_model=pipeline.SMALL_SMOLLM2_1_7B,
    training=pipeline.Training(add_options, made_of, train),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return pipeline.main(TABLE, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
