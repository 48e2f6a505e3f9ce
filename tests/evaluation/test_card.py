import ast
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from comparisons import ARC, REFERENCE, WIKITEXT, accuracy, kld, make_model, make_results, ppl
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from small_checkpoint import DAMAGES, edit_json, write_checkpoint

from srd_modifier.checkpoint.sizes import measure
from srd_modifier.checkpoint.summary import summarize
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.evaluation.card import metadata
from srd_modifier.evaluation.card.metadata import Identity
from srd_modifier.evaluation.card.write import write_card
from srd_modifier.evaluation.digest import model_digest
from srd_modifier.evaluation.plots.comparison import draw_all
from srd_modifier.evaluation.results import write_results

RECIPE = """\
quant_stage:
  quant_modifiers:
    SRDModifier:
      ignore: [lm_head]
    GPTQModifier:
      scheme: W4A16
"""


@pytest.fixture
def checkpoint(tmp_path):
    """Four small modules, three of them with a residual."""
    directory = write_checkpoint(tmp_path / "small-srd", tmp_path / "scratch")
    (directory / "recipe.yaml").write_text(RECIPE)
    return directory


@pytest.fixture
def plain(checkpoint, tmp_path):
    """The W4A16 model of it."""
    directory = Path(shutil.copytree(checkpoint, tmp_path / "small-w4"))
    shutil.rmtree(directory / "srd")
    edit_json(directory / "config.json", lambda config: config.pop("srd_config"))
    return directory


