"""What the quantizer alone saves, checkpoints read by hand, and forwards that must not happen."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from pack_quantized import all_w4
from random_models import make_llama, make_mixture, save_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from srd_modifier import SRDModifier

GROUP = 32  # columns per scale of the residuals in these tests, all of 8 bits


def _read(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def _residuals(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Residual and scale of every entry in float64, of a sidecar of dense 8-bit residuals with groups of GROUP."""
    tensors = _read(directory / "srd")
    return {
        name: (tensors[f"{name}.weight_d8"] * scale, scale)
        for name in [name.removesuffix(".weight_d8") for name in tensors if name.endswith(".weight_d8")]
        for scale in [tensors[f"{name}.weight_d8_scale"].double().repeat_interleave(GROUP, dim=1)]
    }


def _bytes(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def read() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor in the root of a model directory."""
    return _read


@pytest.fixture(scope="session")
def directory_bytes() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of every file below a directory, by relative path."""
    return _bytes


@pytest.fixture(scope="session")
def original(random_llama: Path) -> dict[str, Tensor]:
    return _read(random_llama)


@pytest.fixture(scope="session")
def assert_within_half_a_step() -> Callable[..., None]:
    """Every residual of a checkpoint decodes to `weights - W4`, no entry further off than half a step."""

    def check(directory: Path, weights: dict[str, Tensor], *, modules: int = 42) -> None:
        base, residuals = all_w4(_read(directory)), _residuals(directory)
        assert len(residuals) == modules
        for name, (residual, scale) in residuals.items():
            weight = weights[f"{name}.weight"].double()
            error = (weight - base[name] - residual).abs()
            assert bool((error <= scale / 2 + 1e-7 * weight.abs()).all()), name
            assert bool(residual.any()), f"{name}: nothing but zeros"

    return check


@pytest.fixture(scope="session")
def make_recipe(group_scheme: Callable[..., dict[str, Any]]) -> Callable[..., list[Modifier]]:
    """A recipe with fresh modifiers: SRDModifier and `kind`, or `kind` alone."""

    def make(
        kind: str, scheme: dict[str, Any] | None = None, *, alone: bool = False, **settings: Any
    ) -> list[Modifier]:
        scheme = group_scheme(32) if scheme is None else scheme
        quantizers = {"itself": QuantizationModifier, "round-to-nearest": QuantizationModifier, "gptq": GPTQModifier}
        quantizer = quantizers[kind](config_groups=scheme, ignore=["lm_head"])
        if alone:
            return [quantizer]
        settings = {"ignore": ["lm_head"], "residual_group_size": GROUP, **settings}
        if kind == "itself":
            return [SRDModifier(config_groups=scheme, **settings)]
        return [SRDModifier(**settings), quantizer]

    return make


@pytest.fixture(scope="session")
def quantize(quantize: Callable[..., Path]) -> Callable[..., Path]:
    """The shared fixture, with the samples in their own order: sums depend on it in their last bits."""
    return partial(quantize, shuffle_calibration_samples=False)


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three small layers with random bf16 weights and uneven norms, for what takes long."""
    model = make_llama(num_hidden_layers=3, uneven_norms=True)
    return save_model(model, tmp_path_factory.mktemp("models") / "small-llama")


@pytest.fixture(scope="session")
def small(quantize: Callable[..., Path], small_llama: Path) -> Callable[..., Path]:
    """Quantize the small Llama with calibration data."""

    def run(recipe: Any, output: Path, **kwargs: Any) -> Path:
        return quantize(recipe, output, **{"model": small_llama, "data": True, **kwargs})

    return run


@pytest.fixture(scope="session")
def small_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 mixture of experts of two layers; the router of the second sends no token to its last one."""
    model = make_mixture(num_experts=5)
    with torch.no_grad():
        # of a logit and its negative one is above 0, so that two of the first four are above the last one's
        router = model.model.layers[1].mlp.gate.weight
        router[1], router[3], router[4] = -router[0], -router[2], 0.0
    return save_model(model, tmp_path_factory.mktemp("models") / "small-mixture")


@pytest.fixture(scope="session")
def divergence() -> Callable[..., float]:
    """Mean KL(original || checkpoint) in nats per token, in float32; by default on text that was not calibrated on."""
    from transformers import AutoTokenizer

    from srd_modifier.transformers import load_corrected

    @torch.no_grad()
    def measure(original: Path, checkpoint: Path, alpha: float, *, rows: list[list[int]] | None = None) -> float:
        if rows is None:
            text = (Path(__file__).parents[2] / "examples" / "text" / "demo.txt").read_text(encoding="utf-8")
            ids = AutoTokenizer.from_pretrained(original)(text[20000:26000])["input_ids"]
            rows = [ids[start : start + 64] for start in range(0, 512, 64)]
        ids = torch.tensor(rows)
        models = (
            AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32),
            load_corrected(checkpoint, alpha=alpha, dtype=torch.float32),
        )
        p, q = (model(ids).logits.double().log_softmax(-1) for model in models)
        return float((p.exp() * (p - q)).sum(-1).mean())

    return measure


@pytest.fixture(scope="session")
def quantized_model(random_llama: Path, calibration: Any) -> Callable[..., Any]:
    """Run `oneshot` and return the model, saved nowhere."""

    def run(recipe: Any, *, model: Path = random_llama, data: bool = True, **kwargs: Any) -> Any:
        if data:
            kwargs |= {"dataset": calibration, "num_calibration_samples": 8, "max_seq_length": 64}
            kwargs |= {"shuffle_calibration_samples": False}
        return oneshot(model=str(model), recipe=recipe, **kwargs)

    return run


@pytest.fixture(scope="session")
def mean_squares(random_llama: Path, calibration: Any) -> dict[str, Tensor]:
    """Mean squared input of every Linear of the original model over the calibration text."""
    model = AutoModelForCausalLM.from_pretrained(random_llama, attn_implementation="eager")  # as in calibration
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, __, name=name: inputs.setdefault(name, []).append(args[0].double().flatten(0, 1))
            )
    with torch.no_grad():
        for row in calibration["input_ids"]:
            model(input_ids=torch.tensor([row]))
    return {name: torch.cat(rows).square().mean(0) for name, rows in inputs.items()}


@pytest.fixture(scope="session")
def first_layer_importance(mean_squares: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the first layer only: no quantized layer stands before it."""
    return {name: value.float() for name, value in mean_squares.items() if name.startswith("model.layers.0.")}


@pytest.fixture
def forwards() -> Iterator[list[str]]:
    """Grows by one entry with every forward of a Linear."""
    seen: list[str] = []

    def record(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.Linear):
            seen.append(type(module).__name__)

    handle = nn.modules.module.register_module_forward_pre_hook(record)
    yield seen
    handle.remove()


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What llm-compressor's logger says, a message per entry."""
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="INFO")
    yield messages
    logger.remove(sink)
