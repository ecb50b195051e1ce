"""Environments by id, and rewards as a command line writes them."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator

import dpok_gym  # noqa: F401  (registers the environments)
from agents.common.arguments import describe_arguments
from dpok_gym.registration import DEFAULT_ENVIRONMENT, ENVIRONMENTS
from dpok_gym.rewards.remote.access import check_no_secret
from dpok_gym.utils.validation import check_finite
from dpok_gym.vector_env import DenoisingVectorEnv
from dpok_gym.worlds import World

#: Images of an evaluation that are drawn side by side.
EVALUATION_BATCH_SIZE = 64


def environment_class(env_id: str) -> type[DenoisingVectorEnv]:
    """Returns the class of an environment.

    Args:
        env_id: an id, or ``"module:id"`` for one that a module registers when it is imported.

    Raises:
        ValueError: if there is no such id, or it is no denoising environment.
    """
    entry = _find_spec(env_id).vector_entry_point
    creator: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    if not (isinstance(creator, type) and issubclass(creator, DenoisingVectorEnv)):
        raise ValueError(f"{env_id} is no denoising environment; use one such as {DEFAULT_ENVIRONMENT}")
    return creator


def environment_kwargs(env_id: str) -> dict[str, Any]:
    """Returns all settings of an environment, as its id defines them.

    Args:
        env_id: an id; errors as :func:`environment_class`.

    Returns:
        The arguments of the class by name: its defaults, changed by those that the id is registered with.
    """
    arguments = describe_arguments(environment_class(env_id))
    defaults = {name: argument.default for name, argument in arguments.items()}
    for name in ("num_envs", "render_mode", "autoreset_mode", "predicted_info"):  # nothing of this is in an image
        defaults.pop(name, None)
    return defaults | registered_kwargs(env_id)


def registered_kwargs(env_id: str) -> dict[str, Any]:
    """Returns the arguments that an environment's id is registered with; errors as :func:`environment_class`."""
    return dict(_find_spec(env_id).kwargs)


def make_env(env_id: str, num_envs: int, **kwargs: Any) -> DenoisingVectorEnv:
    """Makes an environment.

    Args:
        env_id: its id; errors as :func:`environment_class`.
        num_envs: images drawn side by side.
        **kwargs: changes to its arguments.
    """
    environment_class(env_id)  # for its errors, which are clearer than Gymnasium's
    # The other vectorization modes would step single environments, one call of the network for each.
    env = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)
    assert isinstance(env, DenoisingVectorEnv)  # environment_class has checked this
    return env


def unseen_prompts(env: DenoisingVectorEnv) -> Sequence[str]:
    """Returns prompts that training in an environment never shows; a text or a file of prompts holds none out."""
    return env.prompts.held_out if env.world is None else env.world.unseen_prompts(env.prompts)


def evaluation_rewards(world: World | None, reward: Mapping[str, Any], also: Collection[str] = ()) -> dict[str, Any]:
    """Adds components of weight 0 to a reward: evaluations show them, and the total stays the same.

    Args:
        world: the environment's world, whose own rewards every evaluation computes.
        reward: the weights of the reward trained on.
        also: further rewards.
    """
    of_world = world.evaluation_rewards if world else ()
    # The reward comes last, so that its weights replace the zeros of components that it has too.
    return dict.fromkeys((*of_world, *also), 0.0) | dict(reward)


def parse_reward(text: Any) -> dict[str, Any]:
    """Reads ``NAME=WEIGHT,NAME=WEIGHT``; a weight that is left out is 1.

    A name may be an address, or several with spaces between them: ``http://a:8000 http://b:8000=0.5``. An address with
    a comma or "=" cannot be written so.

    Args:
        text: the text; a mapping is returned as a dict.

    Raises:
        ValueError: if the text cannot be read.
    """
    if not isinstance(text, str):
        return dict(text)
    check_no_secret(text)  # before an error shows a part of it
    weights: dict[str, Any] = {}
    for entry in text.split(","):
        name, equals, weight = (part.strip() for part in entry.partition("="))
        if not name or name in weights:
            raise ValueError(f"a reward is written NAME or NAME=WEIGHT,NAME=WEIGHT with each name once, not {text!r}")
        try:
            number = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"the weight of the reward {name!r} must be a number, not {weight!r}") from None
        weights[name] = check_finite(f"the weight of the reward {name!r}", number)
    return weights


def _find_spec(env_id: str) -> EnvSpec:
    module, _, name = env_id.rpartition(":")
    try:
        if module:  # as in gymnasium.make("my_module:MyEnv-v0")
            importlib.import_module(module)
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(
            f"there is no environment {env_id!r}: {error} The built-in ones are {', '.join(ENVIRONMENTS)}"
        ) from error
