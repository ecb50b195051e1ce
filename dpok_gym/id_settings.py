"""A warning where an environment's id sets steps, guidance and noise for another kind of model than it draws with."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from gymnasium.envs.registration import EnvSpec

from dpok_gym.registration import ENVIRONMENTS

#: The arguments of an environment that suit a family of models; an id has those of its own model.
_OF_FAMILY = ("num_inference_steps", "guidance_scale", "eta")

logger = logging.getLogger(__name__)


class MadeById:
    """A base of the environments: a warning, once, if the settings of the id do not suit the model."""

    model: Any
    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """Gymnasium's record of the id and the arguments; None if the environment was made by its class."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:  # only Gymnasium knows the id, and sets this after the constructor
        self._spec = spec
        pipeline = getattr(self.model, "pipeline", None)
        if spec is not None and pipeline is not None and (text := describe_settings(spec.id, spec.kwargs, pipeline)):
            _warn(text)


@functools.cache  # a training makes several environments
def _warn(text: str) -> None:
    logger.warning("%s", text)


def describe_settings(env_id: str, kwargs: Mapping[str, Any], pipeline: str) -> str | None:
    """Returns a sentence about settings that an id has for another family of models; None if there are none.

    Args:
        env_id: an id, perhaps of somebody's own.
        kwargs: the arguments of the environment.
        pipeline: name of diffusers' pipeline of the model that it draws with.
    """
    from dpok_gym.models.architecture import PUBLISHED, find_architecture  # diffusers takes seconds to import

    if env_id not in ENVIRONMENTS:
        return None
    of_id = ENVIRONMENTS[env_id]
    try:
        meant = find_architecture(of_id["model"]).pipeline
    except ValueError:  # a model that a function makes has no family
        return None
    kept = {name: of_id[name] for name in _OF_FAMILY if kwargs[name] == of_id[name]}
    if meant == pipeline or not kept:
        return None
    published = {other: PUBLISHED.get(of_other["model"]) for other, of_other in ENVIRONMENTS.items()}
    fitting = [other for other, found in published.items() if found is not None and found.pipeline == pipeline]
    instead = f", or use {' or '.join(fitting)} with this model" if fitting else ""
    return (
        f"{', '.join(f'{name}={value}' for name, value in kept.items())} of {env_id} are meant for a {meant}, and the "
        f"model is a {pipeline}: give your own ({', '.join('--' + name.replace('_', '-') for name in kept)}){instead}"
    )
