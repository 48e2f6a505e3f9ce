"""Every family against llama.cpp and against Transformers: the same numbers, not only a file that loads."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from small_models import (
    COMMON,
    CONFIGS,
    END,
    PROMPT,
    VOCABULARY,
    llama_cpp_log_probabilities,
    randomize,
    rewrite,
    torch_log_probabilities,
    write_model,
)
from torch import Tensor

from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.gguf import families, plan
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.families import FAMILIES, Family, family_of
from srd_modifier.gguf.families.base import Part
from srd_modifier.gguf.families.rope import FACTORS, llama3_factors
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.weights import ModelWeights

# ggml looks the gelu of a half-precision argument up in a table; everything else is computed in float32
TOLERANCE = 1e-3
GELU_TOLERANCE = 0.05


def tolerance(name: str) -> float:
    return GELU_TOLERANCE if name.startswith("gemma") else TOLERANCE


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def tensors_of(directory: Path) -> dict[str, Any]:
    weights = ModelWeights.open(directory)
    return {tensor.name: tensor for tensor in family_of(weights.config).tensors(weights)}


def llama_cpp_error(directory: Path, output: Path, expected: Tensor) -> float:
    """The largest difference of a token's log probability between llama.cpp and `expected`."""
    export_gguf(directory, output, file_type=FileType.F32)
    with LlamaCpp(output, exact=True) as model:
        return float((llama_cpp_log_probabilities(model, PROMPT) - expected).abs().max())


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_computes(
    name: str, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    reference = load(small_model(name))
    export_gguf(small_model(name), tmp_path / "model.gguf", file_type=FileType.F32)
    with LlamaCpp(tmp_path / "model.gguf", exact=True) as model:
        torch.testing.assert_close(
            llama_cpp_log_probabilities(model, PROMPT),
            torch_log_probabilities(reference, PROMPT),
            atol=tolerance(name),
            rtol=0,
        )
        generated = model.complete(PROMPT, 16)
    assert len(generated) == 16 or generated[-1] == END
    with torch.no_grad():
        logits = reference(torch.tensor([PROMPT + generated])).logits[0, len(PROMPT) - 1 : -1]
    # greedy at every step, but for ties
    chosen = logits.gather(1, torch.tensor(generated).unsqueeze(1)).squeeze(1)
    assert float((logits.max(dim=1).values - chosen).max()) <= 2 * tolerance(name)


def without(family: Family, *, rotated: bool = True, offset: bool = True) -> Family:
    def change(part: Part) -> Part:
        return replace(part, rotated=part.rotated and rotated, offset=part.offset if offset else 0.0)

    return replace(family, layer=tuple(map(change, family.layer)), outside=tuple(map(change, family.outside)))


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("smollm2", lambda family: without(family, rotated=False)),
        ("smollm3", lambda family: without(family, rotated=False)),
        ("gemma3", lambda family: without(family, offset=False)),
        ("llama3", lambda family: replace(family, computed=lambda settings: {})),
        ("gemma4", lambda family: replace(family, computed=lambda settings: {FACTORS: torch.ones(32)})),
        (
            "llama-linear",
            lambda family: replace(family, rope=lambda settings: {"rope_type": "default", "rope_theta": 1e4}),
        ),
        (
            "gemma3-pattern",
            lambda family: replace(family, add_own=lambda writer, settings: writer.add_sliding_window(16)),
        ),
    ],
)
def test_the_comparison_notices_what_is_left_out(
    name: str,
    change: Callable[[Family], Family],
    small_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "family_of", lambda config, where: change(family_of(config, where)))
    expected = torch_log_probabilities(load(small_model(name)), PROMPT)
    assert llama_cpp_error(small_model(name), tmp_path / "model.gguf", expected) > 3 * tolerance(name)