def write_gguf(path, *, kind="model", seed=0, **strings):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value in strings.items():
        writer.add_string(f"srd.{key.replace('__', '.')}", value)
    weight = np.random.default_rng(seed).normal(size=(32, 64))
    writer.add_tensor("blk.0.ffn_up.weight", weight.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def measured(tmp_path):
    """Writes the results of a comparison in which the given paths have rows."""

    def write(*paths, tasks=(WIKITEXT, ARC), peers=(), **fields):
        rows = [
            make_model(
                f"own {number}",
                5_000_000,
                ppl(10.5 + number, 95.24, 94.8, 95.6),
                kld(1e-3 * (number + 1), stderr=1e-5),
                accuracy(0.78, 97.5, 95.2, 99.9),
                digest=model_digest(path),
                model=str(path),
                **fields,
            )
            for number, path in enumerate(paths)
        ]
        (tmp_path / "comparison").mkdir(exist_ok=True)
        path = tmp_path / "comparison" / "results.json"
        write_results(make_results(*rows, *peers, tasks=tasks), path)
        return path

    return write


def read(written):
    return written.path.read_text(encoding="utf-8")


def front_matter(written):
    return metadata_load(written.path)


def body(written):
    return ModelCard(read(written)).text


def tables(text):
    """Every table as rows of cells, as a reader of CommonMark with tables finds them."""
    found, inside = [], False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        inside = {"th_open": True, "td_open": True, "th_close": False, "td_close": False}.get(token.type, inside)
        if inside and token.type == "inline":
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def blocks(text, language):
    tokens = MarkdownIt("commonmark").parse(text)
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def headings(text):
    return re.findall(r"^## (.*)$", text, re.M)


# --- without results -------------------------------------------------------------------------------------------------


def test_without_results_the_card_has_sizes_and_no_figures(checkpoint):
    written = write_card(checkpoint)
    assert written.path == checkpoint / "README.md"
    assert headings(body(written)) == ["Use", "Size", "Residual", "How it was made", "Limits"]
    assert "model-index" not in front_matter(written)
    assert "Its quality was not measured for this card." in body(written)


def test_sizes_are_those_of_the_files(checkpoint):
    sizes, residual = tables(body(write_card(checkpoint)))
    base, whole = measure(checkpoint, corrected=()), measure(checkpoint)
    assert [row[1:] for row in sizes[1:]] == [
        [f"{base.bytes_on_disk:,}", f"{base.bits_per_weight:.2f}"],
        [f"{whole.bytes_on_disk - base.bytes_on_disk:,}", f"{whole.bits_per_weight - base.bits_per_weight:.2f}"],
        [f"{whole.bytes_on_disk:,}", f"{whole.bits_per_weight:.2f}"],
    ]
    on_disk = sum(path.stat().st_size for path in (checkpoint / "srd").glob("residual*.safetensors"))
    assert sizes[2][1] == f"{on_disk:,}"
    assert residual[1:] == [
        [name, depth, f"{chunk.modules} of {chunk.of}", f"{chunk.bytes:,}"]
        for (name, chunk), depth in zip(summarize(checkpoint).chunks.items(), ["0 to 20 %", "40 to 77 %"], strict=True)
    ]


def test_front_matter_says_only_what_is_known(checkpoint):
    assert front_matter(write_card(checkpoint)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["srd", "compressed-tensors", "w4a16", "llm-compressor"],
    }


def test_front_matter_says_what_it_is_told(checkpoint):
    identity = Identity("org/base", quantized_by="someone", repo_id="someone/base-srd", license="mit")
    written = write_card(checkpoint, identity=identity)
    found = front_matter(written)
    assert (found["base_model"], found["base_model_relation"]) == ("org/base", "quantized")
    assert (found["quantized_by"], found["license"]) == ("someone", "mit")
    assert body(written).startswith("\n# base-srd\n\n[org/base](https://huggingface.co/org/base), quantized")


def test_a_prediction_is_marked_as_one(tmp_path):
    directory = write_checkpoint(tmp_path / "model", tmp_path / "scratch", sensitivity=DAMAGES)
    text = body(write_card(directory))
    (sentence,) = (line for line in text.splitlines() if "redicted" in line)
    assert sentence.startswith("**Predicted, not measured:**")
    assert "1.15e-2 nats per token for the 4-bit weights and 9.30e-4 with the residual" in sentence


def test_without_a_sensitivity_nothing_is_predicted(checkpoint):
    assert "redicted" not in read(write_card(checkpoint))


def test_alphas_of_the_checkpoint_are_said(checkpoint):
    edit_json(
        checkpoint / "config.json",
        lambda config: config["srd_config"].update(alpha=0.5, layer_alphas={"re:.*down_proj$": 0.25}),
    )
    assert "unless told otherwise it is 0.5, and 0.25 for `re:.*down_proj$`." in body(write_card(checkpoint))


def test_the_recipe_is_quoted(checkpoint):
    text = body(write_card(checkpoint))
    assert blocks(text, "yaml") == [RECIPE]
    assert "in groups of 32 by llm-compressor with `SRDModifier` and `GPTQModifier`." in text


def test_without_a_recipe_nothing_is_said_of_one(checkpoint):
    (checkpoint / "recipe.yaml").unlink()
    text = read(write_card(checkpoint))
    assert "recipe" not in text
    assert "llm-compressor" not in text
    assert "The weights were quantized to 4-bit integers, symmetric, in groups of 32." in text


# --- what is in the directory ----------------------------------------------------------------------------------------


def test_a_plain_w4_checkpoint_gets_what_is_true_for_it(plain):
    written = write_card(plain)
    assert front_matter(written)["tags"] == ["compressed-tensors", "w4a16", "llm-compressor"]
    text = body(written)
    assert headings(text) == ["Use", "Size", "How it was made", "Limits"]
    for word in ("srd_modifier", "srd-modifier", "alpha", "srd export"):
        assert word not in text
    assert "vllm serve small-w4" in text


def test_a_dense_model_gets_what_is_true_for_it(tiny_llama, tmp_path):
    written = write_card(tiny_llama, output=tmp_path / "card.md")
    found = front_matter(written)
    assert found == {
        "language": ["en"],
        "library_name": "transformers",
        "license": "cc-by-4.0",
        "pipeline_tag": "text-generation",
    }
    text = body(written)
    assert headings(text) == ["Use", "Size", "Limits"]
    assert tables(text) == [
        [["", "bytes on disk", "bits/weight"], ["model*.safetensors", "14,696,792", "16.00"]],
    ]
    assert "scales" not in text
    assert "quantized" not in text


def test_a_dense_model_is_no_quantized_one_of_its_base(tiny_llama, tmp_path):
    identity = Identity("org/base", quantized_by="someone")
    found = front_matter(write_card(tiny_llama, identity=identity, output=tmp_path / "card.md"))
    assert found["base_model"] == "org/base"
    assert "base_model_relation" not in found
    assert "quantized_by" not in found


def test_gguf_files_alone_are_described(tmp_path):
    path = write_gguf(
        tmp_path / "small-F16.gguf",
        library="0.3.0",
        method="output-error",
        mixture="4.85bpw",
        calibration__text="wiki.txt",
        calibration__tokens="32768",
    )
    written = write_card(tmp_path, identity=Identity("org/base"))
    assert front_matter(written) == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["gguf"],
    }
    text = body(written)
    assert tables(text) == [
        [["", "bytes on disk", "bits/weight"], ["small-F16.gguf, 4.85bpw", f"{path.stat().st_size:,}", "16.00"]]
    ]
    assert "by the error of the layers' outputs, calibrated on 32,768 tokens of `wiki.txt`" in text
    assert blocks(text, "bash") == ['llama-cli -m small-F16.gguf -p "The river"\n']
    assert blocks(text, "python") == []


