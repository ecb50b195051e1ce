"""The options of steering, which ``dpok evaluate`` and ``dpok sample`` share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from agents.cli.arguments import UsageError, default_hint, given

if TYPE_CHECKING:
    from agents.common.steering import Steering


@dataclass
class SteeringOptions:
    """Better images without training: each one is chosen by the reward among several on their way."""

    steering: Annotated[Literal["best-of", "fk", "svdd"] | None, default_hint("NAME", "none")] = None
    """best-of keeps the best of several finished images; fk (Feynman-Kac) copies promising particles and drops others
    on the way; svdd goes on with one of several candidates after each step."""
    best_of: Annotated[int | None, default_hint("INT", "none")] = None
    """Short for --steering best-of with so many --n-particles."""
    n_particles: Annotated[int | None, default_hint("INT", "8")] = None
    """Particles of each image, 1 or more, usually 2 to 16. More cost as many times the denoiser calls."""
    temperature: Annotated[float | None, default_hint("FLOAT", "fk 0.1, svdd 0")] = None
    """In units of the reward, for fk (above 0) and svdd (0 or more). A lower one follows the reward more closely."""
    resample_every: Annotated[int | None, default_hint("INT", "1")] = None
    """Denoising steps from one choice to the next, 1 or more, for fk and svdd. Each choice costs rewards."""
    potential: Annotated[Literal["difference", "max", "sum"] | None, default_hint("NAME", "difference")] = None
    """Weigh by the rise of the value, by the best value so far, or by the sum of the values so far; for fk."""
    ess_threshold: Annotated[float | None, default_hint("FLOAT", "1")] = None
    """Choose when the effective share of the particles is below this, in [0, 1]; 1 is always, 0 never. For fk."""
    choice: Annotated[Literal["best", "draw"] | None, default_hint("NAME", "best")] = None
    """Take the best final particle, or draw one from the weights, for samples of p exp(r / temperature); for fk."""


def make_steering(options: SteeringOptions) -> Steering:
    """Makes the method that the options describe.

    Raises:
        UsageError: if an option is given that the method does not have.
        ValueError: if a value is out of range.
    """
    from agents.common.steering import SVDD, UNSTEERED, BestOf, FKSteering
    from dpok_gym.utils.validation import check_integer

    if options.best_of is not None:
        others = [_written(name) for name, value in asdict(options).items() if value is not None and name != "best_of"]
        if others:
            raise UsageError(f"--best-of is a way of steering by itself; leave out {', '.join(others)}")
        return BestOf(check_integer("--best-of", options.best_of, maximum=2**17))
    methods: dict[str, type[Steering]] = {"best-of": BestOf, "fk": FKSteering, "svdd": SVDD}
    settings = given(options, *(field.name for field in fields(options) if field.name != "steering"))
    if options.steering is None:
        if settings:
            raise UsageError(f"{_written(next(iter(settings)))} needs --steering {', '.join(methods)}")
        return UNSTEERED
    method = methods[options.steering]
    known = [field.name for field in fields(method)]
    for name in settings:
        if name not in known:
            options_of_method = ", ".join(map(_written, known))
            raise UsageError(f"--steering {options.steering} has no {_written(name)}; it has {options_of_method}")
    return method(**settings)


def describe_steering(steering: Steering, num_inference_steps: int) -> dict[str, Any]:
    """Returns the method, its settings and what an image costs, as JSON can keep them."""
    return {
        "method": type(steering).__name__,
        **asdict(steering),
        "denoiser_calls": steering.denoiser_calls(num_inference_steps),
        "reward_calls": steering.reward_calls(num_inference_steps),
    }


def _written(name: str) -> str:
    return f"--{name.replace('_', '-')}"
