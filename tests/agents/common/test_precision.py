"""The precision of the denoiser's calls: what is computed in bfloat16, and when."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agents import DPOK, DenoisingPolicy
from agents.common import distributed, precision
from agents.common.precision import bfloat16_speedup, in_precision, measure_speedup
from dpok_gym import DenoisingVectorEnv
from dpok_gym.models import load_model
from dpok_gym.samplers import DenoisingProcess
from tests.agents.common.support import observed_states, perturb
from tests.support import make_process

T, N = 3, 5
CPU = torch.device("cpu")


@pytest.fixture
def make_policy(
    tiny_sd_folder: Path, make_env: Callable[..., DenoisingVectorEnv], fresh_models: Callable[[], None]
) -> Callable[..., DenoisingPolicy]:
    env = make_env(1)

    def make(process: DenoisingProcess | None = None, **kwargs: Any) -> DenoisingPolicy:
        spaces = env.single_observation_space, env.single_action_space
        settings = {"process": process or make_process(tiny_sd_folder, T), "lora_rank": 4}
        return DenoisingPolicy(*spaces, lambda _: 1e-3, **(settings | kwargs))

    return make


@pytest.fixture
def speedup(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Called with a number, denoisers that are measured from now on are so many times as fast in bfloat16."""

    def pretend(value: float) -> None:
        monkeypatch.setattr(precision, "measure_speedup", lambda policy: value)

    return pretend


def attend(values: Tensor) -> Tensor:
    query = values.reshape(2, 1, 8, 4)
    return F.scaled_dot_product_attention(query, query, value=query)


def normalise(values: Tensor) -> Tensor:
    return F.group_norm(values, 2, torch.ones(8), bias=torch.zeros(8))


@pytest.mark.parametrize("function", [attend, normalise])
def test_what_stays_float32_on_a_cpu(function: Callable[[Tensor], Tensor]) -> None:
    """Attention and group norms: their inputs and results have the digits of bfloat16, and nothing in between."""
    values = torch.randn(2, 8, 4).bfloat16()
    with in_precision("bfloat16", CPU):
        result = function(values)
        product = values.float()[0] @ values.float()[0].T
    assert result.dtype == product.dtype == torch.bfloat16
    assert torch.equal(result, function(values.float()).bfloat16())
    assert torch.equal(function(values.float()), function(values.float()))
    assert function(values.float()).dtype == torch.float32  # as it was before the block


def test_a_mask_and_float32_inputs_keep_their_types() -> None:
    query, mask = torch.randn(1, 1, 4, 4), torch.tensor([True, True, False, False]).expand(1, 1, 4, 4)
    with in_precision("bfloat16", CPU):
        result = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert torch.equal(result, F.scaled_dot_product_attention(query, query, query, attn_mask=mask))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_gradient_checkpointing_changes_no_number(
    make_policy: Callable[..., DenoisingPolicy], fresh_models: Callable[[], None], tiny_sd_folder: Path
) -> None:
    """The layers that are computed a second time are computed as before, outside of the block too."""
    gradients: list[Tensor] = []
    weights: dict[str, Tensor] = {}
    for gradient_checkpointing in (False, True):
        fresh_models()
        process = make_process(tiny_sd_folder, T)
        policy = make_policy(process, precision="bfloat16", gradient_checkpointing=gradient_checkpointing)
        weights = weights or perturb(policy).state_dict()
        policy.load_state_dict(weights)
        with policy.adapter_enabled():
            policy.transition(observed_states(process, N))[0].square().sum().backward()
        gradients.append(torch.cat([value.grad.flatten() for value in policy.denoiser_parameters()]))
    assert gradients[0].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("times", "expected"), [(1.2, "bfloat16"), (1.05, "float32"), (0.4, "float32")])
def test_auto_takes_what_is_faster(
    make_policy: Callable[..., DenoisingPolicy], speedup: Callable[[float], None], times: float, expected: str
) -> None:
    speedup(times)
    policy = make_policy(precision="auto")
    assert policy.precision == expected
    assert policy.settings["precision"] == "auto"
    assert bfloat16_speedup(policy) == times
    speedup(3.0)
    assert make_policy(policy.process, precision="auto").precision == expected  # a denoiser is measured once
    assert make_policy(policy.process).precision == "float32"


def test_a_training_goes_on_in_the_precision_that_it_began_in(
    make_agent: Callable[..., Any], speedup: Callable[[float], None], fresh_models: Callable[[], None]
) -> None:
    speedup(2.0)
    state = make_agent(policy_kwargs={"precision": "auto"}).state_dict()
    fresh_models()  # as in another process, which measures anew
    speedup(0.5)
    agent = make_agent(policy_kwargs={"precision": "auto"})
    assert agent.policy.precision == "float32"
    agent.load_state_dict(state)
    assert agent.policy.precision == agent.state_dict()["state"]["precision"] == "bfloat16"
    asked_for = make_agent(policy_kwargs={"precision": "float32"})
    asked_for.load_state_dict(state)
    assert asked_for.policy.precision == "float32"
    state["state"]["precision"] = "float8"
    with pytest.raises(ValueError, match="precision must be one of 'float32', 'bfloat16'"):
        agent.load_state_dict(state)


def test_ranks_agree(
    make_policy: Callable[..., DenoisingPolicy], speedup: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is not worth it for one of them, none has it."""
    speedup(2.0)
    given: list[bool] = []

    def any_of(flag: bool) -> bool:
        given.append(flag)
        return True

    monkeypatch.setattr(distributed, "any_of", any_of)
    assert make_policy(precision="auto").precision == "float32"
    assert given == [False]


@pytest.mark.slow
def test_measuring(make_policy: Callable[..., DenoisingPolicy], monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no gradient, draws no random number and counts for nothing. A large network is not run."""
    monkeypatch.setattr(precision, "_N_STATES", 2)
    policy = make_policy(guidance_gradient="conditional")
    calls = []
    policy.model.denoiser.register_forward_pre_hook(lambda *_: calls.append(torch.is_autocast_enabled("cpu")))
    before = torch.get_rng_state()
    assert measure_speedup(policy) > 0
    assert calls == [False, True] * 3
    assert all(value.grad is None for value in policy.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.process.num_function_evaluations == 0
    monkeypatch.setattr(precision, "_LARGE", 0)
    monkeypatch.setattr(precision, "_MATRIX_SIZE", 16)
    assert measure_speedup(policy) > 0
    assert len(calls) == 6


def test_what_cannot_be_measured_is_float32(make_policy: Callable[..., DenoisingPolicy], tiny_sd_folder: Path) -> None:
    """A model of bfloat16 weights has its precision, and the mixture reads no empty prompt."""
    half = make_policy(make_process(tiny_sd_folder, T, dtype="bfloat16"), precision="auto")
    mixture = DPOK(env="DPOK-Mixture-v0", policy_kwargs={"precision": "auto"}, device="cpu").policy
    assert load_model("mixture", "cpu") is mixture.model
    for policy in (half, mixture):
        assert (policy.precision, measure_speedup(policy)) == ("float32", 1.0)