def test_a_gguf_file_beside_a_checkpoint_has_its_row_and_its_command(checkpoint):
    write_gguf(checkpoint / "small F16.gguf", library="0.3.0", base_digest=summarize(checkpoint).base_digest, alpha="1")
    written = write_card(checkpoint, identity=Identity(repo_id="someone/small"))
    assert front_matter(written)["tags"][-1] == "gguf"
    text = body(written)
    assert tables(text)[0][-1][0] == "small F16.gguf, F16"
    assert "llama-cli --hf-repo someone/small --hf-file 'small F16.gguf'" in text
    assert "made of this checkpoint at alpha 1" in text


def test_other_gguf_files_are_no_models(tmp_path):
    write_gguf(tmp_path / "small.gguf")
    adapter = write_gguf(tmp_path / "small-lora.gguf", kind="adapter")
    write_gguf(tmp_path / "imatrix.gguf", kind="imatrix")
    text = body(write_card(tmp_path))
    assert [row[0] for row in tables(text)[0][1:]] == ["small.gguf, F16", "small-lora.gguf, adapter"]
    assert f"{adapter.stat().st_size:,}" in text
    assert "add `--lora small-lora.gguf`." in text
    assert "imatrix" not in text


def test_of_a_gguf_file_from_elsewhere_nothing_is_said_about_its_making(tmp_path):
    write_gguf(tmp_path / "small.gguf")
    assert "How it was made" not in headings(body(write_card(tmp_path)))


# --- how to use it ---------------------------------------------------------------------------------------------------


def test_commands_name_the_directory_or_the_repository(checkpoint):
    text = body(write_card(checkpoint))
    assert "vllm serve small-srd --quantization compressed-tensors" in text
    assert "srd export bf16 small-srd --output small-srd-bf16" in text
    assert "hf download" not in text
    text = body(write_card(checkpoint, identity=Identity(repo_id="someone/other"), overwrite=True))
    assert "vllm serve someone/other --quantization compressed-tensors" in text
    assert "hf download someone/other --local-dir small-srd\nsrd export bf16 small-srd" in text


def test_python_is_python_whatever_the_directory_is_called(checkpoint, tmp_path):
    odd = checkpoint.rename(tmp_path / 'it\'s "odd" | größer')
    snippets = blocks(body(write_card(odd)), "python")
    assert len(snippets) == 2
    for snippet in snippets:
        names = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
        assert odd.name in names


