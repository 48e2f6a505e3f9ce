"""One of the processes that quantize small models together; run by `test_modifier_distributed.py`.

    python distributed_quantize.py quantize DIRECTORY       every recipe of RECIPES, on the models in DIRECTORY
    python distributed_quantize.py talk DIRECTORY           what the processes tell each other
    python distributed_quantize.py fail FAULT DIRECTORY     a quantization in which one process fails or is killed

A process without RANK in its environment is alone, and writes what the others' files are compared with.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from random_models import TINY_LLAMA
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from srd_modifier import SRDModifier
from srd_modifier.distributed import Ranks, own_part
from srd_modifier.errors import SRDError
from srd_modifier.modifier.capture import ResidualCapture
from srd_modifier.modifier.inputs import CalibrationInputs
from srd_modifier.quantizing import quantize

ALONE = "RANK" not in os.environ
RANK = int(os.environ.get("RANK", "0"))
IGNORE = ["lm_head", "re:.*mlp.gate$"]
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
SCHEME: dict[str, Any] = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}, "ignore": IGNORE}
SRD: dict[str, Any] = {"ignore": IGNORE, "residual_group_size": 32}
FEEDBACK = {"rounding": "feedback", "residual_bits": 3}


def _budget(**settings: Any) -> SRDModifier:
    return SRDModifier(**SCHEME, correct={"budget": "7bpw"}, sensitivity_tokens=300, **settings)


def _gptq(**settings: Any) -> list[Modifier]:
    return [SRDModifier(**SRD, **settings), GPTQModifier(**SCHEME)]


RECIPES: dict[str, tuple[str, Callable[[], Any]]] = {
    "nearest": ("llama", lambda: SRDModifier(**SCHEME, residual_group_size=32)),
    "residual-feedback": ("llama", lambda: SRDModifier(**SCHEME, residual_group_size=32, **FEEDBACK)),
    "base-feedback": (
        "llama",
        lambda: SRDModifier(**SCHEME, residual_group_size=32, base_rounding="feedback", **FEEDBACK),
    ),
    "budget": ("llama", lambda: _budget(base_rounding="feedback")),
    "budget-by-noise": ("llama", lambda: _budget(sensitivity="forward")),
    "experts": ("mixture", lambda: _budget(base_rounding="feedback")),
    "gptq": ("llama", lambda: _gptq(**FEEDBACK)),
    "gptq-nearest": ("llama", lambda: _gptq()),
}
WITHOUT_DATA = ("nearest",)


def samples() -> Dataset:
    """Eleven samples of three lengths, which no two processes can divide evenly."""
    text = (TINY_LLAMA.parent / "text" / "demo.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(TINY_LLAMA)(text[:8000])["input_ids"]
    rows = [ids[64 * i : 64 * i + (64, 40, 52)[i % 3]] for i in range(11)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def quantize_all(folder: Path) -> None:
    who = "alone" if ALONE else "together"
    for name, (model_name, make) in RECIPES.items():
        data = {}
        if name not in WITHOUT_DATA:
            data = {"dataset": own_part(samples()), "num_calibration_samples": 11, "max_seq_length": 64}
            data |= {"shuffle_calibration_samples": False}
        model = AutoModelForCausalLM.from_pretrained(folder / model_name, dtype="auto")
        recipe = make()
        oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(TINY_LLAMA), recipe=recipe, **data)
        model.save_pretrained(folder / who / name)
        reset_session()  # or the next recipe.yaml would tell of this one too


def recorded(work: Callable[[], Any]) -> str:
    try:
        work()
    except SRDError as error:
        return str(error)
    return "nothing was refused"


def talk(folder: Path) -> dict[str, Any]:
    ranks = Ranks.current()
    found: dict[str, Any] = {"rank": ranks.rank, "size": ranks.size}
    found["gathered"] = ranks.gather(ranks.rank * 10)
    found["merged"] = ranks.merge({ranks.rank: "own", "common": ranks.rank})
    found["from first"] = ranks.from_first(f"process {ranks.rank}")
    found["divided"] = ranks.divide({"a": 3, "b": 5, "c": 1, "d": 3})

    total = torch.full((3,), float(ranks.rank + 1), dtype=torch.float64)
    ranks.sum(total)
    found["sum"] = total.tolist()
    spread = torch.full((2,), float(ranks.rank), dtype=torch.bfloat16)
    ranks.spread(spread, owner=1)
    found["spread"] = spread.tolist()
    sent = [torch.arange(5, dtype=torch.int8), torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16), torch.empty(0)]
    if ranks.rank == 1:
        ranks.send(sent)
    else:
        received = ranks.receive(1, [(one.dtype, tuple(one.shape)) for one in sent])
        found["received"] = all(torch.equal(*pair) for pair in zip(received, sent, strict=True))

    found["inputs"] = divided_inputs(ranks)

    def fail() -> None:
        with ranks.together():
            if ranks.rank == 1:
                raise SRDError("the disk is full")

    found["broken before"] = ranks.broken
    found["failed"] = recorded(fail)
    found["broken"] = ranks.broken
    found["still here"] = ranks.gather(None)
    return found


def divided_inputs(ranks: Ranks) -> dict[str, Any]:
    """Moments of modules of which some saw data in one process only."""
    batches = torch.randn(6, 9, 24, generator=torch.Generator().manual_seed(0))
    mine = CalibrationInputs(second_moments=True)
    for number in range(3 * ranks.rank, 3 * ranks.rank + 3):
        hidden = batches[number]  # one tensor, which both read
        for name in ("q", "k"):
            mine.add(name, hidden)
        if number == 4:
            mine.add("expert", hidden + 1)
    groups = mine.shared(["q", "k", "expert", "idle"], ranks)
    owners = {"q": 0, "expert": 0, "idle": 1}
    mine.gather(groups, ranks, owner=owners.__getitem__, device=torch.device("cpu"))
    cpu = torch.device("cpu")
    hessians = {name: mine.hessian(name, cpu) for name in ("q", "k", "expert", "idle")}
    disagreeing = CalibrationInputs()
    disagreeing.add("a", hidden)
    disagreeing.add("b", hidden if ranks.rank else hidden + 1)
    return {
        "groups": groups,
        "squares": mine.mean_squares(),
        "moments": {name: one.regularized for name, one in hessians.items() if one is not None},
        "shared": hessians["q"] is hessians["k"],
        "disagreeing": recorded(lambda: disagreeing.shared(["a", "b"], ranks)),
    }


# faults: each is put into one process, before it quantizes


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise SRDError("the disk is full")


def _kill(*args: Any, **kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(calls: int, method: Callable[..., Any], fault: Callable[..., Any]) -> Callable[..., Any]:
    seen = []

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        seen.append(None)
        return fault() if len(seen) > calls else method(*args, **kwargs)

    return sometimes


def put(fault: str) -> None:
    """Make one process fail at a point of its work."""
    from srd_modifier.modifier import saving

    kind, _, place = fault.partition("-in-")
    act = {"error": _raise, "kill": _kill}[kind]
    if place == "calibration" and RANK == 1:
        CalibrationInputs.add = _after(20, CalibrationInputs.add, act)  # type: ignore[method-assign]
    elif place == "encoding" and RANK == 1:
        encode = ResidualCapture._encode_by_inputs
        ResidualCapture._encode_by_inputs = _after(4, encode, act)  # type: ignore[method-assign]
    elif place == "writing" and RANK == 0:
        saving.attach_sidecar = act
    elif place == "waiting" and RANK == 1:
        # while the first one writes
        ResidualCapture.settle = act  # type: ignore[method-assign]


def fail(fault: str, folder: Path) -> None:
    put(fault)
    text = TINY_LLAMA.parent / "text" / "demo.txt"
    # its own group, as under torchrun
    quantize(
        str(folder / "llama"),
        folder / "recipe.yaml",
        folder / "out" / "checkpoint",
        dataset=str(text),
        num_samples=8,
        max_seq_length=64,
    )


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[-1])
    torch.set_num_threads(1)
    if what == "fail":
        try:
            fail(sys.argv[2], folder)
        except SRDError as error:
            sys.exit(f"SRDError: {error}")
        return
    if not ALONE:
        distributed.init_process_group("gloo")
    if what == "quantize":
        quantize_all(folder)
    else:
        torch.save(talk(folder), folder / f"found-{RANK}.pt")
    print(json.dumps({"rank": RANK, "done": what}))
    if not ALONE:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
