"""The memory of a training, told without weights: compared with that of the same passes with weights."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.spaces import Box, Dict

from agents.common import memory, precision
from agents.common.memory import LiveMemory, Rehearsal, free_memory, size_of, with_margin
from agents.common.policy import DenoisingPolicy
from dpok_gym.models import load_model
from dpok_gym.models.architecture import find_architecture
from dpok_gym.samplers import DenoisingProcess
from tests.support import make_process


@pytest.fixture
def make_policy() -> Callable[..., DenoisingPolicy]:
    """Makes the policy of a process, with a LoRA of rank 8 unless another one is asked for."""

    def make(process: DenoisingProcess, **kwargs: Any) -> DenoisingPolicy:
        shape = process.model.latent_shape
        spaces = Dict({"latent": Box(-1, 1, shape)}), Box(-1, 1, shape)
        return DenoisingPolicy(*spaces, lambda _: 1e-3, process=process, **kwargs)

    return make


def test_live_memory_counts_what_is_alive() -> None:
    known = torch.zeros(100)
    with LiveMemory([known]) as counted:
        one = torch.zeros(1000)
        view = one[10:].view(10, 99)  # has no memory of its own
        _ = known + 0
        assert (counted.now, counted.peak) == (4000 + 400, 4000 + 400)
        del _, one
        assert counted.now == 4000
        del view
        assert (counted.now, counted.peak) == (0, 4400)
        two = known[:50]
        assert counted.now == 0
        two += 1  # in place
        assert counted.now == 0
    torch.zeros(10_000)
    assert counted.peak == 4400


def test_live_memory_sees_the_backward_pass() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    with LiveMemory([weight]) as counted:
        loss = (weight * 2).exp().sum()  # exp keeps its result for the backward pass
        assert counted.now >= 40_000
        loss.backward()
        del loss
        assert counted.now == 40_000  # the gradient
    assert 80_000 <= counted.peak <= 130_000


_UNETS = ("stable-diffusion", "stable-diffusion-xl")
_TRANSFORMERS = ("stable-diffusion-3", "stable-diffusion-3-no-t5", "flux-dev", "flux2-klein", "pixart-sigma", "sana")
_OF_UNETS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True},
    {"guidance_scale": 5.0},
    {"guidance_scale": 5.0, "guidance_gradient": "conditional"},
    {"dtype": "bfloat16", "lora_rank": 4, "target_modules": "all", "gradient_checkpointing": True},
    {"precision": "bfloat16", "lora_rank": 0},
]
_OF_TRANSFORMERS: list[dict[str, Any]] = [
    {"guidance_scale": 5.0, "dtype": "bfloat16", "target_modules": "all", "gradient_checkpointing": True}
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [*itertools.product(_UNETS, _OF_UNETS), *itertools.product(_TRANSFORMERS, _OF_TRANSFORMERS)],
)
def test_a_rehearsal_takes_what_the_real_passes_take(
    family: str,
    settings: dict[str, Any],
    tiny_folder: Callable[[str], Path],
    make_policy: Callable[..., DenoisingPolicy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "_Float32Attention", nullcontext)  # as on a GPU
    folder = tiny_folder(family)
    settings = dict(settings)
    checkpoints = settings.pop("gradient_checkpointing", False)
    dtype, scale = settings.pop("dtype", "float32"), settings.pop("guidance_scale", 1.0)
    process = make_process(folder, guidance_scale=scale, dtype=dtype)
    policy = make_policy(process, gradient_checkpointing=checkpoints, **settings)
    autocast = settings.pop("precision", "float32") == "bfloat16"
    rehearsal = Rehearsal(find_architecture(str(folder)), dtype, guidance_scale=scale, autocast=autocast, **settings)
    assert size_of(policy.denoiser_parameters()) == size_of(rehearsal.trained)
    state = process.state(torch.randn(3, *process.model.latent_shape), 0, process.encode(["a dog"] * 3))
    process.model.unconditional()  # type: ignore[attr-defined]  # kept from now on
    known = [*process.model.denoiser.parameters(), *(policy.denoiser or policy).parameters()]
    for value in policy.denoiser_parameters():
        value.grad = torch.zeros_like(value)
        known.append(value.grad)
    gc.collect()
    with LiveMemory(known) as counted, policy.adapter_enabled():
        mean, _ = policy.transition(state)
        policy.reference_transition(state)
        mean.sum().backward()
    assert rehearsal.update(3, checkpoints) == pytest.approx(counted.peak, rel=0.08)
    with LiveMemory(known) as counted, torch.no_grad():
        policy.transition(state)
    assert rehearsal.rollout(3) == pytest.approx(counted.peak, rel=0.08)
    model: Any = process.model
    with LiveMemory(model.vae.parameters()) as counted, torch.no_grad():
        process.model.decode(state.latents)
    assert rehearsal.decode(3) == pytest.approx(counted.peak, rel=0.08)


@pytest.mark.slow
def test_the_memory_of_an_update_is_proportional_to_its_elements(tiny_sd_folder: Path) -> None:
    rehearsal = Rehearsal(find_architecture(str(tiny_sd_folder)), "bfloat16", 128, guidance_scale=5.0)
    for checkpoints in (False, True):
        one, eight = (rehearsal.update(n, checkpoints) for n in (1, 8))
        assert eight == pytest.approx(8 * one, rel=0.08)
    assert rehearsal.update(1, True) < rehearsal.update(1, False)
    assert rehearsal.update(1, False, guided=False) == pytest.approx(rehearsal.update(1, False) / 2, rel=0.1)
    assert rehearsal.update(1, False, n_steps=3) > 2 * rehearsal.update(1, False)
    assert rehearsal.update(1, False, decodes=True) > rehearsal.update(1, False)


def test_free_memory_and_margin() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None
    assert with_margin(100, "cpu") == 110
    assert with_margin(100, "cuda") == 110 + 858993459  # 0.8 GiB


@pytest.mark.parametrize(("free", "expected"), [(2**40, False), (2**10, True), (None, True)])
def test_checkpointing_where_memory_asks_for_it(
    tiny_sd_folder: Path,
    make_policy: Callable[..., DenoisingPolicy],
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    expected: bool,
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    policy = make_policy(make_process(tiny_sd_folder), gradient_checkpointing="auto", max_batch_size=1)
    assert policy.gradient_checkpointing is expected
    assert policy._get_constructor_parameters()["gradient_checkpointing"] == "auto"


@pytest.mark.parametrize(
    ("micro_batch_size", "batch_size", "expected"), [(3, None, 3), (128, 2, 2), ("auto", 2, 1), (None, None, 4 * 3)]
)
def test_checkpointing_is_reckoned_with_the_micro_batch_of_updates(
    make_agent: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    micro_batch_size: int | str | None,
    batch_size: int | None,
    expected: int,
) -> None:
    """The states of a rollout, ``max_batch_size``, need no gradient."""
    asked: list[int] = []
    monkeypatch.setattr(Rehearsal, "needs_checkpointing", lambda self, n, free: asked.append(n))
    policy = {"gradient_checkpointing": "auto", "max_batch_size": 7}
    make_agent(micro_batch_size=micro_batch_size, batch_size=batch_size, policy_kwargs=policy)
    assert asked == [expected]


def test_a_model_of_another_kind_needs_no_checkpointing(make_policy: Callable[..., DenoisingPolicy]) -> None:
    process = DenoisingProcess(load_model("mixture", "cpu"), num_inference_steps=3)
    assert make_policy(process, gradient_checkpointing="auto").gradient_checkpointing is False


@pytest.mark.slow
@pytest.mark.parametrize("family", ["stable-diffusion", "flux-dev"])
def test_what_the_blocks_keep(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """Nearly all that an update without gradient checkpointing takes; with it, little more than their inputs."""
    rehearsal = Rehearsal(find_architecture(str(tiny_folder(family))))
    denoiser: Any = rehearsal.model.denoiser
    plain, checkpointed = (rehearsal.blocks(4, checkpoints) for checkpoints in (False, True))
    names = ["transformer_blocks", "single_transformer_blocks"] if "flux" in family else ["down_blocks", "up_blocks"]
    assert sorted(blocks.name for blocks in plain) == sorted(names)
    for blocks, less in zip(plain, checkpointed, strict=True):
        of_model = getattr(denoiser, blocks.name)
        assert (blocks.number, blocks.parameters) == (len(of_model), sum(v.numel() for v in of_model.parameters()))
        assert less.kept < blocks.kept / 2
    assert 0.5 < sum(blocks.kept for blocks in plain) / rehearsal.update(4, False) < 1


def test_numbers_of_parameters(tiny_folder: Callable[[str], Path]) -> None:
    """Of a T5 encoder, whose embeddings have two names."""
    folder = tiny_folder("pixart-sigma")
    model: Any = load_model(folder, "cpu")
    rehearsal = Rehearsal(find_architecture(str(folder)))
    networks = {"denoiser": model.denoiser, "autoencoder": model.vae, "text encoders": model.text_encoder}
    assert rehearsal.parameters == {n: sum(v.numel() for v in each.parameters()) for n, each in networks.items()}
    assert rehearsal.text_encoder_bytes == 4 * rehearsal.parameters["text encoders"]