@pytest.mark.slow
def test_the_python_of_a_card_does_what_it_says(finished_checkpoint, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(finished_checkpoint.parent)
    written = write_card(finished_checkpoint, output=tmp_path / "card.md")
    corrected, _ = blocks(body(written), "python")
    names = {}
    exec(compile(corrected, "card", "exec"), names)
    model = names["model"]
    with torch.no_grad():
        assert torch.isfinite(model(**names["tokenizer"]("The river", return_tensors="pt")).logits).all()


# --- results ---------------------------------------------------------------------------------------------------------


def test_rows_of_these_files_and_of_others_are_told_apart(checkpoint, measured):
    peer = make_model("peer", 6_000_000, ppl(11.0), notes=("a | note",))
    written = write_card(checkpoint, results=measured(checkpoint, peers=[peer], alpha=1.0))
    assert (written.rows, written.others) == (("own 0",), ("bf16", "peer"))
    _, _, figures = tables(body(written))
    assert [row[:2] for row in figures] == [
        ["model", ""],
        ["bf16 (reference)", "in the same run"],
        ["own 0", "this checkpoint, alpha 1"],
        ["peer ¹", "in the same run"],
    ]
    assert figures[2][4:] == [
        "10.500 ± 0.500, 95.24 % [94.80, 95.60]",
        "1.00e-3 ± 1.0e-5",
        "0.7800 ± 0.0100, 97.5 % [95.2, 99.9]",
    ]
    assert "¹ a \\| note" in body(written)


def test_the_model_index_has_what_was_measured_on_these_files(checkpoint, measured):
    written = write_card(checkpoint, results=measured(checkpoint, peers=[make_model("peer", 6, ppl(11.0))]))
    name, results = model_index_to_eval_results(front_matter(written)["model-index"])
    assert name == "small-srd"
    assert [(each.dataset_name, each.metric_type, each.metric_name, each.metric_value) for each in results] == [
        ("WikiText-2", "perplexity", "perplexity", 10.5),
        ("WikiText-2", "kl_divergence", "KLD", 1e-3),
        ("ARC easy", "accuracy", "acc", 0.78),
    ]
    # a local file has the task's name, a data set of the hub its own
    assert [each.dataset_type for each in results] == ["wikitext2", "wikitext2", "allenai/ai2_arc"]


def test_several_rows_of_one_directory_keep_their_labels(checkpoint, measured):
    gguf_file = write_gguf(checkpoint / "small.gguf")
    written = write_card(checkpoint, results=measured(checkpoint, gguf_file))
    _, results = model_index_to_eval_results(front_matter(written)["model-index"])
    assert [each.metric_name for each in results if each.metric_type == "perplexity"] == [
        "perplexity, own 0",
        "perplexity, own 1",
    ]
    assert [row[1] for row in tables(body(written))[2][2:]] == ["this checkpoint", "small.gguf"]
    assert "GGUF files were scored by their dequantized weights." in body(written)


def test_tasks_on_one_data_set_stay_apart_in_the_model_index(checkpoint, measured, monkeypatch):
    monkeypatch.setattr(metadata, "_dataset", lambda task: ("org/data", "config"))
    written = write_card(checkpoint, results=measured(checkpoint))
    _, results = model_index_to_eval_results(front_matter(written)["model-index"])
    assert {(each.dataset_name, each.metric_name) for each in results} == {
        ("WikiText-2, ARC easy", "perplexity, WikiText-2"),
        ("WikiText-2, ARC easy", "KLD, WikiText-2"),
        ("WikiText-2, ARC easy", "acc, ARC easy"),
    }


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("allenai/ai2_arc/ARC-Easy", ("allenai/ai2_arc", "ARC-Easy")),
        ("Rowan/hellaswag", ("Rowan/hellaswag", None)),
        ("/data/eval/wiki.test.raw", ("task", None)),
        ("eval/wiki.test.raw", ("task", None)),
        ("/data/eval: arc_easy.jsonl", ("task", None)),
    ],
)
def test_data_sets_have_the_hub_s_names_and_files_the_task_s(source, expected):
    assert metadata._dataset(dataclasses.replace(ARC, name="task", source=source)) == expected


def test_it_says_how_it_was_measured(checkpoint, measured):
    written = write_card(checkpoint, results=measured(checkpoint))
    text = body(written)
    section = text[text.index("## How it was measured") : text.index("## How it was made")]
    for words in (
        "All rows come from one run of `srd compare` on 2026-11-25",
        "- WikiText-2: windows of 512 tokens that do not overlap, BOS in front of each",
        f"Data: `texts/wiki.test.raw`, SHA-256 `{'5' * 64}`.",
        "- ARC easy: multiple choice, no examples shown, the most likely answer counts. Data: `allenai/ai2_arc`.",
        "srd compare out/bf16 out/w4 --tasks wikitext2,arc_easy",
        "- Settings: dtype float32, device cpu\n",
        "- Machine: Linux, x86_64, 2 cores\n",
        "- Versions: srd-modifier 0.3.0, python 3.11.7, torch 2.13.0\n",
        f"of this checkpoint: `{model_digest(checkpoint)}`",
    ):
        assert words in section


