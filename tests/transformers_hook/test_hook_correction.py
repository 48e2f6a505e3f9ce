import copy
import gc
import random
import re
import weakref
from pathlib import Path

import pytest
import torch
from small_checkpoint import flip_bit
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from srd_modifier import hydrate, load_corrected, release, set_alpha
from srd_modifier.errors import CheckpointError, ConfigError, SRDError

CHUNKS = {"early": (0, 1), "factual": (2,), "reasoning": (3, 4), "governance": (5,)}  # of six layers


def layer(name: str) -> int:
    return int(re.findall(r"layers\.(\d+)\.", name)[0])


class Expected:
    """What a user expects of the dial: released chunks are plain W4, the others have the alpha last set."""

    def __init__(self, weights) -> None:
        self.weights = weights
        self.dial = dict.fromkeys(weights.residual, 1.0)
        self.released: set[str] = set()

    def set(self, alpha: float, layer_alphas: dict[str, float] | None = None) -> "Expected":
        patterns = {re.compile(key.removeprefix("re:")): value for key, value in (layer_alphas or {}).items()}
        self.dial = {
            name: next((value for pattern, value in patterns.items() if pattern.match(name)), alpha)
            for name in self.dial
        }
        return self

    def release(self, *chunks: str) -> "Expected":
        self.released |= {name for name in self.dial if any(layer(name) in CHUNKS[chunk] for chunk in chunks or CHUNKS)}
        return self

    def hydrate(self, *chunks: str) -> "Expected":
        self.released -= {name for name in self.dial if any(layer(name) in CHUNKS[chunk] for chunk in chunks or CHUNKS)}
        return self

    def now(self) -> dict[str, torch.Tensor]:
        return self.weights.weights({name: a for name, a in self.dial.items() if name not in self.released})


@pytest.fixture
def model(finished_checkpoint) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(finished_checkpoint)


@pytest.fixture(scope="module")
def weights(finished_checkpoint, by_hand):
    return by_hand(finished_checkpoint)


