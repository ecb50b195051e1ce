"""Agents as Stable-Baselines3's users expect them, and what they leave: files, pipelines, a live model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from stable_baselines3.common.save_util import save_to_zip_file
from torch import Tensor

from agents import DDPO, DPOK, DenoisingPolicy, GymnasiumVecEnv, evaluate
from agents.common.randomness import ImageNoise
from dpok_gym import DenoisingEnv, DenoisingVectorEnv, VectorNoiseAction, reference_policy
from dpok_gym.models import TextToImageModel
from tests.agents.common.support import PROMPTS, collect, perturb, snapshot
from tests.support import assert_same

N, T = 4, 3
UPDATE = N * T


def load_pipeline(folder: Path) -> Any:
    """Returns a plain diffusers pipeline that samples as the environments do."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- Environments


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["id", "environment", "vector environment", "VecEnv"])
def test_environments(make_env: Callable[..., Any], make_agent: Callable[..., Any], settings: Any, kind: str) -> None:
    env: Any = {
        "id": lambda: "DPOK-Shapes-v0",
        "environment": lambda: DenoisingEnv(**settings),
        "vector environment": make_env,
        "VecEnv": lambda: GymnasiumVecEnv(make_env()),
    }[kind]()
    # A single image has no others whose mean could be subtracted.
    plain = {"center_advantage": False, "critic_kind": "network"}
    agent = make_agent(env, **plain, **({"n_envs": 2} if kind == "id" else {}))
    before = snapshot(agent)
    n_envs = {"id": 2, "environment": 1}.get(kind, N)
    assert agent.n_envs == agent.images_per_iteration == n_envs
    agent.learn(1)
    assert agent.num_timesteps == n_envs * (20 if kind == "id" else T)
    assert agent.images_drawn == n_envs
    assert agent._n_updates == 1
    after = snapshot(agent)
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if name.startswith("lora"))
    assert all(bool(value.isfinite().all()) for value in after.values())


@pytest.mark.slow
def test_the_environment_keeps_its_model(make_env: Callable[..., Any], make_agent: Callable[..., Any]) -> None:
    env = make_env()
    observation, _ = env.reset(seed=0)
    expected = reference_policy(env, seed=0)(observation)
    agent = make_agent(env)
    agent.learn(2 * UPDATE)
    assert np.array_equal(reference_policy(env, seed=0)(observation), expected)
    tuned, _ = agent.predict(observation, deterministic=True)
    reference, _ = agent.policy.reference_transition(env.state_of(observation))
    assert not np.allclose(tuned, reference.numpy(), atol=1e-3)


def test_without_environment() -> None:
    with pytest.raises(ValueError, match="an agent needs an environment: pass env='DPOK-SD15-v0'"):
        DPOK()


def test_another_number_of_environments_is_refused(make_env: Callable[..., Any]) -> None:
    env = make_env(2)
    for given in (env, GymnasiumVecEnv(env)):
        with pytest.raises(ValueError, match="n_envs=3 does not fit the environment, which has 2: leave it out"):
            DPOK(env=given, n_envs=3, device="cpu")
    assert DPOK(env=env, n_envs=2, device="cpu").n_envs == 2
    with pytest.raises(ValueError, match="n_envs must be an integer of at least 1, got 0"):
        DPOK(env="DPOK-Shapes-v0", n_envs=0, device="cpu")


def test_the_environment_of_an_id_is_on_the_device_of_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, its model would be there."""
    make_vec, asked = gymnasium.make_vec, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("device"))
        return make_vec(*args, **kwargs)

    monkeypatch.setattr(gymnasium, "make_vec", recorded)
    for device in ("cpu", "auto"):
        DPOK(env="DPOK-Mixture-v0", n_envs=1, device=device)
    assert asked == ["cpu", None]


def test_another_policy_class(make_env: Callable[..., Any]) -> None:
    class Mine(DenoisingPolicy):
        """A policy of one's own."""

    assert isinstance(DPOK(Mine, make_env(), device="cpu").policy, Mine)


def test_a_seed_is_a_number_of_at_least_0(make_agent: Callable[..., Any]) -> None:
    for seed in (-1, 0.5):
        with pytest.raises(ValueError, match="seed must be an integer of at least 0, got"):
            make_agent(seed=seed)


@pytest.mark.slow
def test_learning_goes_on_with_new_images(make_agent: Callable[..., Any]) -> None:
    """With and without SB3's reset of the counted steps."""
    agents = [make_agent(), make_agent()]
    agents[0].learn(2 * UPDATE)
    for _ in range(2):
        agents[1].learn(UPDATE)
    assert [agent.num_timesteps for agent in agents] == [2 * UPDATE, UPDATE]
    assert [(agent.images_drawn, agent.iteration) for agent in agents] == [(2 * N, 2)] * 2
    assert_same(snapshot(agents[1]), snapshot(agents[0]))


