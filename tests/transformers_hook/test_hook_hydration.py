"""Hydration by intent: the model of its chunks, in place, while others use it, and without staying in memory."""

import itertools
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from background import SOON, in_background
from random_models import make_llama, save_model
from rtn import write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedModel, TextIteratorStreamer

from srd_modifier import hydrate, load_corrected, release, set_alpha
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.met import INTENTS, Policy, build_met
from srd_modifier.transformers.correction import correction_of

CHUNKS = {
    "INFORM": ["early"],
    "CLARIFY": ["early", "governance"],
    "REFUSE": ["early", "governance"],
    "UNCERTAIN": ["early", "governance"],
    "HARM": ["early", "factual", "reasoning", "governance"],
    "DECEIVE": ["early", "factual", "reasoning", "governance"],
}
CUSTOM = {"SUMMARIZE": ["factual"], "REFUSE": ["reasoning"], "DRAFT": []}
IDS = torch.arange(32)[None]


@pytest.fixture
def model(finished_checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(finished_checkpoint)


@pytest.fixture(scope="module")
def models(finished_checkpoint) -> list[PreTrainedModel]:
    """The models that the intents are, each loaded by itself."""
    return [load_corrected(finished_checkpoint, chunks=CHUNKS[intent]) for intent in ("INFORM", "REFUSE", "HARM")]


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Every weight and the logits, bit for bit."""
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


# --- the chunks of an intent


@pytest.mark.parametrize("intent", INTENTS)
@pytest.mark.parametrize("start", ["all", "none", "others"])
def test_an_intent_is_what_loading_its_chunks_is(intent, start, model, finished_checkpoint):
    if start != "all":
        release(model)
    if start == "others":
        hydrate(model, chunks=["factual"])
    hydrate(model, intent=intent)
    assert_same(model, load_corrected(finished_checkpoint, chunks=CHUNKS[intent]))


def test_the_intents_are_different_models(model, logits):
    outputs = []
    for intent in ("INFORM", "REFUSE", "HARM"):
        hydrate(model, intent=intent)
        outputs.append(logits(model))
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(outputs, 2))


def test_intents_follow_one_another_in_any_order(model, models):
    expected = dict(zip(("INFORM", "REFUSE", "HARM"), models, strict=True))
    for intent in ("HARM", "INFORM", "REFUSE", "INFORM", "HARM", "REFUSE"):
        hydrate(model, intent=intent)
        assert_same(model, expected[intent])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_in_other_dtypes(dtype, finished_checkpoint):
    model = load_corrected(finished_checkpoint, dtype=dtype)
    hydrate(model, intent="CLARIFY")
    assert_same(model, load_corrected(finished_checkpoint, dtype=dtype, chunks=CHUNKS["CLARIFY"]))


def test_experts_are_hydrated_with_their_layer(mixture_checkpoint):
    model = load_corrected(mixture_checkpoint, chunks=[])
    for intent in ("INFORM", "HARM", "INFORM"):
        hydrate(model, intent=intent)
        assert_same(model, load_corrected(mixture_checkpoint, chunks=CHUNKS[intent]))


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}], ids=["bf16 scales", "biases"])
def test_a_tied_head_and_other_shapes(changes, tied_checkpoint, float32_checkpoint):
    directory = float32_checkpoint if changes else tied_checkpoint
    model = load_corrected(directory, chunks=["reasoning"])
    hydrate(model, intent="REFUSE")
    assert_same(model, load_corrected(directory, chunks=CHUNKS["REFUSE"]))


def test_offloaded_weights(finished_checkpoint, tmp_path):
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {f"model.layers.{layer}": "disk" if layer in (1, 3, 5) else "cpu" for layer in range(6)}
    options = {"device_map": places, "offload_folder": str(tmp_path)}
    model = load_corrected(finished_checkpoint, chunks=["early", "reasoning"], **options)
    hydrate(model, intent="REFUSE")
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        expected = load_corrected(finished_checkpoint, chunks=CHUNKS["REFUSE"])(input_ids=IDS).logits
    assert torch.equal(found, expected)


def test_the_dial_turns_what_is_hydrated(model, finished_checkpoint):
    set_alpha(model, 0.5)
    hydrate(model, intent="CLARIFY")
    assert_same(model, load_corrected(finished_checkpoint, alpha=0.5, chunks=CHUNKS["CLARIFY"]))
    set_alpha(model, 0.25)
    assert_same(model, load_corrected(finished_checkpoint, alpha=0.25, chunks=CHUNKS["CLARIFY"]))


def test_chunks_come_on_top_and_intents_replace(model, finished_checkpoint):
    hydrate(model, intent="INFORM")
    hydrate(model, chunks=["factual"])
    assert_same(model, load_corrected(finished_checkpoint, chunks=["early", "factual"]))
    hydrate(model, intent="INFORM")
    assert_same(model, load_corrected(finished_checkpoint, chunks=["early"]))


def test_a_corrected_head_is_in_no_chunk(random_llama, tmp_path):
    directory = write_checkpoint(random_llama, tmp_path / "model", quantized=r"_proj$|lm_head$", ignore=())
    model = load_corrected(directory)
    hydrate(model, intent="HARM")
    chosen = load_corrected(directory, chunks=CHUNKS["HARM"])
    assert_same(model, chosen)
    assert not torch.equal(model.lm_head.weight, load_corrected(directory).lm_head.weight)


def test_only_weights_that_change_are_computed(model, monkeypatch):
    hydrate(model, intent="REFUSE")
    computed = []
    correct = Sidecar.correct

    def spy(self, module, *args, **kwargs):
        computed.append(module)
        return correct(self, module, *args, **kwargs)

    monkeypatch.setattr(Sidecar, "correct", spy)
    hydrate(model, intent="CLARIFY")  # the same chunks
    assert computed == []
    hydrate(model, intent="INFORM")
    assert {re.findall(r"layers\.(\d)", name)[0] for name in computed} == {"5"}


# --- the policy


def test_a_policy_of_ones_own(model, finished_checkpoint, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps(CUSTOM))
    for policy in (Policy.from_mapping(CUSTOM, "test"), path, str(path)):
        for intent, chunks in CUSTOM.items():
            hydrate(model, intent=intent, policy=policy)
            assert_same(model, load_corrected(finished_checkpoint, chunks=chunks))


@pytest.fixture
def with_policy(checkpoint) -> Path:
    """A checkpoint that brings its own."""
    met = build_met(checkpoint, policy=Policy.from_mapping(CUSTOM, "test"))
    (checkpoint / "met.json").write_text(json.dumps(met))
    return checkpoint


def test_the_policy_that_a_checkpoint_brings(with_policy, finished_checkpoint):
    model = load_corrected(with_policy)
    for intent in ("REFUSE", "SUMMARIZE"):
        hydrate(model, intent=intent)
        assert_same(model, load_corrected(finished_checkpoint, chunks=CUSTOM[intent]))
    with pytest.raises(ConfigError, match="intent 'HARM' is unknown, expected one of SUMMARIZE, REFUSE, DRAFT"):
        hydrate(model, intent="HARM")
    hydrate(model, intent="HARM", policy=Policy.default())
    assert_same(model, load_corrected(finished_checkpoint))


def test_the_policy_of_another_file(model, with_policy, finished_checkpoint):
    for policy in (with_policy / "met.json", with_policy):
        release(model)
        hydrate(model, intent="REFUSE", policy=policy)
        assert_same(model, load_corrected(finished_checkpoint, chunks=CUSTOM["REFUSE"]))


def test_a_checkpoint_that_is_gone_may_have_had_a_policy(with_policy, finished_checkpoint):
    model = load_corrected(with_policy)
    shutil.rmtree(with_policy)
    with pytest.raises(CheckpointError, match=r"is gone, and its met\.json with it; give hydrate a policy"):
        hydrate(model, intent="REFUSE")
    hydrate(model, intent="REFUSE", policy=Policy.default())
    assert_same(model, load_corrected(finished_checkpoint, chunks=CHUNKS["REFUSE"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"intent": "inform"}, "intent 'inform' is unknown, expected one of INFORM, CLARIFY"),
        ({"intent": "INFORM", "chunks": ["early"]}, "chunks and an intent were both given"),
        ({"intent": "INFORM", "chunks": []}, "chunks and an intent were both given"),
        ({"policy": Policy.default()}, "a policy was given without an intent"),
        ({"policy": Policy.default(), "chunks": ["early"]}, "a policy was given without an intent"),
    ],
    ids=str,
)
def test_arguments_that_are_refused_change_nothing(arguments, message, model, finished_checkpoint):
    with pytest.raises(ConfigError, match=message):
        hydrate(model, **arguments)
    assert_same(model, load_corrected(finished_checkpoint))


def test_a_policy_that_is_not_there(model, finished_checkpoint, tmp_path):
    for name in ("policy.yaml", "met.json"):
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
            hydrate(model, intent="INFORM", policy=tmp_path / name)
    assert_same(model, load_corrected(finished_checkpoint))


def test_a_damaged_policy_of_the_checkpoint(checkpoint, finished_checkpoint):
    model = load_corrected(checkpoint)
    (checkpoint / "met.json").write_text('{"format": "srd-met", "version": 99}')
    with pytest.raises(CheckpointError, match=r"met\.json: version is 99"):
        hydrate(model, intent="INFORM")
    assert_same(model, load_corrected(finished_checkpoint))


def test_a_model_without_a_residual(random_llama):
    with pytest.raises(SRDError, match="this LlamaForCausalLM has no residual"):
        hydrate(AutoModelForCausalLM.from_pretrained(random_llama), intent="INFORM")


# --- memory


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory) -> Path:
    """A residual of 31 MB: enough to be seen among the pages of a process."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8}
    folder = tmp_path_factory.mktemp("large")
    return write_checkpoint(save_model(make_llama(**sizes), folder / "original"), folder / "model")


def resident(directory: Path) -> int:
    """Bytes of the mapped files in this directory that are in memory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line[line.find("/") :].startswith(f"{directory}/") if "/" in line else False
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def seen_at_release(large_checkpoint, monkeypatch) -> list[int]:
    """What of the residual is in memory each time before it is given back."""
    seen: list[int] = []
    plain = Sidecar.release

    def spy(self) -> None:
        seen.append(resident(large_checkpoint / "srd"))
        plain(self)

    monkeypatch.setattr(Sidecar, "release", spy)
    return seen


counts_pages = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts pages as Linux does")


@counts_pages
def test_the_memory_of_the_maps_is_returned(large_checkpoint, seen_at_release):
    model = load_corrected(large_checkpoint, chunks=[])
    (file,) = (large_checkpoint / "srd").glob("residual-*.safetensors")
    size = file.stat().st_size
    release(model)
    loaded = resident(large_checkpoint)  # what of the model's own weights Transformers has mapped
    read = {}
    for intent in ("INFORM", "REFUSE", "HARM"):
        release(model)
        hydrate(model, intent=intent)
        read[intent] = seen_at_release[-1]
        assert resident(large_checkpoint / "srd") < size / 100
        assert resident(large_checkpoint) <= loaded  # the base was read too
    # of ten layers two, four and ten; the kernel maps up to 2 MB around what is read
    assert 0.2 * size <= read["INFORM"] < read["REFUSE"] < read["HARM"] <= 1.01 * size
    assert read["INFORM"] < 0.5 * size
    assert read["HARM"] > 0.99 * size
    release(model)
    assert resident(large_checkpoint) <= loaded


@counts_pages
def test_a_large_change_returns_memory_on_its_way(large_checkpoint, seen_at_release, monkeypatch):
    from srd_modifier.transformers import correction

    model = load_corrected(large_checkpoint, chunks=[])
    monkeypatch.setattr(correction, "_RELEASE_BYTES", 4 * 2**20)
    seen_at_release.clear()
    hydrate(model, intent="HARM")
    assert len(seen_at_release) >= 5
    assert max(seen_at_release) < 16 * 2**20  # of 30


def test_memory_is_returned_when_a_change_fails(checkpoint, monkeypatch):
    model = load_corrected(checkpoint, chunks=[])
    released = []
    monkeypatch.setattr(Sidecar, "release", lambda self: released.append(self))
    monkeypatch.setattr(Sidecar, "encoded", lambda *_: (_ for _ in ()).throw(CheckpointError("damaged")))
    with pytest.raises(CheckpointError, match="damaged"):
        hydrate(model, intent="INFORM")
    assert len(released) == 1


# --- threads


def generate(model: PreTrainedModel, **options) -> Tensor:
    """Logits of every step of a greedy generation."""
    prompt = torch.arange(1, 9)[None]
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=10,
        min_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits)


def forward(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("run", [forward, generate])
def test_every_output_is_of_one_consistent_model_while_intents_change(run, model, models):
    expected = [run(one) for one in models]
    hydrate(model, intent="INFORM")
    ended, flips = threading.Event(), 0

    def flip() -> None:
        nonlocal flips
        for intent in itertools.cycle(("HARM", "INFORM", "REFUSE")):
            if ended.is_set():
                return
            hydrate(model, intent=intent)
            flips += 1

    found: list[list[bool]] = []  # of each output, which of the models it is of

    def use() -> None:
        # until there was enough to see, however fast this machine is
        while not (flips >= 20 and len(found) >= 20 and all(map(any, zip(*found, strict=True)))):
            output = run(model)
            found.append([torch.equal(output, one) for one in expected])
            if ended.is_set():
                return

    flipping = in_background(flip)
    try:
        for using in [in_background(use) for _ in range(2)]:
            using.result(SOON)
    finally:
        ended.set()
    flipping.result(SOON)
    assert all(sum(matches) == 1 for matches in found), "an output is of no single model"


def test_without_the_lock_an_output_would_be_of_no_single_model(model, models):
    # that the test above can fail: the same change between two tokens, with nobody kept waiting
    class Change(LogitsProcessor):
        def __call__(self, input_ids, scores):
            correction = correction_of(model)
            chosen = ["early"] if input_ids.shape[1] % 2 else list(CHUNKS["HARM"])
            correction.update(model, hydrated=correction.in_chunks(chosen))
            return scores

    mixed = generate(model, logits_processor=[Change()])
    assert not any(torch.equal(mixed, generate(one)) for one in models)


def test_alphas_and_chunks_change_in_one_step_too(model, finished_checkpoint):
    plain = forward(load_corrected(finished_checkpoint, alpha=0))
    expected = [forward(load_corrected(finished_checkpoint)), plain]
    ended = threading.Event()

    def turn() -> None:
        while not ended.is_set():
            set_alpha(model, 0)
            set_alpha(model, 1)
            release(model)
            hydrate(model)

    turning = in_background(turn)
    try:
        found = in_background(lambda: [forward(model) for _ in range(40)]).result(SOON)
    finally:
        ended.set()
    turning.result(SOON)
    assert all(any(torch.equal(output, one) for one in expected) for output in found)


def test_a_stream_is_of_one_model(model, models, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def stream(of: PreTrainedModel, meanwhile=lambda: None) -> str:
        streamer = TextIteratorStreamer(tokenizer, timeout=SOON)
        generating = in_background(lambda: generate(of, streamer=streamer))
        pieces = []
        for piece in streamer:
            if len(pieces) == 2:
                meanwhile()
            pieces.append(piece)
        generating.result(SOON)
        return "".join(pieces)

    hydrate(model, intent="HARM")
    changing = []
    text = stream(model, lambda: changing.append(in_background(lambda: hydrate(model, intent="INFORM"))))
    assert text == stream(models[2])
    changing[0].result(SOON)
    assert torch.equal(generate(model), generate(models[0]))
