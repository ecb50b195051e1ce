"""The prompt set of the mixture world."""

from __future__ import annotations

from dpok_gym.prompts import PromptSet


def mixture() -> PromptSet:
    """Returns three of the prompts of :data:`dpok_gym.mixture.data.MIXTURES`; the fourth is held out."""
    return PromptSet("mixture", ("one gaussian", "two modes", "ring of six"), ("three modes",))