@pytest.mark.slow
def test_steps_are_rounded_up_to_whole_iterations(make_agent: Callable[..., Any]) -> None:
    agent = make_agent()
    agent.learn(UPDATE + 1)
    assert (agent.num_timesteps, agent.images_drawn) == (2 * UPDATE, 2 * N)
    assert agent.is_done(2 * UPDATE)
    assert not agent.is_done(2 * UPDATE + 1)


# --- Other environments than the agent's


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_inference_steps": T + 1}, f"num_inference_steps {T} there, {T + 1} here"),
        ({"guidance_scale": 7.5}, r"guidance_scale 1\.0 there, 7\.5 here"),
        ({"eta": 0.5}, r"eta 1\.0 there, 0\.5 here"),
        ({"model": "velocity"}, "model '.*stable-diffusion' there, '.*stable-diffusion-v' here"),
        ({"image_size": 32}, "image_size None there, 32 here"),
    ],
    ids=str,
)
def test_another_sampler_is_refused(
    make_env: Callable[..., Any],
    make_agent: Callable[..., Any],
    settings: dict[str, Any],
    tiny_v_folder: Path,
    other: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    if "model" in other:
        other = {"model": str(tiny_v_folder)}
    agent = make_agent()
    agent.save(tmp_path / "agent")
    for env in (make_env(**other), DenoisingEnv(**settings | other)):
        with pytest.raises(ValueError, match=message):
            agent.set_env(env)
        with pytest.raises(ValueError, match=message):
            DPOK.load(tmp_path / "agent", env, device="cpu")
    before = agent.process
    agent.learn(UPDATE)  # the refused ones left the agent as it was
    assert agent.process is before


def test_environments_that_are_no_denoising_are_refused(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], tmp_path: Path
) -> None:
    agent = make_agent()
    agent.save(tmp_path / "agent")
    for env, message in [
        (gymnasium.make("CartPole-v1"), "needs a denoising environment such as DPOK-SD15-v0, got"),
        (VectorNoiseAction(make_env()), "would not notice the wrapper VectorNoiseAction; take it off"),
    ]:
        for use in (agent.set_env, make_agent, lambda env: DPOK.load(tmp_path / "agent", env, device="cpu")):
            with pytest.raises(ValueError, match=message):
                use(env)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [{"model": "linked"}, {"model": "moved"}, {"dtype": "bfloat16"}, {"model_kwargs": {"vae_tiling": True}}],
    ids=str,
)
def test_the_same_sampler_computed_elsewhere_is_taken(
    make_env: Callable[..., Any],
    make_agent: Callable[..., Any],
    tiny_sd_folder: Path,
    how: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    first = shutil.copytree(tiny_sd_folder, tmp_path / "first" / "model")
    agent = make_agent(make_env(model=str(first)))
    agent.save("agent")
    if how.get("model") == "linked":
        (tmp_path / "link").symlink_to(first)
        how = {"model": "./link"}
    elif how.get("model") == "moved":
        how = {"model": str((tmp_path / "first").rename(tmp_path / "second") / "model")}
    env = make_env(**{"model": str(first)} | how)
    loaded = DPOK.load("agent", env, device="cpu")
    assert loaded.process is env.process
    assert loaded.sampler_config.model == how.get("model", str(first))
    loaded.learn(UPDATE)


# --- Saving as Stable-Baselines3 does


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRA", "whole denoiser", "before learning", "saved twice", "normalized"])
def test_goes_on_exactly_after_loading(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], kind: str, tmp_path: Path
) -> None:
    policy_kwargs = {"lora_rank": 0} if kind == "whole denoiser" else {}
    original = make_agent(policy_kwargs=policy_kwargs, batch_size=5, normalize_rewards=kind == "normalized")
    if kind != "before learning":
        original.learn(UPDATE)
    original.save(tmp_path / "agent")
    saved = snapshot(original)
    original.learn(UPDATE, reset_num_timesteps=False)
    random_state = torch.get_rng_state()

    loaded = DPOK.load(tmp_path / "agent", make_env(), device="cpu")
    if kind == "saved twice":
        loaded.save(tmp_path / "again")
        loaded.save(tmp_path / "again")
        loaded = DPOK.load(tmp_path / "again.zip", make_env(), device="cpu")
        loaded.save(tmp_path / "once more")  # which must not make it forget where to go on
    assert_same(snapshot(loaded), saved)
    loaded.learn(UPDATE, reset_num_timesteps=False)
    assert_same(snapshot(loaded), snapshot(original))
    assert_same(loaded.state_dict()["state"], original.state_dict()["state"])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert any(not torch.equal(value, saved.get(name)) for name, value in snapshot(loaded).items() if name in saved)


