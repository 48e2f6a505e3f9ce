"""The low-rank peer: the ranks, the mathematics against an independent form of it, and the files."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("llmcompressor")

from benchmarks.peers.base import Unavailable
from benchmarks.peers.low_rank import correction, make, ranks

SHAPES = {"a": (8, 4), "b": (16, 16), "c": (8, 4)}
COSTS = {"a": 24, "b": 64, "c": 24}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (2 * 112, {"a": 2, "b": 2, "c": 2}),
        (2 * 112 + 23, {"a": 2, "b": 2, "c": 2}),
        (2 * 112 + 24, {"a": 3, "b": 2, "c": 2}),
        (2 * 112 + 48, {"a": 3, "b": 2, "c": 3}),
        (2 * 112 + 88, {"a": 3, "b": 3, "c": 2}),
        (48, {"a": 1, "c": 1}),
        (1000, {"a": 4, "b": 9, "c": 4}),
    ],
)
def test_ranks_spend_the_bytes(size, expected):
    assert ranks(SHAPES, size) == expected
    assert sum(COSTS[module] * rank for module, rank in expected.items()) <= size


def test_no_rank_fits():
    with pytest.raises(Unavailable, match="does not fit into 23 bytes"):
        ranks(SHAPES, 23)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_correction_is_the_best_of_its_rank_for_the_output(shape):
    torch.manual_seed(0)
    lost, inputs = torch.randn(shape, dtype=torch.float64), torch.randn(100, shape[1], dtype=torch.float64)
    inputs *= torch.rand(shape[1]) + 0.1
    a, b = correction(lost, inputs.T @ inputs / 100)
    torch.testing.assert_close(b @ a, lost)
    # the squared singular values of what the layer's output loses
    values = torch.linalg.svdvals(inputs @ lost.T).square()
    for rank in (1, 5, 12):
        left = inputs @ (lost - b[:, :rank] @ a[:rank]).T
        torch.testing.assert_close(left.square().sum(), values[rank:].sum(), rtol=1e-4, atol=1e-6)


def test_inputs_that_are_always_zero_do_no_harm():
    torch.manual_seed(0)
    moment = torch.rand(16, dtype=torch.float64).diag()
    moment[3, 3] = 0
    a, b = correction(torch.randn(8, 16, dtype=torch.float64), moment)
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()


def test_files(setting, check, read, weights_of, original):
    from srd_modifier.evaluation.load import load

    rows = list(make(setting, bits=(6.0, 8.0)))
    check(rows)
    base = setting.folder / "low-rank"
    before = weights_of(load(str(base)).model)
    stored = load_file(base / "model.safetensors")
    quantized = sum(tensor.nbytes for name, tensor in stored.items() if name.rpartition(".")[0] in before)
    losses = [lost(before, original)]
    for made, bits in zip(rows[::2], (6.0, 8.0), strict=True):
        adapter = load_file(made.path / "adapter_model.safetensors")
        config = json.loads((made.path / "adapter_config.json").read_text("utf-8"))
        assert config["peft_type"] == "LORA"
        assert config["alpha_pattern"] == config["rank_pattern"]
        assert config["lora_alpha"] == config["r"]
        after = weights_of(read(made))
        for name, weight in after.items():
            a, b = (adapter[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
            assert a.dtype == b.dtype == torch.bfloat16
            assert len(a) == b.shape[1] == config["rank_pattern"].get(name, config["r"])
            torch.testing.assert_close(weight, before[name] + b.float() @ a.float(), rtol=0, atol=1e-6)
        weights = sum(weight.numel() for weight in after.values())
        spent = 8 * (quantized + sum(tensor.nbytes for tensor in adapter.values())) / weights
        assert bits - 0.1 < spent <= bits
        files = [base / "model.safetensors", made.path / "adapter_model.safetensors"]
        assert made.bytes_on_disk == sum(file.stat().st_size for file in files)
        losses.append(lost(after, original))
    assert losses == sorted(losses, reverse=True)
    labels = [re.sub(r"rank [\d-]+", "rank R", made.label) for made in rows]
    assert labels == [
        f"RTN W4 g32 + QERA-{method} rank R, {bits} bpw" for bits in (6, 8) for method in ("approx", "exact")
    ]


def lost(weights: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> float:
    return sum(float((weight - original[f"{name}.weight"]).square().sum()) for name, weight in weights.items())
