"""The denoiser as a policy: the pre-trained model to begin with, and no one else's after that."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.distributions import Independent, Normal

from agents import DenoisingPolicy
from dpok_gym import DenoisingVectorEnv, diffusion
from dpok_gym.prompts import prompt_to_bytes
from dpok_gym.samplers import DenoisingProcess, State
from dpok_gym.utils.batching import BatchSize
from tests.agents.common.support import PROMPTS, observed_states, perturb
from tests.support import assert_same, make_process

N, T = 5, 3
SHAPE = (N, 4, 8, 8)
LR = 1e-2


@pytest.fixture
def process(tiny_sd_folder: Path) -> DenoisingProcess:
    return make_process(tiny_sd_folder, T)


@pytest.fixture
def make_policy(make_env: Callable[..., DenoisingVectorEnv]) -> Callable[..., DenoisingPolicy]:
    """Makes a policy of a process, with a critic."""
    env = make_env(1)

    def make(process: DenoisingProcess, **kwargs: Any) -> DenoisingPolicy:
        settings = {"lora_rank": 4, "critic_hidden": 16, "use_critic": True}
        spaces = env.single_observation_space, env.single_action_space
        return DenoisingPolicy(*spaces, lambda _: LR, process=process, **(settings | kwargs))

    return make


def observe(state: State) -> dict[str, Tensor]:
    """Returns states as an environment shows them."""
    prompts = prompt_to_bytes([PROMPTS[i % len(PROMPTS)] for i in range(N)], 512)
    return {"latent": state.latents, "step": state.step, "prompt": torch.from_numpy(prompts)}


def to_numpy(observation: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in observation.items()}


def take_a_step(policy: DenoisingPolicy, state: State) -> None:
    """Updates everything once, towards higher values and likelier actions."""
    values, log_prob, _ = policy.evaluate_actions(observe(state), torch.zeros(SHAPE))
    policy.optimizer.zero_grad()
    (-values - log_prob / 256).mean().backward()
    policy.optimizer.step()


@torch.no_grad()
def mean_of(policy: DenoisingPolicy, state: State, **kwargs: Any) -> Tensor:
    return policy.transition(state, **kwargs)[0]


def copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- The pre-trained model, and the trained one beside it


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"guidance_scale": 3.0},
        {"lora_rank": 0},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "lora_rank": 0},
    ],
    ids=str,
)
def test_is_the_pretrained_model_before_training(
    tiny_sd_folder: Path, make_policy: Callable[..., DenoisingPolicy], kwargs: dict[str, Any]
) -> None:
    process = make_process(tiny_sd_folder, T, guidance_scale=kwargs.pop("guidance_scale", 1.0))
    policy, state = make_policy(process, **kwargs), observed_states(process, N)
    mean, std = policy.transition(state)
    for reference, reference_std in (policy.transition(state, reference=True), policy.reference_transition(state)):
        assert torch.equal(mean, reference)
        assert torch.equal(std, reference_std)
        assert diffusion.kl_divergence(mean, reference, std).tolist() == [0.0] * N
        assert diffusion.log_ratio(torch.randn(SHAPE), mean, reference, std).exp().tolist() == [1.0] * N
    if "precision" not in kwargs:
        expected_mean, expected_std = process.transition(state)
        assert torch.equal(mean, expected_mean)
        assert torch.equal(std, expected_std)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_training_changes_this_policy_and_nothing_else(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], lora_rank: int
) -> None:
    state = observed_states(process, N)
    pretrained = process.transition(state)[0].detach()
    policy = make_policy(process, lora_rank=lora_rank)
    others = [perturb(make_policy(process)), perturb(make_policy(process, lora_rank=0))]
    before = [mean_of(other, state) for other in others]
    shared = copy_of(process.model.denoiser)  # with the LoRAs of those that have one
    started = copy_of(policy)
    for _ in range(2):
        take_a_step(policy, state)
    trained = mean_of(policy, state)
    assert not torch.allclose(trained, pretrained, atol=1e-3)
    # The matrix A of a LoRA has no gradient in the first step, as B is still zero; hence two.
    unchanged = [name for name, value in policy.state_dict().items() if torch.equal(value, started[name])]
    assert all("gains" in name for name in unchanged)  # those of steps that no state was at
    assert torch.equal(mean_of(policy, state, reference=True), pretrained)
    assert torch.equal(process.transition(state)[0], pretrained)
    for other, expected in zip(others, before, strict=True):
        assert torch.equal(mean_of(other, state), expected)
        take_a_step(other, state)
    assert torch.equal(mean_of(policy, state), trained)
    denoiser = process.model.denoiser.state_dict()
    changed = {name for name, value in denoiser.items() if not torch.equal(value, shared[name])}
    assert all("lora_" in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_the_reference_is_the_reference_wherever_it_is_asked_for(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], lora_rank: int
) -> None:
    policy, state = perturb(make_policy(process, lora_rank=lora_rank)), observed_states(process, N)
    other = perturb(make_policy(process), scale=0.3)
    trained, pretrained = mean_of(policy, state), process.transition(state)[0].detach()
    assert not torch.allclose(trained, pretrained, atol=1e-3)
    with policy.adapter_enabled():
        assert torch.equal(mean_of(policy, state, reference=True), pretrained)
        assert torch.equal(policy.reference_transition(state)[0], pretrained)
        assert torch.equal(mean_of(policy, state), trained)
        with policy.adapter_enabled(False):
            assert torch.equal(mean_of(policy, state, reference=True), pretrained)
            assert torch.equal(mean_of(policy, state), trained)
        assert not torch.allclose(mean_of(other, state), trained, atol=1e-3)
        assert torch.equal(mean_of(policy, state), trained)
    assert torch.equal(process.transition(state)[0], pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_answers_as_the_old_policy_too(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], lora_rank: int
) -> None:
    policy, state = make_policy(process, lora_rank=lora_rank, keep_old=True), observed_states(process, N)
    other = perturb(make_policy(process))
    first = perturb(policy).denoiser_parameters()
    kept = [value.detach().clone() for value in first]
    policy.old.follow(0)
    old, pretrained = mean_of(policy, state), process.transition(state)[0].detach()
    perturb(policy, scale=0.3)
    trained, others = mean_of(policy, state), mean_of(other, state)
    for one, another in ((trained, old), (old, pretrained), (trained, pretrained), (others, old)):
        assert not torch.allclose(one, another, atol=1e-3)
    answer, std = policy.old_transition(state)
    assert torch.equal(answer, old)
    assert torch.equal(std, policy.transition(state)[1])
    assert not answer.requires_grad
    with policy.old_weights():
        assert torch.equal(mean_of(policy, state), old)
        assert torch.equal(mean_of(policy, state, reference=True), pretrained)
        assert torch.equal(mean_of(other, state), others)
    assert torch.equal(mean_of(policy, state), trained)
    # A gradient from before is still that of the trained weights.
    output = policy.predict_output(state)
    policy.old_transition(state)
    with policy.adapter_enabled():
        output.sum().backward()
    assert all(value.grad is not None for value in policy.denoiser_parameters())
    policy.old.restore()
    assert_same([value.detach() for value in policy.denoiser_parameters()], kept)


def test_keeps_no_old_policy_unless_asked(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]
) -> None:
    with pytest.raises(ValueError, match="keeps no old weights: make it with keep_old=True"):
        make_policy(process).old_transition(observed_states(process, N))


def test_the_adapter_is_switched_off_by_an_error(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]
) -> None:
    policy, state = perturb(make_policy(process)), observed_states(process, N)
    pretrained, trained = process.transition(state)[0].detach(), mean_of(policy, state)
    with pytest.raises(KeyboardInterrupt), policy.adapter_enabled():
        raise KeyboardInterrupt
    assert torch.equal(process.transition(state)[0], pretrained)
    assert torch.equal(mean_of(policy, state), trained)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_the_reference_has_no_gradient_and_the_policy_keeps_its_own(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], lora_rank: int, precision: str
) -> None:
    """Switching the LoRA off between the forward and the backward pass must not freeze what is trained."""
    policy, state = make_policy(process, lora_rank=lora_rank, precision=precision), observed_states(process, N)
    with policy.adapter_enabled():
        mean, _ = policy.transition(state)
        reference, _ = policy.reference_transition(state)
        assert not reference.requires_grad
        (mean - reference - 1).square().sum().backward()
    gradients = [value.grad for value in policy.denoiser_parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    n_changed = sum(bool(gradient.any()) for gradient in gradients)
    assert n_changed >= len(gradients) // 2  # the matrices A have none as long as B is zero
    assert all(value.grad is None for value in process.model.denoiser.parameters() if not value.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_the_merged_denoiser_is_the_policy(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], lora_rank: int
) -> None:
    policy, state = perturb(make_policy(process, lora_rank=lora_rank)), observed_states(process, N)
    merged = policy.merged_denoiser()
    mean, _ = process.transition(state, denoiser=merged)
    torch.testing.assert_close(mean, mean_of(policy, state), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mean, mean_of(policy, state, reference=True), atol=1e-3)
    assert not any("lora" in name for name in merged.state_dict())


# --- What Stable-Baselines3 asks of a policy


def test_log_probabilities_are_those_of_a_gaussian(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]
) -> None:
    policy, state = perturb(make_policy(process)), observed_states(process, N)
    observation = observe(state)
    with torch.no_grad():
        actions, values, log_prob = policy(observation)
        mean, std = policy.transition(state)
        distribution = policy.get_distribution(observation)
        evaluated = policy.evaluate_actions(observation, actions)
        # As Stable-Baselines3's buffers return them: actions flattened, steps with an axis of one.
        column = observation | {"step": observation["step"][:, None]}
        flattened = policy.evaluate_actions(column, actions.flatten(1))
    assert [tuple(part.shape) for part in (actions, values, log_prob)] == [SHAPE, (N,), (N,)]
    gaussian = Independent(Normal(mean.double(), std.double().reshape(-1, 1, 1, 1).expand_as(mean)), 3)
    expected = [values, gaussian.log_prob(actions.double()).float(), gaussian.entropy().float()]
    for ours in (evaluated, flattened, [values, log_prob, evaluated[2]]):
        for part, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(part, theirs, rtol=1e-5, atol=5e-3)
    torch.testing.assert_close(distribution.log_prob(actions.flatten(1)), expected[1], rtol=1e-5, atol=5e-3)
    torch.testing.assert_close(distribution.entropy(), expected[2], rtol=1e-5, atol=5e-3)
    torch.testing.assert_close(distribution.mode(), mean.flatten(1))


def test_a_step_without_noise_has_no_distribution(
    tiny_sd_folder: Path, make_policy: Callable[..., DenoisingPolicy]
) -> None:
    process = make_process(tiny_sd_folder, T, eta=0.0)
    policy, state = make_policy(process), observed_states(process, N)
    with pytest.raises(ValueError, match=r"denoising step 0 adds no noise, so its action has no distribution: ask pre"):
        policy.get_distribution(observe(state))


@pytest.mark.parametrize("critic", [{"use_critic": False}, {"critic_kind": "network"}, {"critic_kind": "reward"}])
@pytest.mark.parametrize("name", ["loook_fraction", "process"])
def test_names_of_the_critics_arguments(
    name: str, critic: dict[str, Any], process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]
) -> None:
    with pytest.raises(
        ValueError, match=f"unknown argument in critic_kwargs '{name}'; .*here are: forgetting, look_fr"
    ):
        make_policy(process, critic_kwargs={name: 0.2}, **critic)


def test_observations_are_read_as_states(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]
) -> None:
    policy, state = make_policy(process), observed_states(process, N)
    for observation in (observe(state), observe(state) | {"step": state.step[:, None].float()}):
        assert_same(policy.state_of(observation), state)


def test_predict(process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]) -> None:
    policy, state = perturb(make_policy(process)), observed_states(process, N)
    batch, mean = to_numpy(observe(state)), mean_of(policy, state).numpy()
    actions, recurrent = policy.predict(batch, deterministic=True)
    assert recurrent is None
    assert actions.dtype == np.float32
    assert np.array_equal(actions, mean)
    assert np.array_equal(policy.predict(batch, deterministic=True)[0], actions)
    for i in range(N):
        single, _ = policy.predict({name: values[i] for name, values in batch.items()}, deterministic=True)
        assert single.shape == SHAPE[1:]
        np.testing.assert_allclose(single, mean[i], rtol=1e-4, atol=1e-5)

    torch.manual_seed(3)
    sample, again = policy.predict(batch)[0], policy.predict(batch)[0]
    assert not np.array_equal(sample, again)
    std = process.table.std[state.step].numpy().reshape(-1, 1, 1, 1)
    noise = (np.stack([sample, again]) - mean) / std
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert abs(noise.std() - 1) < 4 / math.sqrt(2 * noise.size)
    torch.manual_seed(3)
    assert np.array_equal(policy.predict(batch)[0], sample)


def test_values_depend_on_everything(process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]) -> None:
    policy, state = make_policy(process), observed_states(process, N)
    observation = observe(state)
    assert policy.predict_values(observation).tolist() == [0.0] * N  # at first
    torch.nn.init.normal_(policy.critic.head.weight)
    values = policy.predict_values(observation)
    assert values.shape == (N,)
    assert torch.equal(policy.values(state), values)
    for name, other in {
        "latent": -observation["latent"],
        "step": (observation["step"] + 1) % T,
        "prompt": observation["prompt"].roll(1, 0),
    }.items():
        assert (policy.predict_values(observation | {name: other}) != values).all(), name


def test_without_a_critic_values_are_0(process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]) -> None:
    policy, state = make_policy(process, use_critic=False), observed_states(process, N)
    assert policy.critic is None
    assert policy.predict_values(observe(state)).tolist() == [0.0] * N
    assert len(policy.optimizer.param_groups) == 1
    assert len(list(policy.parameters())) == len(policy.denoiser_parameters())


def test_training_mode_changes_nothing(process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]) -> None:
    policy, state = make_policy(process), observed_states(process, N)
    expected = mean_of(policy, state)
    policy.set_training_mode(True)
    assert torch.equal(mean_of(policy, state), expected)
    dropouts = [module for module in process.model.denoiser.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert not any(module.training for module in dropouts)


# --- How the denoiser is called


@pytest.mark.slow
def test_max_batch_size(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, state = perturb(make_policy(process, max_batch_size=None)), observed_states(process, N)
    sizes: list[int] = []
    predict = policy.model.predict

    def counted(latents: Tensor, *args: Any) -> Tensor:
        sizes.append(len(latents))
        return predict(latents, *args)

    monkeypatch.setattr(policy.model, "predict", counted)
    whole = [mean_of(policy, state, reference=reference) for reference in (False, True)]
    assert sizes == [N, N]
    policy._batch_size = BatchSize("max_batch_size", 2)
    sizes.clear()
    for reference, expected in zip((False, True), whole, strict=True):
        torch.testing.assert_close(mean_of(policy, state, reference=reference), expected, rtol=1e-4, atol=1e-5)
    assert sizes == [2, 2, 1] * 2
    sizes.clear()
    policy.transition(state)
    assert sizes == [N]  # with gradients, whoever trains chooses the size


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{}, {"lora_rank": 0}, {"guidance_gradient": "conditional"}], ids=str)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_function_evaluations(
    tiny_sd_folder: Path, make_policy: Callable[..., DenoisingPolicy], guidance_scale: float, kwargs: dict[str, Any]
) -> None:
    """Counts what goes through the network: the pre-trained one's passes too, and two for each latent if guided."""
    process = make_process(tiny_sd_folder, T, guidance_scale=guidance_scale)
    policy, state = make_policy(process, max_batch_size=2, **kwargs), observed_states(process, N)
    passed: list[int] = []
    for network in {policy.model.denoiser, policy.denoiser} - {None}:
        network.register_forward_hook(lambda module, inputs, output: passed.append(len(output.sample)))
    each = N if guidance_scale == 1 else 2 * N

    def count(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
        before = process.num_function_evaluations
        passed.clear()
        call(*args, **kwargs)
        assert process.num_function_evaluations - before == sum(passed)
        return sum(passed)

    assert process.num_function_evaluations == 0
    assert count(policy.transition, state) == each
    assert count(policy.transition, state, reference=True) == each
    assert count(mean_of, policy, state) == each  # without gradients, in batches of two
    assert count(policy.predict, to_numpy(observe(state))) == each
    assert count(policy.predict_output, state, guidance_scale=1.0) == N  # as the forward process asks
    assert count(policy.predict_values, observe(state)) == 0


@pytest.mark.slow
def test_guidance(process: DenoisingProcess, tiny_sd_folder: Path, make_policy: Callable[..., DenoisingPolicy]) -> None:
    """The mean is linear in the network's output, so guidance extrapolates it from the empty prompt's."""
    policy, state = perturb(make_policy(process)), observed_states(process, N)
    conditional = mean_of(policy, state)
    unconditional = mean_of(policy, State(state.latents, state.step, process.model.encode([""] * N)))
    expected = unconditional + 4 * (conditional - unconditional)
    guided = make_policy(make_process(tiny_sd_folder, T, guidance_scale=4.0))
    guided.load_state_dict(policy.state_dict())
    torch.testing.assert_close(mean_of(guided, state), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, conditional, atol=1e-3)
    output = guided.predict_output(state, guidance_scale=1.0)
    torch.testing.assert_close(process.mean_of_output(state, output), conditional, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_guidance_gradients(tiny_sd_folder: Path, make_policy: Callable[..., DenoisingPolicy]) -> None:
    process = make_process(tiny_sd_folder, T, guidance_scale=3.0)
    state = observed_states(process, N)
    policies = [make_policy(process, guidance_gradient=which) for which in ("both", "conditional")]
    gradients = []
    for policy in policies:
        policy.load_state_dict(perturb(policies[0]).state_dict())
        mean, _ = policy.transition(state)
        mean.sum().backward()
        gradients.append(torch.cat([value.grad.flatten() for value in policy.denoiser_parameters()]))
    assert torch.equal(mean_of(policies[0], state), mean_of(policies[1], state))
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1)


@pytest.mark.slow
def test_bfloat16(process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]) -> None:
    policy, state = perturb(make_policy(process)), observed_states(process, N)
    expected = mean_of(policy, state)
    policy.precision = "bfloat16"
    mean, std = policy.transition(state)
    assert mean.dtype == std.dtype == torch.float32
    assert not torch.equal(mean, expected)
    torch.testing.assert_close(mean, expected, rtol=0.1, atol=0.1)
    take_a_step(policy, state)
    assert all(bool(value.isfinite().all()) for value in policy.parameters())
    assert not torch.equal(mean_of(policy, state), mean)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_gradient_checkpointing_changes_no_number(
    process: DenoisingProcess,
    tiny_sd_folder: Path,
    fresh_models: Callable[[], None],
    make_policy: Callable[..., DenoisingPolicy],
    lora_rank: int,
) -> None:
    policies = [make_policy(process, lora_rank=lora_rank)]
    fresh_models()  # or both would be counted
    policies.append(make_policy(make_process(tiny_sd_folder, T), lora_rank=lora_rank, gradient_checkpointing=True))
    policies[1].load_state_dict(perturb(policies[0]).state_dict())
    state = observed_states(process, N)
    calls = [0, 0]
    gradients = []
    for number, policy in enumerate(policies):
        network: Any = policy.denoiser or policy.model.denoiser

        def count(module: Any, inputs: Any, number: int = number) -> None:
            calls[number] += 1

        network.up_blocks[0].resnets[0].register_forward_pre_hook(count)
        with policy.adapter_enabled():
            mean, _ = policy.transition(state)
            mean.square().sum().backward()
        gradients.append(torch.cat([value.grad.flatten() for value in policy.denoiser_parameters()]))
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])
    assert calls == [1, 2]