def test_folders_of_the_machine_are_not_published(checkpoint, measured):
    results = measured(checkpoint)

    def spell_out(values):
        values["command"] = ["srd", "compare", "/home/jo/bf16", "a=/home/jo/w4@alpha=0", "http://localhost:8000/v1"]
        values["tasks"][0]["source"] = "/home/jo/data/wiki.test.raw"

    edit_json(results, spell_out)
    text = read(write_card(checkpoint, results=results))
    assert "/home" not in text
    assert blocks(text, "bash")[-1] == "srd compare bf16 a=w4@alpha=0 http://localhost:8000/v1\n"
    assert "Data: `wiki.test.raw`" in text


def test_results_of_other_files_are_refused(checkpoint, plain, measured):
    results = measured(plain)
    with pytest.raises(SRDError, match=r"results\.json: no row was measured on .*small-srd as it is now"):
        write_card(checkpoint, results=results)
    assert not (checkpoint / "README.md").exists()


def test_results_from_before_a_change_are_refused(checkpoint, measured):
    results = measured(checkpoint)
    edit_json(checkpoint / "config.json", lambda config: config["srd_config"].update(alpha=0.5))
    with pytest.raises(SRDError, match="no row was measured on"):
        write_card(checkpoint, results=results)


def test_a_gguf_file_that_changed_since_is_no_peer(checkpoint, measured):
    gguf_file = write_gguf(checkpoint / "small.gguf")
    results = measured(checkpoint, gguf_file)
    write_gguf(gguf_file, seed=1)
    with pytest.raises(SRDError, match=r"results\.json: own 1 was measured before the files in .* were changed"):
        write_card(checkpoint, results=results)


def test_a_row_of_a_gguf_file_does_not_stand_for_the_checkpoint(checkpoint, measured):
    gguf_file = write_gguf(checkpoint / "small.gguf")
    with pytest.raises(SRDError, match="no row was measured on"):
        write_card(checkpoint, results=measured(gguf_file))


def test_of_gguf_files_alone_one_row_is_enough(tmp_path, measured):
    folder = tmp_path / "files"
    folder.mkdir()
    measured_file = write_gguf(folder / "a.gguf")
    write_gguf(folder / "b.gguf", seed=1)
    written = write_card(folder, results=measured(measured_file))
    assert written.rows == ("own 0",)
    assert f"SHA-256 of `a.gguf`: `{model_digest(measured_file)}`" in body(written)


def test_a_copy_of_what_was_measured_may_have_the_figures(checkpoint, measured, tmp_path):
    results = measured(checkpoint)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    assert write_card(copy, results=results).rows == ("own 0",)


def test_the_card_does_not_change_what_it_is_bound_to(checkpoint, measured):
    results = measured(checkpoint)
    draw_all(make_results(make_model("own 0", 5, kld(1e-3))), results.parent, sensitivities={})
    write_card(checkpoint, results=results)
    assert write_card(checkpoint, results=results, overwrite=True).rows == ("own 0",)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_beside_the_results_come_along(checkpoint, measured):
    results = measured(checkpoint)
    picture = results.parent / "quality-wikitext2-kld_mean.png"
    picture.write_bytes(b"a picture")
    (results.parent / "quality-other.png").write_bytes(b"of another run")
    written = write_card(checkpoint, results=results)
    assert written.pictures == (checkpoint / "assets" / picture.name,)
    assert written.pictures[0].read_bytes() == b"a picture"
    assert [path.name for path in (checkpoint / "assets").iterdir()] == [picture.name]
    assert "![WikiText-2: KLD against bytes on disk](assets/quality-wikitext2-kld_mean.png)" in body(written)


