"""The device that networks run on."""

from __future__ import annotations

import torch


def find_device(name: str) -> torch.device:
    """Returns a device of this machine by its name.

    Args:
        name: "auto" (a GPU if there is one), or any torch device, such as "cpu" or "cuda:1".

    Raises:
        ValueError: if the device cannot be used here.
    """
    if not isinstance(name, str):
        raise ValueError(f"device {name!r} cannot be used here: it is no text; use 'auto' or 'cpu'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # A tensor knows the device's number: "cuda" becomes "cuda:0", so both names find the same loaded model.
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}; use 'auto' or 'cpu'") from error
    if device.type == "meta":
        raise ValueError("device 'meta' cannot be used here: it computes shapes only; use 'auto' or 'cpu'")
    return device
