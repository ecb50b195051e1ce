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

from agents import DPOK, DenoisingPolicy
from dpok_gym import DenoisingVectorEnv, diffusion
from dpok_gym.utils.batching import BatchSize

N, T = 5, 3
SHAPE = (N, 4, 8, 8)
PROMPTS = ["a rabbit", "a green dog", "the moon"]
LR = 1e-2


pytestmark = pytest.mark.usefixtures("fresh_models")


@pytest.fixture
def make_env(tiny_sd_folder: Path) -> Callable[..., DenoisingVectorEnv]:
    def make(**kwargs: Any) -> DenoisingVectorEnv:
        settings = {"model": str(tiny_sd_folder), "prompts": PROMPTS, "reward": "jpeg-compressibility", "device": "cpu"}
        return DenoisingVectorEnv(N, num_inference_steps=T, **settings | kwargs)

    return make


def make_policy(env: DenoisingVectorEnv, **kwargs: Any) -> DenoisingPolicy:
    settings = {"device": "cpu", "lora_rank": 4, "critic_hidden": 16}
    spaces = env.single_observation_space, env.single_action_space
    return DenoisingPolicy(*spaces, lambda _: LR, **env.sampler | settings | kwargs)


def observe(env: DenoisingVectorEnv, seed: int = 0) -> dict[str, Tensor]:
    """Noisy pictures at different steps of different prompts."""
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(N)]
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return {"latent": latents, "step": torch.arange(N) % T, "prompt": env.model.tokenize(texts)}


def to_numpy(observation: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in observation.items()}


def change(policy: DenoisingPolicy, scale: float = 0.1) -> DenoisingPolicy:
    """As training does, only more."""
    with torch.no_grad():
        for value in policy.denoiser_parameters():
            value.add_(scale * torch.randn_like(value))
    return policy


def take_a_step(policy: DenoisingPolicy, observation: dict[str, Tensor]) -> None:
    """One update of everything, towards higher values and likelier actions."""
    values, log_prob, _ = policy.evaluate_actions(observation, torch.zeros(SHAPE))
    policy.optimizer.zero_grad()
    (-values - log_prob / 256).mean().backward()
    policy.optimizer.step()


