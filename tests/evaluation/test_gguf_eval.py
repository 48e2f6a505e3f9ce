"""Models made of GGUF files: against the models that the files were made of, and against other readers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import TINY_LLAMA
from torch import Tensor

from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.evaluation.gguf import LlamaCppTokenizer, build_model
from srd_modifier.evaluation.load import load
from srd_modifier.evaluation.text import bos_where_added
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.families import family_of
from srd_modifier.gguf.ggml import GGMLType, quantize
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.gguf.weights import ModelWeights
from srd_modifier.gguf.writer import Entry, write_gguf

SHARED = Path(__file__).parents[3] / "shared" / "models"
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA4 = {
    "num_hidden_layers": 6,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "final_logit_softcapping": 10.0,
}
E2B = {
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-with-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.5, "beta_fast": 16.0}}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3moe": (
        "qwen3_moe",
        EXPERTS | {"head_dim": 32, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "smollm3": ("smollm3", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3-period-and-softcap": (
        "gemma3_text",
        GEMMA | {"sliding_window_pattern": 3, "final_logit_softcapping": 10.0},
    ),
    "gemma3-linear-rope": (
        "gemma3_text",
        GEMMA
        | {
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
    ),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4-moe": ("gemma4_text", GEMMA4 | EXPERTS | {"enable_moe_block": True, "top_k_experts": 2}),
    "gemma4-e2b": ("gemma4_text", E2B),
}


def random_model(model_type: str, **settings: Any) -> Any:
    """Random weights, norms and biases too, so that none of them can be left out unnoticed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **settings})).eval()
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if values.dim() == 1 or "scalar" in name:
                values += 0.3 * torch.randn_like(values)
    return model


def write_file(directory: Path, ggml_type: GGMLType = GGMLType.F32) -> Path:
    """The model in `directory` as a GGUF file without a vocabulary, its matrices of one type."""
    weights = ModelWeights.open(directory)
    family = family_of(weights.config)
    tensors = {tensor.name: tensor for tensor in family.tensors(weights)}
    entries = [
        Entry(name, tensor.shape, ggml_type if len(tensor.shape) > 1 else GGMLType.F32)
        for name, tensor in tensors.items()
    ]
    write_gguf(
        directory / "model.gguf",
        family.architecture,
        lambda writer: family.add_hyperparameters(writer, weights.config),
        entries,
        lambda entry: (
            quantize(part.reshape(-1, entry.shape[-1]), entry.ggml_type) for part in tensors[entry.name].parts(weights)
        ),
    )
    return directory / "model.gguf"


def logits(model: Any, vocabulary: int = 96) -> Tensor:
    ids = torch.randint(0, vocabulary, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize(("model_type", "settings"), MODELS.values(), ids=list(MODELS))
def test_an_unquantized_file_computes_what_the_original_computes(tmp_path, model_type, settings):
    model = random_model(model_type, **settings)
    model.save_pretrained(tmp_path)
    found = build_model(GGUFFile(write_file(tmp_path)), torch.float32)
    # the factors of llama3's RoPE are float32 in the file and are divided by, which rounds
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-3 if "llama3" in str(settings) else 1e-5)


