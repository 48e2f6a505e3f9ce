"""What `import srd_modifier` does and does not do, each in a process of its own."""

import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from types import ModuleType

import pytest

import srd_modifier
from srd_modifier import _registration

HEAVY = (
    *("torch", "transformers", "llmcompressor", "compressed_tensors", "safetensors", "numpy", "pydantic"),
    *("datasets", "typer", "rich", "yaml", "gguf", "vllm", "auto_round"),
)

# a finder that does not find what is not to be there
WITHOUT = """
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing} else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


def python(code: str, *arguments: object, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, on a machine that lacks some libraries."""
    if without:
        code = WITHOUT.format(missing=set(without)) + code
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )


def output(code: str, *arguments: object, without: tuple[str, ...] = ()) -> str:
    """The last line that `code` prints; it must end well, and nothing of ours may warn."""
    result = python(code, *arguments, without=without)
    assert result.returncode == 0, result.stderr
    assert "srd-modifier" not in result.stderr, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_it_imports_nothing_but_wrapt():
    """Next to nothing is what it may cost, in every process of an environment with `srd autoload`."""
    code = """
import json, sys

before = set(sys.modules)
import srd_modifier

imported = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(imported - sys.stdlib_module_names)))
"""
    assert set(json.loads(output(code))) <= {"srd_modifier", "wrapt"}


CHECK = """
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.recipe import Recipe
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import srd_modifier

recipe = Recipe.create_instance("quant_stage: {quant_modifiers: {SRDModifier: {scheme: W4A16, residual_bits: 4}}}")
assert type(recipe.modifiers[0]) is srd_modifier.SRDModifier
assert recipe.modifiers[0].residual_bits == 4
assert AUTO_QUANTIZER_MAPPING["compressed-tensors"].__module__ == "srd_modifier.transformers.quantizer"
print("registered")
"""
ORDERS = {
    "srd": "import srd_modifier, llmcompressor, transformers",
    "the-modifier-itself": "from srd_modifier import SRDModifier",
    "transformers": "import transformers, srd_modifier, llmcompressor",
    "a-model-class": "from transformers import AutoModelForCausalLM; import srd_modifier",
    "llmcompressor": "import llmcompressor, srd_modifier",
    "a-modifier": "from llmcompressor.modifiers.gptq import GPTQModifier; import srd_modifier",
    "the-factory": "import srd_modifier; from llmcompressor.modifiers.factory import ModifierFactory",
    "the-modifier-package": "import srd_modifier.modifier",
    "the-loader": "from srd_modifier import load_corrected; import transformers, llmcompressor",
    "twice": "import srd_modifier, llmcompressor; from srd_modifier._registration import register; register()",
}
FAST = ("the-modifier-itself", "llmcompressor")


@pytest.mark.parametrize("first", [pytest.param(o, marks=() if o in FAST else pytest.mark.slow) for o in ORDERS])
def test_every_order_of_imports_registers_both(first):
    assert output(f"{ORDERS[first]}\n{CHECK}") == "registered"


@pytest.mark.slow
def test_importing_transformers_is_not_made_slower():
    code = """
import sys
import srd_modifier
from transformers import AutoModelForCausalLM
import transformers.quantizers.auto

print(sorted({"compressed_tensors", "llmcompressor", "wrapt"} & set(sys.modules)))
"""
    assert output(code) == "['wrapt']"


def test_without_llmcompressor_the_extra_is_named():
    code = "import srd_modifier\nfrom srd_modifier import SRDModifier"
    result = python(code, without=("llmcompressor",))
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "srd_modifier.errors.MissingExtraError: llmcompressor is not installed; "
        "it comes with: pip install 'srd-modifier[quantize]'"
    )


def test_a_missing_extra_is_an_import_error():
    # so that `try: from srd_modifier import SRDModifier / except ImportError` works as for any optional library
    code = (
        "try:\n    from srd_modifier import SRDModifier\nexcept ImportError as error:\n    print(type(error).__name__)"
    )
    assert output(code, without=("llmcompressor",)) == "MissingExtraError"


def test_it_is_imported_where_nothing_is_installed():
    code = "import srd_modifier; print(srd_modifier.__version__)"
    assert output(code, without=HEAVY) == srd_modifier.__version__


def test_checkpoints_are_read_without_transformers_or_llmcompressor(finished_checkpoint):
    code = """
import sys
from srd_modifier.checkpoint.sidecar import Sidecar

sidecar = Sidecar.open(sys.argv[1])
sidecar.verify()
print(sidecar.correct("model.layers.0.mlp.up_proj", 0.5).shape)
"""
    without = ("transformers", "llmcompressor", "compressed_tensors", "pydantic")
    assert output(code, finished_checkpoint, without=without) == "torch.Size([128, 64])"


@pytest.mark.slow
def test_corrected_models_are_loaded_without_llmcompressor(finished_checkpoint):
    code = """
import sys
import srd_modifier
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
before = model.get_submodule("model.layers.0.mlp.up_proj").weight.clone()
srd_modifier.set_alpha(model, 0)
print(bool((model.get_submodule("model.layers.0.mlp.up_proj").weight != before).any()), "llmcompressor" in sys.modules)
"""
    assert output(code, finished_checkpoint, without=("llmcompressor",)) == "True False"


def test_the_public_names():
    assert set(srd_modifier.__all__) <= set(dir(srd_modifier))
    for name in srd_modifier.__all__:
        assert getattr(srd_modifier, name) is not None
    with pytest.raises(AttributeError, match="module 'srd_modifier' has no attribute 'SRDModifer'"):
        _ = srd_modifier.SRDModifer


def test_the_version_is_the_installed_one():
    assert srd_modifier.__version__ == version("srd-modifier")


def test_a_hook_that_fails_does_not_fail_the_import_that_set_it_off():
    def fail(_: ModuleType) -> None:
        raise ImportError("cannot import name 'Modifier'")

    guarded = _registration._guarded(fail, "SRDModifier in YAML recipes")
    message = "srd-modifier: SRDModifier in YAML recipes is not available: ImportError: cannot import name 'Modifier'"
    with pytest.warns(UserWarning, match=message):
        guarded(ModuleType("llmcompressor"))


def test_registering_again_does_nothing(monkeypatch):
    calls: list[object] = []
    monkeypatch.setattr(_registration.wrapt, "register_post_import_hook", lambda *args: calls.append(args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _registration.register()
    assert calls == []
