"""Linear modules that compute with fake-quantized weights, put into a model and taken out of it again.

The class of a module is changed and nothing is wrapped, so that every parameter keeps its name: the checkpoints that a
Trainer writes load as ordinary models, and DDP, FSDP and tied weights see what they always see. (torch's `parametrize`
renames `weight` to `parametrizations.weight.original` in the state dict, which no other loader knows.)
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel

from srd_modifier.errors import ConfigError
from srd_modifier.qat.fake_quantizer import FakeQuantizer
from srd_modifier.qat.grid import Grid

_CHILD = "fake_quantizer"

# what FSDP, checkpointing of activations and torch.compile put into the names of the modules they wrap
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


class FakeQuantizedLinear(nn.Linear):
    """A Linear whose weight goes through its `fake_quantizer` in every forward pass."""

    fake_quantizer: FakeQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """`input @ fake_quantized(weight).T + bias`."""
        return linear(input, self.fake_quantizer(self.weight), self.bias)


def fake_quantize(model: nn.Module, grids: Mapping[str, Grid], *, learned_scales: bool = False) -> None:
    """Make the named Linear modules of a model compute on their grids, at the grids' own widths.

    Args:
        model: before it is wrapped for several processes and before its optimizer is made.
        grids: by module name.
        learned_scales: train the scales of the grids too.

    Raises:
        ConfigError: a name is no Linear module, is one already, shares its weight with another module, or its weight
            does not fit the grid.
    """
    modules = dict(model.named_modules())
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    for name, grid in grids.items():
        module = modules.get(name)
        if type(module) is not nn.Linear:
            found = "there is no such module" if module is None else f"it is a {type(module).__name__}"
            raise ConfigError(f"{name} cannot be fake-quantized: {found}, expected a torch.nn.Linear")
        if owners.count(id(module.weight)) > 1:
            raise ConfigError(f"{name} cannot be fake-quantized: its weight is tied to another module's; ignore it")
        rows, columns = module.weight.shape
        if grid.scale.shape[0] != rows or columns % grid.scale.shape[1]:
            raise ConfigError(
                f"{name} cannot be fake-quantized: scales {list(grid.scale.shape)} do not fit its weight "
                f"[{rows}, {columns}]"
            )
    for name, grid in grids.items():
        module = modules[name]
        assert isinstance(module, nn.Linear)
        module.__class__ = FakeQuantizedLinear
        own = FakeQuantizer(grid.to(module.weight.device), learned_scale=learned_scales)
        own.train(module.training)
        module.add_module(_CHILD, own)


def fake_quantized_modules(model: nn.Module) -> dict[str, FakeQuantizedLinear]:
    """The modules that `fake_quantize` changed, by the names that they had then."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizedLinear)
    }


def set_width(model: nn.Module, width: float) -> None:
    """Set the width of every fake-quantized module; one whose grid is wider stays at its grid."""
    for module in fake_quantized_modules(model).values():
        module.fake_quantizer.width = width


@torch.no_grad()
def finish(model: nn.Module) -> dict[str, Grid]:
    """Put every fake-quantized weight on its grid for good, and make the modules ordinary Linear ones again.

    The model then computes what it computed at the grids' own widths, and nothing in it, its state dict included, tells
    how it was trained. A model that FSDP has sharded is finished in place by all of its processes together.

    Returns:
        The grids by module name, scales as they were learned, on the weights' devices.
    """
    modules = fake_quantized_modules(model)
    with _whole_parameters(model):
        grids = {name: module.fake_quantizer.grid for name, module in modules.items()}
        for name, module in modules.items():
            _put_on(grids[name], module.weight)
    for module in modules.values():
        delattr(module, _CHILD)
        module.__class__ = _unchanged_class(type(module))
    return grids


def _unchanged_class(changed: type) -> type:
    """What a module was before; FSDP 2 puts a class of its own above that of a module which it shards by itself."""
    if changed is FakeQuantizedLinear:
        return nn.Linear
    bases = tuple(nn.Linear if base is FakeQuantizedLinear else base for base in changed.__bases__)
    own = {name: value for name, value in vars(changed).items() if name not in ("__dict__", "__weakref__")}
    return type(changed.__name__.replace(FakeQuantizedLinear.__name__, nn.Linear.__name__), bases, own)


def _put_on(grid: Grid, weight: Tensor) -> None:
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(weight, DTensor):  # FSDP 2
            mesh = weight.device_mesh
            # what is offloaded to the CPU cannot be gathered there
            there: Any = weight.to(mesh.device_type)
            values = grid.to(mesh.device_type).nearest(there.full_tensor().float())
            # all processes have all values: each takes its own part of them
            weight.copy_(distribute_tensor(values.to(weight.dtype), mesh, weight.placements, src_data_rank=None))
            return
    weight.copy_(grid.nearest(weight.float()))


def _whole_parameters(model: nn.Module) -> AbstractContextManager[None]:
    """Gathers what FSDP 1 has sharded; changes are scattered again afterwards."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(model, writeback=True)
