"""Every peer that runs on a CPU: it makes what it says, and what is on disk is what its package computed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from benchmarks.peers import PEERS, autoround, ggml, llm_compressor, srd
from benchmarks.peers.base import Unavailable


@pytest.fixture
def seen(monkeypatch) -> dict[str, Any]:
    """Of the last `oneshot`: the token ids that reached the embedding, and the weights in memory after it."""
    import llmcompressor

    run, seen = llmcompressor.oneshot, {}

    def observed(**kwargs: Any) -> None:
        ids: list[list[int]] = []
        embedding = kwargs["model"].get_input_embeddings()
        handle = embedding.register_forward_pre_hook(lambda module, arguments: ids.extend(arguments[0].tolist()))
        run(**kwargs)
        handle.remove()
        weights = {name: weight.detach().clone() for name, weight in kwargs["model"].named_parameters()}
        seen.update(ids=ids, weights=weights)

    monkeypatch.setattr(llmcompressor, "oneshot", observed)
    return seen


def passes(ids: list[list[int]], samples: list[list[int]]) -> int:
    """How often exactly these samples were read, in their order; 0 if anything else was."""
    times, rest = divmod(len(ids), len(samples))
    return times if rest == 0 and ids == samples * times else 0


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_whose_package_is_missing_says_so(name, setting, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.base.find_spec", lambda module: None)
    with pytest.raises(Unavailable, match="is not installed"):
        next(PEERS[name](setting))


def test_llm_compressor(setting, check, read, weights_of, original, seen):
    makers = PEERS["llm-compressor"](setting)
    rtn = next(makers)
    gptq = next(makers)
    assert passes(seen["ids"], setting.samples)
    # GPTQ leaves the rounded weights in the model, in bf16
    for name, weight in weights_of(read(gptq)).items():
        assert torch.equal(weight.bfloat16(), seen["weights"][f"{name}.weight"]), name
    awq = next(makers)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(read(awq).get_parameter(norm), original[norm]), "AWQ scaled nothing"
    assert passes(seen["ids"], setting.samples)
    assert [made.label for made in (rtn, gptq, awq)] == ["RTN W4 g32", "GPTQ W4 g32", "AWQ + RTN W4 g32"]
    assert ("pinning" in awq.note) != torch.accelerator.is_available()
    check([rtn, gptq, awq])


def test_the_stand_in_for_pinning_goes_again(setting):
    from llmcompressor.pipelines.cache import IntermediatesCache

    original = IntermediatesCache.pin_memory
    with llm_compressor._without_pinning():
        pass
    assert IntermediatesCache.pin_memory is original


def test_autoround(setting, check, read, weights_of, seen):
    pytest.importorskip("auto_round")
    made = next(autoround.make(setting, iterations=1))
    assert made.label == "AutoRound W4 g32, 1 iterations"
    assert passes(seen["ids"], setting.samples)
    # the modifier leaves bf16 in memory, and the scales go to disk
    for name, weight in weights_of(read(made)).items():
        torch.testing.assert_close(weight, seen["weights"][f"{name}.weight"].float(), rtol=2**-7, atol=0)
    check([made])


def test_autoround_gguf(setting, check):
    pytest.importorskip("auto_round")
    made = autoround._gguf(setting, 1)
    assert made.path.suffix == ".gguf"
    check([made], head_is_kept=False)


def test_autoround_gguf_refuses_samples_that_it_would_leave_out(setting):
    pytest.importorskip("auto_round")
    uneven = replace(setting, samples=[*setting.samples, [1, 2, 3]])
    with pytest.raises(Unavailable, match="these have 3 to 32 tokens"):
        autoround._gguf(uneven, 1)


def test_ggml(setting, check):
    from srd_modifier.gguf.calibration.text import Calibration
    from srd_modifier.gguf.export import export_gguf
    from srd_modifier.gguf.importance import read_imatrix

    rows = list(ggml.make(setting))
    assert [made.label for made in rows] == ["ggml Q4_K_M", "ggml Q5_K_M", "ggml Q6_K", "ggml Q8_0"]
    sizes = [made.path.stat().st_size for made in rows]
    assert sizes == sorted(sizes)
    check(rows, head_is_kept=False)
    # the importance is what our own calibration measures on the same samples, with hidden states in less precision
    export_gguf(
        setting.model,
        setting.folder / "calibrated.gguf",
        calibration=Calibration("samples", samples=setting.samples),
        imatrix_output=setting.folder / "calibrated-imatrix.gguf",
    )
    ours = read_imatrix(setting.folder / "calibrated-imatrix.gguf")
    theirs = read_imatrix(setting.folder / "imatrix.gguf")
    assert theirs.keys() == ours.keys()
    for name, importance in theirs.items():
        torch.testing.assert_close(importance, ours[name], rtol=0.02, atol=0)


def test_bitsandbytes(setting, check, read, weights_of, original):
    bnb = pytest.importorskip("bitsandbytes")
    nf4, int8, alone = rows = list(PEERS["bitsandbytes"](setting))
    assert [made.label for made in rows] == ["NF4 g64, double quant", "LLM.int8()", "LLM.int8(), weights alone"]
    assert int8.path == alone.path != nf4.path
    assert nf4.bytes_on_disk == (nf4.path / "model.safetensors").stat().st_size < int8.bytes_on_disk
    check(rows)
    from_disk = [weights_of(read(made)) for made in rows]
    for name in from_disk[0]:
        weight = original[f"{name}.weight"].bfloat16()
        codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        in_memory = bnb.functional.dequantize_4bit(codes, state)
        # where the CPU multiplies in bfloat16, its kernel rounds once more; NF4's levels are ten times as far apart
        torch.testing.assert_close(from_disk[0][name].bfloat16(), in_memory, rtol=2**-6, atol=1e-7)
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        in_memory = bnb.functional.int8_vectorwise_dequant(codes, scales)
        assert torch.equal(from_disk[2][name], in_memory), name
        # the identity is exact in 8 bits, so that only float16 is between the two
        torch.testing.assert_close(from_disk[1][name], in_memory, rtol=2**-10, atol=1e-6)


def test_hqq(setting, check, read, weights_of, original):
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    (made,) = PEERS["hqq"](setting)
    assert made.label == "HQQ W4 g32"
    check([made])
    for name, weight in weights_of(read(made)).items():
        codes, meta = quantizer.quantize(
            original[f"{name}.weight"], nbits=4, group_size=32, axis=1, round_zero=True, device="cpu"
        )
        # as it is saved: scale and zero in float16
        meta |= {"scale": meta["scale"].half().float(), "zero": meta["zero"].half().float()}
        in_memory = quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
        torch.testing.assert_close(weight, in_memory, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_srd(setting, check, read, weights_of, original, seen):
    rows = list(srd.make(setting, budgets=((6.0, 0.6), (9.5, 1.0))))
    assert [made.label for made in rows] == [
        "SRD W4 g32 feedback alone, balance 0.6",
        "SRD budget 6 bpw, balance 0.6",
        "SRD W4 g32 feedback alone, balance 1",
        "SRD budget 9.5 bpw, balance 1",
        "GPTQ W4 g32 + D8, 40-77 % of depth",
        "GPTQ W4 g32 + D8",
        "SRD Q4_K_M, calibrated",
        "SRD GGUF by budget, bytes of Q4_K_M",
    ]
    assert passes(seen["ids"], setting.samples)
    checkpoints, files = rows[:6], rows[6:]
    check(checkpoints, least_loss=1e-5)
    check(files, head_is_kept=False)
    assert files[1].path.stat().st_size <= files[0].path.stat().st_size

    def lost(made: Any) -> float:
        weights = weights_of(read(made))
        return sum(float((weight - original[f"{name}.weight"]).norm()) for name, weight in weights.items())

    losses = list(map(lost, checkpoints))
    assert losses[0] > losses[1]
    assert losses[2] > losses[3]
    assert losses[4] > 10 * losses[5]
    assert not list(setting.folder.glob(".srd-residual-*")), "what waited on the disk is still there"
