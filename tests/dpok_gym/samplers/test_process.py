"""The denoising process and its config, against diffusers' pipelines and against the environment."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

import dpok_gym
from dpok_gym import DenoisingVectorEnv, diffusion, reference_policy
from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.samplers import DenoisingProcess, DenoisingStep, SamplerConfig, State, make_flow_table
from dpok_gym.samplers.flow_matching import KERNELS
from dpok_gym.shapes import WEIGHTS
from tests.flow_model import FlowModel
from tests.support import assert_same, make_process, redness

PROMPTS = ["a green rabbit.", "dog", "moon"]
B, T = 3, 4
SHAPE = (B, 4, 8, 8)
FOLDERS = ["tiny_sd_folder", "tiny_v_folder", "tiny_xl_folder"]


def randn(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def state_at(process: DenoisingProcess, index: int, seed: int = 0) -> State:
    return process.state(randn(seed), index, process.encode(PROMPTS))


@torch.no_grad()
def denoise(process: DenoisingProcess, noise: Callable[[int], Tensor] = randn, **kwargs: Any) -> list[DenoisingStep]:
    return list(process.denoise(randn(99), process.encode(PROMPTS), noise, **kwargs))


class TestTransition:
    @pytest.mark.slow
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
    @pytest.mark.parametrize("eta", [1.0, 0.3])
    @torch.no_grad()
    def test_equals_the_step_of_diffusers(
        self, tiny_sd_folder: Path, prediction_type: str, guidance_scale: float, eta: float
    ) -> None:
        model: Any = copy.copy(load_model(tiny_sd_folder, "cpu"))
        model.scheduler_config = {**model.scheduler_config, "prediction_type": prediction_type}
        process = DenoisingProcess(model, "ddim", T, eta, guidance_scale)
        pipeline = DiffusionPipeline.from_pretrained(tiny_sd_folder)
        scheduler = DDIMScheduler.from_config(model.scheduler_config, clip_sample=False)
        scheduler.set_timesteps(T)
        conditional, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
        for index, timestep in enumerate(scheduler.timesteps):
            latents, noise = randn(index), randn(100 + index)
            output = pipeline.unet(latents, timestep, conditional).sample
            if guidance_scale != 1:
                unconditional = pipeline.unet(latents, timestep, empty).sample
                output = unconditional + guidance_scale * (output - unconditional)
            expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
            mean, std = process.transition(state_at(process, index, index))
            assert (mean.shape, mean.dtype, std.shape, std.dtype) == (SHAPE, torch.float32, (B,), torch.float32)
            torch.testing.assert_close(diffusion.sample(mean, std, noise), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.slow
    @torch.no_grad()
    def test_every_family(self, folder: Path) -> None:
        """The whole trajectory is that of the pipeline, noise for noise."""
        process = make_process(folder, T, guidance_scale=3.0)
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        generator = torch.Generator().manual_seed(8)
        expected = pipeline(
            PROMPTS,
            num_inference_steps=T,
            guidance_scale=3.0,
            eta=1.0,
            generator=torch.Generator().manual_seed(8),
            latents=randn(99),
            output_type="latent",
        ).images
        *_, last = denoise(process, lambda index: torch.randn(SHAPE, generator=generator))
        torch.testing.assert_close(last.next_latents, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    @torch.no_grad()
    def test_each_row_is_at_its_own_step(self, folder: Path) -> None:
        process = make_process(folder, T)
        together = State(randn(), torch.tensor([3, 0, 2]), process.encode(PROMPTS))
        mean, std = process.transition(together)
        for row in range(B):
            alone = together[row : row + 1]
            of_row, std_of_row = process.transition(alone)
            torch.testing.assert_close(mean[row : row + 1], of_row, rtol=1e-4, atol=1e-5)
            assert torch.equal(std[row : row + 1], std_of_row)
        assert torch.equal(std, process.table.std[together.step])

    @torch.no_grad()
    def test_another_denoiser(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, T, guidance_scale=3.0)
        other = copy.deepcopy(process.model.denoiser)
        for parameter in other.parameters():
            parameter.mul_(0.9)
        state = state_at(process, 1)
        theirs, _ = process.transition(state, other)
        before, _ = process.transition(state)
        assert not torch.allclose(theirs, before)
        with_other = copy.copy(process)
        with_other.model = copy.copy(process.model)
        with_other.model.denoiser = other
        assert_same(theirs, with_other.transition(state)[0])

    def test_guidance_gradient(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, T, guidance_scale=3.0)
        denoiser: Any = copy.deepcopy(process.model.denoiser).requires_grad_()
        gradients = []
        for guidance_gradient in ("both", "conditional"):
            mean, _ = process.transition(state_at(process, 1), denoiser, guidance_gradient)  # type: ignore[arg-type]
            denoiser.zero_grad()
            mean.square().sum().backward()
            gradients.append(denoiser.conv_in.weight.grad.clone())
        assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2)

    def test_mean_of_output(self, tiny_v_folder: Path) -> None:
        process = make_process(tiny_v_folder, T)
        state = State(randn(), torch.tensor([3, 0, 2]), process.encode(PROMPTS))
        assert_same(process.mean_of_output(state, randn(1)), process.table.mean(state.step, state.latents, randn(1)))

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    @torch.no_grad()
    def test_predicted_clean_is_that_of_diffusers(self, tiny_sd_folder: Path, prediction_type: str) -> None:
        model: Any = copy.copy(load_model(tiny_sd_folder, "cpu"))
        model.scheduler_config = {**model.scheduler_config, "prediction_type": prediction_type}
        process = DenoisingProcess(model, num_inference_steps=T)
        scheduler = DDIMScheduler.from_config(model.scheduler_config, clip_sample=False)
        scheduler.set_timesteps(T)
        for index, timestep in enumerate(scheduler.timesteps):
            state, output = state_at(process, index, index), randn(50 + index)
            expected = scheduler.step(output, timestep, state.latents, eta=1.0).pred_original_sample
            clean = process.predicted_clean(state, process.mean_of_output(state, output))
            torch.testing.assert_close(clean, expected, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def test_low_precision_gives_float32(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, T, dtype="bfloat16")
        mean, std = process.transition(state_at(process, 0))
        assert mean.dtype == std.dtype == torch.float32


class TestDenoise:
    @pytest.mark.slow
    @pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
    def test_equals_stepping_the_environment(self, folder: Path, guidance_scale: float) -> None:
        env = DenoisingVectorEnv(
            B,
            model=str(folder),
            prompts=PROMPTS,
            reward=redness,
            num_inference_steps=T,
            guidance_scale=guidance_scale,
            device="cpu",
        )
        observation, _ = env.reset(seed=0, options={"prompt": PROMPTS})
        rng = np.random.default_rng(7)
        with torch.no_grad():
            steps = list(
                env.process.denoise(
                    torch.from_numpy(observation["latent"].copy()),
                    env.process.encode(PROMPTS),
                    lambda index: torch.from_numpy(rng.standard_normal(SHAPE, np.float32)),
                )
            )
        policy = reference_policy(env, seed=7)
        for step in steps:
            assert observation["step"].tolist() == [step.index] * B
            assert_same(observation["latent"], step.state.latents.numpy())
            observation, _, terminated, _, infos = env.step(policy(observation))
            if terminated.all():
                observation = {"latent": np.stack([last["latent"] for last in infos["final_obs"]])}
            assert_same(observation["latent"], step.next_latents.numpy())
        assert terminated.all()
        outcome = env.judge(steps[-1].next_latents, PROMPTS)
        assert_same(outcome.images, np.stack(infos["final_info"]["image"]))

    @pytest.mark.slow
    def test_steps(self, folder: Path) -> None:
        process = make_process(folder, T)
        steps = denoise(process)
        assert [step.index for step in steps] == list(range(T))
        latents = randn(99)
        for step in steps:
            assert step.state.step.tolist() == [step.index] * B
            assert torch.equal(step.state.latents, latents)
            assert_same(step.state.conditioning, process.encode(PROMPTS))
            with torch.no_grad():
                assert_same((step.mean, step.std), process.transition(step.state))
            latents = diffusion.sample(step.mean, step.std, randn(step.index))
            assert torch.equal(step.next_latents, latents)

    def test_first_step(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, T)
        whole = denoise(process)
        with torch.no_grad():
            rest = list(process.denoise(whole[1].next_latents, process.encode(PROMPTS), randn, first_step=2))
        assert [step.index for step in rest] == [2, 3]
        assert torch.equal(rest[-1].next_latents, whole[-1].next_latents)

    def test_another_transition(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, T)
        asked: list[State] = []

        def transition(state: State) -> tuple[Tensor, Tensor]:
            asked.append(state)
            return state.latents / 2, torch.full((B,), 0.25)

        steps = denoise(process, transition=transition)
        assert process.num_function_evaluations == 0
        assert [state.step[0].item() for state in asked] == [0, 1, 2, 3]
        expected = randn(99)
        for index in range(T):
            expected = expected / 2 + 0.25 * randn(index)
        assert torch.equal(steps[-1].next_latents, expected)

    def test_selected_states_go_on(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, T)
        asked: list[tuple[State, Tensor]] = []

        def select(state: State, mean: Tensor) -> Tensor | None:
            asked.append((state, mean))
            return torch.tensor([2, 0, 0]) if len(asked) == 2 else None

        plain, steps = denoise(process), denoise(process, select=select)
        assert [step.parents is None for step in steps] == [True, False, True, True]
        assert_same(steps[0], plain[0])
        # The choice is made of all states of its step; mean, prompt and state of the chosen ones go on together.
        assert_same(asked[1], (plain[1].state, plain[1].mean))
        rows = torch.tensor([2, 0, 0])
        assert_same(steps[1].state, plain[1].state[rows])
        expected = diffusion.sample(plain[1].mean[rows], plain[1].std, randn(1))  # with the noise of their new row
        assert torch.equal(steps[1].next_latents, expected)
        assert torch.equal(steps[2].state.latents, expected)
        assert_same(steps[3].state.conditioning, process.encode([PROMPTS[row] for row in rows]))
        assert not torch.equal(expected[1], expected[2])

    def test_it_computes_no_more_than_it_is_asked_for(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, T)
        asked: list[int] = []

        def noise(index: int) -> Tensor:
            asked.append(index)
            return randn(index)

        steps = process.denoise(randn(99), process.encode(PROMPTS), noise)
        assert process.num_function_evaluations == 0
        with torch.no_grad():
            next(steps)
        assert (process.num_function_evaluations, asked) == (B, [0])

    def test_gradients_go_through_every_step(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, 2)
        latents = randn(99).requires_grad_()
        *_, last = process.denoise(latents, process.encode(PROMPTS), randn)
        last.next_latents.sum().backward()
        assert latents.grad is not None
        assert latents.grad.abs().min() > 0


class TestFunctionEvaluations:
    @pytest.mark.parametrize(("guidance_scale", "passes"), [(1.0, 1), (3.0, 2), (0.0, 2)])
    def test_guidance_takes_two(self, tiny_sd_folder: Path, guidance_scale: float, passes: int) -> None:
        process = make_process(tiny_sd_folder, T, guidance_scale=guidance_scale)
        assert process.num_function_evaluations == 0
        denoise(process)
        assert process.num_function_evaluations == passes * B * T

    @torch.no_grad()
    def test_it_counts_what_the_denoiser_is_called_with(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, T, guidance_scale=3.0)
        rows: list[int] = []
        handle = process.model.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        try:
            process.transition(state_at(process, 0))
            process.predict(state_at(process, 1)[:2], guidance_scale=1.0)
            process.predict(state_at(process, 1), guidance_scale=7.0)
        finally:
            handle.remove()
        assert process.num_function_evaluations == sum(rows) == 2 * B + 2 + 2 * B

    def test_processes_count_for_themselves(self, tiny_sd_folder: Path) -> None:
        first, second = make_process(tiny_sd_folder, T), make_process(tiny_sd_folder, T)
        assert first.model is second.model
        denoise(first)
        assert second.num_function_evaluations == 0

    @torch.no_grad()
    def test_the_model_says_how_many_it_takes(self, tiny_sd_folder: Path) -> None:
        model: Any = copy.copy(load_model(tiny_sd_folder, "cpu"))
        model.num_forward_passes = lambda guidance_scale: 5
        process = DenoisingProcess(model, num_inference_steps=T)
        process.predict(state_at(process, 0))
        assert process.num_function_evaluations == 5 * B


@torch.no_grad()
def test_predict_takes_another_guidance_scale(tiny_sd_folder: Path) -> None:
    plain, guided = make_process(tiny_sd_folder, T), make_process(tiny_sd_folder, T, guidance_scale=3.0)
    state = state_at(plain, 1)
    assert_same(plain.predict(state, guidance_scale=3.0), guided.predict(state))
    assert_same(guided.predict(state, guidance_scale=1.0), plain.predict(state))
    assert not torch.allclose(plain.predict(state), guided.predict(state))


def test_states_can_be_indexed(folder: Path) -> None:
    process = make_process(folder, T)
    state = State(randn(), torch.tensor([3, 0, 2]), process.encode(PROMPTS))
    for rows, expected in (
        (slice(1, 3), [1, 2]),
        (torch.tensor([2, 0, 0]), [2, 0, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
    ):
        part = state[rows]
        assert isinstance(part, State)
        assert torch.equal(part.latents, state.latents[expected])
        assert part.step.tolist() == [[3, 0, 2][row] for row in expected]
        assert part.conditioning.keys() == state.conditioning.keys()
        assert_same(part.conditioning, process.encode([PROMPTS[row] for row in expected]))


def test_state() -> None:
    state = DenoisingProcess(load_model("mixture", "cpu"), num_inference_steps=T).state(randn(), 2, {})
    assert (state.step.tolist(), state.step.dtype) == ([2, 2, 2], torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of 'ddim', 'flow-sde', 'dance-sde', 'cps', 'precise', 'ode', got"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({"sampler": "flow-sde"}, "the sampler 'flow-sde' is for flow-matching models, and the model .* is not one"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"sde_steps": (19, 2)}, r"sde_steps=\(19, 2\) ends after step 20, but the last of the 20 denoising steps"),
        ({"guidance_scale": -1.0}, "guidance_scale .* must be a number of at least 0, got -1"),
        ({"guidance_scale": float("inf")}, "guidance_scale .* must be a number of at least 0, got inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale .* must be a number of at least 0, got nan"),
    ],
)
def test_bad_arguments(tiny_sd_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingProcess(load_model(tiny_sd_folder, "cpu"), **arguments)


def test_a_model_without_guidance_refuses_it_at_once() -> None:
    with pytest.raises(ValueError, match="use guidance_scale=1, not 2"):
        DenoisingProcess(load_model("mixture", "cpu"), guidance_scale=2.0)


class TestConfig:
    def test_of_a_process(self, tiny_sd_folder: Path) -> None:
        process = make_process(tiny_sd_folder, T, eta=0.5, guidance_scale=3.0, dtype="bfloat16", image_size=32)
        assert process.config == SamplerConfig(str(tiny_sd_folder), {"image_size": 32}, "ddim", T, 0.5, 3.0)
        assert process.config.to_dict() == {
            "model": str(tiny_sd_folder),
            "model_kwargs": {"dtype": "bfloat16", "image_size": 32},
            "sampler": "ddim",
            "num_inference_steps": T,
            "eta": 0.5,
            "guidance_scale": 3.0,
            "sde_steps": None,
        }

    def test_of_a_live_pipeline(self, tiny_sd_folder: Path) -> None:
        model = TextToImageModel.from_pipeline(DiffusionPipeline.from_pretrained(tiny_sd_folder))
        config = DenoisingProcess(model, num_inference_steps=T).config
        assert config == make_process(tiny_sd_folder, T).config

    def test_defaults(self, tiny_sd_folder: Path) -> None:
        assert DenoisingProcess(load_model(tiny_sd_folder, "cpu")).config == SamplerConfig(str(tiny_sd_folder))

    @pytest.mark.parametrize("image_size", [32, [32, 16], (32, 16)])
    def test_survives_json(self, tiny_sd_folder: Path, image_size: Any) -> None:
        process = make_process(
            tiny_sd_folder, np.int64(T), image_size=image_size, negative_prompt="dog", guidance_scale=2.0
        )
        config = SamplerConfig.from_dict(json.loads(json.dumps(process.config.to_dict())))
        assert config == process.config
        assert hash(config) == hash(process.config)
        assert config.to_dict() == process.config.to_dict()

    @pytest.mark.slow
    @torch.no_grad()
    def test_makes_the_same_process(self, folder: Path, fresh_models: Callable[[], None]) -> None:
        process = make_process(folder, T, eta=0.5, guidance_scale=3.0, image_size=[16, 32], negative_prompt="a cat")
        config = json.loads(json.dumps(process.config.to_dict()))
        fresh_models()
        again = DenoisingProcess.from_config(SamplerConfig.from_dict(config), "cpu")
        assert again.model is not process.model
        assert again.config == process.config
        assert again.num_inference_steps == T
        state = State(randn(0, (B, 4, 8, 16)), torch.tensor([0, 1, 2]), process.encode(PROMPTS))
        assert_same(again.transition(state), process.transition(state))

    def test_unknown_settings(self) -> None:
        with pytest.raises(ValueError, match="unknown sampler setting 'guidance'; did you mean 'guidance_scale'"):
            SamplerConfig.from_dict({"model": "tiny", "guidance": 3.0})
        with pytest.raises(ValueError, match="unknown sampler setting 'drawing_kwargs'"):
            SamplerConfig.from_dict({"model": "tiny", "drawing_kwargs": []})

    def test_is_frozen(self) -> None:
        kwargs = {"image_size": 32}
        config = SamplerConfig("tiny", kwargs)
        kwargs["image_size"] = 16
        assert config.model_kwargs == {"image_size": 32}
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.eta = 0.5  # type: ignore[misc]

    @pytest.mark.parametrize(
        "changes",
        [
            {"dtype": "bfloat16"},
            {"variant": "fp16"},
            {"allow_pickle": True},
            {"config": "folder"},
            {"vae_tiling": True},
            {"compile": True},
        ],
    )
    def test_precision_and_files_make_no_difference(self, changes: dict[str, Any]) -> None:
        config, other = SamplerConfig("tiny"), SamplerConfig("tiny", changes)
        assert config == other
        assert hash(config) == hash(other)
        config.check_equal(other)

    def test_a_pair_of_sizes_is_a_list_or_a_tuple(self) -> None:
        config, other = (SamplerConfig("tiny", {"image_size": size}) for size in ([32, 16], (32, 16)))
        assert config == other
        assert hash(config) == hash(other)

    @pytest.mark.parametrize(
        ("changes", "difference"),
        [
            ({"model": "sd15"}, "model 'tiny' there, 'sd15' here"),
            ({"num_inference_steps": 50}, "num_inference_steps 20 there, 50 here"),
            ({"eta": 0.5}, "eta 1.0 there, 0.5 here"),
            ({"guidance_scale": 7.5}, "guidance_scale 1.0 there, 7.5 here"),
            ({"sampler": "ode"}, "sampler 'ddim' there, 'ode' here"),
            ({"sde_steps": [2, 3]}, "sde_steps None there, (2, 3) here"),
            ({"model_kwargs": {"image_size": 32}}, "image_size None there, 32 here"),
            ({"model_kwargs": {"negative_prompt": "blurry"}}, "negative_prompt None there, 'blurry' here"),
            ({"model_kwargs": {"revision": "v2"}}, "revision None there, 'v2' here"),
            ({"eta": 0.5, "num_inference_steps": 50}, "num_inference_steps 20 there, 50 here, eta 1.0 there, 0.5 here"),
        ],
    )
    def test_differences_are_named(self, changes: dict[str, Any], difference: str) -> None:
        config = SamplerConfig("tiny")
        other = dataclasses.replace(config, **changes)
        assert config != other
        message = f"made for another sampler ({difference}); make the environment with the agent's settings"
        with pytest.raises(ValueError, match=re.escape(message)):
            config.check_equal(other)

    def test_a_folder_may_have_moved(self, tmp_path: Path) -> None:
        """A folder that is no longer where it was is found by its own name."""
        old, new, other = (tmp_path / name for name in ("old/tiny", "new/tiny", "new/large"))
        for folder in (new, other):
            folder.mkdir(parents=True)
        moved = SamplerConfig(str(old))
        moved.check_equal(SamplerConfig(str(new)))
        SamplerConfig(f"{old}/").check_equal(SamplerConfig(f"{new}/"))
        assert moved != SamplerConfig(str(new))
        for slash in ("", "/"):
            with pytest.raises(ValueError, match=r"model '.*/old/tiny/?' there, '.*/new/large/?' here"):
                SamplerConfig(f"{old}{slash}").check_equal(SamplerConfig(f"{other}{slash}"))
        with pytest.raises(ValueError, match=r"\(eta 1.0 there, 0.5 here\)"):  # the model is not among the differences
            moved.check_equal(SamplerConfig(str(new), eta=0.5))
        old.mkdir(parents=True)  # now both are there: they are two models
        with pytest.raises(ValueError, match=r"model '.*/old/tiny' there, '.*/new/tiny' here"):
            moved.check_equal(SamplerConfig(str(new)))

    def test_a_link_is_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "tiny").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "tiny")
        SamplerConfig(str(tmp_path / "tiny")).check_equal(SamplerConfig(str(tmp_path / "link")))
        monkeypatch.chdir(tmp_path)
        SamplerConfig("tiny").check_equal(SamplerConfig(str(tmp_path / "tiny")))


@pytest.mark.slow
@torch.no_grad()
def test_the_embedded_model_denoises_to_its_prompt() -> None:
    """A whole image, as a user of the process alone draws it."""
    process = DenoisingProcess(load_model(str(WEIGHTS), "cpu"), num_inference_steps=10)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    prompts = ["a red circle"] * 4
    for step in process.denoise(  # noqa: B007 (the last one is wanted)
        latents, process.encode(prompts), lambda index: torch.randn(latents.shape, generator=generator)
    ):
        pass
    rewards = dpok_gym.make_reward("shapes-alignment")(process.model.decode(step.next_latents), prompts)
    assert rewards.total.mean() > 0.5


class TestFlowMatching:
    """The kind of a model's transitions is that of its scheduler."""

    def test_tables(self) -> None:
        model = FlowModel()
        for sampler, eta in KERNELS.items():
            process = DenoisingProcess(model, sampler, T)  # type: ignore[arg-type]
            assert process.config.eta == eta
            assert_same(process.table, make_flow_table(model.scheduler_config, T, sampler))  # type: ignore[arg-type]
        assert DenoisingProcess(model, "ode", T, 0.5).config == DenoisingProcess(model, "ode", T).config
        window = DenoisingProcess(model, "cps", T, 0.5, sde_steps=[1, 2])
        assert window.table.stochastic.tolist() == [step in (1, 2) for step in range(T)]
        config = json.loads(json.dumps(window.config.to_dict()))
        assert config["sde_steps"] == [1, 2]
        assert SamplerConfig.from_dict(config) == window.config

    def test_levels(self) -> None:
        spaced = FlowModel().with_options(timestep_spacing="trailing")
        table = DenoisingProcess(spaced, num_inference_steps=T).table
        assert_same(table, make_flow_table(FlowModel().scheduler_config, T, sigmas="trailing"))
        flux = FlowModel(use_dynamic_shifting=True)
        flux.sequence_length = 1024
        table = DenoisingProcess(flux, num_inference_steps=T).table
        assert_same(table, make_flow_table(flux.scheduler_config, T, sequence_length=1024))

    @torch.no_grad()
    @pytest.mark.parametrize(("sampler", "spread"), [("ode", 0.998), ("ddim", 0.995), ("cps", 0.804)])
    def test_samples_have_the_datas_mean_and_spread(self, sampler: Any, spread: float) -> None:
        """The spread is that of the chain in closed form, see test_flow_matching.py."""
        process = DenoisingProcess(FlowModel(), sampler, 1000)
        n, generator = 2000, torch.Generator().manual_seed(0)

        def draw(index: int = 0) -> Tensor:
            return torch.randn(n, 1, 2, 2, generator=generator)

        for step in process.denoise(draw(), process.encode(["bright"] * n), draw):  # noqa: B007
            pass
        assert step.next_latents.mean().item() == pytest.approx(1, abs=0.05)
        assert step.next_latents.std().item() == pytest.approx(spread, abs=0.03)

    @torch.no_grad()
    def test_the_predicted_clean_latents(self) -> None:
        process = DenoisingProcess(FlowModel(), "ddim", T, sde_steps=(0, 1))
        for index in range(T):
            state = process.state(randn(0, (3, 1, 2, 2)), index, process.encode(["dark"] * 3))
            mean, _ = process.transition(state)
            s = process.table.noise[index]
            expected = state.latents - s * process.predict(state)
            torch.testing.assert_close(process.predicted_clean(state, mean), expected, rtol=1e-4, atol=1e-5)


class Recorder(nn.Module):
    """A denoiser that remembers the timesteps it is told."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.told = denoiser, list[int]()

    def forward(self, latents: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Any:
        self.told += timesteps.tolist()
        return self.denoiser(latents, timesteps, **conditioning)


@torch.no_grad()
def test_the_network_is_told_the_timesteps_of_the_table(tiny_sd_folder: Path) -> None:
    process = make_process(tiny_sd_folder, T)
    recorder = Recorder(process.model.denoiser)
    process.transition(State(randn(), torch.tensor([3, 0, 2]), process.encode(PROMPTS)), recorder)
    assert recorder.told == process.table.timesteps[[3, 0, 2]].tolist()


@pytest.mark.parametrize("call", [r"\b(table|schedule)\.mean\(", r"\bmodel\.predict\(state\."])
def test_nothing_else_computes_transitions(call: str) -> None:
    root = Path(dpok_gym.__file__).parents[1]
    callers = []
    for package in ("dpok_gym", "agents", "benchmarks"):
        for path in (root / package).rglob("*.py"):
            callers += [path.relative_to(root).as_posix()] * len(re.findall(call, path.read_text(encoding="utf-8")))
    assert callers == ["dpok_gym/samplers/process.py"]
