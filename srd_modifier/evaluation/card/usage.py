"""How to load what is in a directory, and nothing that is not there."""

import json
import shlex

from srd_modifier.evaluation.card.contents import Contents, GGUFModel, Kind
from srd_modifier.evaluation.card.markdown import block, code

_PROMPT = "The river"


def usage(contents: Contents, repo_id: str | None) -> str:
    """Markdown of all ways, each under a heading of its own.

    Args:
        contents: of the directory.
        repo_id: the hub id to load from; `None` is the directory's name.
    """
    name = repo_id or contents.name
    parts = []
    if contents.kind is Kind.SRD:
        parts += [_corrected(name), _served_corrected(name), _dequantized(contents.name, repo_id)]
    elif contents.kind is not Kind.NONE:
        parts += [_loaded(name, contents.kind), _served(name)]
    if contents.gguf:
        parts.append(_llama_cpp(contents.gguf, repo_id))
    return "\n\n".join(parts)


def _corrected(name: str) -> str:
    dial = f"""\
import srd_modifier
{_loading(name)}  # corrected

srd_modifier.set_alpha(model, 0.0)  # the plain 4-bit weights, in place
srd_modifier.set_alpha(model, 1.0)  # corrected again"""
    return _section(
        "Transformers",
        "Corrected, with `pip install srd-modifier`:",
        block(dial, "python"),
        "Plain W4, with `pip install transformers compressed-tensors`, where `srd_modifier` is not imported and "
        "`srd autoload` is off:",
        block(_loading(name), "python"),
    )


def _loaded(name: str, kind: Kind) -> str:
    packages = "transformers compressed-tensors" if kind is Kind.W4A16 else "transformers"
    return _section("Transformers", f"With `pip install {packages}`:", block(_loading(name), "python"))


def _loading(name: str) -> str:
    quoted = json.dumps(name, ensure_ascii=False)
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({quoted})
model = AutoModelForCausalLM.from_pretrained({quoted})"""


def _served_corrected(name: str) -> str:
    model = shlex.quote(name)
    commands = f"""\
pip install vllm srd-modifier

# corrected
vllm serve {model}
# half of the residual
vllm serve {model} --hf-overrides '{{"srd_config": {{"alpha": 0.5}}}}'
# plain W4
vllm serve {model} --quantization compressed-tensors"""
    without = f"Where srd-modifier is not installed, {code(f'vllm serve {model}')} serves plain W4."
    return _section("vLLM", block(commands, "bash"), without)


def _served(name: str) -> str:
    return _section("vLLM", block(f"pip install vllm\nvllm serve {shlex.quote(name)}", "bash"))


def _dequantized(name: str, repo_id: str | None) -> str:
    fetch = "" if repo_id is None else f"hf download {shlex.quote(repo_id)} --local-dir {shlex.quote(name)}\n"
    export = f"srd export bf16 {shlex.quote(name)} --output {shlex.quote(f'{name}-bf16')}"
    return _section(
        "As an ordinary dense checkpoint",
        "The corrected weights in bfloat16, for loaders that know neither format:",
        block(fetch + export, "bash"),
    )


def _llama_cpp(models: tuple[GGUFModel, ...], repo_id: str | None) -> str:
    commands = []
    for model in models:
        file = shlex.quote(model.path.name)
        source = f"-m {file}" if repo_id is None else f"--hf-repo {shlex.quote(repo_id)} --hf-file {file}"
        commands.append(f'llama-cli {source} -p "{_PROMPT}"')
    adapters = [
        f"{code(model.adapter.name)} holds part of what {code(model.path.name)} lost, as a LoRA adapter for this file "
        f"alone: add {code(f'--lora {shlex.quote(model.adapter.name)}')}."
        for model in models
        if model.adapter is not None
    ]
    return _section("llama.cpp", block("\n".join(commands), "bash"), *adapters)


def _section(heading: str, *parts: str) -> str:
    return "\n\n".join([f"### {heading}", *parts])