@torch.no_grad()
def mean_of(policy: DenoisingPolicy, observation: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return policy.transition(observation, **kwargs)[0]


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("kwargs", [{}, {"guidance_scale": 3.0}, {"lora_rank": 0}, {"autocast": True}], ids=str)
def test_is_the_pretrained_model_before_training(make_env, kwargs: dict[str, Any]) -> None:
    env = make_env(guidance_scale=kwargs.get("guidance_scale", 1.0))
    policy, observation = make_policy(env, **kwargs), observe(env)
    mean, std = policy.transition(observation)
    reference, reference_std = policy.transition(observation, reference=True)
    assert torch.equal(mean, reference)
    assert torch.equal(std, reference_std)
    assert diffusion.kl_divergence(mean, reference, std).tolist() == [0.0] * N
    if "autocast" not in kwargs:
        expected_mean, expected_std = env.pretrained_transition(to_numpy(observation))
        assert torch.equal(mean, expected_mean)
        assert torch.equal(std, expected_std)


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_training_changes_this_policy_and_nothing_else(make_env, lora_rank: int) -> None:
    env = make_env()
    observation = observe(env)
    pretrained = env.pretrained_transition(to_numpy(observation))[0]
    policy = make_policy(env, lora_rank=lora_rank)
    others = [change(make_policy(env)), change(make_policy(env, lora_rank=0))]
    before = [mean_of(other, observation) for other in others]
    shared = snapshot(env.model.denoiser)  # with the LoRAs of those that have one
    started = snapshot(policy)
    for _ in range(2):
        take_a_step(policy, observation)
    trained = mean_of(policy, observation)
    assert not torch.allclose(trained, pretrained, atol=1e-3)
    # The matrix A of a LoRA has no gradient in the first step, as B is still zero; hence two.
    assert not any(
        torch.equal(value, started[name]) for name, value in policy.state_dict().items() if "gains" not in name
    )
    assert torch.equal(mean_of(policy, observation, reference=True), pretrained)
    assert torch.equal(env.pretrained_transition(to_numpy(observation))[0], pretrained)
    for other, expected in zip(others, before, strict=True):
        assert torch.equal(mean_of(other, observation), expected)
        take_a_step(other, observation)
    assert torch.equal(mean_of(policy, observation), trained)
    changed = {name for name, value in env.model.denoiser.state_dict().items() if not torch.equal(value, shared[name])}
    assert all("lora_" in name for name in changed)


def test_log_probabilities_are_those_of_a_gaussian(make_env) -> None:
    env = make_env()
    policy, observation = change(make_policy(env)), observe(env)
    with torch.no_grad():
        actions, values, log_prob = policy(observation)
        mean, std = policy.transition(observation)
        distribution = policy.get_distribution(observation)
        found = policy.evaluate_actions(observation, actions)
        # As Stable-Baselines3's buffers return them: actions flattened, steps with an axis of one.
        column = observation | {"step": observation["step"][:, None]}
        flattened = policy.evaluate_actions(column, actions.flatten(1))
    assert [tuple(part.shape) for part in (actions, values, log_prob)] == [SHAPE, (N,), (N,)]
    gaussian = Independent(Normal(mean.double(), std.double().reshape(-1, 1, 1, 1).expand_as(mean)), 3)
    expected = [values, gaussian.log_prob(actions.double()).float(), gaussian.entropy().float()]
    for ours in (found, flattened, [values, log_prob, found[2]]):
        for part, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(part, theirs, rtol=1e-5, atol=5e-3)
    torch.testing.assert_close(distribution.log_prob(actions.flatten(1)), expected[1], rtol=1e-5, atol=5e-3)
    torch.testing.assert_close(distribution.entropy(), expected[2], rtol=1e-5, atol=5e-3)
    torch.testing.assert_close(distribution.mode(), mean.flatten(1))


def test_predict(make_env) -> None:
    env = make_env()
    policy, observation = change(make_policy(env)), observe(env)
    batch, mean = to_numpy(observation), mean_of(policy, observation).numpy()
    actions, state = policy.predict(batch, deterministic=True)
    assert state is None
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
    std = env.schedule.std[observation["step"]].numpy().reshape(-1, 1, 1, 1)
    noise = (np.stack([sample, again]) - mean) / std
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert abs(noise.std() - 1) < 4 / math.sqrt(2 * noise.size)
    torch.manual_seed(3)
    assert np.array_equal(policy.predict(batch)[0], sample)


def test_values_depend_on_everything(make_env) -> None:
    env = make_env()
    policy, observation = make_policy(env), observe(env)
    torch.nn.init.normal_(policy.critic.head.weight)  # it begins with V = 0
    values = policy.predict_values(observation)
    assert values.shape == (N,)
    for name, other in {
        "latent": -observation["latent"],
        "step": (observation["step"] + 1) % T,
        "prompt": observation["prompt"].roll(1, 0),
    }.items():
        assert (policy.predict_values(observation | {name: other}) != values).all(), name


def test_max_batch_size(make_env, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env()
    policy, observation = change(make_policy(env, max_batch_size=None)), observe(env)
    sizes: list[int] = []
    predict = policy.model.predict

    def counted(latents: Tensor, *args: Any) -> Tensor:
        sizes.append(len(latents))
        return predict(latents, *args)

    monkeypatch.setattr(policy.model, "predict", counted)
    whole = [mean_of(policy, observation, reference=reference) for reference in (False, True)]
    assert sizes == [N, N]
    policy._batch_size = BatchSize("max_batch_size", 2)
    sizes.clear()
    for reference, expected in zip((False, True), whole, strict=True):
        torch.testing.assert_close(mean_of(policy, observation, reference=reference), expected, rtol=1e-4, atol=1e-5)
    assert sizes == [2, 2, 1] * 2
    sizes.clear()
    policy.transition(observation)
    assert sizes == [N]  # with gradients, whoever trains chooses the size


@pytest.mark.parametrize("kwargs", [{}, {"lora_rank": 0}, {"guidance_gradient": "conditional"}], ids=str)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_network_calls(make_env, guidance_scale: float, kwargs: dict[str, Any]) -> None:
    """Counts what goes through the network: the pre-trained one's passes too, and two for each latent if guided."""
    env = make_env(guidance_scale=guidance_scale)
    policy, observation = make_policy(env, max_batch_size=2, **kwargs), observe(env)
    passed: list[int] = []
    for network in {policy.model.denoiser, policy.denoiser} - {None}:
        network.register_forward_hook(lambda module, inputs, output: passed.append(len(output.sample)))
    each = N if guidance_scale == 1 else 2 * N

    def count(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
        before = policy.network_calls
        passed.clear()
        call(*args, **kwargs)
        assert policy.network_calls - before == sum(passed)
        return sum(passed)

    assert policy.network_calls == 0
    assert count(policy.transition, observation) == each
    assert count(policy.transition, observation, reference=True) == each
    assert count(mean_of, policy, observation) == each  # without gradients, in batches of two
    assert count(policy.predict, to_numpy(observation)) == each
    assert count(policy.denoise, observation) == N  # without guidance unless asked for
    assert count(policy.predict_values, observation) == 0
    assert make_policy(env).network_calls == 0  # each policy counts for itself


def test_only_what_is_trained_is_kept(make_env, tiny_sd_folder: Path) -> None:
    rank = 4
    policy = make_policy(make_env(), lora_rank=rank)
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


def test_names_do_not_depend_on_other_policies(make_env) -> None:
    env = make_env()
    for lora_rank in (2, 0):
        first = make_policy(env, lora_rank=lora_rank).state_dict()
        make_policy(env, lora_rank=3)
        second = make_policy(env, lora_rank=lora_rank).state_dict()
        assert {name: value.shape for name, value in second.items()} == {name: v.shape for name, v in first.items()}


def test_full_fine_tuning_trains_the_denoiser_alone(make_env, tiny_sd_folder: Path) -> None:
    env = make_env()
    make_policy(env)  # its LoRA in the shared network must not be copied
    policy = make_policy(env, lora_rank=0)
    network = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    state = {name: value for name, value in policy.state_dict().items() if not name.startswith("critic")}
    assert is_same({name.removeprefix("denoiser."): value for name, value in state.items()}, network.state_dict())
    assert len(policy.denoiser_parameters()) == len(list(network.parameters()))
    assert all(value.requires_grad for value in policy.denoiser_parameters())


def test_training_mode_changes_nothing(make_env) -> None:
    env = make_env()
    policy, observation = make_policy(env), observe(env)
    expected = mean_of(policy, observation)
    policy.set_training_mode(True)
    assert torch.equal(mean_of(policy, observation), expected)
    assert not any(
        module.training for module in policy.model.denoiser.modules() if isinstance(module, torch.nn.Dropout)
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lora_rank": 3, "target_modules": ["to_q", "ff.net.2"], "max_batch_size": 2},
        {"lora_rank": 0, "critic_hidden": 8, "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}},
    ],
    ids=["lora", "full"],
)
def test_save_and_load(make_env, kwargs: dict[str, Any], tmp_path: Path) -> None:
    env = make_env(guidance_scale=2.0, eta=0.7)
    policy, observation = change(make_policy(env, **kwargs)), observe(env)
    policy.save(tmp_path / "policy.pt")
    loaded = DenoisingPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert loaded is not policy
    assert is_same(loaded.state_dict(), policy.state_dict())
    assert torch.equal(mean_of(loaded, observation), mean_of(policy, observation))
    assert torch.equal(loaded.predict_values(observation), policy.predict_values(observation))
    theirs, ours = loaded._get_constructor_parameters(), policy._get_constructor_parameters()
    assert theirs.keys() == ours.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"lr_schedule"}
    take_a_step(loaded, observation)  # it can still be trained


def test_saved_lora(make_env, tmp_path: Path) -> None:
    env = make_env()
    policy, observation = change(make_policy(env)), observe(env)
    policy.save_lora(tmp_path)
    other = make_policy(env)
    assert not torch.allclose(mean_of(other, observation), mean_of(policy, observation), atol=1e-3)
    other.load_lora(tmp_path)
    assert torch.equal(mean_of(other, observation), mean_of(policy, observation))
    with pytest.raises(ValueError, match=r"the LoRA in .* is of another model"):
        make_policy(env, lora_rank=2).load_lora(tmp_path)
    full = make_policy(env, lora_rank=0)
    with pytest.raises(ValueError, match=r"trains the whole denoiser \(lora_rank=0\) and has no LoRA"):
        full.save_lora(tmp_path)
    with pytest.raises(ValueError, match=r"trains the whole denoiser \(lora_rank=0\) and takes no LoRA"):
        full.load_lora(tmp_path)


def test_guidance(make_env) -> None:
    """The mean is linear in the network's output, so guidance extrapolates it from the empty prompt's."""
    env = make_env()
    policy, observation = change(make_policy(env)), observe(env)
    conditional = mean_of(policy, observation)
    unconditional = mean_of(policy, observation | {"prompt": env.model.tokenize([""] * N)})
    policy.guidance_scale = 4.0
    expected = unconditional + 4 * (conditional - unconditional)
    torch.testing.assert_close(mean_of(policy, observation), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, conditional, atol=1e-3)


def test_autocast(make_env) -> None:
    env = make_env()
    policy, observation = change(make_policy(env)), observe(env)
    expected = mean_of(policy, observation)
    policy.autocast = True
    mean, std = policy.transition(observation)
    assert mean.dtype == std.dtype == torch.float32
    assert not torch.equal(mean, expected)
    torch.testing.assert_close(mean, expected, rtol=0.1, atol=0.1)
    take_a_step(policy, observation)
    assert all(bool(value.isfinite().all()) for value in policy.parameters())
    assert not torch.equal(mean_of(policy, observation), mean)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_sde": True}, "use_sde must be False"),
        ({"max_batch_size": 0}, "max_batch_size must be an integer of at least 1, None or 'auto', got 0"),
        ({"lora_rank": -1}, "rank must be an integer of at least 1, got -1"),
        ({"target_modules": ["to_x"]}, r"no layer of the denoiser ends in any of \['to_x'\]"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000, got 0"),
        ({"eta": 0.0}, r"eta must lie in \(0, 1\], got 0"),
        ({"model_kwargs": {"dtype": "float8"}}, "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_bad_arguments(make_env, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(make_env(), **kwargs)


def test_half_precision_cannot_be_trained(make_env) -> None:
    with pytest.raises(ValueError, match=r"lost in the digits of bfloat16.*or train a LoRA"):
        make_policy(make_env(dtype="bfloat16"), lora_rank=0)
    with pytest.raises(ValueError, match=r"float16 can draw but not learn.*use dtype='bfloat16'"):
        DPOK("DenoisingPolicy", make_env(dtype="float16"), device="cpu")


def test_the_environment_decides_how_to_sample(make_env) -> None:
    kwargs = {"num_inference_steps": 4, "guidance_scale": 2.0, "lora_rank": 2}
    with pytest.raises(ValueError, match="the environment decides guidance_scale, num_inference_steps"):
        DPOK("DenoisingPolicy", make_env(), device="cpu", policy_kwargs=kwargs)
