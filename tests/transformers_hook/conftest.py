"""Checkpoints of several shapes, what their weights must be, and what Transformers makes of them without the plugin."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pack_quantized import all_w4
from random_models import (
    make_gemma4_e2b,
    make_gemma4_mixture,
    make_gemma4_with_images,
    make_llama,
    make_mixture,
    make_routed_mixture,
    save_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 32  # columns per scale of the residuals in these tests, all of 8 bits
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# run without `import srd_modifier`: what anybody else gets from the same directories
PLAIN = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for directory, dtype, output in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(32)[None]).logits
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file({**tensors, "logits": logits}, output)
print(sorted(name for name in sys.modules if name.startswith("srd_modifier")))
"""


@dataclass(frozen=True)
class ByHand:
    """The modules of a checkpoint in float64, computed from the definition of the formats."""

    base: dict[str, Tensor]
    residual: dict[str, Tensor]

    def weights(self, alphas: Mapping[str, float] | float = 1.0) -> dict[str, Tensor]:
        """`W4 + alpha * residual` of every quantized module; modules that `alphas` does not name are plain W4."""
        of = (lambda _: alphas) if isinstance(alphas, float | int) else (lambda name: alphas.get(name, 0.0))
        return {
            name: base + of(name) * self.residual[name] if name in self.residual else base
            for name, base in self.base.items()
        }


@pytest.fixture(scope="session")
def by_hand() -> Callable[[Path], ByHand]:
    def read(directory: Path) -> ByHand:
        tensors = {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}
        stored = {
            k: v for path in (directory / "srd").glob("residual*.safetensors") for k, v in load_file(path).items()
        }
        residual = {
            name: stored[f"{name}.weight_d8"] * scale.double().repeat_interleave(GROUP, dim=1)
            for name, scale in ((k.removesuffix(".weight_d8_scale"), v) for k, v in stored.items())
            if f"{name}.weight_d8_scale" in stored
        }
        return ByHand(all_w4(tensors), residual)

    return read


@pytest.fixture(scope="session")
def assert_weights() -> Callable[..., None]:
    """Every weight of a model is the expected one rounded once to the model's dtype."""

    def check(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
        found = dict(model.named_parameters())
        for name, weight in expected.items():
            parameter = found[f"{name}.weight" if f"{name}.weight" in found else name]
            kind = torch.finfo(parameter.dtype)
            # half a unit in the last place, and in float32 the rounding of the sum before
            tolerance = (0.5 * kind.eps + 3 * torch.finfo(torch.float32).eps) * weight.abs()
            tolerance += kind.smallest_normal * kind.eps + 1e-8
            assert bool(((parameter.double() - weight).abs() <= tolerance).all()), name

    return check


@pytest.fixture(scope="session")
def logits() -> Callable[[nn.Module], Tensor]:
    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(32)[None]).logits

    return run


# --- checkpoints


@pytest.fixture(scope="session")
def partial_checkpoint(quantize, group_scheme, tmp_path_factory) -> Path:
    """Asymmetric, the head quantized too, some modules corrected, and alphas of its own."""
    from srd_modifier import SRDModifier

    recipe = SRDModifier(
        config_groups=group_scheme(64, symmetric=False),
        residual_group_size=GROUP,
        correct={"targets": ["re:.*mlp", "re:.*layers.4"]},
        alpha=0.5,
        layer_alphas={"re:.*up_proj": 0.25, "model.layers.5.mlp.down_proj": 0.0},
    )
    return quantize(recipe, tmp_path_factory.mktemp("partial") / "model")


@pytest.fixture(scope="session")
def partial_alphas(partial_checkpoint) -> dict[str, float]:
    """The alphas that `partial_checkpoint` carries, by module."""
    modules = json.loads((partial_checkpoint / "config.json").read_text())["srd_config"]["modules"]
    special = {"model.layers.5.mlp.down_proj": 0.0}
    return {name: special.get(name, 0.25 if name.endswith("up_proj") else 0.5) for name in modules}


@pytest.fixture(scope="session")
def tied_checkpoint(quantize, tiny_llama, group_scheme, tmp_path_factory) -> Path:
    """tiny-llama, whose head is its embedding."""
    from srd_modifier import SRDModifier

    recipe = SRDModifier(config_groups=group_scheme(64), ignore=["lm_head"], residual_group_size=GROUP)
    return quantize(recipe, tmp_path_factory.mktemp("tied") / "model", model=tiny_llama)


@pytest.fixture(scope="session")
def subnormal_checkpoint(quantize, random_llama, group_scheme, tmp_path_factory) -> Path:
    """With rows of weights so small that their scales are among float16's subnormal numbers."""
    from srd_modifier import SRDModifier

    model = Path(shutil.copytree(random_llama, tmp_path_factory.mktemp("subnormal") / "original"))
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[::3] *= 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = SRDModifier(config_groups=group_scheme(32), ignore=["lm_head"], residual_group_size=GROUP)
    return quantize(recipe, model.with_name("model"), model=model)