# those that Transformers reads back from GGUF
@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize(
    "name", ["smollm2", "tinyllama", "qwen2", "qwen3", "qwen3moe", "gemma3", "gemma4", "gemma4-e2b"]
)
def test_transformers_reads_the_same_weights_back(
    name: str, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    export_gguf(small_model(name), tmp_path / "model.gguf", file_type=FileType.F32)
    config = AutoConfig.from_pretrained(small_model(name))
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32)
    expected = load(small_model(name)).state_dict()
    found = read.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.endswith("layer_scalar"):
            continue  # a buffer, which Transformers does not read from GGUF
        # adding one to a norm and subtracting it again rounds
        torch.testing.assert_close(found[key], tensor, atol=1e-6 if name == "gemma3" else 0, rtol=0, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_piece_goes_back_to_where_it_came_from(name: str, small_model: Callable[[str], Path]) -> None:
    weights = ModelWeights.open(small_model(name))
    restored = {key: torch.full_like(weights.tensor(key), torch.nan) for key in weights.names}
    for tensor in family_of(weights.config).tensors(weights):
        whole = tensor.read(weights)
        assert tuple(whole.shape) == tensor.shape
        for number, piece in enumerate(tensor.pieces):
            part = whole[number] if len(tensor.shape) == 3 else whole
            assert torch.equal(part, piece.read(weights))
            restored[piece.source][piece.index] = piece.to_hugging_face(part)
    for key, tensor in restored.items():
        torch.testing.assert_close(tensor, weights.tensor(key), atol=1e-6, rtol=0, msg=key)


def test_rows_of_queries_and_keys_alternate_between_the_halves_of_each_head(
    small_model: Callable[[str], Path],
) -> None:
    tensors = tensors_of(small_model("tinyllama"))  # heads of 8 rows
    rows = tensors["blk.0.attn_q.weight"].pieces[0].rows
    assert rows[:10].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12]
    assert tensors["blk.0.attn_k.weight"].pieces[0].rows.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert tensors["blk.0.attn_v.weight"].pieces[0].rows is None


def test_modules_are_those_whose_input_a_weight_multiplies(small_model: Callable[[str], Path]) -> None:
    tensors = tensors_of(small_model("qwen3moe"))
    modules = {name: [piece.module for piece in tensor.pieces] for name, tensor in tensors.items()}
    assert modules["token_embd.weight"] == ["model.embed_tokens"]
    assert modules["output.weight"] == ["lm_head"]
    assert modules["blk.1.attn_q.weight"] == ["model.layers.1.self_attn.q_proj"]
    assert modules["blk.1.attn_norm.weight"] == [None]
    assert modules["blk.1.ffn_down_exps.weight"][5] == "model.layers.1.mlp.experts.5.down_proj"
    fused = tensors_of(small_model("gemma4-moe"))["blk.0.ffn_gate_up_exps.weight"]
    assert fused.pieces[2].module == "model.layers.0.experts.2.gate_proj"


@pytest.mark.parametrize("head", [64, 128])
def test_factors_of_llama3_are_those_of_transformers(head: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=head, max_position_embeddings=131072, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, head, 2) / head)
    factors = llama3_factors(parameters, head)
    assert factors.dtype is torch.float32
    torch.testing.assert_close(factors, plain / scaled)
    assert {float(factors.min()), float(factors.max())} == {1.0, 32.0}


def test_a_tied_embedding_is_the_head_too(small_model: Callable[[str], Path]) -> None:
    assert "output.weight" not in tensors_of(small_model("smollm2"))
    assert "output.weight" in tensors_of(small_model("tinyllama"))


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_of_a_tied_model_counts_if_it_differs(equal: bool, tmp_path: Path) -> None:
    directory = write_model("smollm2", tmp_path)
    name = "lm_head.weight"
    rewrite(directory, lambda tensors: tensors | {name: tensors["model.embed_tokens.weight"] * (1 if equal else 2)})
    assert ("output.weight" in tensors_of(directory)) is not equal


