"""Networks that one device cannot hold: their weights are spread over the ranks (FSDP2), and gathered block by block.

The ranks must call such a network together. Weights that are added later, as those of a LoRA, are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Spreads the weights of a network over the ranks, in place; returns the network. A single process keeps all.

    Args:
        network: one of diffusers' models, best on the CPU. Its blocks go to the device one by one.
        device: where each rank computes.
    """
    if not dist.is_initialized():
        return network
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    blocks = set(getattr(network, "_no_split_modules", None) or ())
    for values in network.parameters():
        values.data = values.data.contiguous()  # FSDP does not know the channels-last order
    for module in network.modules():
        # The innermost blocks: those around them hold little else.
        if type(module).__name__ in blocks and not any(
            type(inner).__name__ in blocks for inner in module.modules() if inner is not module
        ):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def is_sharded(network: Any) -> bool:
    """Returns whether the weights of a network are spread over the ranks."""
    return isinstance(network, FSDPModule)


def sharded_copy(network: Any) -> nn.Module:
    """Returns a trainable copy of a network that is spread over the ranks, without any LoRA; all ranks must call this.

    Args:
        network: one of diffusers' models. Each rank needs the memory of a whole one on the CPU for a moment.
    """
    weights = {name.replace(".base_layer.", "."): values for name, values in network.state_dict().items()}
    with torch.random.fork_rng():  # the first weights are replaced at once, and must not cost a run's random numbers
        copied = type(network).from_config(network.config).eval()
    copied.load_state_dict({name: whole(weights[name]).cpu() for name in copied.state_dict()})
    return shard(copied.requires_grad_(True), next(network.parameters()).device)


def whole(values: Tensor) -> Tensor:
    """Returns a tensor that is spread over the ranks in one piece, on every rank; any other one as it is."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def like(values: Tensor, example: Tensor) -> Tensor:
    """Spreads a tensor over the ranks as another one is; it stays whole if that one is."""
    if not isinstance(example, DTensor):
        return values
    return distribute_tensor(values.to(example.device), example.device_mesh, example.placements)


def load_whole(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads whole tensors into a network, which may be spread over the ranks; errors as ``load_state_dict``."""
    own = network.state_dict()
    network.load_state_dict(
        {name: like(values, own[name]) if name in own else values for name, values in state.items()}
    )
