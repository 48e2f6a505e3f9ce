import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity
from srd_modifier.checkpoint.writer import ResidualEntry, SidecarWriter
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.evaluation import evaluate as evaluate_module
from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.evaluation.tasks.text import require_fit
from srd_modifier.evaluation.windows import Convention
from srd_modifier.residual import ResidualFormat, encode

REAL_TEXT = Path(__file__).parents[3] / "shared" / "data" / "eval" / "wiki.test.raw"


def transformers_perplexity(model_directory: Path, text: str, *, ctx: int, windows: int) -> float:
    """exp of the loss that Transformers gives for `windows` separate windows of `ctx` tokens."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(model_directory)(text, return_tensors="pt").input_ids[:, : ctx * windows]
    ids = ids.view(windows, ctx)
    with torch.no_grad():
        return math.exp(model(input_ids=ids, labels=ids).loss)


def test_the_trained_example_reads_prose(tiny_llama, prose):
    report = evaluate_text(str(tiny_llama), prose, ctx=64, stride=64, max_tokens=192)
    assert report.perplexity.tokens == 3 * 63
    assert report.perplexity.ppl == pytest.approx(
        transformers_perplexity(tiny_llama, prose.read_text(), ctx=64, windows=3), rel=1e-5
    )
    # Guessing evenly among the 4096 tokens of the vocabulary would give 4096.
    assert report.perplexity.ppl < 500
    assert 0 < report.perplexity.ppl_stderr < report.perplexity.ppl
    assert report.size.bytes_on_disk == (tiny_llama / "model.safetensors").stat().st_size
    assert report.size.bits_per_weight == 16
    assert report.divergence is None


@pytest.mark.skipif(not REAL_TEXT.is_file(), reason="the WikiText-2 test text is not beside the repository")
def test_the_trained_example_on_real_text(tiny_llama):
    report = evaluate_text(str(tiny_llama), REAL_TEXT, ctx=512, stride=512, max_tokens=2048)
    expected = transformers_perplexity(tiny_llama, REAL_TEXT.read_text(encoding="utf-8")[:40000], ctx=512, windows=4)
    assert report.perplexity.ppl == pytest.approx(expected, rel=1e-5)
    assert report.perplexity.ppl < 200


def test_a_model_against_itself(make_directory, prose):
    name = str(make_directory())
    report = evaluate_text(name, prose, reference=name, ctx=32, stride=16, max_tokens=100)
    assert (report.divergence.kld_mean, report.divergence.top1_agreement) == (0.0, 1.0)
    assert report.seconds > 0
    assert {"srd-modifier", "python", "torch", "transformers", "compressed-tensors"} == report.versions.keys()


def test_a_model_against_another(make_directory, prose):
    report = evaluate_text(
        str(make_directory("candidate", seed=0)),
        prose,
        reference=str(make_directory("original", seed=1)),
        ctx=32,
        stride=16,
        max_tokens=100,
    )
    assert report.divergence.kld_median > 0
    assert report.divergence.top1_agreement < 0.5


def test_a_residual_brings_a_compressed_model_back(compressed, make_directory, edit_config, prose, tmp_path):
    def measure(**options):
        return evaluate_text(
            str(compressed.directory),
            prose,
            reference=str(make_directory("original")),
            ctx=32,
            stride=16,
            max_tokens=100,
            **options,
        )

    plain = measure()
    fmt = ResidualFormat(group_size=16)
    rows, columns = compressed.original.shape
    writer = SidecarWriter(tmp_path / "sidecar", {compressed.module: ResidualEntry(rows, columns, fmt)})
    writer.write(compressed.module, encode(compressed.original - compressed.dequantized, fmt))
    writer.finish(fmt)
    files = sorted((tmp_path / "sidecar").iterdir())
    sensitivity = Sensitivity(
        method="gradient",
        tokens=64,
        modules={
            compressed.module: ModuleSensitivity(w4=0.5, corrected=0.01, mixed=0.02),
            "model.layers.0.mlp.up_proj": ModuleSensitivity(w4=0.25),
        },
    )
    attach_sidecar(compressed.directory, files, modules=[compressed.module], fmt=fmt, sensitivity=sensitivity)

    # The module is in the second of two layers, at depth 0.5: in the reasoning chunk and not in the early one.
    full, off, elsewhere = measure(), measure(alpha=0.0), measure(chunks=["early"])
    assert full.divergence.kld_mean < plain.divergence.kld_mean / 100
    assert off.divergence == elsewhere.divergence == plain.divergence
    assert off.size == elsewhere.size == plain.size
    assert full.size.bits_per_weight == pytest.approx(plain.size.bits_per_weight + 8 + 16 / 16)
    assert measure(chunks=["reasoning"]).divergence == full.divergence
    assert (full.alpha, off.alpha, plain.alpha, elsewhere.chunks) == (1.0, 0.0, None, ("early",))

    # the prediction follows what is applied: the dial, the chunks, and the checkpoint's own alphas
    assert (plain.predicted_kld, full.predicted_kld) == (None, 0.26)
    assert off.predicted_kld == elsewhere.predicted_kld == 0.75
    half = 0.25 * 0.5 + 0.5 * 0.02 + 0.25 * 0.01 + 0.25
    assert measure(alpha=0.5).predicted_kld == pytest.approx(half)
    config = json.loads((compressed.directory / "config.json").read_text())["srd_config"]
    edit_config(compressed.directory, srd_config={**config, "layer_alphas": {"re:.*layers.1": 0.5}})
    assert measure().predicted_kld == pytest.approx(half)
    assert full.as_json()["predicted_ratio"] == pytest.approx(0.26 / full.divergence.kld_mean)


def test_a_broken_sensitivity_is_noticed_before_scoring(compressed, prose, tmp_path, monkeypatch):
    fmt = ResidualFormat(group_size=16)
    writer = SidecarWriter(tmp_path / "sidecar", {compressed.module: ResidualEntry(*compressed.original.shape, fmt)})
    writer.write(compressed.module, encode(compressed.original - compressed.dequantized, fmt))
    writer.finish(fmt)
    attach_sidecar(compressed.directory, sorted((tmp_path / "sidecar").iterdir()), modules=[compressed.module], fmt=fmt)
    (compressed.directory / "srd" / "sensitivity.json").write_text("{}")
    monkeypatch.setattr(evaluate_module, "score_tokens", None)
    with pytest.raises(CheckpointError, match=r"sensitivity.json: version is None"):
        evaluate_text(str(compressed.directory), prose, ctx=32, max_tokens=100)


def test_llamacpp_puts_the_bos_that_the_tokenizer_adds(make_directory, prose, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate_module, "bos_where_added", lambda tokenizer: 5)
    inner = evaluate_module.score_tokens
    monkeypatch.setattr(
        evaluate_module,
        "score_tokens",
        lambda *args, **options: seen.append(options["first_token"]) or inner(*args, **options),
    )
    name = str(make_directory())
    report = evaluate_text(name, prose, convention=Convention.LLAMACPP, ctx=32, max_tokens=100)
    assert report.perplexity.tokens == 3 * 15
    evaluate_text(name, prose, ctx=32, max_tokens=100)
    assert seen == [5, None]


@pytest.mark.parametrize("options", [{"ctx": 65}, {"convention": Convention.LLAMACPP, "ctx": 128}, {}])
def test_a_ctx_beyond_the_models_positions_is_refused(make_directory, prose, options):
    with pytest.raises(SRDError, match=r"ctx \d+ exceeds the 64 positions \(max_position_embeddings\) of .*model"):
        evaluate_text(str(make_directory()), prose, **options)


def test_a_ctx_beyond_the_references_positions_is_refused(make_directory, edit_config, prose):
    original = make_directory("original")
    edit_config(original, max_position_embeddings=16)
    with pytest.raises(SRDError, match=r"exceeds the 16 positions .* of .*original"):
        evaluate_text(str(make_directory()), prose, reference=str(original), ctx=32)


def test_too_short_a_text_is_refused(make_directory, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    with pytest.raises(SRDError, match="the text has too few tokens"):
        evaluate_text(str(make_directory()), path, ctx=32)


def test_sizes_are_checked_before_anything_is_loaded(prose):
    with pytest.raises(ConfigError, match="stride must be at least 1"):
        evaluate_text("not-loaded", prose, stride=0)


def test_models_that_tokenize_differently_are_refused(make_directory, prose):
    original = make_directory("original")
    tokenizer = original / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    with pytest.raises(SRDError, match=r"tokenize .*prose\.txt differently: their divergence is not defined"):
        evaluate_text(str(make_directory()), prose, reference=str(original), ctx=32)


def test_token_ids_beyond_the_embeddings_are_refused():
    model = SimpleNamespace(name="model", max_positions=None, vocabulary_size=10)
    rule = evaluate_module.window_rule(ctx=8, stride=4)
    with pytest.raises(SRDError, match="gives token id 12, but the model has only 10 embeddings"):
        require_fit(model, torch.tensor([3, 12]), rule)
