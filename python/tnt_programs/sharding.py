"""FSDP2: parameters and optimiser state shared out among the processes, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

# Whole tensors: gathered on the CPU of the first process, the others get nothing.
_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SCATTER = StateDictOptions(full_state_dict=True)


def shard(model: nn.Module) -> nn.Module:
    """Share out a model's parameters, block by block, in place."""
    for block in getattr(model, "blocks", ()):
        fully_shard(block)
    fully_shard(model)
    return model


def weights(model: nn.Module, *, sharded: bool) -> dict[str, Tensor]:
    """The state dict; of a sharded model on the first process alone."""
    found: Any = get_model_state_dict(model, options=_GATHER) if sharded else model.state_dict()
    return found


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> Mapping[str, Any]:
    """The optimiser's state dict; of a sharded model by parameters' names, on the first process alone."""
    return get_optimizer_state_dict(model, optimizer, options=_GATHER) if sharded else optimizer.state_dict()


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, sharded: bool
) -> None:
    """What `optimizer_state` gave, into an optimiser of the same kind of model."""
    if sharded:
        set_optimizer_state_dict(model, optimizer, dict(state), options=_SCATTER)
    else:
        optimizer.load_state_dict(dict(state))