def split_experts(tensors: dict[str, Tensor], container: str) -> dict[str, Tensor]:
    """Experts that share two tensors, as ones with tensors of their own."""
    result = {}
    for name, tensor in tensors.items():
        prefix, _, projection = name.rpartition(".")
        if not prefix.endswith(container):
            result[name] = tensor
        elif projection == "down_proj":
            result |= {f"{prefix}.{number}.down_proj.weight": own.clone() for number, own in enumerate(tensor)}
        else:
            for number, own in enumerate(tensor):
                gate, up = own.chunk(2)
                result[f"{prefix}.{number}.gate_proj.weight"] = gate.clone()
                result[f"{prefix}.{number}.up_proj.weight"] = up.clone()
    return result


@pytest.mark.usefixtures("numbered")
def test_experts_of_gemma4_may_have_tensors_of_their_own(tmp_path: Path) -> None:
    directory = write_model("gemma4-moe", tmp_path / "model")
    expected = torch_log_probabilities(load(directory), PROMPT)
    rewrite(directory, lambda tensors: split_experts(tensors, ".experts"))
    assert "blk.0.ffn_gate_exps.weight" in tensors_of(directory)
    assert llama_cpp_error(directory, tmp_path / "model.gguf", expected) <= GELU_TOLERANCE


@pytest.mark.usefixtures("numbered")
def test_experts_of_qwen3_may_share_two_tensors(tmp_path: Path) -> None:
    directory = write_model("qwen3moe", tmp_path / "model")
    reference = load(directory)
    expected = torch_log_probabilities(reference, PROMPT)
    in_memory = reference.state_dict()
    rewrite(
        directory,
        lambda tensors: (
            {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
            | {name: tensor.clone() for name, tensor in in_memory.items() if ".experts." in name}
        ),
    )
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(directory / "model.safetensors"))
    assert llama_cpp_error(directory, tmp_path / "model.gguf", expected) <= TOLERANCE


def write_with_vision(name: str, kind: str, directory: Path) -> Any:
    """The model as the text part of one that also takes images."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    text = write_model(name, directory / "text")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    if kind == "gemma4":
        vision |= {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
    special = ("image", "video", "audio", "boi", "eoi")
    ids = {f"{token}_token_id": VOCABULARY - 2 - number for number, token in enumerate(special)}
    config = CONFIG_MAPPING[kind](text_config=load(text).config.to_dict(), vision_config=vision, **ids)
    model = AutoModelForImageTextToText.from_config(config)
    randomize(model)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize(
    ("name", "kind", "mask"),
    [("gemma3", "gemma3", "token_type_ids"), ("gemma4-e2b", "gemma4", "mm_token_type_ids")],
)
def test_the_text_part_of_a_model_with_vision(name: str, kind: str, mask: str, tmp_path: Path) -> None:
    model = write_with_vision(name, kind, tmp_path / "model")
    text_only = {mask: torch.zeros(1, len(PROMPT), dtype=torch.long)}
    expected = torch_log_probabilities(model, PROMPT, **text_only)
    assert llama_cpp_error(tmp_path / "model", tmp_path / "model.gguf", expected) <= GELU_TOLERANCE


def test_keys_that_gemma4_never_uses_are_left_out(tmp_path: Path) -> None:
    directory = write_model("gemma4-e2b", tmp_path)
    rewrite(directory, lambda tensors: tensors | {"model.layers.7.self_attn.k_proj.weight": torch.ones(128, 64)})
    assert "blk.7.attn_k.weight" not in tensors_of(directory)


def test_frequencies_that_old_versions_stored_are_left_out(tmp_path: Path) -> None:
    directory = write_model("tinyllama", tmp_path)
    before = tensors_of(directory).keys()
    rewrite(directory, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert tensors_of(directory).keys() == before


def test_an_unknown_model_type_names_the_known_ones_and_the_place_for_more() -> None:
    with pytest.raises(SRDError) as caught:
        family_of({"model_type": "gpt2"}, "somewhere/config.json")
    message = str(caught.value)
    assert message.startswith("somewhere/config.json: models of type 'gpt2' cannot be written as GGUF yet")
    assert all(name in message for family in FAMILIES for name in family.model_types)
    assert message.endswith("declare its Family in srd_modifier/gguf/families")


def test_the_message_names_a_folder_that_is_there() -> None:
    assert Path(families.__file__).parent.as_posix().endswith("srd_modifier/gguf/families")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tinyllama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not one that"),
        ("qwen3", {"rope_scaling": CONFIGS["llama3"]["rope_scaling"]}, "rope type 'llama3' is not one that .* qwen3"),
        (
            "llama-yarn",
            {"rope_parameters": {**CONFIGS["llama-yarn"]["rope_parameters"], "truncate": False}},
            "truncate",
        ),
        ("tinyllama", {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta"),
        ("tinyllama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("tinyllama", {"hidden_act": "relu"}, "with silu, not relu"),
        ("tinyllama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive whole number"),
        ("gemma4", {"global_head_dim": -1}, "the size of head of layer 5 is -1"),
        ("gemma3", {"sliding_window": None}, "sliding_window gives none"),
        ("gemma4", {"rope_parameters": {}}, "no rope_type for every kind of attention"),
        ("tinyllama", {"hidden_size": "wide"}, "not a configuration that Transformers reads"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "no_rope_layers says otherwise"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob: true only"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "experts in every layer"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 32, not 64"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "without attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "without use_bidirectional_attention"),
        ("gemma3", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 5}, "layer_types says otherwise"),
        ("gemma4", {"attention_bias": True}, "without attention_bias"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "without use_bidirectional_attention"),
        ("gemma4-e2b", {"vocab_size_per_layer_input": 80}, "vocab_size_per_layer_input is 80 and vocab_size 160"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDError, match=message) as caught:
        family_of({**COMMON, **CONFIGS[name], **changes}, "config.json")
    assert str(caught.value).startswith("config.json")
    assert "\n" not in str(caught.value)


def places(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Where something stands in nested objects."""
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in places(value))


