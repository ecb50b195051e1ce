"""What the tests of the algorithms share: one set of settings for each algorithm, and its loss written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3.common.logger import KVWriter, Logger
from torch import Tensor

import agents
from agents import (
    AWM,
    DDPO,
    DPOK,
    GRPO,
    REINFORCE,
    RWR,
    BestOfN,
    DiffusionDPO,
    DiffusionNFT,
    DRaFT,
    ForwardProcess,
    OnlineForwardProcess,
    PolicyGradient,
    RewardWeightedSFT,
)
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.buffer import TrajectoryBuffer, Transitions
from agents.common.matching import NoisyImages
from agents.common.pairs import NoisyPairs
from dpok_gym.models.scheduler_configs import is_flow_matching
from dpok_gym.samplers import State
from tests.support import assert_same

#: The algorithms of the package, by name; tests register more of them.
BUILT_IN = {
    "dpok": agents.DPOK,
    "ddpo": agents.DDPO,
    "grpo": agents.GRPO,
    "reinforce": agents.REINFORCE,
    "sft": agents.RewardWeightedSFT,
    "rwr": agents.RWR,
    "best-of-n": agents.BestOfN,
    "diffusion-nft": agents.DiffusionNFT,
    "awm": agents.AWM,
    "diffusion-dpo": agents.DiffusionDPO,
    "draft": agents.DRaFT,
}

N, T = 4, 3
UPDATE = N * T  # denoising steps of one iteration
DIMS = 4 * 8 * 8  # of a latent of the tiny model
PROMPTS = ["a rabbit", "a green dog"]

MakeAgent = Callable[..., Any]


class Brightness:
    """A reward that everything can learn, with a gradient."""

    differentiable = True

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.score(images, prompts)


class EveryOtherFails(Brightness):
    """The same reward, which fails for each second image that is drawn."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.score(images, prompts).where(torch.arange(len(images)) % 2 == 0, torch.nan)


class AlwaysFails(Brightness):
    """A reward that no image gets."""

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.full((len(images),), torch.nan)


_FORWARD: dict[str, Any] = {"n_gradient_steps": 4, "log_every": 3, "batch_size": 3}

#: The tiny models: a UNet that predicts the noise, and a transformer that was trained with flow matching. The last step
#: of the latter has no noise.
DIFFUSIONS = {"vp": "stable-diffusion", "flow": "stable-diffusion-3-no-t5"}

#: Each algorithm, in each form that has a loss of its own.
ALGORITHMS: dict[str, tuple[type[DenoisingAlgorithm], dict[str, Any]]] = {
    "DPOK": (DPOK, {"target_kl": 1.0, "skip_last_steps": 0, "critic_kind": "network"}),
    "DPOK, critic on rewards": (DPOK, {"critic_kind": "reward"}),
    "DPOK, late steps held": (DPOK, {"kl_coef": 0.3, "use_critic": False, "step_weighting": "output"}),
    "DPOK, KL in the reward": (
        DPOK,
        {"kl_placement": "reward", "kl_coef": 0.5, "use_critic": False, "skip_last_steps": 0},
    ),
    "DDPO-IS": (DDPO, {"batch_size": 5}),
    "DDPO-SF": (DDPO, {"score_function": True}),
    "GRPO": (GRPO, {"group_size": 2, "same_noise": "group"}),
    "REINFORCE": (REINFORCE, {}),
    "SFT, KL-D": (RewardWeightedSFT, _FORWARD),
    "SFT, KL-O": (RewardWeightedSFT, {"regularization": "KL-O", **_FORWARD}),
    "RWR": (RWR, _FORWARD),
    "BestOfN": (BestOfN, {"n": 2, **_FORWARD}),
    # Without the normalisation, whose constant has no gradient.
    "DiffusionNFT": (
        DiffusionNFT,
        {"group_size": 2, "batch_size": 5, "beta": 0.5, "kl_coef": 0.1, "normalize_errors": False},
    ),
    "AWM": (AWM, {"group_size": 2, "batch_size": 5, "kl_coef": 0.1}),
    "DiffusionDPO": (
        DiffusionDPO,
        {"group_size": 2, "steps_per_iteration": 2, "n_gradient_steps": 4, "batch_size": 3, "beta": 30.0},
    ),
    "DRaFT": (DRaFT, {"n_last_steps": 2, "batch_size": 2}),
    "DRaFT, KL": (DRaFT, {"n_last_steps": 2, "batch_size": 2, "kl_coef": 0.1, "max_kl": 1e6}),
}

