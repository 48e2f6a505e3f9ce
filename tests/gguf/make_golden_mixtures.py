"""Ask llama.cpp's quantizer which types it gives to the tensors of small models, and print them as JSON.

    python tests/gguf/make_golden_mixtures.py > tests/gguf/golden_mixtures.json

in an environment with `pip install llama-cpp-python==0.3.36 gguf`, which takes a compiler. Each model has the names and
row lengths of real ones, and rows of zeros. What the quantizer refuses is recorded as null.
"""

import ctypes
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

LLAMA_CPP = "0c1e57098"  # the commit that llama-cpp-python 0.3.36 is built from
QUANTIZED = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0"]
ROWS = 2


@dataclass(frozen=True)
class Model:
    """A model's dimensions; `extra` are row lengths of further tensors, `absent` names that it does not have."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int = 4
    kv_heads: int = 4
    experts: int = 0
    tied: bool = False
    fused: bool = False
    extra: tuple[tuple[str, tuple[int, ...]], ...] = ()
    absent: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    def tensors(self) -> dict[str, list[int]]:
        """Torch shapes by name, a `*` for the layer."""
        names = {"token_embd.weight": [ROWS, self.hidden], "output_norm.weight": [self.hidden]}
        if not self.tied:
            names["output.weight"] = [ROWS, self.hidden]
        attention = ["qkv"] if self.fused else ["q", "k", "v"]
        names |= {f"blk.*.attn_{part}.weight": [ROWS, self.hidden] for part in [*attention, "output"]}
        names["blk.*.attn_norm.weight"] = [self.hidden]
        if self.experts:
            names["blk.*.ffn_gate_inp.weight"] = [self.experts, self.hidden]
            widths = {"gate": self.hidden, "up": self.hidden, "down": self.intermediate}
            names |= {f"blk.*.ffn_{part}_exps.weight": [self.experts, ROWS, width] for part, width in widths.items()}
        else:
            widths = {"gate": self.hidden, "up": self.hidden, "down": self.intermediate}
            names |= {f"blk.*.ffn_{part}.weight": [ROWS, width] for part, width in widths.items()}
        return names | {name: list(shape) for name, shape in self.extra}


GEMMA4 = (
    ("attention.sliding_window", 512),
    ("attention.sliding_window_pattern", [True]),
    ("embedding_length_per_layer_input", 256),
    ("attention.key_length_swa", 256),
    ("attention.value_length_swa", 256),
)
PER_LAYER = (
    ("per_layer_token_embd.weight", (ROWS, 256)),
    ("per_layer_model_proj.weight", (ROWS, 1536)),
    ("per_layer_proj_norm.weight", (256,)),
    ("blk.*.inp_gate.weight", (ROWS, 1536)),
    ("blk.*.proj.weight", (ROWS, 256)),
    ("blk.*.layer_output_scale.weight", (1,)),
)
MODELS = {
    "SmolLM2-135M": Model("llama", 30, 576, 1536, heads=9, kv_heads=3, tied=True),
    "Llama-3-8B": Model("llama", 32, 256, 512, heads=32, kv_heads=8, extra=(("rope_freqs.weight", (64,)),)),
    "Llama-65B": Model("llama", 80, 256, 256, heads=8, kv_heads=8),
    "Llama-70B": Model("llama", 80, 256, 256, heads=8, kv_heads=1),
    "Mixtral-8x7B": Model("llama", 32, 256, 256, heads=8, kv_heads=2, experts=8),
    "fused": Model("llama", 12, 256, 256, fused=True),
    "5 layers": Model("llama", 5, 256, 256),
    "odd widths": Model(
        "llama", 8, 256, 256, extra=(("blk.*.attn_output.weight", (ROWS, 80)), ("blk.*.ffn_down.weight", (ROWS, 336)))
    ),
    "one row": Model("llama", 8, 256, 256, extra=(("blk.*.ffn_down.weight", (1, 256)),)),
    "Qwen2-72B": Model("qwen2", 80, 256, 256, extra=(("blk.*.attn_q.bias", (256,)),)),
    "Qwen3-0.6B": Model("qwen3", 28, 256, 768, tied=True, extra=(("blk.*.attn_q_norm.weight", (128,)),)),
    "Qwen3-MoE": Model("qwen3moe", 48, 256, 768, heads=32, kv_heads=4, experts=16),
    "SmolLM3-3B": Model("smollm3", 36, 256, 256, tied=True),
    "Gemma-3-1B": Model("gemma3", 26, 1152, 6912, kv_heads=1, tied=True),
    "Gemma-4-E2B": Model("gemma4", 35, 1536, 6144, kv_heads=1, tied=True, extra=PER_LAYER, settings=GEMMA4),
    "Gemma-4-26B-A4B": Model(
        "gemma4",
        30,
        256,
        704,
        experts=16,
        tied=True,
        extra=(
            ("blk.*.ffn_gate_up_exps.weight", (16, ROWS, 256)),
            ("blk.*.ffn_down.weight", (ROWS, 2112)),
            ("blk.*.ffn_down_exps.scale", (16,)),
        ),
        absent=tuple(f"blk.{layer}.attn_v.weight" for layer in range(5, 30, 6)),
        settings=GEMMA4,
    ),
}
# model, file type, whether there is an imatrix, overrides
CASES: list[tuple[str, str, bool, list[tuple[str, str]]]] = [
    *((model, file_type, False, []) for model in MODELS for file_type in QUANTIZED),
    *((model, file_type, False, []) for model in ("Qwen3-MoE", "Gemma-4-E2B") for file_type in ("F32", "F16", "BF16")),
    *(("Llama-3-8B", file_type, True, []) for file_type in QUANTIZED),
    ("SmolLM2-135M", "Q4_0", True, []),
    ("Qwen3-MoE", "Q4_0", True, []),
    ("Llama-3-8B", "Q4_K_M", False, [("attn_v", "Q8_0"), ("ffn_(up|gate)", "Q5_K"), ("ffn", "BF16")]),
    # tensors that are overridden are not counted
    ("Llama-3-8B", "Q4_K_M", False, [(r"blk\.[0-3]\.(attn_v|ffn_down)", "Q5_K")]),
    ("Qwen3-MoE", "Q4_K_M", False, [(r"blk\.[0-3]\.(attn_v|ffn_down)", "Q5_K")]),
    ("SmolLM2-135M", "Q4_K_M", False, [("token_embd", "Q4_K"), ("attn_q", "F16")]),
]


def write_model(model: Model, file_type: str, path: Path) -> None:
    """A GGUF file as llama.cpp's converter would give it to the quantizer: float32, or bfloat16 where that is kept."""
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
    for key, value in model.settings:
        key = f"{model.architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(key, value * model.layers)
        else:
            writer.add_uint32(key, value)
    for name, shape in model.tensors().items():
        for layer in range(model.layers if "*" in name else 1):
            full = name.replace("*", str(layer))
            if full in model.absent:
                continue
            if name.startswith("per_layer_model_proj") and file_type != "F32":
                kept = gguf.GGMLQuantizationType.F16 if file_type == "F16" else gguf.GGMLQuantizationType.BF16
                data = gguf.quants.quantize(np.zeros(shape, np.float32), kept)
                writer.add_tensor(full, data, raw_dtype=kept)
            else:
                writer.add_tensor(full, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, file_type: str, weighted: bool, overrides: list[tuple[str, str]]) -> bool:
    """Run the quantizer; whether it did not refuse."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = gguf.LlamaFileType["ALL_F32" if file_type == "F32" else f"MOSTLY_{file_type}"]
    parameters.nthread = 1
    if weighted:  # of no tensor of the model: only its presence matters
        value = (ctypes.c_float * 1)(1.0)
        parameters.imatrix = (llama_cpp.llama_model_imatrix_data * 2)((b"none", value, 1), (None, None, 0))
    given = [(pattern.encode(), gguf.GGMLQuantizationType[name]) for pattern, name in overrides]
    parameters.tt_overrides = (llama_cpp.llama_model_tensor_override * (len(given) + 1))(*given, (None, 0))
    return llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters)) == 0


def types_of(path: Path, model: Model) -> dict[str, str | list[str]]:
    """Types by name, a `*` for the layer; a list of them where layers differ, with "" where a layer has none."""
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    types: dict[str, str | list[str]] = {}
    for name in model.tensors():
        layers = [found.get(name.replace("*", str(layer)), "") for layer in range(model.layers if "*" in name else 1)]
        types[name] = layers[0] if len(set(layers)) == 1 else layers
    return types


def main() -> None:
    log = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(log, None)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.gguf", Path(folder) / "target.gguf"
        for name, file_type, weighted, overrides in CASES:
            write_model(MODELS[name], file_type, source)
            accepted = quantize(source, target, file_type, weighted, overrides)
            types = types_of(target, MODELS[name]) if accepted else None
            cases.append(
                {"model": name, "file_type": file_type, "weighted": weighted, "overrides": overrides, "types": types}
            )
            print(name, file_type, file=sys.stderr)
    models = {
        name: {
            "architecture": model.architecture,
            "layers": model.layers,
            "experts": model.experts,
            "heads": model.heads,
            "kv_heads": model.kv_heads,
            "absent": model.absent,
            "tensors": model.tensors(),
        }
        for name, model in MODELS.items()
    }
    source_text = f"llama_model_quantize of llama-cpp-python {llama_cpp.__version__}, llama.cpp {LLAMA_CPP}"
    # a line per model and per case
    print("{")
    print(f'"made_by": {json.dumps(source_text + ", by make_golden_mixtures.py")},')
    print('"models": {\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in models.items()) + "\n},")
    print('"cases": [\n' + ",\n".join(json.dumps(case) for case in cases) + "\n]")
    print("}")


if __name__ == "__main__":
    main()
