"""What a card says about a directory's files: what it is, what it costs, how it was made, where it ends."""

import math
from typing import Any

from srd_modifier.evaluation.card.contents import Contents, GGUFModel, Kind
from srd_modifier.evaluation.card.markdown import block, code, table
from srd_modifier.evaluation.card.measured import Measured
from srd_modifier.evaluation.table import escape, format_value
from srd_modifier.selection.depth import CHUNKS

_METHODS = {
    "weight-error": "codes chosen by the error of the weights, as llama-quantize does",
    "output-error": "codes chosen by the error of the layers' outputs",
    "training": "codes trained on this grid",
}


def introduction(contents: Contents, base_model: str | None) -> str:
    """What it is."""
    what = _subject(contents, base_model)
    if contents.kind is Kind.SRD:
        text = (
            f"{what}, quantized to 4-bit weights (W4A16, compressed-tensors), with an integer residual beside them: "
            "what the quantization took off the original weights, in a folder of its own.\n\n"
            "- **Without srd-modifier** this is an ordinary W4A16 checkpoint. Any loader of compressed-tensors reads "
            "the 4-bit weights and leaves the folder `srd/` alone.\n"
            "- **With srd-modifier** Transformers and vLLM load `W = W4 + alpha * residual`. The dial alpha goes from "
            f"0, the 4-bit weights, to 1, all of the residual; {_own_alpha(contents)}."
        )
    elif contents.kind is Kind.W4A16:
        text = f"{what}, quantized to 4-bit weights (W4A16, compressed-tensors)."
    elif contents.kind is Kind.DENSE:
        text = f"{what}, as an ordinary dense checkpoint."
    else:
        text = f"{what}, as {_files(len(contents.gguf))} for llama.cpp."
    if contents.gguf and contents.kind is not Kind.NONE:
        text += f"\n\nThe directory also holds {_files(len(contents.gguf))} for llama.cpp."
    return text


def sizes(contents: Contents) -> str:
    """Bytes on disk and bits per weight of each part."""
    rows = []
    if contents.base_size is not None and contents.size is not None:
        base, whole = contents.base_size, contents.size
        if contents.kind is Kind.SRD:
            residual = whole.bytes_on_disk - base.bytes_on_disk
            extra = whole.bits_per_weight - base.bits_per_weight
            rows.append(_size_row("4-bit weights, `model*.safetensors`", base.bytes_on_disk, base.bits_per_weight))
            rows.append(_size_row("residual, `srd/`", residual, extra))
            rows.append(_size_row("both", whole.bytes_on_disk, whole.bits_per_weight))
        else:
            rows.append(_size_row("`model*.safetensors`", whole.bytes_on_disk, whole.bits_per_weight))
    for model in contents.gguf:
        mixture = "" if model.mixture is None else f", {escape(model.mixture)}"
        rows.append(_size_row(code(model.path.name) + mixture, model.size.bytes_on_disk, model.size.bits_per_weight))
        if model.adapter is not None:
            rows.append([f"{code(model.adapter.name)}, adapter", f"{model.adapter.stat().st_size:,}", ""])
    return f"{table(['', 'bytes on disk', 'bits/weight'], rows, numbers=2)}\n\n{_about_bits(contents)}"


def _about_bits(contents: Contents) -> str:
    """What bits per weight are counted over."""
    matrices = "those of the decoder layers' matrices"
    counted = "scales, zero points and masks counted"
    text = "Bytes are those of the files that hold weights. Bits per weight are "
    if contents.kind is Kind.DENSE:
        return text + matrices + (f", {counted}." if contents.gguf else ".")
    if contents.kind is Kind.NONE:
        return f"{text}{matrices}, {counted}."
    return f"{text}those of the quantized matrices{', in GGUF files ' + matrices if contents.gguf else ''}, {counted}."


def residual(contents: Contents) -> str:
    """Where the residual is, in what format, and what it is predicted to do."""
    summary = contents.summary
    if contents.kind is not Kind.SRD or summary is None:
        return ""
    rows = [
        [name, _depth(name), f"{chunk.modules} of {chunk.of}", f"{chunk.bytes:,}"]
        for name, chunk in summary.chunks.items()
    ]
    formats = "; ".join(f"{escape(label)} ({_modules(count)})" for label, count in summary.formats.items())
    parts = [table(["chunk", "depth", "modules with a residual", "bytes"], rows, numbers=3), f"Format: {formats}."]
    if summary.predicted_kld is not None and summary.predicted_kld_w4 is not None:
        parts.append(
            "**Predicted, not measured:** the sensitivity that was computed on calibration data when the model was "
            "quantized puts the mean KL divergence from the original at "
            f"{format_value('kld_mean', summary.predicted_kld_w4)} nats per token for the 4-bit weights and "
            f"{format_value('kld_mean', summary.predicted_kld)} with the residual."
        )
    return "\n\n".join(parts)


