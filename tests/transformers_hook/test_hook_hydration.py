"""Hydration by intent: the logits of chunk selection, memory that is given back, and one set of weights for a call."""

import copy
import gc
import json
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from random_models import make_llama, save_model
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

from srd_modifier import hydrate, load_corrected, release, set_alpha
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.met import INTENTS, Policy, build_met, encode_met
from srd_modifier.transformers.correction import correction_of
from srd_modifier.transformers.measure import measure_hydration

TOKENS = torch.arange(1, 13)[None]
GENERATION = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture
def model(finished_checkpoint):
    return AutoModelForCausalLM.from_pretrained(finished_checkpoint)


@pytest.fixture(scope="module")
def by_intent(finished_checkpoint) -> dict[str, torch.Tensor]:
    """What chunk selection gives, in models that never knew an intent."""
    chunks = Policy.default().intents
    return {intent: logits(load_corrected(finished_checkpoint, chunks=chunks[intent])) for intent in INTENTS}


@pytest.mark.parametrize("intent", INTENTS)
def test_an_intent_gives_the_logits_of_its_chunks(model, by_intent, intent):
    hydrate(model, intent=intent)
    assert torch.equal(logits(model), by_intent[intent])


def test_intents_differ_and_follow_one_another_in_any_order(model, by_intent):
    assert not torch.equal(by_intent["INFORM"], by_intent["CLARIFY"])
    assert not torch.equal(by_intent["CLARIFY"], by_intent["HARM"])
    for intent in ("HARM", "INFORM", "CLARIFY", "INFORM", "DECEIVE", "REFUSE"):
        hydrate(model, intent=intent)
        assert torch.equal(logits(model), by_intent[intent]), intent


def test_the_checkpoints_own_policy_counts_and_a_given_one_before_it(finished_checkpoint, tmp_path):
    own = tmp_path / "model"
    own.mkdir()
    for path in finished_checkpoint.rglob("*"):
        if path.is_file():
            copied = own / path.relative_to(finished_checkpoint)
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes(path.read_bytes())
    (own / "met.json").write_bytes(encode_met(build_met(own, policy=Policy({"AUDIT": ("reasoning",)}))))
    model = AutoModelForCausalLM.from_pretrained(own)
    hydrate(model, intent="AUDIT")
    assert torch.equal(logits(model), logits(load_corrected(own, chunks=["reasoning"])))
    with pytest.raises(ConfigError, match="intent 'INFORM' is unknown, expected one of AUDIT"):
        hydrate(model, intent="INFORM")
    custom = tmp_path / "custom.yaml"
    custom.write_text("chat: []\n")
    hydrate(model, intent="chat", policy=custom)
    assert torch.equal(logits(model), logits(load_corrected(own, alpha=0.0)))


def test_what_cannot_be_meant_is_refused(model):
    before = logits(model)
    with pytest.raises(ConfigError, match="intent 'SHRUG' is unknown, expected one of INFORM"):
        hydrate(model, intent="SHRUG")
    with pytest.raises(ConfigError, match="chunks and an intent were both given"):
        hydrate(model, intent="INFORM", chunks=["early"])
    with pytest.raises(ConfigError, match="a policy was given without an intent"):
        hydrate(model, policy=Policy.default())
    with pytest.raises(SRDError, match="there is no such policy"):
        hydrate(model, intent="INFORM", policy=Path("nowhere.yaml"))
    assert torch.equal(logits(model), before)


def test_alpha_goes_on_counting_under_an_intent(model, finished_checkpoint):
    set_alpha(model, 0.5)
    hydrate(model, intent="INFORM")
    assert torch.equal(logits(model), logits(load_corrected(finished_checkpoint, alpha=0.5, chunks=["early"])))


def test_a_change_that_fails_is_undone(finished_checkpoint, tmp_path):
    import shutil

    shutil.copytree(finished_checkpoint, tmp_path / "model")
    model = load_corrected(tmp_path / "model", chunks=[])
    before = logits(model)
    shard = next((tmp_path / "model" / "srd").glob("residual-*.safetensors"))
    # the last layers' residual is damaged on the disk, after the model was loaded
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    places = json.loads(shard.read_bytes()[8 : 8 + header])
    last = max(name for name in places if name.endswith("layers.5.mlp.up_proj.weight_d8"))
    with shard.open("r+b") as file:
        file.seek(8 + header + places[last]["data_offsets"][0])
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match=re.escape(f"{last} does not match its digest")):
        hydrate(model, intent="HARM")
    assert torch.equal(logits(model), before)
    hydrate(model, intent="INFORM")  # what is whole can still be loaded
    assert not torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def generated(finished_checkpoint) -> set[tuple[int, ...]]:
    """What each of the two intents below generates when nothing changes meanwhile."""
    found = set()
    for chunks in ([], ["early", "factual", "reasoning", "governance"]):
        model = load_corrected(finished_checkpoint, chunks=chunks)
        found.add(tuple(model.generate(TOKENS, **GENERATION)[0].tolist()))
    assert len(found) == 2, "the test needs intents that generate different texts"
    return found