@pytest.fixture(scope="session")
def float32_checkpoint(quantize, group_scheme, tmp_path_factory) -> Path:
    """Of a float32 model with biases: its scales have more digits than the 16-bit types it may be loaded in."""
    from srd_modifier import SRDModifier

    model = make_llama(attention_bias=True, mlp_bias=True)
    directory = save_model(model, tmp_path_factory.mktemp("float32") / "original", torch.float32)
    recipe = SRDModifier(
        config_groups=group_scheme(32), ignore=["lm_head"], residual_group_size=GROUP, scale_dtype="float32"
    )
    return quantize(recipe, directory.with_name("model"), model=directory)


def corrected(quantize, group_scheme, original: Path, ignore: list[str]) -> Path:
    """The checkpoint of a saved model, every module but those ignored with a residual."""
    from srd_modifier import SRDModifier

    recipe = SRDModifier(config_groups=group_scheme(32), ignore=ignore, residual_group_size=GROUP)
    return quantize(recipe, original.with_name("model"), model=original)


@pytest.fixture(scope="session")
def mixture_checkpoint(quantize, group_scheme, tmp_path_factory) -> Path:
    """A Qwen3 mixture of experts: two layers of four experts, random weights."""
    original = save_model(make_mixture(num_experts=4), tmp_path_factory.mktemp("mixture") / "original")
    return corrected(quantize, group_scheme, original, ignore=["lm_head", "re:.*mlp.gate$"])


@pytest.fixture(scope="session")
def routed_checkpoint(quantize, group_scheme, tmp_path_factory) -> Path:
    """A Qwen3 mixture of experts whose weights are large enough for W4 to change what it says."""
    original = save_model(make_routed_mixture(), tmp_path_factory.mktemp("routed") / "original")
    return corrected(quantize, group_scheme, original, ignore=["lm_head", "re:.*mlp.gate$"])


@pytest.fixture(scope="session")
def gemma4_checkpoint(quantize, group_scheme, tmp_path_factory) -> Path:
    """A Gemma 4 mixture of experts, whose stacks Transformers knows and whose single experts it does not."""
    original = save_model(make_gemma4_mixture(), tmp_path_factory.mktemp("gemma4") / "original")
    return corrected(quantize, group_scheme, original, ignore=["lm_head", "re:.*router"])


@pytest.fixture(scope="session")
def gemma4_images_checkpoint(quantize, group_scheme, tmp_path_factory) -> Path:
    """The text part of a Gemma 4 that also takes images."""
    original = save_model(make_gemma4_with_images(), tmp_path_factory.mktemp("images") / "original")
    return corrected(quantize, group_scheme, original, ignore=["lm_head", "re:.*router", "re:.*vision"])


@pytest.fixture(scope="session")
def gemma4_e2b_checkpoint(quantize, group_scheme, tmp_path_factory) -> Path:
    """A dense Gemma 4 in the layout of the E2B."""
    original = save_model(make_gemma4_e2b(), tmp_path_factory.mktemp("e2b") / "original")
    return corrected(quantize, group_scheme, original, ignore=["lm_head"])


# --- without the plugin


@dataclass(frozen=True)
class PlainLoads:
    """What Transformers alone makes of the checkpoints: tensors and logits by name and dtype, and what it says."""

    tensors: dict[tuple[str, str], dict[str, Tensor]]
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def resaved(finished_checkpoint, tmp_path_factory) -> Path:
    """The corrected model, saved again by Transformers."""
    from transformers import AutoModelForCausalLM

    import srd_modifier  # noqa: F401 - registers the hook

    directory = tmp_path_factory.mktemp("resaved") / "model"
    AutoModelForCausalLM.from_pretrained(finished_checkpoint).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def plain(
    finished_checkpoint,
    partial_checkpoint,
    tied_checkpoint,
    subnormal_checkpoint,
    float32_checkpoint,
    mixture_checkpoint,
    resaved,
    tmp_path_factory,
) -> PlainLoads:
    directories = {
        "finished": finished_checkpoint,
        "partial": partial_checkpoint,
        "tied": tied_checkpoint,
        "subnormal": subnormal_checkpoint,
        "float32": float32_checkpoint,
        "mixture": mixture_checkpoint,
        "resaved": resaved,
    }
    output = tmp_path_factory.mktemp("plain")
    jobs = [
        (name, dtype)
        for name in directories
        for dtype in (["bfloat16"] if name in ("tied", "mixture", "resaved") else DTYPES)
    ]
    arguments = [(str(directories[name]), dtype, str(output / f"{name}-{dtype}")) for name, dtype in jobs]
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", PLAIN, json.dumps(arguments)],
        capture_output=True,
        text=True,
        cwd=output,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    assert result.returncode == 0, result.stderr
    tensors: dict[Any, Any] = {(name, dtype): load_file(output / f"{name}-{dtype}") for name, dtype in jobs}
    stderr = result.stderr
    for directory in directories.values():
        stderr = stderr.replace(str(directory), "DIR")
    return PlainLoads(tensors, result.stdout, stderr)
