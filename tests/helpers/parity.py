"""What an engine is compared with: the same checkpoint in float32 torch, through Transformers and without vLLM.

Log-probabilities are those of the prompts' own tokens, as a mean absolute difference. A greedy token agrees if it is
the reference's best after the same tokens, or a near-tie: the reference gives its best less than `gap` more.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from random_models import TINY_LLAMA
from rtn import write_checkpoint
from torch import Tensor, nn

from srd_modifier import load_corrected

VOCABULARY = 4096  # of tiny-llama's tokenizer, which random models have too
TEXT = Path(__file__).parents[2] / "examples" / "text" / "demo.txt"


class Tolerance(NamedTuple):
    """How far an engine may be off.

    Attributes:
        mean: of log-probabilities.
        gap: of log-probabilities between the reference's best token and the one that was generated.
    """

    mean: float
    gap: float


TOLERANCES = {
    "float32": Tolerance(mean=1e-3, gap=1e-3),
    "bfloat16": Tolerance(mean=2e-2, gap=0.2),
    "float16": Tolerance(mean=5e-3, gap=0.05),
}


class Difference(NamedTuple):
    """How an answer differs from the reference.

    Attributes:
        mean: of log-probabilities.
        gap: the largest.
        others: share of generated tokens that are not the reference's best.
    """

    mean: float
    gap: float
    others: float


class Reference:
    """A checkpoint in float32 torch.

    Args:
        directory: of the checkpoint.
        settings: alpha, layer_alphas and chunks, as `load_corrected` takes them.
    """

    def __init__(self, directory: Path | str, **settings: Any) -> None:
        self._model = load_corrected(directory, dtype=torch.float32, **settings).eval()

    @torch.no_grad()
    def logprobs(self, ids: list[list[int]]) -> Tensor:
        """Of every token of the vocabulary after each token, `[prompts, tokens, vocabulary]`."""
        return self._model(torch.tensor(ids)).logits.log_softmax(-1)

    def own(self, ids: list[list[int]]) -> Tensor:
        """Of the prompts' own tokens after the first, `[prompts, tokens - 1]`."""
        return _of(self.logprobs(ids)[:, :-1], torch.tensor(ids)[:, 1:])

    def difference(self, prompts: list[list[int]], answer: Any) -> Difference:
        """How an engine's answer (`conftest.Served`) differs."""
        ids, generated = torch.tensor(prompts), torch.tensor(answer.generated)
        logprobs = self.logprobs(torch.cat([ids, generated], 1).tolist())
        own = _of(logprobs[:, : ids.shape[1] - 1], ids[:, 1:])
        before = logprobs[:, ids.shape[1] - 1 : -1]
        gaps = before.amax(-1) - _of(before, generated)
        mean = (own - answer.logprobs).abs().mean()
        return Difference(mean.item(), gaps.max().item(), (gaps > 0).float().mean().item())


def _of(logprobs: Tensor, ids: Tensor) -> Tensor:
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def assert_parity(
    name: str,
    directory: Path | str,
    prompts: list[list[int]],
    answer: Any,
    dtype: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Compare an answer with the checkpoint under these settings, and print the figures under a name."""
    found = Reference(directory, **(settings or {})).difference(prompts, answer)
    print(f"parity | {name} | {dtype} | {found.mean:.2e} | {found.gap:.2e} | {found.others:.2%}")
    tolerance = TOLERANCES[dtype]
    assert found.mean <= tolerance.mean, (name, found)
    assert found.gap <= tolerance.gap, (name, found)


class Case(NamedTuple):
    """One engine and the settings that it is asked under.

    Attributes:
        dtype: of the engine.
        ranks: of tensor parallelism.
        group_size: of the checkpoint's W4 and residual.
        cover: `full`, or `selective`: some modules have no residual.
        start: `srd_config` at the start of the engine.
        steps: to which the dial is turned then.
    """

    dtype: str
    ranks: int
    group_size: int
    cover: str
    start: dict[str, Any]
    steps: tuple[dict[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """For people."""
        compute = self.start.get("compute", "auto")
        return (
            f"{self.dtype}-TP{self.ranks}-g{self.group_size}-{self.cover}-{compute}-alpha{self.start.get('alpha', 1)}"
        )

    def covered_by(self, other: "Case") -> bool:
        """Whether another case has the same engine, and at least these settings."""
        return self[:4] == other[:4] and all(step in (other.start, *other.steps) for step in self.steps)

    def check(self, run_engine: Callable[..., Any], directory: Path, prompts: list[list[int]], **arguments: Any) -> Any:
        """Start the engine, compare each of its answers, and return it."""
        overrides = {"srd_config": self.start} if self.start else {}
        engine = run_engine(
            directory,
            prompts,
            tokens=24,
            steps=list(self.steps),
            dtype=self.dtype,
            tensor_parallel_size=self.ranks,
            hf_overrides=overrides,
            **arguments,
        )
        assert engine.status == 0, engine.log[-8000:]
        start = {name: value for name, value in self.start.items() if name != "compute"}
        for settings, answer in zip((start, *self.steps), engine.answers, strict=True):
            assert_parity(f"{self.label}: {settings}", directory, prompts, answer, self.dtype, settings)
        return engine


def selective(module: str) -> bool:
    """Whether a module has a residual where not all have: one layer has none, some fused layers have it in part."""
    _, _, layer, *_, name = module.split(".")
    parts = {"0": ("k_proj", "up_proj"), "2": ("q_proj", "v_proj", "gate_proj")}
    return layer != "1" and name not in parts.get(layer, ()) and ".experts.3." not in module


def text_prompts(count: int = 8, tokens: int = 48) -> list[list[int]]:
    """Token ids of the text that the repository ships."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(TINY_LLAMA)(TEXT.read_text(encoding="utf-8")[: 16 * count * tokens])
    return [ids["input_ids"][start : start + tokens] for start in range(0, count * tokens, tokens)]


def sampled_prompts(model: Path, count: int = 8, tokens: int = 48) -> list[list[int]]:
    """What a model says by itself: a random model finds any other text impossible."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    start = torch.randint(1, VOCABULARY, (count, 1))
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sampling = {"do_sample": True, "top_k": 0, "min_new_tokens": tokens - 1, "max_new_tokens": tokens - 1}
    return found.generate(start, attention_mask=torch.ones_like(start), pad_token_id=0, **sampling).tolist()


@torch.no_grad()
def write_peaked(config: Any, directory: Path) -> Path:
    """Save a random bf16 model whose outputs are peaked, with tiny-llama's tokenizer."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(noise * 0.2 + (0 if name.endswith("bias") else 1))
        else:
            gain = 1.5 if "lm_head" in name else 0.8
            parameter.copy_(noise * (1 if "embed" in name else gain / parameter.shape[-1] ** 0.5))
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, directory / name)
    return directory


def by_cover(model: Path, folder: Path) -> Callable[[int, str], Path]:
    """Checkpoints of a model by group size and cover (`full`, `selective`), each made once in a folder."""

    def make(group_size: int, cover: str) -> Path:
        directory = folder / f"{group_size}-{cover}"
        if not directory.exists():
            corrected = selective if cover == "selective" else lambda _: True
            write_checkpoint(model, directory, group_size=group_size, corrected=corrected)
        return directory

    return make