def making(contents: Contents) -> str:
    """The recipe, and what GGUF files say about themselves."""
    parts = []
    if contents.kind in (Kind.SRD, Kind.W4A16):
        scheme = _scheme(contents.config)
        modifiers = [code(name) for name in contents.modifiers]
        by = f"llm-compressor with {_listed(modifiers)}" if modifiers else ""
        if scheme or by:
            parts.append("The weights were quantized" + f" to {scheme}" * bool(scheme) + f" by {by}" * bool(by) + ".")
    if contents.recipe is not None:
        parts.append(f"The recipe, {code('recipe.yaml')}:\n\n{block(contents.recipe, 'yaml')}")
    made = [f"- {code(model.path.name)}: {_making_of(model, contents)}" for model in contents.gguf if model.made]
    return "\n\n".join([*parts, *(["\n".join(made)] if made else [])])


def limits(contents: Contents, measured: Measured | None, base_model: str | None) -> str:
    """What a reader must not expect."""
    original = "the original model" if base_model is None else _link(base_model)
    points = []
    if base_model is not None or contents.is_quantized:
        points.append(f"Whatever limits {original} has, this model has too.")
    if measured is None:
        points.append("Its quality was not measured for this card.")
    else:
        points.append("The figures hold for the tasks named above; nothing follows for other tasks or languages.")
        if any(path.suffix == ".gguf" for path in measured.own.values()):
            points.append(
                "GGUF files were scored by their dequantized weights. When llama.cpp runs them it rounds activations "
                "as well, and comes to slightly other figures."
            )
    if contents.kind is Kind.SRD:
        points += [
            "Loaded without srd-modifier the model is the 4-bit one, and no loader warns of it.",
            "Corrected layers are dense in Transformers and take the memory of the original. In vLLM they are dense, "
            "or in 8 bits where memory is short; only layers without a correction run on 4-bit kernels.",
        ]
    points.append("The commands above are how these tools are used; they were not run for this card.")
    return "\n".join(f"- {point}" for point in points)


def _subject(contents: Contents, base_model: str | None) -> str:
    if base_model is not None:
        return _link(base_model)
    names = contents.config.get("architectures")
    return f"A {code(str(names[0]))} model" if isinstance(names, list) and names else "A language model"


def _link(hub_id: str) -> str:
    return f"[{escape(hub_id)}](https://huggingface.co/{hub_id})"


def _own_alpha(contents: Contents) -> str:
    settings: dict[str, Any] = {} if contents.summary is None else contents.summary.settings
    text = f"unless told otherwise it is {settings['alpha']:g}"
    patterns = settings["layer_alphas"]
    return text + (f", and {_listed([f'{a:g} for {code(name)}' for name, a in patterns.items()])}" if patterns else "")


def _size_row(what: str, size: int, bits: float) -> list[str]:
    return [what, f"{size:,}", "" if math.isnan(bits) else f"{bits:.2f}"]


def _depth(chunk: str) -> str:
    if chunk not in CHUNKS:
        return ""
    start, end = CHUNKS[chunk]
    return f"{100 * start:.0f} to {100 * end:.0f} %"


def _scheme(config: dict[str, Any]) -> str:
    """The weights of the quantization, in words.

    >>> group = {"weights": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 128}}
    >>> _scheme({"quantization_config": {"config_groups": {"group_0": group}}})
    '4-bit integers, symmetric, in groups of 128'
    """
    quantization = config.get("quantization_config")
    groups = quantization.get("config_groups") if isinstance(quantization, dict) else None
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and "num_bits" in weights:
            symmetry = "symmetric" if weights.get("symmetric", True) else "asymmetric"
            size = weights.get("group_size")
            rows = f"in groups of {size}" if weights.get("strategy") == "group" else "with a scale for each row"
            found.append(f"{weights['num_bits']}-bit integers, {symmetry}, {rows}")
    return _listed(list(dict.fromkeys(found)))


def _making_of(model: GGUFModel, contents: Contents) -> str:
    made = model.made
    text = f"written by srd-modifier {escape(made['library'])}"
    if made.get("method") in _METHODS:
        text += f", {_METHODS[made['method']]}"
    if "importance" in made and made.get("method") == "weight-error":
        text += ", weighted by the importance of the inputs"
    if "calibration.text" in made:
        tokens = made.get("calibration.tokens", "")
        amount = f"{int(tokens):,} tokens of " if tokens.isdigit() else ""
        text += f", calibrated on {amount}{code(made['calibration.text'])}"
    if "base_digest" in made:
        same = contents.summary is not None and made["base_digest"] == contents.summary.base_digest
        source = "this checkpoint" if same else "an SRD checkpoint"
        text += f", made of {source} at alpha {escape(made.get('alpha', 'unknown'))}"
    return text


def _files(count: int) -> str:
    return "a GGUF file" if count == 1 else f"{count} GGUF files"


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


def _listed(words: list[str]) -> str:
    """Words in a row, with `and` before the last."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