POLICY_GRADIENTS = [name for name, (cls, _) in ALGORITHMS.items() if issubclass(cls, PolicyGradient)]
ONLINE_FORWARD_PROCESSES = [name for name, (cls, _) in ALGORITHMS.items() if issubclass(cls, OnlineForwardProcess)]
FORWARD_PROCESSES = [name for name, (cls, _) in ALGORITHMS.items() if issubclass(cls, ForwardProcess)]
#: Those whose loss has a meaningful gradient only, and the value 0.
SCORE_FUNCTIONS = ["DDPO-SF", "REINFORCE"]


class Memory(KVWriter):
    """Keeps what is logged, one dict for each row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None: ...


def listen(agent: DenoisingAlgorithm) -> list[dict[str, Any]]:
    """Returns the list that the rows of the agent's log will be added to."""
    memory = Memory()
    agent.set_logger(Logger(None, [memory]))
    return memory.rows


def weights(agent: DenoisingAlgorithm) -> dict[str, Tensor]:
    """Returns a copy of all trained weights."""
    return {name: value.clone() for name, value in agent.policy.state_dict().items()}


def flat_weights(agent: DenoisingAlgorithm) -> Tensor:
    """Returns a copy of the denoiser's trained weights as one vector."""
    return torch.cat([value.detach().flatten() for value in agent.policy.denoiser_parameters()])


def is_same(actual: Any, expected: Any) -> bool:
    """Returns whether two values are equal to the last bit."""
    try:
        assert_same(actual, expected)
    except AssertionError:
        return False
    return True


@torch.no_grad()
def change(agent: DenoisingAlgorithm, scale: float = 0.1) -> None:
    """Changes the denoiser as training does, only more."""
    generator = torch.Generator().manual_seed(5)
    for value in agent.policy.denoiser_parameters():
        value.add_(scale * torch.randn(value.shape, generator=generator))


def use_sgd(agent: DenoisingAlgorithm) -> None:
    """Makes each step proportional to the gradient."""
    agent.policy.optimizer = torch.optim.SGD(agent.policy.optimizer.param_groups, lr=1.0)


def collect(agent: DenoisingAlgorithm, images: int = N) -> TrajectoryBuffer:
    """Draws one iteration without an update."""
    _, callback = agent._setup_learn(images * T)
    assert agent.env is not None
    assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
    return agent.rollout_buffer


def take_batches(agent: DenoisingAlgorithm, images: int = N) -> list[Any]:
    """Returns the batches that an iteration would learn from; the denoiser stays as it was."""
    batches: list[Any] = []
    agent.backward = batches.append  # type: ignore[assignment, method-assign]
    with torch.enable_grad():
        agent.learn(images * T)
    del agent.backward  # type: ignore[method-assign]
    return batches


def whole_batch(agent: DenoisingAlgorithm) -> Any:
    """Returns the first batch of an iteration, with all transitions or images in it if the algorithm allows that."""
    agent.batch_size = None
    return take_batches(agent)[0]


def gradient(agent: DenoisingAlgorithm, batch: Any) -> Tensor:
    """Returns the gradient of the sum of the losses, as one vector."""
    with agent.policy.adapter_enabled():
        loss, _ = agent.loss(batch)
        parts = torch.autograd.grad(loss.sum(), agent.policy.denoiser_parameters())
    return torch.cat([part.flatten() for part in parts])


# The losses by hand, each (B,) in float64 apart from the networks. They share no code with the package's equations.


@torch.no_grad()
def expected_loss(agent: Any, batch: Any) -> Tensor:
    """Returns the loss of each element by the formula of the algorithm's paper."""
    if isinstance(agent, ForwardProcess):
        return _denoising_loss(agent, batch)
    if isinstance(agent, OnlineForwardProcess):
        return _matching_loss(agent, batch)
    if isinstance(agent, DiffusionDPO):
        return _preference_loss(agent, batch)
    if isinstance(agent, DRaFT):
        return _minus_reward(agent, batch)
    return _policy_gradient_loss(agent, batch)