@pytest.mark.parametrize("n", [0, 1, N])
def test_ranks_call_a_denoiser_that_is_spread_over_them_equally_often(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Without a gradient too, of which another rank has 2 N + 1 states here."""
    policy = make_policy(process, max_batch_size=2)
    state = observed_states(process, N)[:n]
    sizes: list[int] = []
    predict = process.predict

    def spy(state: State, *settings: Any) -> Tensor:
        sizes.append(len(state.latents))
        return predict(state, *settings)

    with torch.no_grad():
        expected = policy.predict_output(state)
        assert expected.shape == state.latents.shape
        monkeypatch.setattr(process, "predict", spy)
        monkeypatch.setattr("agents.common.policy.is_sharded", lambda network: True)
        monkeypatch.setattr("agents.common.distributed.largest", lambda number: 2 * N + 1)
        torch.testing.assert_close(policy.predict_output(state), expected)
    assert sizes == [2] * N + [1]
    with pytest.raises(ValueError, match="none can choose its own max_batch_size"):
        make_policy(process, max_batch_size="auto")


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_gradient_checkpointing_is_each_policys_own(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], lora_rank: int
) -> None:
    """Policies that share a denoiser do not switch it on or off for each other."""
    policies = [make_policy(process, lora_rank=lora_rank, gradient_checkpointing=on) for on in (True, False)]
    for policy in (*policies, *policies):
        network: Any = policy.denoiser or policy.model.denoiser
        with policy.adapter_enabled():
            with policy.adapter_enabled(), policy.adapter_enabled(False):
                assert network.is_gradient_checkpointing is policy.gradient_checkpointing
            assert network.is_gradient_checkpointing is policy.gradient_checkpointing
        assert not network.is_gradient_checkpointing


# --- What is kept


@pytest.mark.slow
def test_only_what_is_trained_is_kept(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], tiny_sd_folder: Path
) -> None:
    rank = 4
    policy = make_policy(process, lora_rank=rank)
    groups = policy.optimizer.param_groups
    assert [group["lr"] for group in groups] == [LR, LR]
    assert {id(value) for group in groups for value in group["params"]} == {id(value) for value in policy.parameters()}
    assert all(value.requires_grad for value in policy.parameters())
    state = policy.state_dict()
    assert {name.partition(".")[0] for name in state} == {"adapter", "critic"}

    network = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    targets = [layer for name, layer in network.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    expected = rank * sum(layer.in_features + layer.out_features for layer in targets)
    assert sum(value.numel() for value in policy.denoiser_parameters()) == expected
    assert sum(value.numel() for name, value in state.items() if name.startswith("adapter")) == expected


@pytest.mark.slow
def test_names_do_not_depend_on_other_policies(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]
) -> None:
    for lora_rank in (2, 0):
        first = make_policy(process, lora_rank=lora_rank).state_dict()
        make_policy(process, lora_rank=3)
        second = make_policy(process, lora_rank=lora_rank).state_dict()
        assert {name: value.shape for name, value in second.items()} == {name: v.shape for name, v in first.items()}


@pytest.mark.slow
def test_full_fine_tuning_trains_the_denoiser_alone(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], tiny_sd_folder: Path
) -> None:
    make_policy(process)  # its LoRA in the shared network must not be copied
    policy = make_policy(process, lora_rank=0)
    network = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    state = {name: value for name, value in policy.state_dict().items() if not name.startswith("critic")}
    assert_same({name.removeprefix("denoiser."): v for name, v in state.items()}, dict(network.state_dict()))
    assert len(policy.denoiser_parameters()) == len(list(network.parameters()))
    assert all(value.requires_grad for value in policy.denoiser_parameters())
    own = {value.data_ptr() for value in policy.denoiser_parameters()}
    assert not own & {value.data_ptr() for value in process.model.denoiser.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        {"lora_rank": 3, "target_modules": ["to_q", "ff.net.2"], "max_batch_size": 2},
        {"lora_rank": 0, "critic_hidden": 8, "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}},
        {"lora_rank": None, "use_critic": False, "precision": "bfloat16", "guidance_gradient": "conditional"},
        {"lora_rank": 2, "keep_old": True},
    ],
    ids=["lora", "full", "default", "old"],
)
def test_save_and_load(
    tiny_sd_folder: Path, make_policy: Callable[..., DenoisingPolicy], kwargs: dict[str, Any], tmp_path: Path
) -> None:
    process = make_process(tiny_sd_folder, T, guidance_scale=2.0, eta=0.7)
    policy, state = perturb(make_policy(process, **kwargs)), observed_states(process, N)
    policy.save(tmp_path / "policy.pt")
    loaded = DenoisingPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert loaded is not policy
    assert_same(dict(loaded.state_dict()), dict(policy.state_dict()))
    assert loaded.process.config == process.config
    assert torch.equal(mean_of(loaded, state), mean_of(policy, state))
    assert torch.equal(loaded.predict_values(observe(state)), policy.predict_values(observe(state)))
    theirs, ours = loaded._get_constructor_parameters(), policy._get_constructor_parameters()
    assert theirs.keys() == ours.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"lr_schedule"}
    before = copy_of(loaded)
    for group in loaded.optimizer.param_groups:
        group["lr"] = LR  # which SB3 does not save
    take_a_step(loaded, state)
    assert any(not torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


def test_the_default_rank_is_the_models(process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy]) -> None:
    assert make_policy(process, lora_rank=None).lora.rank == process.model.default_lora_rank == 8


@pytest.mark.slow
def test_saved_lora(process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], tmp_path: Path) -> None:
    policy, state = perturb(make_policy(process)), observed_states(process, N)
    assert policy.save_lora(tmp_path) == tmp_path / "pytorch_lora_weights.safetensors"
    other = make_policy(process)
    assert not torch.allclose(mean_of(other, state), mean_of(policy, state), atol=1e-3)
    other.load_lora(tmp_path)
    assert torch.equal(mean_of(other, state), mean_of(policy, state))
    with pytest.raises(ValueError, match=r"the LoRA in .* is of another model"):
        make_policy(process, lora_rank=2).load_lora(tmp_path)
    full = make_policy(process, lora_rank=0)
    for method in (full.save_lora, full.load_lora):
        with pytest.raises(ValueError, match=r"trains the whole denoiser \(lora_rank=0\) and has no LoRA"):
            method(tmp_path)


@pytest.mark.slow
def test_it_starts_from_a_lora(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], tmp_path: Path
) -> None:
    """With the ranks and layers of the file; the reference stays the pre-trained model."""
    first, state = perturb(make_policy(process, target_modules=["to_q", "conv1"])), observed_states(process, N)
    first.save_lora(tmp_path)
    second = make_policy(process, lora=tmp_path, lora_rank=2)
    assert torch.equal(mean_of(second, state), mean_of(first, state))
    assert torch.equal(mean_of(second, state, reference=True), mean_of(first, state, reference=True))
    assert set(second.state_dict()) == set(first.state_dict())
    assert second.lora.rank == 4
    take_a_step(second, state)
    assert not torch.equal(mean_of(second, state), mean_of(first, state))
    second.save(tmp_path / "policy.pt")
    loaded = DenoisingPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert torch.equal(mean_of(loaded, state), mean_of(second, state))


def test_a_lora_that_is_a_pickle(
    tiny_sd_folder: Path, make_policy: Callable[..., DenoisingPolicy], tmp_path: Path
) -> None:
    """It is read if the model's own pickles are."""
    process = make_process(tiny_sd_folder, T)
    state = make_policy(process).lora.state_dict()
    torch.save({f"unet.{name}": value for name, value in state.items()}, tmp_path / "theirs.bin")
    with pytest.raises(ValueError, match=r"theirs\.bin is a pickle"):
        make_policy(process, lora=tmp_path / "theirs.bin")
    make_policy(make_process(tiny_sd_folder, T, allow_pickle=True), lora=tmp_path / "theirs.bin")


# --- Bad input


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_sde": True}, "use_sde must be False"),
        ({"max_batch_size": 0}, "max_batch_size .* must be an integer of at least 1, got 0"),
        ({"lora_rank": -1}, "lora_rank must be an integer of at least 0, got -1"),
        ({"lora": " "}, "the LoRA must be a path that is not blank"),
        ({"lora": "nowhere", "lora_rank": 0}, "lora_rank=0 trains the whole denoiser, which starts from no LoRA"),
        ({"target_modules": ["to_x"]}, r"no layer of the denoiser ends in any of \['to_x'\]"),
        ({"target_modules": "to_q"}, "target_modules must be one of 'attention', 'all', got 'to_q'"),
        ({"guidance_gradient": "none"}, "guidance_gradient must be one of 'both', 'conditional', got 'none'"),
    ],
)
def test_bad_arguments(
    process: DenoisingProcess, make_policy: Callable[..., DenoisingPolicy], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(process, **kwargs)


@pytest.mark.slow
def test_half_precision_cannot_be_trained(make_env: Callable[..., Any], make_agent: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"lost in the digits of bfloat16.*or train a LoRA"):
        make_agent(make_env(dtype="bfloat16"), policy_kwargs={"lora_rank": 0})
    with pytest.raises(ValueError, match=r"float16 can draw but not learn.*use dtype='bfloat16'"):
        make_agent(make_env(dtype="float16"))


@pytest.mark.slow
def test_a_lora_learns_on_half_precision(make_env: Callable[..., Any], make_agent: Callable[..., Any]) -> None:
    agent = make_agent(make_env(dtype="bfloat16"))
    assert {value.dtype for value in agent.policy.parameters()} == {torch.float32}
    before = copy_of(agent.policy)
    agent.learn(2 * 4 * T)
    after = agent.policy.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items() if "adapter" in name)
