"""Samplers: the table of a sampler's transitions, and the denoising process made of a model and such a table."""

from dpok_gym.samplers.ddim import make_ddim_table
from dpok_gym.samplers.flow_matching import make_flow_table
from dpok_gym.samplers.process import DenoisingProcess, DenoisingStep, SamplerConfig, Selection, State, Transition
from dpok_gym.samplers.transition_table import TransitionTable

__all__ = [
    "DenoisingProcess",
    "DenoisingStep",
    "SamplerConfig",
    "Selection",
    "State",
    "Transition",
    "TransitionTable",
    "make_ddim_table",
    "make_flow_table",
]