@pytest.mark.parametrize(
    ("directory", "file"),
    [("stories260K", "stories260Ktok512.gguf"), ("tiny1m", "tiny1m-f32.gguf")],
    ids=["stories260K", "tiny1m"],
)
def test_a_file_by_another_exporter_computes_what_the_original_computes(directory, file):
    if not (SHARED / directory).is_dir():
        pytest.skip(f"needs {SHARED / directory}")
    found, original = load(str(SHARED / directory / file)), load(str(SHARED / directory / "hf"))
    torch.testing.assert_close(logits(found.model, 512), logits(original.model, 512), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_quantized_file_is_read_as_transformers_reads_it(tmp_path, model_type):
    """Of models without anything that its reader passes over."""
    from transformers import AutoModelForCausalLM

    random_model(model_type).save_pretrained(tmp_path)
    path = write_file(tmp_path, GGMLType.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    torch.testing.assert_close(logits(build_model(GGUFFile(path), torch.float32)), logits(theirs), rtol=0, atol=1e-5)


def test_the_dtype_is_the_one_asked_for(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    model = build_model(GGUFFile(write_file(tmp_path)), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_size_is_that_of_the_file_and_of_the_layers_matrices(tmp_path):
    random_model("qwen3_moe", **MODELS["qwen3moe"][1]).save_pretrained(tmp_path)
    path = write_file(tmp_path, GGMLType.Q8_0)
    size = GGUFFile(path).size
    heads = 4 * 32 * 64 + 2 * 2 * 32 * 64 + 64 * 4 * 32
    experts = 4 * 3 * 32 * 64
    norms = 2 * 64 + 2 * 32
    assert size.bytes_on_disk == path.stat().st_size
    assert size.quantized_weights == 8 * (heads + experts)  # routers aside
    assert size.bits_per_weight == 8.5
    assert size.total_weights == 8 * (heads + experts + 4 * 64 + norms) + 2 * 96 * 64 + 64
    assert size.total_bits_per_weight > 8.5


# --- with a vocabulary -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained example model, unquantized."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-llama.gguf"
    export_gguf(TINY_LLAMA, path, file_type=FileType.F32)
    return path


def test_an_unquantized_file_does_not_diverge_from_the_original(whole_file, prose):
    report = evaluate_text(str(whole_file), prose, reference=str(TINY_LLAMA), ctx=64, stride=32)
    values = report.as_json()
    assert values["kld_mean"] == pytest.approx(0, abs=1e-9)
    assert values["top1_agreement"] == 1
    assert values["bytes_on_disk"] == whole_file.stat().st_size
    assert values["bits_per_weight"] == 32
    assert (values["alpha"], values["chunks"], values["predicted_kld"]) == (None, None, None)
    assert report.perplexity == evaluate_text(str(TINY_LLAMA), prose, ctx=64, stride=32).perplexity


def test_a_file_can_be_the_reference(whole_file, prose):
    report = evaluate_text(str(TINY_LLAMA), prose, reference=str(whole_file), ctx=64, stride=32)
    assert report.divergence is not None
    assert report.divergence.kld_mean == pytest.approx(0, abs=1e-9)


def test_a_context_beyond_that_of_the_file_is_refused(whole_file, prose):
    with pytest.raises(SRDError, match=r"ctx 4096 exceeds the 2048 positions .* of .*tiny-llama\.gguf"):
        evaluate_text(str(whole_file), prose, ctx=4096)


@pytest.mark.slow
def test_a_megabyte_is_tokenized_as_by_the_original(whole_file, wikitext):
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(TINY_LLAMA)(wikitext, verbose=False)["input_ids"]
    assert LlamaCppTokenizer(GGUFFile(whole_file))(wikitext)["input_ids"] == expected


def test_special_tokens_that_the_file_adds_are_added():
    if not (SHARED / "tiny1m").is_dir():
        pytest.skip(f"needs {SHARED / 'tiny1m'}")
    tokenizer = LlamaCppTokenizer(GGUFFile(SHARED / "tiny1m" / "tiny1m-f32.gguf"))
    assert tokenizer.bos_token_id == 1
    assert tokenizer("a")["input_ids"][0] == 1
    assert bos_where_added(tokenizer) == 1


def test_a_file_that_tokenizes_otherwise_than_the_reference_is_not_compared(prose):
    """This file adds a BOS, which the tokenizer beside the model does not."""
    if not (SHARED / "tiny1m").is_dir():
        pytest.skip(f"needs {SHARED / 'tiny1m'}")
    file, reference = SHARED / "tiny1m" / "tiny1m-f32.gguf", SHARED / "tiny1m" / "hf"
    with pytest.raises(SRDError, match=r"tiny1m-f32\.gguf and the reference .*hf tokenize .* differently: their"):
        evaluate_text(str(file), prose, reference=str(reference), ctx=64)


# --- malformed files -------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """What a GGUF file is written from, for a test to damage."""

    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def write(self, path: Path, architecture: str = "llama") -> Path:
        import gguf

        writer = gguf.GGUFWriter(path, architecture)
        for key, value in self.metadata.items():
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(key, value)
        for name, values in self.tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture
def parts() -> Parts:
    """A Llama of one layer, 32 wide, with two heads."""
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (20, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    return Parts(
        {
            "llama.block_count": 1,
            "llama.context_length": 64,
            "llama.embedding_length": 32,
            "llama.feed_forward_length": 48,
            "llama.attention.head_count": 2,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
        },
        {f"{name}.weight": generator.standard_normal(shape, np.float32) for name, shape in shapes.items()},
    )


def test_the_parts_are_a_model(parts, tmp_path):
    assert logits(build_model(GGUFFile(parts.write(tmp_path / "m.gguf")), torch.float32), 20).isfinite().all()


FAULTS: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "adapter": (
        lambda parts: parts.metadata.update({"general.type": "adapter"}),
        r"m\.gguf holds no model, its general\.type is 'adapter'",
    ),
    "split": (
        lambda parts: parts.metadata.update({"split.count": 3}),
        r"m\.gguf is one of 3 parts of a model; merge them with llama-gguf-split first",
    ),
    "missing-key": (
        lambda parts: parts.metadata.pop("llama.block_count"),
        r"llama\.block_count is None, which this reader cannot make a Transformers model of",
    ),
    "no-heads": (
        lambda parts: parts.metadata.update({"llama.attention.head_count": 0}),
        r"llama\.attention\.head_count is 0, which this reader cannot",
    ),
    "unknown-key": (
        lambda parts: parts.metadata.update({"llama.attention.clamp_kqv": 8.0}),
        r"llama\.attention\.clamp_kqv is 8\.0, which this reader cannot",
    ),
    "partial-rope": (
        lambda parts: parts.metadata.update({"llama.rope.dimension_count": 8}),
        r"llama\.rope\.dimension_count is 8, which this reader cannot",
    ),
    "other-rope-scaling": (
        lambda parts: parts.metadata.update({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}),
        r"llama\.rope\.scaling\.type is 'longrope', which this reader cannot",
    ),
    "no-rope-factor": (
        lambda parts: parts.metadata.update({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.0}),
        r"llama\.rope\.scaling\.factor is 0\.0, which this reader cannot",
    ),
    "unknown-type": (
        lambda parts: parts.tensors.update({"blk.0.ffn_up.weight": np.ones((48, 32), np.int8)}),
        r"blk\.0\.ffn_up\.weight is of type I8, which gguf cannot read back$",
    ),
    "missing-tensor": (
        lambda parts: parts.tensors.pop("blk.0.ffn_up.weight"),
        r"1 weights are missing, have .*: model\.layers\.0\.mlp\.up_proj\.weight$",
    ),
    "missing-embedding": (
        lambda parts: parts.tensors.pop("token_embd.weight"),
        r"2 weights are missing, .*: lm_head\.weight, model\.embed_tokens\.weight$",
    ),
    "wrong-shape": (
        lambda parts: parts.tensors.update({"blk.0.ffn_down.weight": np.zeros((32, 40), np.float32)}),
        r"1 weights are missing, have the wrong shape .*: model\.layers\.0\.mlp\.down_proj\.weight$",
    ),
    "odd-heads": (
        lambda parts: parts.tensors.update({"blk.0.attn_q.weight": np.zeros((33, 32), np.float32)}),
        r"1 weights are missing, have the wrong shape .*: model\.layers\.0\.self_attn\.q_proj\.weight$",
    ),
    "layer-too-many": (
        lambda parts: parts.tensors.update({"blk.1.ffn_up.weight": parts.tensors["blk.0.ffn_up.weight"]}),
        r"1 weights .* do not belong to a llama model: model\.layers\.1\.mlp\.up_proj\.weight$",
    ),
    "unknown-tensor": (
        lambda parts: parts.tensors.update({"blk.0.attn_sinks.weight": np.zeros(2, np.float32)}),
        r"the tensor blk\.0\.attn_sinks\.weight has no place in a Transformers model of the architecture 'llama'$",
    ),
    "rope-factors": (
        lambda parts: parts.tensors.update({"rope_freqs.weight": np.ones(3, np.float32)}),
        r"rope_freqs\.weight does not fit RoPE of a llama model$",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=list(FAULTS))
def test_a_file_that_is_not_understood_is_never_scored(parts, tmp_path, damage, message):
    damage(parts)
    with pytest.raises(CheckpointError, match=message):
        load(str(parts.write(tmp_path / "m.gguf")))


def test_an_architecture_that_is_not_known_is_refused(parts, tmp_path):
    path = parts.write(tmp_path / "m.gguf", "rwkv7")
    with pytest.raises(CheckpointError, match=r"architecture 'rwkv7' cannot be scored from its GGUF file, only one of"):
        load(str(path))


def test_a_gemma_without_positions_is_refused(tmp_path):
    random_model("gemma4_text", **GEMMA4).save_pretrained(tmp_path)
    file = GGUFFile(write_file(tmp_path))
    del file.tensors["rope_freqs.weight"]
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is missing, without which gemma4 has no positions$"):
        build_model(file, torch.float32)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_refused(parts, tmp_path, share):
    path = parts.write(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"m\.gguf is not a whole GGUF file: "):
        load(str(path))


def test_another_file_under_the_name_of_a_gguf_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_text("this is no model\n" * 100)
    with pytest.raises(CheckpointError, match=r"m\.gguf is not a whole GGUF file: "):
        load(str(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"m\.gguf: there is no such file$"):
        load(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"alpha": 0.5}, "alpha"), ({"chunks": ["early"]}, "chunks")],
    ids=["alpha", "chunks"],
)
def test_a_file_has_no_residual_to_dial(tmp_path, options, named):
    with pytest.raises(SRDError, match=rf"has no residual \(a GGUF file holds none\), so {named} cannot be applied"):
        load(str(tmp_path / "m.gguf"), **options)