def test_a_card_elsewhere_has_no_pictures(checkpoint, measured, tmp_path):
    results = measured(checkpoint)
    (results.parent / "quality-wikitext2-kld_mean.png").write_bytes(b"a picture")
    written = write_card(checkpoint, results=results, output=tmp_path / "card.md")
    assert written.pictures == ()
    assert not (checkpoint / "assets").exists()
    assert "![" not in body(written)


# --- earlier cards ---------------------------------------------------------------------------------------------------


def card(path, **values):
    path.write_text(f"---\n{json.dumps(values)}\n---\n\n# A card\n")


@pytest.fixture
def base_card(tmp_path, monkeypatch):
    """The card of org/base in the hub's cache."""
    path = tmp_path / "base-card.md"
    card(path, license="other", license_name="llama3", license_link="https://example.org", language="en")
    cached = {("org/base", "README.md"): str(path)}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *wanted: cached.get(wanted))
    return path


def test_the_licence_of_the_original_is_taken_from_its_card(checkpoint, base_card):
    found = front_matter(write_card(checkpoint, identity=Identity("org/base")))
    assert (found["license"], found["license_name"]) == ("other", "llama3")
    assert (found["license_link"], found["language"]) == ("https://example.org", "en")


def test_a_licence_that_is_given_stands_alone(checkpoint, base_card):
    found = front_matter(write_card(checkpoint, identity=Identity("org/base", license="mit")))
    assert found["license"] == "mit"
    assert "license_name" not in found


def test_the_directory_s_own_card_comes_first(checkpoint, base_card):
    card(checkpoint / "README.md", license="apache-2.0", base_model="org/base", quantized_by="someone")
    found = front_matter(write_card(checkpoint, overwrite=True))
    assert (found["license"], found["base_model"], found["quantized_by"]) == ("apache-2.0", "org/base", "someone")
    assert "license_name" not in found


def test_an_original_that_is_not_here_has_no_licence_to_take(checkpoint):
    assert "license" not in front_matter(write_card(checkpoint, identity=Identity("org/nowhere")))