def _policy_gradient_loss(agent: Any, batch: Transitions) -> Tensor:
    """(-alpha w_t A D rho^(1/D) + beta w_t KL) / scale, or -w_t A log p / scale, times the batch's weight."""
    table = agent.process.table
    mean, std = agent.policy.transition(batch.state)
    mean, old_mean, std = mean.double(), batch.old_means.double(), std.double()
    log_p = _squared(batch.actions - mean) / (-2 * std**2)
    log_p_old = _squared(batch.actions - old_mean) / (-2 * std**2)
    advantages = batch.advantages.double()
    if isinstance(agent, REINFORCE) or (isinstance(agent, DDPO) and agent.score_function):
        policy_loss = -advantages * log_p
    else:
        moved = _squared(mean - old_mean) / (2 * std**2)
        log_ratio = log_p - log_p_old + (moved if agent.ratio == "centred" else 0)
        unit = 1 if agent.ratio == "joint" else DIMS
        policy_loss = unit * _surrogate(agent, log_ratio / unit, advantages, agent.clip_range / unit, moved)
    weight = table.std.double() / table.output_coef.double().abs()
    weight = weight if agent.step_weighting == "output" else torch.ones(T).double()
    skipped = 2 if agent.skip_last_steps == "auto" else agent.skip_last_steps
    weight = weight / weight[: T - skipped].mean()
    weight[T - skipped :] = 0
    loss = getattr(agent, "reward_weight", 1.0) * weight[batch.step] * policy_loss
    if agent.kl_coef:
        reference, _ = agent.policy.transition(batch.state, reference=True)
        distance = _squared(mean - reference.double())
        kl = distance / (2 * std**2)
        if getattr(agent, "kl_estimator", "exact") == "output-mse":
            kl = distance / table.output_coef.double()[batch.step] ** 2
        held = getattr(agent, "initial_kl_coef", agent.kl_coef) / agent.kl_coef
        held = held * torch.clip(table.std.double() / (table.std.max().double() / 40), max=1) ** 2
        loss = loss + agent.kl_coef * torch.where(weight > 0, weight, held)[batch.step] * kl
    scale = float(DIMS)
    if isinstance(agent, DPOK) and agent.normalize_loss:
        scale = DIMS * agent.advantage_statistics.std * (agent.reward_weight or 1)
    return batch.weight.double() * loss / scale


def _surrogate(agent: Any, log_ratio: Tensor, advantages: Tensor, limit: float, moved: Tensor) -> Tensor:
    ratio = torch.exp(log_ratio)
    if agent.clip_type == "kl":
        is_too_far = (moved > agent.clip_range) & (torch.sign(advantages) == torch.sign(log_ratio))
        return torch.where(is_too_far, torch.zeros(()).double(), -ratio * advantages)
    clipped = torch.exp(torch.clip(log_ratio, -limit, limit))
    if agent.clip_type == "clamp":
        return -clipped * advantages
    return torch.maximum(-ratio * advantages, -clipped * advantages)


def _target(agent: Any, batch: NoisyImages) -> Tensor:
    """What a perfect denoiser predicts: eps, or for flow matching v = eps - x_0."""
    table = agent.process.table
    signal, noise = table.signal[batch.step][:, None, None, None], table.noise[batch.step][:, None, None, None]
    eps = (batch.noisy.double() - signal * batch.latents) / noise
    return eps - batch.latents if _is_flow(agent) else eps


def _is_flow(agent: Any) -> bool:
    return is_flow_matching(agent.process.model.scheduler_config)


def _denoising_loss(agent: Any, batch: NoisyImages) -> Tensor:
    """w ||output - target||^2 / D, with KL-O + gamma ||output - output_pre||^2 / D."""
    policy = agent.policy
    output = policy.predict_output(batch.state, guidance_scale=1.0).double()
    loss = batch.weight * _squared(output - _target(agent, batch)) / DIMS
    if getattr(agent, "regularization", "") == "KL-O":
        reference = policy.predict_output(batch.state, reference=True, guidance_scale=1.0).double()
        loss = loss + agent.gamma_kl * _squared(output - reference) / DIMS
    return loss