@pytest.mark.slow
def test_loaded_without_environment(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], tmp_path: Path
) -> None:
    agent = make_agent()
    agent.learn(UPDATE)
    agent.save(tmp_path / "agent.zip")
    observation, _ = make_env().reset(seed=0)
    expected, _ = agent.predict(observation, deterministic=True)
    loaded = DPOK.load(tmp_path / "agent.zip", device="cpu")
    assert np.array_equal(loaded.predict(observation, deterministic=True)[0], expected)
    assert loaded.predict(observation)[0].shape == expected.shape
    with pytest.raises(ValueError, match=r"the agent has no environment: give it one with set_env\(\)"):
        _ = loaded.denoising_env
    loaded.set_env(make_env())
    loaded.learn(UPDATE)


@pytest.mark.slow
def test_loaded_on_another_number_of_environments(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], tmp_path: Path
) -> None:
    """The number of environments is a matter of speed: an iteration keeps its images."""
    agent = make_agent(policy_kwargs={"max_batch_size": 1})
    agent.save(tmp_path / "agent")
    loaded = DPOK.load(tmp_path / "agent", make_env(3), device="cpu")
    for each in (agent, loaded):
        each.learn(UPDATE)
    assert (loaded.n_envs, loaded.images_per_iteration, loaded.images_drawn) == (3, N, N)
    assert_same(snapshot(loaded), snapshot(agent))


@pytest.mark.slow
def test_arguments_can_be_changed_when_loading(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], tmp_path: Path
) -> None:
    make_agent().save(tmp_path / "agent")
    loaded = DPOK.load(tmp_path / "agent", make_env(), device="cpu", kl_coef=0.5, print_system_info=False)
    assert loaded.kl_coef == 0.5
    with pytest.raises(TypeError, match="DPOK has no argument 'kl_coeff'; did you mean 'kl_coef'"):
        DPOK.load(tmp_path / "agent", make_env(), device="cpu", kl_coeff=0.5)
    with pytest.raises(ValueError, match=r"kl_coef must be a number of at least 0, got -1"):
        DPOK.load(tmp_path / "agent", make_env(), device="cpu", kl_coef=-1)
    with pytest.raises(ValueError, match="the state is of DPOK, and the agent is DDPO"):
        DDPO.load(tmp_path / "agent", make_env(), device="cpu")


@pytest.mark.slow
def test_every_argument_that_changes_when_loading_has_its_effect(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], tmp_path: Path
) -> None:
    agent = make_agent(clip_range=2.5)
    agent.learn(UPDATE)
    agent.save(tmp_path / "agent")
    changed = {"learning_rate": 0.5, "images_per_iteration": 2 * N, "normalize_rewards": True, "seed": 7}
    loaded = DPOK.load(tmp_path / "agent", make_env(), device="cpu", **changed)
    assert loaded.clip_range == 2.5
    assert loaded.lr_schedule(1.0) == 0.5
    assert len(loaded.rollout_buffer) == loaded.images_per_iteration == 2 * N
    assert loaded.reward_normalizer is not None
    assert loaded.run_seed == 7
    assert loaded.images_drawn == N
    loaded.learn(UPDATE)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    save_to_zip_file(tmp_path / "other.zip", {"policy_class": "MlpPolicy"}, {})
    with pytest.raises(ValueError, match=r"other.zip was not written by save\(\) of this version"):
        DPOK.load(tmp_path / "other.zip", device="cpu")


# --- What was learned, in other people's hands


