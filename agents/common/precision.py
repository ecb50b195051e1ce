"""The precision that a policy's denoiser runs in, and which one is faster on this device.

In bfloat16 the denoiser runs under ``torch.autocast``: its weights and the transitions stay float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from agents.common import distributed

if TYPE_CHECKING:
    from agents.common.policy import DenoisingPolicy

Precision = Literal["float32", "bfloat16"]

#: How much faster bfloat16 must be to be worth its lost digits.
WORTHWHILE = 1.1
#: States of a measurement (with few, a small network is busy with other things than its products), and how often it is
#: made: the fastest counts, as the first one also makes the kernels.
_N_STATES, _REPEATS = 48, 3
#: A network with more parameters is not run to measure. It spends its time on products of large matrices.
_LARGE = 100_000_000
_MATRIX_SIZE = 1024
#: How much faster bfloat16 is for each denoiser, as far as it was measured: that takes a moment.
_speedups: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


class _Float32Attention(TorchFunctionMode):
    """Within its block, attention and group norms are computed in float32, from inputs and to results in bfloat16.

    On a CPU, torch 2.13 takes ten times as long for the backward pass of attention in bfloat16 as in float32, and
    three times as long for group norms.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (F.scaled_dot_product_attention, F.group_norm):
            return func(*args, **kwargs)
        dtype = (args or tuple(kwargs.values()))[0].dtype
        args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs).to(dtype)


def _to_float32(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values


@contextmanager
def in_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within the block, networks run in this precision on a device."""
    if precision == "float32":
        yield
        return
    attention = _Float32Attention() if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16), attention:
        yield


def checkpoint(layer: Callable[..., Any], *args: Any) -> Any:
    """Calls a layer for gradient checkpointing, whose second pass then runs as the first one did."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[Any]]:
        # Torch itself takes care of autocast.
        return nullcontext(), _Float32Attention() if torch.is_autocast_enabled("cpu") else nullcontext()

    return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False, context_fn=contexts)


def faster_precision(policy: DenoisingPolicy) -> Precision:
    """Returns bfloat16 if the policy's denoiser is faster in it here, measured forward and backward, else float32.

    All ranks get the same answer, and must ask together. It takes about a second, and is measured once for a
    denoiser in a process.
    """
    return "float32" if distributed.any_of(bfloat16_speedup(policy) < WORTHWHILE) else "bfloat16"


def bfloat16_speedup(policy: DenoisingPolicy) -> float:
    """Returns :func:`measure_speedup`, which is asked once for a denoiser."""
    network = policy.denoiser or policy.model.denoiser
    if network not in _speedups:
        _speedups[network] = measure_speedup(policy)
    return _speedups[network]


def measure_speedup(policy: DenoisingPolicy) -> float:
    """Returns how many times as fast bfloat16 is here as float32, for the policy's denoiser.

    It is 1 if the weights are not float32, or the model reads no empty prompt.
    """
    model = policy.model
    if "dtype" in model.options or any(model.find_unreadable([""])):
        return 1.0
    is_large = sum(parameter.numel() for parameter in model.denoiser.parameters()) > _LARGE
    call = _product(model.device) if is_large else _update(policy)
    seconds = {"float32": math.inf, "bfloat16": math.inf}
    for _ in range(_REPEATS):
        for precision in ("float32", "bfloat16"):  # in turn, as a machine is not equally fast all the time
            with in_precision(precision, model.device):
                seconds[precision] = min(seconds[precision], _seconds_of(call, model.device))
    return seconds["float32"] / seconds["bfloat16"]


def _seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    # A CPU's time is its own, whatever else runs on the machine.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock() - started


def _product(device: torch.device) -> Callable[[], Any]:
    matrix = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, device=device)
    return lambda: matrix @ matrix


def _update(policy: DenoisingPolicy) -> Callable[[], Any]:
    """Returns what an update spends its time on: a forward and a backward pass, which leave no gradient behind."""
    model, process, weights = policy.model, policy.process, policy.denoiser_parameters()
    latents = torch.zeros(_N_STATES, *model.latent_shape, device=model.device)
    timesteps, conditioning = process.table.timesteps[:1].expand(_N_STATES), model.encode([""] * _N_STATES)
    settings = process.config.guidance_scale, policy.denoiser, policy.guidance_gradient

    def call() -> None:
        with policy.adapter_enabled():  # not by the process, which would count it
            output = model.predict(latents, timesteps, conditioning, *settings)
            torch.autograd.grad(output.sum(), weights, allow_unused=True)

    return call