@pytest.fixture
def expected(weights) -> Expected:
    return Expected(weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_set_alpha(dtype, finished_checkpoint, expected, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint, dtype=dtype)
    for alpha in (0.5, 0, 1, 0.125, 1.0):
        set_alpha(model, alpha)
        assert_weights(model, expected.set(alpha).now())


def test_there_and_back_is_the_same_model_bit_for_bit(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for alpha in (0, 0.3, 1):
        set_alpha(model, alpha)
    release(model)
    hydrate(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_alpha_zero_is_the_plain_model_bit_for_bit(model, plain, logits):
    set_alpha(model, 0)
    assert torch.equal(logits(model), plain.tensors["finished", "bfloat16"]["logits"])
    set_alpha(model, 1)
    release(model)
    assert torch.equal(logits(model), plain.tensors["finished", "bfloat16"]["logits"])


def test_layer_alphas(model, expected, assert_weights):
    layer_alphas = {"re:.*layers.3": 0.0, "re:.*q_proj": 0.25, "model.layers.0.mlp.up_proj": 0.75}
    set_alpha(model, 0.5, layer_alphas=layer_alphas)
    assert_weights(model, expected.set(0.5, layer_alphas).now())
    set_alpha(model, 0.5)  # which does not keep them
    assert_weights(model, expected.set(0.5).now())


def test_the_first_pattern_counts(model, expected, assert_weights):
    set_alpha(model, 1, layer_alphas={"re:.*proj": 0.5, "re:.*q_proj": 0.0})
    assert_weights(model, expected.set(0.5).now())


def test_the_checkpoints_own_layer_alphas_end_with_the_first_set_alpha(partial_checkpoint, by_hand, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(partial_checkpoint)
    set_alpha(model, 0.5)
    assert_weights(model, by_hand(partial_checkpoint).weights(0.5))


def test_release_and_hydrate(model, expected, assert_weights):
    release(model, chunks=["early", "reasoning"])
    assert_weights(model, expected.release("early", "reasoning").now())
    hydrate(model, chunks=["early"])
    assert_weights(model, expected.hydrate("early").now())
    release(model)
    assert_weights(model, expected.release().now())
    hydrate(model)
    assert_weights(model, expected.hydrate().now())
    hydrate(model)  # which is nothing new
    assert_weights(model, expected.now())


def test_the_alpha_is_kept_while_a_chunk_is_released(model, expected, assert_weights):
    set_alpha(model, 0.5, layer_alphas={"re:.*q_proj": 0.25})
    release(model, chunks=["factual"])
    hydrate(model, chunks=["factual"])
    assert_weights(model, expected.set(0.5, {"re:.*q_proj": 0.25}).now())


def test_a_released_chunk_has_the_new_alpha_when_it_comes_back(model, expected, assert_weights):
    release(model, chunks=["early"])
    set_alpha(model, 0.5)
    assert_weights(model, expected.release("early").set(0.5).now())
    hydrate(model, chunks=["early"])
    assert_weights(model, expected.hydrate("early").now())


def test_all_released_then_the_dial_then_hydrated(model, expected, assert_weights):
    release(model)
    set_alpha(model, 0.5)
    assert_weights(model, expected.release().set(0.5).now())
    hydrate(model)
    assert_weights(model, expected.hydrate().now())


def test_from_zero_to_one(model, expected, assert_weights):
    set_alpha(model, 0)
    assert_weights(model, expected.set(0).now())
    set_alpha(model, 1)
    assert_weights(model, expected.set(1).now())


def test_a_released_chunk_stays_so_while_the_dial_passes_zero(model, expected, assert_weights):
    release(model, chunks=["early"])
    for alpha in (0, 1):
        set_alpha(model, alpha)
        assert_weights(model, expected.release("early").set(alpha).now())


def test_a_chunk_released_at_zero_stays_released(model, expected, assert_weights):
    set_alpha(model, 0)
    release(model, chunks=["reasoning"])
    set_alpha(model, 1)
    assert_weights(model, expected.release("reasoning").now())


def test_a_chunk_hydrated_at_zero_comes_with_the_dial(model, expected, assert_weights):
    release(model)
    set_alpha(model, 0)
    hydrate(model, chunks=["factual"])
    set_alpha(model, 0.5)
    assert_weights(model, expected.release().hydrate("factual").set(0.5).now())


def test_a_layer_alpha_of_zero_is_not_a_release(model, expected, assert_weights):
    set_alpha(model, 1, layer_alphas={"re:.*layers.0": 0.0})
    set_alpha(model, 0.5)
    assert_weights(model, expected.set(0.5).now())


@pytest.mark.parametrize("alpha", [None, 0, 0.5])
def test_chunks_left_out_when_loading_stay_so_until_hydrated(alpha, finished_checkpoint, expected, assert_weights):
    model = load_corrected(finished_checkpoint, alpha=alpha, chunks=["early"])
    expected.set(1.0 if alpha is None else alpha).release("factual", "reasoning", "governance")
    assert_weights(model, expected.now())
    for value in (0.25, 0, 1):
        set_alpha(model, value)
        assert_weights(model, expected.set(value).now())
    hydrate(model, chunks=["reasoning"])
    assert_weights(model, expected.hydrate("reasoning").now())
    hydrate(model)
    assert_weights(model, expected.hydrate().now())


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence(seed, finished_checkpoint, expected, assert_weights):
    choose = random.Random(seed)
    chunks = choose.sample(list(CHUNKS), k=choose.randint(0, 4))
    model = load_corrected(finished_checkpoint, chunks=chunks)
    expected.release(*[chunk for chunk in CHUNKS if chunk not in chunks] or ["early"])
    if len(chunks) == len(CHUNKS):
        expected.hydrate()
    for _ in range(20):
        step = choose.choice(["set", "set with layers", "release", "hydrate"])
        alpha, some = choose.choice([0, 0.25, 0.5, 1]), choose.sample(list(CHUNKS), k=choose.randint(1, 3))
        if step == "set":
            set_alpha(model, alpha)
            expected.set(alpha)
        elif step == "set with layers":
            layer_alphas = {f"re:.*layers.{choose.randrange(6)}": choose.choice([0, 0.75])}
            set_alpha(model, alpha, layer_alphas=layer_alphas)
            expected.set(alpha, layer_alphas)
        else:
            every = choose.random() < 0.2
            {"release": release, "hydrate": hydrate}[step](model, chunks=None if every else some)
            getattr(expected, step)(*([] if every else some))
        assert_weights(model, expected.now())


def test_weights_change_in_place(model):
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    set_alpha(model, 0.5)
    release(model, chunks=["early"])
    hydrate(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert parameter.data_ptr() == before[name][1]


def test_only_weights_whose_alpha_changes_are_computed(model, monkeypatch):
    from srd_modifier.checkpoint.sidecar import Sidecar

    computed = []
    correct = Sidecar.correct

    def spy(self, module, *args, **kwargs):
        computed.append(module)
        return correct(self, module, *args, **kwargs)

    monkeypatch.setattr(Sidecar, "correct", spy)
    set_alpha(model, 1)
    hydrate(model)
    assert computed == []
    release(model, chunks=["governance"])
    assert sorted(computed) == sorted(name for name in computed if "layers.5." in name)
    assert len(computed) == 7


def test_nothing_else_of_the_model_is_touched(model):
    others = {name: p.clone() for name, p in model.named_parameters() if "_proj" not in name}
    set_alpha(model, 0.5)
    release(model)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in others.items())


def test_a_model_in_training_is_changed_without_a_trace(model):
    model.train()
    model.requires_grad_(True)
    set_alpha(model, 0.5)
    assert all(parameter.grad_fn is None and parameter.is_leaf for parameter in model.parameters())


# --- what is refused


CALLS = [lambda model: set_alpha(model, 0.5), hydrate, release]


@pytest.mark.parametrize("call", CALLS, ids=["set_alpha", "hydrate", "release"])
def test_a_model_without_a_residual(call, random_llama):
    model = AutoModelForCausalLM.from_pretrained(random_llama)
    with pytest.raises(SRDError, match="this LlamaForCausalLM has no residual: load an SRD checkpoint"):
        call(model)


@pytest.mark.parametrize("call", CALLS, ids=["set_alpha", "hydrate", "release"])
def test_a_copy_has_no_residual(call, model):
    with pytest.raises(SRDError, match=r"has no residual.*a copy of a loaded model has none either"):
        call(copy.deepcopy(model))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "1", True])
def test_an_alpha_out_of_range_changes_nothing(alpha, model, expected, assert_weights):
    with pytest.raises(ConfigError, match=r"alpha is .*, expected a number from 0 to 1"):
        set_alpha(model, alpha)
    with pytest.raises(ConfigError, match=r"layer_alphas\['re:\.\*'\] is .*, expected a number from 0 to 1"):
        set_alpha(model, 0.5, layer_alphas={"re:.*": alpha})
    assert_weights(model, expected.now())
    release(model, chunks=["early"])
    hydrate(model)
    assert_weights(model, expected.now())


@pytest.mark.parametrize("call", [hydrate, release], ids=["hydrate", "release"])
def test_an_unknown_chunk(call, model, expected, assert_weights):
    with pytest.raises(ConfigError, match=r"chunk 'late' is unknown, expected some of \['early', 'factual'"):
        call(model, chunks=["early", "late"])
    assert_weights(model, expected.now())


def test_a_pattern_that_is_no_regex(model, expected, assert_weights):
    with pytest.raises(ConfigError, match="is not a regular expression"):
        set_alpha(model, 0.5, layer_alphas={"re:(": 0})
    assert_weights(model, expected.now())


def test_files_that_are_gone_are_not_missed(checkpoint, by_hand, assert_weights):
    # they are mapped, and a map outlives the name of its file
    import shutil

    weights = by_hand(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    shutil.rmtree(Path(checkpoint))
    set_alpha(model, 0.5)
    assert_weights(model, weights.weights(0.5))


def test_a_correction_does_not_outlive_its_model(finished_checkpoint):
    from srd_modifier.transformers.correction import _CORRECTIONS

    def load() -> weakref.ref[nn.Module]:
        model = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
        assert model in _CORRECTIONS
        return weakref.ref(model)

    alive = load()
    gc.collect()
    assert alive() is None


def test_two_models_of_one_checkpoint_have_a_dial_each(finished_checkpoint, weights, assert_weights):
    first, second = (AutoModelForCausalLM.from_pretrained(finished_checkpoint) for _ in range(2))
    set_alpha(first, 0.25)
    release(second, chunks=["early"])
    assert_weights(first, weights.weights(0.25))
    hydrate(second)
    assert_weights(second, weights.weights(1.0))


# --- a change that fails half-way

RESIDUAL = "srd/residual-00001-of-00001.safetensors"
DAMAGED = "model.layers.3.mlp.gate_proj"


@pytest.fixture
def half_hydrated(checkpoint) -> LlamaForCausalLM:
    """Early and factual chunks are hydrated, and the file of the residual is one that a test may damage."""
    return load_corrected(checkpoint, alpha=0.5, chunks=["early", "factual"])


@pytest.mark.parametrize(
    "change",
    [hydrate, lambda model: hydrate(model, chunks=["reasoning"]), lambda model: hydrate(model, intent="HARM")],
    ids=["all", "chunk", "intent"],
)
def test_a_residual_that_was_damaged_after_loading(change, half_hydrated, checkpoint, expected, assert_weights):
    before = {name: parameter.clone() for name, parameter in half_hydrated.named_parameters()}
    flip_bit(checkpoint / RESIDUAL, f"{DAMAGED}.weight_d8")  # in place, under the map
    with pytest.raises(CheckpointError, match=f"{DAMAGED}.weight_d8 does not match its digest; the file is damaged$"):
        change(half_hydrated)
    assert all(torch.equal(parameter, before[name]) for name, parameter in half_hydrated.named_parameters())
    hydrate(half_hydrated, chunks=["governance"])  # the damaged chunk is still released, and the dial what it was
    assert_weights(half_hydrated, expected.set(0.5).release("reasoning").now())


def test_a_dial_that_failed_is_turned_back(half_hydrated, checkpoint, expected, assert_weights):
    hydrate(half_hydrated)
    flip_bit(checkpoint / RESIDUAL, f"{DAMAGED}.weight_d8_scale")
    with pytest.raises(CheckpointError, match=f"{DAMAGED}.weight_d8_scale does not match its digest"):
        set_alpha(half_hydrated, 1)
    assert_weights(half_hydrated, expected.set(0.5).now())
    set_alpha(half_hydrated, 0)  # which needs no residual
    assert_weights(half_hydrated, expected.set(0).now())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")], ids=["interrupt", "error"])
@pytest.mark.parametrize("where", ["correct", "store"])
def test_a_change_that_is_cut_off(where, error, model, expected, assert_weights, monkeypatch):
    from srd_modifier.checkpoint.sidecar import Sidecar
    from srd_modifier.transformers import weights

    stopped = []

    def stop_once(owner: object, name: str) -> None:
        plain = getattr(owner, name)

        def stopping(*args, **kwargs):
            result = plain(*args, **kwargs)
            if DAMAGED in args and not stopped:
                stopped.append(DAMAGED)
                raise error
            return result

        monkeypatch.setattr(owner, name, stopping)

    stop_once(Sidecar, "correct") if where == "correct" else stop_once(weights, "store_weight")
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        set_alpha(model, 0.25)
    assert stopped
    assert_weights(model, expected.now())
    set_alpha(model, 0.25)
    assert_weights(model, expected.set(0.25).now())


def test_weights_that_cannot_be_put_back_are_said_to_be_mixed(checkpoint, expected, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    first = "model.layers.0.mlp.down_proj"

    def damage() -> None:
        flip_bit(checkpoint / RESIDUAL, f"{DAMAGED}.weight_d8")
        flip_bit(checkpoint / RESIDUAL, f"{first}.weight_d8")

    from srd_modifier.checkpoint.sidecar import Sidecar

    correct = Sidecar.correct

    def damaging(self, module, *args, **kwargs):
        if module == DAMAGED:
            damage()
        return correct(self, module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sidecar, "correct", damaging)
        with pytest.raises(
            SRDError,
            match=rf"{DAMAGED}.* is damaged; the model now has some weights of each setting, because .*{first}.* "
            "is damaged.: load it anew$",
        ):
            set_alpha(model, 0.5)
    damage()  # undoes itself
    set_alpha(model, 1)  # and what is not known to be right is computed anew
    assert_weights(model, expected.now())


def test_weights_that_nobody_knows_are_computed_anew(model, expected, assert_weights, monkeypatch):
    from srd_modifier.checkpoint.sidecar import Sidecar
    from srd_modifier.transformers import weights

    broken = [True]
    plain = {"correct": Sidecar.correct, "store": weights.store_weight}

    def correct(self, module, alpha, *args):
        assert 0 <= alpha <= 1  # one that could be meant
        if broken and module == DAMAGED and alpha == 1:
            raise CheckpointError("the former weight is damaged")
        return plain["correct"](self, module, alpha, *args)

    def store(model, module, value):
        plain["store"](model, module, value)
        if broken and module == DAMAGED:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sidecar, "correct", correct)
    monkeypatch.setattr(weights, "store_weight", store)
    for _ in range(2):
        with pytest.raises(SRDError, match=r"some weights of each setting.*is damaged.: load it anew"):
            set_alpha(model, 0.5)
    broken.clear()
    set_alpha(model, 1)
    assert_weights(model, expected.now())
