"""Each term of the objectives against numbers computed by hand, and finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from agents.common import losses
from dpok_gym import diffusion
from dpok_gym.samplers import TransitionTable

CLIP = 0.2
INSIDE, ABOVE, BELOW = 0.1, 0.5, -0.5  # log-ratios
UPPER, LOWER = math.exp(CLIP), math.exp(-CLIP)


def tensor(values: list, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def randn(*size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_(True)


# --- The clipped ratio


@pytest.mark.parametrize(
    ("clip_type", "log_ratio", "advantage", "loss", "has_gradient"),
    [
        ("ppo", 0.0, 2.0, -2.0, True),
        ("ppo", INSIDE, 2.0, -2 * math.exp(INSIDE), True),
        ("ppo", INSIDE, -2.0, 2 * math.exp(INSIDE), True),
        ("ppo", ABOVE, 2.0, -2 * UPPER, False),
        ("ppo", ABOVE, -2.0, 2 * math.exp(ABOVE), True),  # too likely, and bad: pushed back
        ("ppo", BELOW, 2.0, -2 * math.exp(BELOW), True),  # too unlikely, and good: pulled back
        ("ppo", BELOW, -2.0, 2 * LOWER, False),
        ("clamp", 0.0, 2.0, -2.0, True),
        ("clamp", INSIDE, 2.0, -2 * math.exp(INSIDE), True),
        ("clamp", INSIDE, -2.0, 2 * math.exp(INSIDE), True),
        ("clamp", ABOVE, 2.0, -2 * UPPER, False),
        ("clamp", ABOVE, -2.0, 2 * UPPER, False),
        ("clamp", BELOW, 2.0, -2 * LOWER, False),
        ("clamp", BELOW, -2.0, 2 * LOWER, False),
    ],
)
def test_clipped_surrogate(
    clip_type: losses.ClipType, log_ratio: float, advantage: float, loss: float, has_gradient: bool
) -> None:
    log_ratios = tensor([log_ratio, 0.0], requires_grad=True)
    result = losses.clipped_surrogate(log_ratios, tensor([advantage, 1.0]), CLIP, clip_type)
    torch.testing.assert_close(result, tensor([loss, -1.0]))
    result[0].backward()
    # d(-A rho) / d(log rho) = -A rho, the loss itself.
    torch.testing.assert_close(log_ratios.grad, tensor([loss if has_gradient else 0.0, 0.0]))


def test_unknown_clip_type() -> None:
    with pytest.raises(ValueError, match="clip_type must be one of 'ppo', 'clamp', got 'soft'"):
        losses.clipped_surrogate(torch.zeros(1), torch.ones(1), CLIP, "soft")


@pytest.mark.parametrize(
    ("ratio", "log_mean", "mean_log"),
    # In 8 dimensions with a KL of 1 nat, log rho is N(-1, 2).
    [("joint", 0.0, -1.0), ("per-dimension", -1 / 8 + 1 / 64, -1 / 8), ("centred", 1 / 64, 0.0)],
)
def test_expected_ratio(ratio: losses.Ratio, log_mean: float, mean_log: float) -> None:
    """Per dimension, it falls with the distance: a constant advantage has a gradient. Centred, it does not."""
    old_mean, std = torch.zeros(100_000, 8), torch.ones(100_000)
    actions = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0))
    log_ratio, dims = losses.importance_ratio(actions, old_mean + 0.5, old_mean, std, ratio)
    assert dims == (1 if ratio == "joint" else 8)
    assert log_ratio.exp().mean().log().item() == pytest.approx(log_mean, abs=0.02)
    assert log_ratio.mean().item() == pytest.approx(mean_log, abs=0.01)


# --- The policy gradient of transitions. Actions of two dimensions, std 2, old mean 0.

OLD_MEAN = tensor([[0.0, 0.0]] * 3)
MEANS = tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 4.0]])
ACTIONS = tensor([[1.0, -1.0], [2.0, 1.0], [4.0, 4.0]])
#: mean . (action - mean / 2) / 4: 0; (1.5 + 0.5) / 4 = 0.5; (4 * 2 + 4 * 2) / 4 = 4.
LOG_RATIO = tensor([0.0, 0.5, 4.0])


#: Added to log rho, KL(old || new) = |mean|^2 / 8 centres it: 0, 2 / 8, 32 / 8.
KL = tensor([0.0, 0.25, 4.0])


@pytest.mark.parametrize(
    ("ratio", "dims", "log_ratio"),
    [("joint", 1, LOG_RATIO), ("per-dimension", 2, LOG_RATIO / 2), ("centred", 2, (LOG_RATIO + KL) / 2)],
)
def test_policy_gradient_loss_by_hand(ratio: losses.Ratio, dims: int, log_ratio: Tensor) -> None:
    advantages = tensor([3.0, -2.0, 1.0])
    arguments = (ACTIONS, MEANS, OLD_MEAN, tensor([2.0] * 3), advantages, 2.0)
    loss, metrics = losses.policy_gradient_loss(*arguments, "ppo", ratio)
    # The limit of 2 nats is that of the whole latent, whatever the ratio is taken of.
    clipped = log_ratio.clamp(max=2 / dims)
    torch.testing.assert_close(loss, -dims * advantages * clipped.exp())
    assert metrics.keys() == {"mean_ratio", "clip_fraction"}
    torch.testing.assert_close(metrics["mean_ratio"], log_ratio.exp())
    assert metrics["clip_fraction"].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("advantages", "left_out"),
    [
        ([3.0, 3.0, 1.0], [False, False, True]),  # far away, and would go further
        ([3.0, -3.0, -1.0], [False, False, False]),  # far away, and would come back
        ([3.0, 3.0, 0.0], [False, False, False]),  # does not move at all
    ],
)
def test_the_mask_by_kl(advantages: list[float], left_out: list[bool]) -> None:
    """Only the last transition has a KL above the limit of 2 nats."""
    means = MEANS.clone().requires_grad_(True)
    arguments = (ACTIONS, means, OLD_MEAN, tensor([2.0] * 3), tensor(advantages), 2.0)
    loss, metrics = losses.policy_gradient_loss(*arguments, "kl", "centred")
    expected = torch.where(torch.tensor(left_out), 0.0, -2 * tensor(advantages) * ((LOG_RATIO + KL) / 2).exp())
    torch.testing.assert_close(loss, expected)
    assert metrics["clip_fraction"].tolist() == [float(each) for each in left_out]
    loss.sum().backward()
    has_gradient = [not each and advantage != 0 for each, advantage in zip(left_out, advantages, strict=True)]
    assert [bool(gradient.any()) for gradient in means.grad] == has_gradient


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("clip_type", ["ppo", "clamp", "kl"])
def test_a_transition_that_has_moved_too_far_makes_no_nan(clip_type: losses.ClipType, advantage: float) -> None:
    """The exponential of its log-ratio, 200, is infinite in float32."""
    mean = torch.full((1, 2), 20.0, dtype=torch.float32, requires_grad=True)
    zeros, std = torch.zeros(1, 2), torch.ones(1)
    loss, metrics = losses.policy_gradient_loss(
        torch.full((1, 2), 15.0), mean, zeros, std, torch.tensor([advantage]), 2.0, clip_type
    )
    loss.sum().backward()
    assert losses.importance_ratio(torch.full((1, 2), 15.0), mean, zeros, std)[0].item() == pytest.approx(200)
    assert all(value.isfinite().all() for value in (loss, mean.grad, *metrics.values()))


@pytest.mark.parametrize("ratio", ["joint", "per-dimension", "centred"])
@pytest.mark.parametrize("clip_type", ["ppo", "clamp", "kl"])
def test_the_gradient_at_the_old_policy_is_that_of_the_score_function(
    clip_type: losses.ClipType, ratio: losses.Ratio
) -> None:
    """Whatever the ratio is: kl_coef, beside it, always has the same meaning."""
    old_mean, actions = randn(4, 2, 3, seed=0).detach(), randn(4, 2, 3, seed=1).detach()
    std, advantages = tensor([0.5, 1.0, 2.0, 3.0]), tensor([1.0, -1.0, 2.0, 0.5])
    by_ratio, by_score = (old_mean.clone().requires_grad_(True) for _ in range(2))
    loss, _ = losses.policy_gradient_loss(actions, by_ratio, old_mean, std, advantages, CLIP, clip_type, ratio)
    loss.sum().backward()
    losses.score_function_loss(actions, by_score, std, advantages).sum().backward()
    torch.testing.assert_close(by_ratio.grad, by_score.grad)
    assert by_score.grad.any()


def test_the_score_function_has_the_gradient_of_the_log_density() -> None:
    mean, actions = randn(3, 2, 2, seed=0), randn(3, 2, 2, seed=1).detach()
    std, advantages = tensor([0.5, 1.0, 2.0]), tensor([1.0, -1.0, 2.0])
    loss = losses.score_function_loss(actions, mean, std, advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), mean)
    expected = (-advantages * diffusion.log_prob(actions, mean, std)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, mean)[0])


def test_a_constant_advantage_pulls_a_ratio_per_dimension_only() -> None:
    """Away from the old policy if it is negative, back if it is positive; the centred one has no such pull."""
    dims, shift = 8, 0.5
    actions = torch.randn(200_000, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old_mean, std, advantages = torch.zeros_like(actions), torch.ones(len(actions)).double(), -torch.ones(len(actions))
    pulls = {}
    for ratio in ("per-dimension", "centred"):
        moved = torch.full((dims,), shift, dtype=torch.float64, requires_grad=True)
        means = moved.expand_as(actions)
        loss, _ = losses.policy_gradient_loss(actions, means, old_mean, std, advantages, 1e9, "kl", ratio)
        (gradient,) = torch.autograd.grad(loss.mean(), moved)
        pulls[ratio] = -gradient.mean().item()  # of a step down the gradient, in the direction of the shift
    assert pulls["per-dimension"] > 0.5 * shift
    assert abs(pulls["centred"]) < 0.2 * shift


# --- The other terms


def test_value_loss() -> None:
    values = tensor([1.0, -2.0, 3.0], requires_grad=True)
    result = losses.value_loss(values, tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(result, tensor([0.0, 4.0, 6.25]))
    result.sum().backward()
    torch.testing.assert_close(values.grad, tensor([0.0, -4.0, 5.0]))


def test_denoising_loss() -> None:
    output = tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    result = losses.denoising_loss(output, tensor([[[1.0, 0.0], [3.0, 5.0]], [[2.0, 0.0], [0.0, 0.0]]]))
    torch.testing.assert_close(result, tensor([(0 + 4 + 0 + 1) / 4, 4 / 4]))
    result.sum().backward()
    torch.testing.assert_close(output.grad, tensor([[[0.0, 1.0], [0.0, -0.5]], [[-1.0, 0.0], [0.0, 0.0]]]))


# --- Gradients

B, SHAPE = 3, (2, 2, 2)
MEAN, OTHER, SAMPLE = (randn(B, *SHAPE, seed=seed) for seed in range(3))
STD = tensor([0.3, 1.0, 2.5])
TABLE = TransitionTable(
    timesteps=torch.arange(B).flip(0),
    sample_coef=tensor([1.0, 0.9, 0.8]),
    output_coef=tensor([-0.5, 0.1, 2.0]),
    std=STD,
    signal=tensor([0.2, 0.5, 0.9]),
    noise=tensor([0.9, 0.7, 0.3]),
    clean_sample_coef=tensor([0.2, 0.5, 0.9]),
    clean_output_coef=tensor([0.2, 0.5, 0.9]),
)
STEP = torch.tensor([2, 0, 1])
LOG_RATIOS = tensor([0.0, INSIDE, ABOVE, BELOW] * 2, requires_grad=True)
ADVANTAGES = tensor([1.5] * 4 + [-0.7] * 4, requires_grad=True)
THREE_ADVANTAGES = tensor([1.5, -0.7, 0.3], requires_grad=True)


#: So near to the mean that no ratio is clipped.
OLD = MEAN.detach() + 0.01


def policy_gradient(mean: Tensor, advantages: Tensor, ratio: losses.Ratio) -> Tensor:
    return losses.policy_gradient_loss(SAMPLE.detach(), mean, OLD, STD, advantages, 1e3, "ppo", ratio)[0]


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda r, a: losses.clipped_surrogate(r, a, CLIP, "ppo"), (LOG_RATIOS, ADVANTAGES)),
        (lambda r, a: losses.clipped_surrogate(r, a, CLIP, "clamp"), (LOG_RATIOS, ADVANTAGES)),
        (lambda m, a: policy_gradient(m, a, "joint"), (MEAN, THREE_ADVANTAGES)),
        (lambda m, a: policy_gradient(m, a, "per-dimension"), (MEAN, THREE_ADVANTAGES)),
        (lambda m, a: policy_gradient(m, a, "centred"), (MEAN, THREE_ADVANTAGES)),
        (losses.value_loss, (LOG_RATIOS, ADVANTAGES)),
        (losses.denoising_loss, (MEAN, OTHER)),
        (lambda s, m: diffusion.log_prob(s, m, STD), (SAMPLE, MEAN)),
        (lambda s, m, o: diffusion.log_ratio(s, m, o, STD), (SAMPLE, MEAN, OTHER)),
        (lambda m, o: diffusion.kl_divergence(m, o, STD), (MEAN, OTHER)),
        (lambda m, o: TABLE.output_mse(STEP, m, o), (MEAN, OTHER)),
    ],
    ids=[
        "ppo", "clamp", "joint", "per-dimension", "centred", "value", "denoising", "log_prob",
        "log_ratio", "kl", "output_mse",
    ],
)  # fmt: skip
def test_gradients_equal_finite_differences(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    assert gradcheck(function, inputs)


def test_kl_is_the_weighted_difference_of_the_outputs() -> None:
    """output_coef^2 ||output - other_output||^2 / (2 std^2), with means that come from two outputs."""
    outputs, others, samples = (randn(B, *SHAPE, seed=seed).detach().float() for seed in (5, 6, 7))
    mean, other = TABLE.mean(STEP, samples, outputs), TABLE.mean(STEP, samples, others)
    squares = (outputs - others).square().flatten(1).sum(1).double()
    difference = mean[0].numel() * TABLE.output_mse(STEP, mean, other)
    torch.testing.assert_close(difference, squares, rtol=1e-5, atol=1e-6)
    weight = TABLE.output_coef[STEP].square() / (2 * TABLE.std[STEP].square())
    kl = diffusion.kl_divergence(mean, other, TABLE.std[STEP])
    torch.testing.assert_close(kl, weight * difference, rtol=1e-5, atol=1e-6)
