"""From a model directory to a GGUF file that stock llama.cpp loads, in one call."""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from srd_modifier.checkpoint.atomic import refuse_existing_file
from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.gguf.adapter import check_adapter, export_adapter
from srd_modifier.gguf.blocks import LAYOUTS
from srd_modifier.gguf.calibration.budget import candidate_types
from srd_modifier.gguf.calibration.encode import CalibratedTensors, Report, calibrate
from srd_modifier.gguf.calibration.text import Calibration, read_samples
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.gguf.importance import write_imatrix
from srd_modifier.gguf.metadata import Method, model_id
from srd_modifier.gguf.mixture import FileType, Override
from srd_modifier.gguf.plan import ExportPlan, ExportSummary, encode_plain, head_bytes_of, plan_export, write_plan
from srd_modifier.gguf.writer import Entry, padded_bytes
from srd_modifier.selection.budget import Budget


def export_gguf(
    source: str | Path,
    output: Path,
    *,
    file_type: FileType = FileType.Q4_K_M,
    overrides: Sequence[Override] = (),
    alpha: float | None = None,
    layer_alphas: Mapping[str, float] | None = None,
    chunks: Iterable[str] | None = None,
    imatrix: Path | None = None,
    use_importance: bool = True,
    imatrix_output: Path | None = None,
    calibration: Calibration | None = None,
    budget: Budget | None = None,
    lora_rank: int | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> ExportSummary:
    """Write a model as a GGUF file.

    Without calibration each tensor is quantized by ggml itself, byte for byte as `llama-quantize` does. With it, codes
    and scales are chosen to minimise the error of each layer's output (`gguf.calibration`).

    Args:
        source: a directory or hub id: a Hugging Face model, a W4A16 checkpoint, or an SRD checkpoint.
        output: the file to make, or a directory, in which it is named after the model and what gave the types.
        file_type: which types its tensors get. With a budget, those of the tensors that it does not choose for.
        overrides: patterns of tensor names and the type that they get instead, with a budget too.
        alpha: for a checkpoint with a residual, the share of it to apply; None is the checkpoint's own.
        layer_alphas: alpha by module name or `re:` pattern; None is the checkpoint's own, unless alpha is given.
        chunks: for a checkpoint with a residual, the chunks of depth to apply it to; None is all.
        imatrix: importance in llama.cpp's form; None is the checkpoint's own, where it has some.
        use_importance: whether importance is used at all.
        imatrix_output: where to write the importance that was used, in llama.cpp's form.
        calibration: what to calibrate on.
        budget: what the file may take: bytes in all, or bits per weight over all its tensors. Needs calibration.
        lora_rank: also write what the file lost as an adapter of this rank, beside it, with the ending `-lora.gguf`.
        overwrite: replace existing files.
        report: called with what is going on, and how much of it is done, as (done, total).

    Raises:
        SRDError: the model, its vocabulary, the calibration text or the output are at fault; the message names what.
            There is no file then.
        MissingExtraError: a library of the `gguf` extra is not installed.
    """
    _check_options(file_type, imatrix, use_importance, calibration, budget)
    plan = plan_export(
        source,
        file_type=file_type,
        overrides=overrides,
        alpha=alpha,
        layer_alphas=layer_alphas,
        chunks=chunks,
        imatrix=imatrix,
        use_importance=use_importance,
        calibrated=calibration is not None,
    )
    fixed = [name for name in plan.types if any(re.search(pattern, name) for pattern, _ in overrides)]
    if budget is not None:
        plan = replace(plan, mixture=_budget_text(budget, plan.mixture))
        check_budget(budget, plan, fixed)
    if lora_rank is not None:
        check_adapter(plan, lora_rank)
    output = _named(output, plan)
    adapter = None if lora_rank is None else output.with_name(f"{output.stem}-lora.gguf")
    for path in (output, imatrix_output, adapter):
        if path is not None:
            _prepare(path, overwrite=overwrite)
    if imatrix_output is not None and calibration is None and not plan.importance:
        raise SRDError(f"there is no importance to write to {imatrix_output}: this export uses none")
    tokens = 1
    if calibration is None:
        summary = write_plan(plan, output, overwrite=overwrite)
    else:
        with tempfile.TemporaryDirectory(prefix=".srd-gguf-", dir=output.parent) as folder:
            plan, tensors = _calibrate(plan, calibration, budget, fixed, Path(folder), report)
            tokens = tensors.tokens
            summary = write_plan(plan, output, encode=_encoder(tensors), overwrite=overwrite)
            summary = replace(summary, predicted_kld=tensors.predicted)
    if imatrix_output is not None:
        dataset = str(imatrix or source) if calibration is None else calibration.source
        write_imatrix(imatrix_output, plan.importance, dataset=dataset, tokens=tokens)
    if lora_rank is not None and adapter is not None:
        export_adapter(plan, output, adapter, rank=lora_rank, overwrite=overwrite)
    return summary


def _prepare(path: Path, *, overwrite: bool) -> None:
    """Make sure, before hours of work, that there can be such a file."""
    refuse_existing_file(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SRDError(f"cannot write {path}: {error.strerror or error}") from error


def _check_options(
    file_type: FileType,
    imatrix: Path | None,
    use_importance: bool,
    calibration: Calibration | None,
    budget: Budget | None,
) -> None:
    if calibration is None:
        if budget is not None:
            raise ConfigError("a budget is spent by what errors cost on a text: give a calibration text too")
        return
    if imatrix is not None or not use_importance:
        raise ConfigError("calibration measures the importance itself: leave the other options about it out")
    if not file_type.is_quantized:
        raise ConfigError(f"{file_type.value} is not quantized, so there is nothing to calibrate")
    calibration.resolved_device  # noqa: B018 - resolving it checks it


def check_budget(budget: Budget, plan: ExportPlan, fixed: Sequence[str] = ()) -> None:
    """Refuse a budget that even the smallest types do not meet, before anything is measured.

    Args:
        budget: what the file may take.
        plan: what it would hold without a budget.
        fixed: names of tensors that keep their type.

    Raises:
        ConfigError: it is too small, or of another kind.
    """
    smallest = sum(padded_bytes(_smallest(entry, fixed)) for entry in plan.entries)
    over = smallest - _data_bytes(budget, plan)
    if over > 0:
        weights = sum(entry.weights for entry in plan.entries)
        least = (
            f"{math.ceil(8000 * smallest / weights) / 1000} bpw"
            if budget.bytes is None
            else f"{budget.bytes + over:,} bytes"
        )
        raise ConfigError(
            f"a budget of {budget} is too small for this model, which takes {least} with the smallest types"
        )


def _smallest(entry: Entry, fixed: Sequence[str]) -> Entry:
    if entry.name in fixed or entry.ggml_type not in LAYOUTS:
        return entry
    candidates = [replace(entry, ggml_type=candidate) for candidate in candidate_types(entry.shape[-1])]
    return min(candidates, key=padded_bytes, default=entry)


def _calibrate(
    plan: ExportPlan,
    calibration: Calibration,
    budget: Budget | None,
    fixed: Sequence[str],
    folder: Path,
    report: Report | None,
) -> tuple[ExportPlan, CalibratedTensors]:
    """The plan with the types, importance and metadata that calibration gives, and the bytes."""
    samples, text = read_samples(calibration, plan.weights.directory)
    plan = replace(plan, method=Method.OUTPUT_ERROR, calibration=text)
    tensors = calibrate(
        plan.weights,
        plan.tensors,
        plan.types,
        samples,
        folder,
        max_bytes=None if budget is None else _data_bytes(budget, plan),
        fixed=fixed,
        device=calibration.resolved_device,
        report=report,
    )
    if budget is not None:
        # a type that was chosen is none to fall back to, even where it is the one of the rule
        chosen = {name: own for name, own in tensors.types.items() if own in LAYOUTS and name not in fixed}
        plan = replace(
            plan,
            types=tensors.types,
            preferred_types={**plan.preferred_types, **chosen},
            file_type=_nearest_rule(plan, tensors),
        )
    return replace(plan, importance=tensors.mean_squares), tensors


def _encoder(tensors: CalibratedTensors) -> Callable[[ExportPlan, GGUFTensor], Iterator[NDArray[np.uint8]]]:
    def encode(plan: ExportPlan, tensor: GGUFTensor) -> Iterator[NDArray[np.uint8]]:
        return tensors.data(tensor) or encode_plain(plan, tensor)

    return encode


def _data_bytes(budget: Budget, plan: ExportPlan) -> int:
    """What the budget leaves for the data of all tensors."""
    if budget.bits_per_weight is not None:
        return int(budget.bits_per_weight * sum(entry.weights for entry in plan.entries) / 8)
    if budget.bytes is None:
        raise ConfigError(f"a GGUF file's budget is a size or bits per weight, not {budget}")
    # the importance is not known yet, but its digest will be as long as that of any other
    return budget.bytes - head_bytes_of(replace(plan, importance={"": torch.ones(1)}))


def _nearest_rule(plan: ExportPlan, tensors: CalibratedTensors) -> FileType:
    """The rule whose main type most of the chosen weights have, for `general.file_type`."""
    weights: Counter[str] = Counter()
    for entry in plan.entries:
        weights[tensors.types[entry.name].value] += entry.weights if len(entry.shape) > 1 else 0
    rules = {rule.main_type.value: rule for rule in FileType if rule.is_quantized and rule is not FileType.Q4_K_S}
    return next((rules[name] for name, _ in weights.most_common() if name in rules), plan.file_type)


def _budget_text(budget: Budget, rule: str) -> str:
    """What gave the types, in words: the budget, then the overrides of the rule."""
    return ", ".join([str(budget).replace(" ", ""), *rule.split(", ")[1:]])


def _named(output: Path, plan: ExportPlan) -> Path:
    """The file, where a directory was named."""
    if not output.is_dir():
        return output
    name = Path(model_id(plan.weights.directory)).name
    return output / f"{name}-{plan.mixture.split(', ')[0]}.gguf"
