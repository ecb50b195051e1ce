"""The names of algorithms, for the command line and for whoever chooses one by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpok_gym.utils.registry import Registry

if TYPE_CHECKING:
    from agents.common.algorithm import DenoisingAlgorithm

ALGORITHMS: Registry[type[DenoisingAlgorithm]] = Registry(
    "algorithm", "Add yours with register_algorithm(), or write it as 'my_module:Mine'."
)


def register_algorithm(name: str, algorithm: type[DenoisingAlgorithm] | str) -> None:
    """Gives an algorithm a name.

    Args:
        name: the name, as in ``dpok train --algo NAME``.
        algorithm: the class, or ``"module:Class"``, imported when it is used.

    Raises:
        TypeError: if the algorithm is neither a class nor a text.
        ValueError: if the name is blank, or already stands for another class.
    """
    if not isinstance(algorithm, (str, type)):
        raise TypeError(f"the algorithm {name!r} must be a class or 'module:Class', not {algorithm!r}")
    ALGORITHMS.register(name, algorithm)


def list_algorithms() -> list[str]:
    """Returns the registered names, sorted."""
    return ALGORITHMS.names()


def load_algorithm(name: str) -> type[DenoisingAlgorithm]:
    """Returns the class of a registered name, or of ``"module:Class"``.

    Raises:
        ValueError: if the name is unknown; the message has the nearest one.
        ImportError: if the module or the class is not there.
        TypeError: if the class is no algorithm of this kind.
    """
    from agents.common.algorithm import DenoisingAlgorithm

    algorithm = ALGORITHMS.load(name)
    if not (isinstance(algorithm, type) and issubclass(algorithm, DenoisingAlgorithm)):
        raise TypeError(f"the algorithm {name!r} must be a subclass of DenoisingAlgorithm, not {algorithm!r}")
    return algorithm


register_algorithm("dpok", "agents.algorithms.dpok:DPOK")
register_algorithm("ddpo", "agents.algorithms.ddpo:DDPO")
register_algorithm("grpo", "agents.algorithms.grpo:GRPO")
register_algorithm("reinforce", "agents.algorithms.reinforce:REINFORCE")
register_algorithm("sft", "agents.algorithms.sft:RewardWeightedSFT")
register_algorithm("rwr", "agents.algorithms.rwr:RWR")
register_algorithm("best-of-n", "agents.algorithms.best_of_n:BestOfN")
register_algorithm("diffusion-nft", "agents.algorithms.diffusion_nft:DiffusionNFT")
register_algorithm("awm", "agents.algorithms.awm:AWM")
register_algorithm("diffusion-dpo", "agents.algorithms.diffusion_dpo:DiffusionDPO")
register_algorithm("draft", "agents.algorithms.draft:DRaFT")
