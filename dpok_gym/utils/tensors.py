"""Tensors and plain values in files, without pickle: nothing can run by being read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpok_gym.utils.files import replacing
from dpok_gym.utils.reading import check_tensors
from dpok_gym.utils.sharding import like, whole


def save_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> None:
    """Writes a safetensors file, which is whole or not there.

    Args:
        path: the file.
        tensors: by name, on any device.
        state: JSON-able values, which the file's header keeps.

    Raises:
        WriteError: if the file cannot be written.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        save_file(on_cpu, part, None if state is None else {"state": json.dumps(state)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`save_tensors` wrote: the tensors, on the CPU, and the state, {} if there is none.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(check_tensors(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return tensors, json.loads((file.metadata() or {}).get("state", "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimiser's state as tensors named ``<number of the parameter>.<name>``."""
    flat = {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            flat[f"{number}.{name}"] = whole(torch.as_tensor(value))
    return flat


def load_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`flatten_optimizer` returned.

    Raises:
        ValueError: if it is of other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in flat.items():
        number, _, name = key.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise ValueError(f"the optimiser's state is of a parameter {number}, and there are {len(parameters)}")
        moments = value.clone()  # or the step of one agent would change the other
        if value.dim():  # a moment has the shape of its parameter, a step count none
            if value.shape != parameters[int(number)].shape:
                raise ValueError(f"the optimiser's {name} of parameter {number} has the shape {tuple(value.shape)}")
            moments = like(moments, parameters[int(number)])
        state.setdefault(int(number), {})[name] = moments
    if len({frozenset(values) for values in state.values()}) > 1:
        raise ValueError("the optimiser's state lacks a value of some parameters")
    # Learning rates and the like stay those of the constructor; only moments and step counts come back.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
