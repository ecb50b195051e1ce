"""Pipelines saved with any scheduler are sampled with DDIM, with a density at every step, equal to diffusers' own."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline

from dpok_gym import diffusion
from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.scheduler_configs import (
    describe_changes,
    is_flow_matching,
    with_density,
    with_euler_steps,
    with_spacing,
)
from dpok_gym.samplers import DenoisingProcess, SamplerConfig, make_ddim_table, make_flow_table

#: As Stable Diffusion 1.5 is published.
PUBLISHED: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
OTHERS = ["DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "UniPCMultistep", "LMSDiscrete"]
OTHERS += ["DEISMultistep", "DDPM", "HeunDiscrete"]


def assert_equals_diffusers(config: Any, steps: int) -> None:
    """Every step of the table, against the step of diffusers' scheduler of this config."""
    table, scheduler = make_ddim_table(config, steps), DDIMScheduler.from_config(config, clip_sample=False)
    # In float32, the root of what should be 0 is 1e-3.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    assert (table.std > 0).all()
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    for index, timestep in enumerate(scheduler.timesteps):
        latents, output, noise = torch.randn(3, 1, 4, 8, 8, generator=generator)
        expected = scheduler.step(output, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
        step = torch.tensor([index])
        ours = diffusion.sample(table.mean(step, latents, output), table.std[step], noise)
        if config.get("rescale_betas_zero_snr") and index == 0 and expected.isnan().all():
            continue  # there diffusers takes the root of -1e-17
        torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-5)


def test_published_configs_stay_as_they_are() -> None:
    for extra in ({}, {"timestep_spacing": "trailing"}):
        config = with_density(PUBLISHED | extra)
        assert describe_changes(PUBLISHED | extra, config) == ""
        assert config["timestep_spacing"] == extra.get("timestep_spacing", "leading")
        assert_equals_diffusers(config, 20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timestep_spacing": "linspace"}, "timestep_spacing='trailing'"),
        ({"set_alpha_to_one": True, "steps_offset": 0}, "set_alpha_to_one=False, steps_offset=1"),
        (
            {
                "set_alpha_to_one": True,
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
                "prediction_type": "v_prediction",
            },
            "set_alpha_to_one=False",
        ),
    ],
)
def test_configs_without_a_density_at_the_end(changes: dict[str, Any], said: str) -> None:
    if "timestep_spacing" in changes and changes["timestep_spacing"] == "linspace":
        with pytest.raises(ValueError, match="last step removes no noise"):
            make_ddim_table(PUBLISHED | changes, 20)
    else:
        assert not make_ddim_table(PUBLISHED | changes, 20).stochastic[-1]
    config = with_density(PUBLISHED | changes)
    assert describe_changes(PUBLISHED | changes, config) == said
    for steps in (1, 7, 20, 50):
        assert_equals_diffusers(config, steps)
    # What the network learned stays: the betas and what it predicts.
    for name in ("alphas_cumprod", "config"):
        before, after = (getattr(DDIMScheduler.from_config(c), name) for c in (PUBLISHED | changes, config))
        if name == "config":
            assert before["prediction_type"] == after["prediction_type"]
        else:
            assert torch.equal(before, after)


def test_a_chosen_spacing() -> None:
    linspace = PUBLISHED | {"timestep_spacing": "linspace", "steps_offset": 0}
    assert make_ddim_table(with_density(linspace, "leading"), 10).timesteps.tolist() == list(range(901, 0, -100))
    assert make_ddim_table(with_density(linspace, "trailing"), 10).timesteps.tolist() == list(range(999, 0, -100))


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("spacing", [None, "linspace", "leading", "trailing"])
def test_a_pipeline_saved_with_another_scheduler(kind: str, spacing: str | None, tmp_path: Path) -> None:
    """``pipe.scheduler = Other.from_config(pipe.scheduler.config)``, then saved; or used as it is."""
    other = getattr(diffusers, f"{kind}Scheduler")
    given = {} if spacing is None else {"timestep_spacing": spacing}
    scheduler = other.from_config(PNDMScheduler.from_config(PUBLISHED).config, **given)
    scheduler.save_pretrained(tmp_path)
    for config in (dict(DDIMScheduler.load_config(tmp_path)), {**scheduler.config, "_class_name": f"{kind}Scheduler"}):
        assert_equals_diffusers(with_density(config), 10)


