"""A small model, samples, and what holds for every row that a peer makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from random_models import make_llama, save_model
from torch import Tensor

HIDDEN, INTERMEDIATE, VOCABULARY = 64, 128, 4096


@pytest.fixture(scope="session")
def peer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose columns are not worth the same, untied head."""
    return save_model(make_llama(uneven_norms=True), tmp_path_factory.mktemp("peers") / "model")


@pytest.fixture(scope="session")
def original(peer_model: Path) -> dict[str, Tensor]:
    """Its weights in float32."""
    from srd_modifier.evaluation.load import load

    return dict(load(str(peer_model)).model.state_dict())


@pytest.fixture
def setting(peer_model: Path, tmp_path: Path) -> Any:
    """Eight samples of 32 tokens, groups of 32."""
    from benchmarks.peers.base import Setting

    samples = torch.randint(1, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    return Setting(str(peer_model), samples, 32, tmp_path, group_size=32)


@pytest.fixture(scope="session")
def read() -> Callable[[Any], Any]:
    """Load a row from what is on disk, as the comparison does."""
    from srd_modifier.evaluation.load import load

    def read(made: Any) -> Any:
        if made.load is not None:
            return made.load()
        return load(str(made.path), alpha=made.alpha, chunks=made.chunks).model

    return read


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Any], dict[str, Tensor]]:
    """The decoder's Linear weights, in whatever form a module keeps them: what it makes of the columns of an identity.

    A compressed checkpoint must have run once, which unpacks it.
    """

    @torch.no_grad()
    def weights_of(model: Any) -> dict[str, Tensor]:
        model(torch.zeros(1, 2, dtype=torch.long))
        layers = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
        assert len(layers) == 14
        columns = {name: INTERMEDIATE if name.endswith("down_proj") else HIDDEN for name in layers}
        return {name: module(torch.eye(columns[name])).T for name, module in layers.items()}

    return weights_of


@pytest.fixture
def check(read, weights_of, original, setting) -> Callable[..., None]:
    """Row by row: what it says of itself is so, it is finite, float32, and not the original."""
    from benchmarks.peers.base import Family

    def check(rows: list[Any], *, head_is_kept: bool = True, least_loss: float = 1e-3) -> None:
        assert len({made.label for made in rows}) == len(rows) > 0
        for made in rows:
            assert made.family in get_args(Family)
            assert made.path.is_relative_to(setting.folder)
            assert made.seconds > 0
            assert (made.bytes_on_disk is None) == (made.load is None)
            model = read(made)
            assert not model.training
            with torch.no_grad():
                logits = model(torch.tensor(setting.samples[:1])).logits
            assert logits.dtype == torch.float32
            assert torch.isfinite(logits).all()
            for name in ("lm_head.weight", "model.embed_tokens.weight"):
                assert torch.allclose(model.get_parameter(name), original[name], atol=1e-6) == head_is_kept, name
            for name, weight in weights_of(model).items():
                wanted = original[f"{name}.weight"]
                assert (weight - wanted).norm() > least_loss * wanted.norm(), f"{made.label}: {name} is the original"

    return check