def _matching_loss(agent: Any, batch: NoisyImages) -> Tensor:
    """The loss of DiffusionNFT or AWM, plus the distance to the pre-trained model."""
    table, policy = agent.process.table, agent.policy
    signal, noise = table.signal.double()[batch.step], table.noise.double()[batch.step]
    # x_0 = (x_t - noise eps) / signal and v = (eps - noise x_t) / signal, or for flow matching x_0 = x_t - noise v: so
    # an error of the output is an error of these in x_0 and in v.
    in_clean, in_velocity = (noise, torch.ones_like(noise)) if _is_flow(agent) else (noise / signal, 1 / signal)
    target = _target(agent, batch)
    output = policy.predict_output(batch.state, guidance_scale=1.0).double()
    with policy.old_weights():
        old = policy.predict_output(batch.state, guidance_scale=1.0).double()
    reference = policy.predict_output(batch.state, reference=True, guidance_scale=1.0).double()
    penalty = agent.kl_coef * _squared(output - reference) / DIMS
    if isinstance(agent, DiffusionNFT):
        positive = (1 - agent.beta) * old + agent.beta * output
        negative = (1 + agent.beta) * old - agent.beta * output
        r = 0.5 + 0.5 * batch.weight.double()
        loss = r * _squared(positive - target) + (1 - r) * _squared(negative - target)
        return loss * in_clean**2 / DIMS / agent.beta + penalty
    matched = _squared(output - target) * in_velocity**2 / DIMS
    log_ratio = -matched - batch.old_log_prob.double()  # type: ignore[attr-defined]
    ratio, clipped = log_ratio.exp(), log_ratio.clip(-agent.clip_range, agent.clip_range).exp()
    policy_loss = torch.maximum(-batch.weight * ratio, -batch.weight * clipped)
    return policy_loss + agent.ema_coef * _squared(output - old) / DIMS + penalty


def _preference_loss(agent: DiffusionDPO, batch: NoisyPairs) -> Tensor:
    """log(1 + exp(beta / 2 [ (e_w - e_w^pre) - (e_l - e_l^pre) ])) for e = ||output - target||^2 / D."""
    table, closer = agent.process.table, []
    signal, noise = table.signal[batch.step][:, None, None, None], table.noise[batch.step][:, None, None, None]
    conditioning = {name: values[batch.index] for name, values in batch.conditioning.items()}
    for k in (0, 1):
        noisy, clean = batch.noisy[:, k], batch.latents[:, k].double()
        eps = (noisy.double() - signal * clean) / noise
        target = eps - clean if _is_flow(agent) else eps
        state = State(noisy, batch.step, conditioning)
        output = agent.policy.predict_output(state, guidance_scale=1.0)
        reference = agent.policy.predict_output(state, reference=True, guidance_scale=1.0)
        closer.append((_squared(output - target) - _squared(reference - target)) / DIMS)
    return torch.log1p(torch.exp(agent.beta / 2 * (closer[0] - closer[1])))


def _minus_reward(agent: DRaFT, batch: Any) -> Tensor:
    """-r of the images that the same noise leads to, plus the KL of the last steps."""
    latents, table, kl = batch.latents, agent.process.table, torch.zeros(len(batch)).double()
    conditioning = {name: values[batch.image] for name, values in batch.image_conditioning.items()}
    for k in range(agent.n_last_steps):
        index = T - agent.n_last_steps + k
        state = agent.process.state(latents, index, conditioning)
        mean, _ = agent.policy.transition(state)
        if agent.kl_coef and table.std[index] > 0:
            reference, _ = agent.policy.transition(state, reference=True)
            kl = kl + agent.kl_coef * _squared(mean - reference) / (2 * table.std[index].double() ** 2)
        latents = mean + table.std[index] * batch.noise[:, k]
    return kl - agent.process.model.decode(latents).double().mean((1, 2, 3))


def _squared(values: Tensor) -> Tensor:
    return values.double().square().sum((1, 2, 3))