@pytest.mark.parametrize(
    "name", ["llama3", "llama-yarn-mscale", "qwen2", "qwen3moe", "smollm3", "gemma3", "gemma4-moe", "gemma4-e2b"]
)
def test_a_configuration_with_anything_in_any_place_is_read_or_refused(name: str) -> None:
    refusals = []
    config = {**COMMON, "rms_norm_eps": 1e-6, "rope_parameters": None, "text_config": None, **CONFIGS[name]}
    for place in list(places(config)):
        for value in (None, "x", -1, 0, [], {}, 1.5, True, [1]):
            changed = json.loads(json.dumps(config))
            parent = changed
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = value
            try:
                family = family_of(changed, "config.json")
            except SRDError as error:
                refusals.append(str(error))
            else:
                family.add_hyperparameters(gguf.GGUFWriter(None, family.architecture), changed)
                assert family.shape(changed).layers > 0
                family.computed(family.settings(changed))
    assert refusals
    assert all(refusal.startswith("config.json") and "\n" not in refusal for refusal in refusals)


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    directory = write_model("tinyllama", tmp_path)
    rewrite(directory, lambda tensors: {name: value for name, value in tensors.items() if "layers.2." not in name})
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.2\.input_layernorm\.weight and 8 more tensors are missing"
    ):
        tensors_of(directory)


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    directory = write_model("tinyllama", tmp_path)
    rewrite(directory, lambda tensors: {name: value for name, value in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        tensors_of(directory)


def test_an_unknown_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    directory = write_model("tinyllama", tmp_path)
    rewrite(directory, lambda tensors: tensors | {"model.layers.1.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: model\.layers\.1\.self_attn\.q_norm\.weight is not part of a llama"
    ):
        tensors_of(directory)


def test_a_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    directory = write_model("tinyllama", tmp_path)
    rewrite(directory, lambda tensors: tensors | {"model.norm.weight": torch.ones(63)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[63\], config\.json makes it \[64\]"):
        tensors_of(directory)


def test_a_model_without_an_embedding_is_refused(tmp_path: Path) -> None:
    directory = write_model("tinyllama", tmp_path)
    rewrite(directory, lambda tensors: {"encoder.weight": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"no model\.embed_tokens\.weight"):
        tensors_of(directory)


class Recorder:
    """Takes the place of a `gguf.GGUFWriter` and keeps what is added, by the method's name."""

    def __init__(self) -> None:
        self.added: dict[str, Any] = {}

    def __getattr__(self, method: str) -> Callable[[Any], None]:
        def add(value: Any) -> None:
            assert method not in self.added
            self.added[method.removeprefix("add_")] = value

        return add


# config.json as the hub has it, without what does not matter here; what llama.cpp must be told of it
HUB_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama-2-7b": (
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"rope_freq_base": 10000.0, "key_length": 128, "head_count_kv": 32, "layer_norm_rms_eps": 1e-05},
    ),
    "Mistral-Nemo": (
        {
            "model_type": "mistral",
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        {"rope_freq_base": 1000000.0, "key_length": 128, "rope_dimension_count": 128, "context_length": 131072},
    ),
    "Qwen2.5 with YaRN": (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 21,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {
            "key_length": 64,
            "rope_scaling_factor": 4.0,
            "rope_scaling_orig_ctx_len": 32768,
            "rope_scaling_attn_factors": 1.0,
        },
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768, "feed_forward_length": 6144},
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text",
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        {
            "rope_freq_base": 1000000.0,
            "rope_freq_base_swa": 10000.0,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "head_count_kv": 1,
        },
    ),
    "gemma-3-4b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
        {
            "head_count": 8,
            "head_count_kv": 4,
            "key_length": 256,
            "context_length": 131072,
            "rope_scaling_factor": 8.0,
            "rope_freq_base_swa": 10000.0,
            "vocab_size": 262208,
        },
    ),
    "gemma-3-27b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "head_dim": 128,
                "hidden_size": 5376,
                "intermediate_size": 21504,
                "num_attention_heads": 32,
                "num_hidden_layers": 62,
                "num_key_value_heads": 16,
                "query_pre_attn_scalar": 168,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
        {"block_count": 62, "key_length": 128},
    ),
    "gemma-4-26B-A4B": (
        {
            "model_type": "gemma4",
            "text_config": {
                "model_type": "gemma4_text",
                "attention_k_eq_v": True,
                "enable_moe_block": True,
                "final_logit_softcapping": 30.0,
                "global_head_dim": 512,
                "head_dim": 256,
                "hidden_size": 2816,
                "hidden_size_per_layer_input": 0,
                "intermediate_size": 2112,
                "moe_intermediate_size": 704,
                "num_attention_heads": 16,
                "num_experts": 128,
                "num_global_key_value_heads": 2,
                "num_hidden_layers": 30,
                "num_key_value_heads": 8,
                "sliding_window": 1024,
                "top_k_experts": 8,
                "use_bidirectional_attention": "vision",
            },
        },
        {
            "key_length": 512,
            "key_length_swa": 256,
            "head_count_kv": [8, 8, 8, 8, 8, 2] * 5,
            "sliding_window_pattern": [True, True, True, True, True, False] * 5,
            "final_logit_softcapping": 30.0,
            "expert_used_count": 8,
            "feed_forward_length": 2112,
            "shared_kv_layers": 0,
        },
    ),
}


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_configurations_of_the_hub_say_what_llama_cpp_reads(name: str) -> None:
    config, expected = HUB_CONFIGS[name]
    recorder = Recorder()
    family_of(config).add_hyperparameters(recorder, config)
    assert {key: recorder.added.get(key) for key in expected} == expected
    layers = config.get("text_config", config)["num_hidden_layers"]
    assert recorder.added["block_count"] == layers
    if not config.get("rope_scaling") and "text_config" not in config:
        assert "rope_scaling_type" not in recorder.added