def test_front_matter_that_is_none_is_a_sentence(checkpoint):
    (checkpoint / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: its front matter cannot be read") as caught:
        write_card(checkpoint, overwrite=True)
    assert "\n" not in str(caught.value)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_an_existing_card_is_kept(checkpoint):
    (checkpoint / "README.md").write_text("mine")
    with pytest.raises(SRDError, match=r"README\.md already exists; choose another file with --output or pass --over"):
        write_card(checkpoint)
    assert (checkpoint / "README.md").read_text() == "mine"
    write_card(checkpoint, overwrite=True)
    assert (checkpoint / "README.md").read_text() != "mine"


def test_the_same_directory_gives_the_same_card(checkpoint, measured):
    results = measured(checkpoint)
    first = read(write_card(checkpoint, results=results))
    assert read(write_card(checkpoint, results=results, overwrite=True)) == first


@pytest.mark.parametrize(
    ("output", "message"),
    [("", "is a directory, expected the name of a file"), ("nowhere/card.md", "there is no directory .*nowhere")],
)
def test_a_place_that_takes_no_card_is_a_sentence(checkpoint, tmp_path, output, message):
    with pytest.raises(SRDError, match=message):
        write_card(checkpoint, output=tmp_path / output)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_what_is_no_directory_is_a_sentence(tmp_path, name):
    (tmp_path / "file").write_text("text")
    with pytest.raises(SRDError, match=f"{name}: there is no such directory"):
        write_card(tmp_path / name)


def test_a_directory_without_a_model_is_a_sentence(tmp_path):
    with pytest.raises(SRDError, match=r"neither config\.json nor a GGUF file with a model"):
        write_card(tmp_path)


def test_weights_of_another_quantization_are_a_sentence(tiny_llama, tmp_path):
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    edit_json(directory / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(SRDError, match=r"config\.json: the weights are quantized by 'fp8' without packed int4"):
        write_card(directory, output=tmp_path / "card.md")


def test_a_damaged_gguf_file_is_a_sentence(tmp_path):
    for content in (b"", b"GGUF but no more"):
        (tmp_path / "small.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"small\.gguf is not a whole GGUF file"):
            write_card(tmp_path)


def test_a_damaged_checkpoint_is_a_sentence(checkpoint):
    (checkpoint / "srd" / "residual-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="residual-00001-of-00002"):
        write_card(checkpoint)


def test_a_recipe_that_is_no_yaml_is_a_sentence(checkpoint):
    (checkpoint / "recipe.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml is not YAML") as caught:
        write_card(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_model": "a b"}, "--base-model is 'a b', expected a hub id"),
        ({"base_model": "/home/model"}, "--base-model is '/home/model', expected a hub id"),
        ({"repo_id": "a/b/c"}, "--repo-id is 'a/b/c', expected a hub id"),
        ({"license": "Apache 2.0"}, "--license is 'Apache 2.0', expected an identifier of the hub such as apache-2.0"),
        ({"quantized_by": " "}, "--quantized-by is ' ', expected a name"),
    ],
)
def test_what_the_hub_does_not_take_is_a_sentence(values, message):
    with pytest.raises(ConfigError, match=message):
        Identity(**values)


# --- what the hub and readers get ------------------------------------------------------------------------------------


@pytest.fixture
def full(checkpoint, measured):
    """A card with everything in it, and names that Markdown and YAML would take for their own."""
    write_gguf(checkpoint / "small.gguf", library="0.3.0")
    peer = make_model("a | *peer* `x` <b> # [y](z) 'q': ---", 6, ppl(11.0), notes=("a note\nof two | lines",))
    results = measured(checkpoint, checkpoint / "small.gguf", peers=[peer])
    return write_card(checkpoint, results=results, identity=Identity("org/base", "some: one", "org/name", "mit"))


def test_the_library_loads_the_card_and_writes_it_again(full):
    loaded = ModelCard(read(full))
    assert str(loaded) == read(full)
    assert ModelCard.load(full.path).data.to_dict() == loaded.data.to_dict() == front_matter(full)
    assert loaded.data.eval_results == model_index_to_eval_results(front_matter(full)["model-index"])[1]
    assert loaded.data.model_name == "name"


def test_the_hub_is_asked_about_the_card_as_it_stands(full, monkeypatch):
    """The hub's own check needs the hub; what it would get is what lies on the disk."""
    sent = []

    class Session:
        def post(self, url, **request):
            import httpx

            sent.append((url, request["json"]))
            return httpx.Response(200, request=httpx.Request("POST", url))

    monkeypatch.setattr("huggingface_hub.repocard.get_session", Session)
    ModelCard.load(full.path).validate()
    ((url, body),) = sent
    assert url.endswith("/api/validate-yaml")
    assert body == {"repoType": "model", "content": read(full)}


def test_front_matter_has_the_types_that_the_hub_asks_for(full):
    found = front_matter(full)
    assert all(isinstance(found[name], str) for name in ("base_model", "license", "pipeline_tag", "quantized_by"))
    assert all(isinstance(tag, str) for tag in found["tags"])
    for result in found["model-index"][0]["results"]:
        assert set(result) == {"task", "dataset", "metrics"}
        assert {"type", "name"} <= set(result["dataset"])
        for metric in result["metrics"]:
            assert isinstance(metric["type"], str)
            assert math.isfinite(metric["value"])


def test_tables_are_whole_and_names_are_shown_as_they_are(full):
    found = tables(body(full))
    assert len(found) == 3
    for rows in found:
        assert len({len(row) for row in rows}) == 1
    assert found[2][-1][0] == "a | *peer* `x` <b> # [y](z) 'q': --- ¹"


def test_nothing_is_left_open(full):
    for word in ("pending", "TODO", "TBD", "None", "nan", "n/a", "unknown", "estimate"):
        assert not re.search(rf"\b{word}\b", body(full)), word


def test_the_reference_itself_may_have_a_card(tiny_llama, tmp_path):
    reference = dataclasses.replace(REFERENCE, digest=model_digest(tiny_llama), model=str(tiny_llama))
    write_results(make_results(make_model("w4", 5, ppl(10.5)), reference=reference), tmp_path / "results.json")
    written = write_card(tiny_llama, results=tmp_path / "results.json", output=tmp_path / "card.md")
    assert written.rows == ("bf16",)
    assert tables(body(written))[1][1][:2] == ["bf16 (reference)", "this checkpoint"]
