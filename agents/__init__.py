"""Stable-Baselines3 agents that fine-tune diffusion models with rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpok_gym.utils.lazy import lazy_names

if TYPE_CHECKING:
    from agents.algorithms.awm import AWM as AWM
    from agents.algorithms.best_of_n import BestOfN as BestOfN
    from agents.algorithms.ddpo import DDPO as DDPO
    from agents.algorithms.diffusion_dpo import DiffusionDPO as DiffusionDPO
    from agents.algorithms.diffusion_nft import DiffusionNFT as DiffusionNFT
    from agents.algorithms.dpok import DPOK as DPOK
    from agents.algorithms.draft import DRaFT as DRaFT
    from agents.algorithms.forward_process import ForwardProcess as ForwardProcess
    from agents.algorithms.grpo import GRPO as GRPO
    from agents.algorithms.online_forward_process import OnlineForwardProcess as OnlineForwardProcess
    from agents.algorithms.policy_gradient import PolicyGradient as PolicyGradient
    from agents.algorithms.presets import PRESETS as PRESETS
    from agents.algorithms.registry import list_algorithms as list_algorithms
    from agents.algorithms.registry import register_algorithm as register_algorithm
    from agents.algorithms.reinforce import REINFORCE as REINFORCE
    from agents.algorithms.rwr import RWR as RWR
    from agents.algorithms.sft import RewardWeightedSFT as RewardWeightedSFT
    from agents.cli.run_folder import load_run as load_run
    from agents.common.algorithm import DenoisingAlgorithm as DenoisingAlgorithm
    from agents.common.doctor import Finding as Finding
    from agents.common.doctor import diagnose as diagnose
    from agents.common.evaluation import Evaluation as Evaluation
    from agents.common.evaluation import evaluate as evaluate
    from agents.common.monitor import TrainingWarning as TrainingWarning
    from agents.common.policy import DenoisingPolicy as DenoisingPolicy
    from agents.common.residual_actor import ResidualActorPolicy as ResidualActorPolicy
    from agents.common.steering import SVDD as SVDD
    from agents.common.steering import BestOf as BestOf
    from agents.common.steering import FKSteering as FKSteering
    from agents.common.vec_env import GymnasiumVecEnv as GymnasiumVecEnv

__getattr__, __dir__, __all__ = lazy_names(
    "agents",
    {
        "AWM": "algorithms.awm",
        "DDPO": "algorithms.ddpo",
        "DPOK": "algorithms.dpok",
        "GRPO": "algorithms.grpo",
        "PRESETS": "algorithms.presets",
        "REINFORCE": "algorithms.reinforce",
        "RWR": "algorithms.rwr",
        "SVDD": "common.steering",
        "BestOf": "common.steering",
        "BestOfN": "algorithms.best_of_n",
        "DRaFT": "algorithms.draft",
        "DenoisingAlgorithm": "common.algorithm",
        "DenoisingPolicy": "common.policy",
        "DiffusionDPO": "algorithms.diffusion_dpo",
        "DiffusionNFT": "algorithms.diffusion_nft",
        "Evaluation": "common.evaluation",
        "FKSteering": "common.steering",
        "Finding": "common.doctor",
        "ForwardProcess": "algorithms.forward_process",
        "GymnasiumVecEnv": "common.vec_env",
        "OnlineForwardProcess": "algorithms.online_forward_process",
        "PolicyGradient": "algorithms.policy_gradient",
        "ResidualActorPolicy": "common.residual_actor",
        "RewardWeightedSFT": "algorithms.sft",
        "TrainingWarning": "common.monitor",
        "diagnose": "common.doctor",
        "evaluate": "common.evaluation",
        "list_algorithms": "algorithms.registry",
        "load_run": "cli.run_folder",
        "register_algorithm": "algorithms.registry",
    },
)