def draw_with(pipeline: Any, guidance_scale: float, start: Tensor) -> Tensor:
    """Draws with a diffusers pipeline, (B, 3, H, W) in [0, 1]."""
    return pipeline(
        list(PROMPTS),
        num_inference_steps=T,
        eta=1.0,
        guidance_scale=guidance_scale,
        latents=start,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images


def draw_with_agent(agent: Any, start: Tensor) -> Tensor:
    """Draws with the agent's policy and the same noise."""
    process, generator = agent.process, torch.Generator().manual_seed(7)
    latents = start
    with torch.no_grad():
        for step in process.denoise(
            latents,
            process.encode(PROMPTS),
            lambda _: torch.randn(start.shape, generator=generator),
            agent.policy.transition,
        ):
            latents = step.next_latents
        return process.model.decode(latents)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("how", ["LoRA", "pipeline", "folder", "whole denoiser"])
def test_diffusers_draws_the_same_images(
    make_env: Callable[..., Any],
    make_agent: Callable[..., Any],
    tiny_sd_folder: Path,
    tmp_path: Path,
    guidance_scale: float,
    how: str,
) -> None:
    rank = 0 if how == "whole denoiser" else 2
    agent = make_agent(make_env(guidance_scale=guidance_scale), policy_kwargs={"lora_rank": rank})
    agent.learn(UPDATE)
    perturb(agent.policy, 0.02 if rank == 0 else 0.1)
    start = torch.randn(len(PROMPTS), 4, 8, 8)
    expected = draw_with_agent(agent, start)
    plain = load_pipeline(tiny_sd_folder)
    assert not torch.allclose(draw_with(plain, guidance_scale, start), expected, atol=1e-2)
    if how == "LoRA":
        assert agent.save_lora(tmp_path).parent == tmp_path
        pipeline = plain
        pipeline.load_lora_weights(tmp_path)
    elif how == "folder":
        agent.save_pretrained(tmp_path / "model")
        pipeline = load_pipeline(tmp_path / "model")
    else:
        pipeline = agent.pipeline()
        pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw_with(pipeline, guidance_scale, start), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_pipeline_is_not_changed_by_later_training(make_agent: Callable[..., Any]) -> None:
    agent = make_agent()
    perturb(agent.policy)
    pipeline, start = agent.pipeline(), torch.randn(len(PROMPTS), 4, 8, 8)
    pipeline.set_progress_bar_config(disable=True)
    expected = draw_with(pipeline, 1.0, start)
    agent.learn(UPDATE)
    assert_same(draw_with(pipeline, 1.0, start), expected)


@pytest.mark.slow
def test_a_saved_pipeline_is_a_model_to_start_from(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], tmp_path: Path
) -> None:
    agent = make_agent()
    perturb(agent.policy)
    agent.save_pretrained(tmp_path / "model")
    env = make_env(model=str(tmp_path / "model"))
    drawn = evaluate(make_agent(env).policy, env, PROMPTS, 3)
    expected = evaluate(agent.policy, agent.denoising_env, PROMPTS, 3)
    assert np.abs(drawn.images.astype(int) - expected.images).max() <= 1
    np.testing.assert_allclose(drawn.reward, expected.reward, atol=1e-4)
    reference = evaluate(agent.policy, agent.denoising_env, PROMPTS, 3, reference=True)
    assert np.abs(drawn.images.astype(int) - reference.images).max() > 1


# --- A live pipeline


@pytest.fixture
def live_pipeline(tiny_sd_folder: Path) -> Any:
    """A pipeline in memory that has no name to load it by."""
    parts = StableDiffusionPipeline.from_pretrained(tiny_sd_folder).components
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@pytest.mark.slow
def test_a_live_pipeline_can_be_trained(
    live_pipeline: Any, settings: dict[str, Any], make_agent: Callable[..., Any]
) -> None:
    settings.pop("device")
    model = TextToImageModel.from_pipeline(live_pipeline)
    env = gymnasium.make_vec("DPOK-SD15-v0", num_envs=N, **settings | {"model": model, "guidance_scale": 1.0})
    agent = make_agent(env)
    expected = make_agent()  # on the same weights, loaded from their folder
    for each in (agent, expected):
        each.learn(2 * UPDATE)
    assert agent.process.model is model
    assert model.denoiser is live_pipeline.unet
    assert_same(snapshot(agent), snapshot(expected))
    assert evaluate(agent.policy, env, PROMPTS, 0).kl.min() > 0


@pytest.mark.slow
def test_an_agent_of_a_live_pipeline_is_loaded_with_its_environment(
    live_pipeline: Any, make_env: Callable[..., Any], make_agent: Callable[..., Any], tmp_path: Path
) -> None:
    def env_of(pipeline: Any) -> DenoisingVectorEnv:
        return make_env(model=TextToImageModel.from_pipeline(pipeline))

    env = env_of(live_pipeline)
    agent = make_agent(env, DDPO)
    agent.learn(UPDATE)
    agent.save(tmp_path / "agent")
    agent.policy.save(tmp_path / "policy.pt")
    resumed = make_agent(env_of(live_pipeline), DDPO, seed=9)
    resumed.load_state_dict(agent.state_dict())
    message = r"a live diffusers pipeline without a name.*: pass an environment with"
    with pytest.raises(ValueError, match=message):
        DDPO.load(tmp_path / "agent", device="cpu")
    with pytest.raises(ValueError, match=message):
        DenoisingPolicy.load(tmp_path / "policy.pt", device="cpu")
    loaded = DDPO.load(tmp_path / "agent", env, device="cpu")
    for each in (agent, loaded, resumed):
        each.learn(UPDATE, reset_num_timesteps=False)
        assert_same(snapshot(each), snapshot(agent))


@pytest.mark.slow
def test_the_noise_of_a_run_is_that_of_its_seed(make_agent: Callable[..., Any]) -> None:
    noise = ImageNoise.for_training(7, range(N), (4, 8, 8), "cpu")
    assert_same(collect(make_agent(seed=7)).latents[:, 0], noise.initial_latents())