@pytest.fixture
def saved_with_linspace(tiny_sd_folder: Path, tmp_path: Path) -> Path:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="linspace"
    )
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_says_once_that_its_spacing_is_another(
    saved_with_linspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = load_model(saved_with_linspace, "cpu")
    load_model(saved_with_linspace, "cpu")
    (message,) = caplog.messages
    assert "is used with timestep_spacing='trailing' (timestep_spacing or --timestep-spacing chooses" in message
    assert DenoisingProcess(model, num_inference_steps=10).table.timesteps[0] == 999
    scheduler = model.to_pipeline().scheduler
    assert (scheduler.config.timestep_spacing, scheduler.config.set_alpha_to_one) == ("trailing", False)


def test_the_option(saved_with_linspace: Path) -> None:
    model: Any = load_model(saved_with_linspace, "cpu", timestep_spacing="leading")
    assert model.denoiser is load_model(saved_with_linspace, "cpu").denoiser
    process = DenoisingProcess(model, num_inference_steps=10)
    assert process.table.timesteps.tolist() == list(range(901, 0, -100))
    assert process.config.model_kwargs == {"timestep_spacing": "leading"}
    assert process.config != SamplerConfig(process.config.model, {}, num_inference_steps=10)
    assert model.to_pipeline().scheduler.config.timestep_spacing == "leading"
    live = DiffusionPipeline.from_pretrained(saved_with_linspace)
    chosen = TextToImageModel.from_pipeline(live, timestep_spacing="leading")
    assert chosen.scheduler_config["timestep_spacing"] == "leading"
    with pytest.raises(ValueError, match="timestep_spacing must be one of 'leading', 'trailing', got 'linspace'"):
        load_model(saved_with_linspace, "cpu", timestep_spacing="linspace")  # type: ignore[arg-type]
    mixture = load_model("mixture", "cpu", timestep_spacing="trailing")
    assert DenoisingProcess(mixture, num_inference_steps=10).table.timesteps[0] == 999


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def test_recognises_flow_matching() -> None:
    assert is_flow_matching(FLOW)
    assert is_flow_matching({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True})
    assert is_flow_matching({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"})
    assert not is_flow_matching(PUBLISHED)
    assert not is_flow_matching({})


def test_spacing_of_each_kind() -> None:
    assert with_density(FLOW) == FLOW
    assert with_spacing(PUBLISHED, "trailing") == with_density(PUBLISHED, "trailing")
    assert with_spacing(FLOW, "trailing") == {**FLOW, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="a flow-matching model has no timestep_spacing='leading': choose 'trailing'"):
        with_spacing(FLOW, "leading")
    with pytest.raises(ValueError, match="timestep_spacing must be one of 'leading', 'trailing'"):
        with_spacing(FLOW, "linspace")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"])
def test_other_solvers_of_flow_matching(kind: str) -> None:
    """Euler's steps take their noise levels, but for a thousandth of the noise before the shift."""
    solver: Any = getattr(diffusers, f"{kind}Scheduler")(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    config = with_euler_steps(dict(solver.config) | {"_class_name": type(solver).__name__})
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    table = make_flow_table(config, 8, "ode", sigmas=config["timestep_spacing"])
    solver.set_timesteps(8)
    unshifted = [level / (5 - 4 * level) for level in (table.noise, solver.sigmas[:-1])]
    assert (unshifted[0] - unshifted[1]).abs().max() < 0.0011


def test_what_has_no_noise_levels_of_a_flow_stays() -> None:
    for config in ({"_class_name": "DDIMScheduler"}, {"use_flow_sigmas": True, "use_dynamic_shifting": True}):
        assert with_euler_steps(config) == config