@pytest.mark.slow
def test_a_running_generate_sees_one_set_of_weights(model, generated):
    policy = Policy({"PLAIN": (), "FULL": ("early", "factual", "reasoning", "governance")})
    stop, failures, changes = threading.Event(), [], 0

    def change() -> None:
        nonlocal changes
        try:
            while not stop.is_set():
                hydrate(model, intent=("PLAIN", "FULL")[changes % 2], policy=policy)
                changes += 1
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        outputs = [tuple(model.generate(TOKENS, **GENERATION)[0].tolist()) for _ in range(30)]
    finally:
        stop.set()
        thread.join(60)
    assert not failures
    assert changes > 3, "nothing was changed meanwhile"
    assert set(outputs) <= generated


@pytest.mark.slow
def test_without_the_lock_a_generate_would_mix_them(model, generated, monkeypatch):
    """The test above can fail: weights changed between two tokens give a text of neither kind."""

    class Change(LogitsProcessor):
        def __call__(self, input_ids, scores):
            correction = correction_of(model)
            full = set(correction.dial)
            correction.update(model, hydrated=set() if correction.hydrated == full else full)
            return scores

    output = model.generate(TOKENS, logits_processor=LogitsProcessorList([Change()]), **GENERATION)
    assert tuple(output[0].tolist()) not in generated


def test_a_change_from_inside_a_call_is_refused(model):
    before = logits(model)

    class Change(LogitsProcessor):
        def __call__(self, input_ids, scores):
            hydrate(model, intent="INFORM")
            return scores

    with pytest.raises(SRDError, match="in the middle of its own forward, generate or hydration"):
        model.generate(TOKENS, logits_processor=LogitsProcessorList([Change()]), **GENERATION)
    assert torch.equal(logits(model), before)
    hydrate(model, intent="INFORM")  # the call has ended, with an error, and blocks nothing


def test_a_change_waits_for_a_generate_that_streams(model, finished_checkpoint):
    class Numbers:
        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    streamer = TextIteratorStreamer(Numbers())
    alone = model.generate(TOKENS, **GENERATION)[0].tolist()
    thread = threading.Thread(target=lambda: model.generate(TOKENS, streamer=streamer, **GENERATION))
    thread.start()
    first = next(iter(streamer))
    hydrate(model, intent="INFORM")
    text = first + "".join(streamer)
    thread.join(60)
    assert text.split() == [str(number) for number in alone]
    assert torch.equal(logits(model), logits(load_corrected(finished_checkpoint, chunks=["early"])))


def test_a_forward_that_fails_blocks_nothing(model):
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    done = threading.Thread(target=lambda: hydrate(model, intent="INFORM"))
    done.start()
    done.join(60)
    assert not done.is_alive()


def test_copies_and_pickles_of_a_model_work_and_have_no_residual(model):
    before = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), before)
        with pytest.raises(SRDError, match="has no residual"):
            hydrate(other, intent="INFORM")


def mapped_bytes(folder: Path) -> int:
    """Resident bytes of the maps of files below a folder."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = str(folder) in line
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what a map takes")
def test_hydration_gives_its_memory_back(quantize, group_scheme, tmp_path):
    """On a model whose residual is some 20 MB."""
    from srd_modifier import SRDModifier

    dense = save_model(make_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=6), tmp_path / "dense")
    recipe = SRDModifier(config_groups=group_scheme(64), ignore=["lm_head"])
    quantize(recipe, tmp_path / "srd", model=dense)
    model = load_corrected(tmp_path / "srd", chunks=[])
    gc.collect()
    residual = sum(path.stat().st_size for path in (tmp_path / "srd" / "srd").glob("residual-*"))
    assert residual > 10_000_000
    # embedding and head stay mapped from the base's file: they are the model's weights
    idle = mapped_bytes(tmp_path / "srd")
    most = residual / 10
    for intent in ("HARM", "INFORM", "HARM"):
        hydrate(model, intent=intent)
        assert mapped_bytes(tmp_path / "srd" / "srd") <= most, intent
        assert mapped_bytes(tmp_path / "srd") <= idle + most, intent
    release(model)
    assert mapped_bytes(tmp_path / "srd") <= idle + most
    # these pages do fill when nobody gives them back, so that the figures above mean something
    sidecar = correction_of(model).sidecar
    for module in sidecar.entries:
        sidecar.encoded(module)
    assert mapped_bytes(tmp_path / "srd" / "srd") > residual / 2


def test_measuring_tells_seconds_bytes_and_memory(finished_checkpoint):
    met = build_met(finished_checkpoint)
    measured = measure_hydration(finished_checkpoint, Policy.default(), dtype=torch.float32)
    assert [one.intent for one in measured] == list(INTENTS)
    for one in measured:
        assert one.chunks == Policy.default().chunks(one.intent)
        assert one.residual_bytes == met["budgets"][one.intent]["residual_bytes"] > 0
        assert one.seconds > 0
        assert one.resident_bytes_before > 0
        assert one.resident_bytes_after > 0
        assert one.resident_bytes_peak is None or one.resident_bytes_peak >= one.resident_bytes_after
