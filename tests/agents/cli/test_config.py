"""The settings of a run: where they come from, and how config.yaml keeps them."""

import dataclasses
import inspect

import pytest
import yaml

from agents import DPOK, PRESETS, DenoisingPolicy, list_algorithms
from agents.algorithms.registry import load_algorithm
from agents.cli.config import Config, default_config
from agents.cli.environments import environment_kwargs, parse_reward
from agents.cli.train import RunOptions, parse
from agents.common.algorithm import DEFAULT_N_ENVS
from dpok_gym import DenoisingVectorEnv

LAPTOP = PRESETS["laptop"]


def _config(*words):
    return parse(words).config


def test_each_layer_changes_the_ones_before_it():
    config = _config("--eta", "0.5")
    assert config.algo_kwargs["clip_range"] == inspect.signature(DPOK).parameters["clip_range"].default
    assert config.env_kwargs["model"] == environment_kwargs("DPOK-Shapes-v0")["model"] == "shapes"
    assert config.env_kwargs["num_inference_steps"] == LAPTOP.env_kwargs["num_inference_steps"]
    assert environment_kwargs("DPOK-Shapes-v0")["num_inference_steps"] != config.env_kwargs["num_inference_steps"]
    assert (environment_kwargs("DPOK-Shapes-v0")["eta"], config.env_kwargs["eta"]) == (1.0, 0.5)


def test_plain_dpok_train_is_the_laptop_preset():
    """The settings are the same in Python: ``DPOK(env, **PRESETS["laptop"].algorithm_kwargs("dpok"))``."""
    config = _config()
    assert config.preset == "laptop"
    assert config.images == LAPTOP.images
    given = LAPTOP.algorithm_kwargs("dpok")
    assert config.n_envs == DEFAULT_N_ENVS
    policy_kwargs = given.pop("policy_kwargs")
    assert {name: config.policy_kwargs[name] for name in policy_kwargs} == policy_kwargs
    assert {name: config.algo_kwargs[name] for name in given} == given
    assert {name: config.env_kwargs[name] for name in LAPTOP.env_kwargs} == dict(LAPTOP.env_kwargs)
    assert config == default_config("DPOK-Shapes-v0", "dpok")


def test_every_argument_of_the_classes_is_in_the_config():
    left_out = {"policy", "env", "n_envs", "policy_kwargs", "stats_window_size", "tensorboard_log", "verbose"}
    left_out |= {"seed", "device"}
    for algo in list_algorithms():
        config = default_config("DPOK-Shapes-v0", algo)
        arguments = inspect.signature(load_algorithm(algo)).parameters.keys()
        assert config.algo_kwargs.keys() == arguments - left_out
    of_env = inspect.signature(DenoisingVectorEnv).parameters
    named = {name for name, argument in of_env.items() if argument.kind is not argument.VAR_KEYWORD}
    assert config.env_kwargs.keys() == named - {"num_envs", "render_mode", "autoreset_mode", "predicted_info", "device"}
    policy = inspect.signature(DenoisingPolicy).parameters
    optional = {name for name, argument in policy.items() if argument.default is not argument.empty}
    left_out = {"use_sde", "use_critic", "critic_kind", "keep_old", "micro_batch_size", "optimizer_class"}
    assert config.policy_kwargs.keys() == optional - left_out


def test_settings_of_each_algorithm():
    for algo in list_algorithms():
        config = default_config("DPOK-Shapes-v0", algo)
        for name, value in LAPTOP.algorithm_kwargs(algo).items():
            if name == "policy_kwargs":
                continue
            assert config.algo_kwargs[name] == value


@pytest.mark.slow
def test_presets_and_options():
    paper = _config("--preset", "paper")
    assert (paper.n_envs, paper.algo_kwargs["images_per_iteration"]) == (DEFAULT_N_ENVS, 10)
    assert paper.algo_kwargs["reward_weight"] == 10
    assert paper.policy_kwargs["lora_rank"] == 4
    mine = _config(
        *(
            "--preset",
            "paper",
            "--kl-coef",
            "0.5",
            "--lora-rank",
            "2",
            "--target-modules",
            "all",
            "--precision",
            "bfloat16",
        ),
        *("--gradient-checkpointing", "--image-size", "64", "128", "--dtype", "bfloat16", "--n-envs", "3"),
        *("--prompts", "count"),
    )
    assert mine.env_kwargs["image_size"] == [64, 128]
    assert mine.env_kwargs["dtype"] == "bfloat16"
    assert mine.policy_kwargs["target_modules"] == "all"
    assert mine.policy_kwargs["gradient_checkpointing"] is True
    assert mine.policy_kwargs["precision"] == "bfloat16"
    assert mine.algo_kwargs["kl_coef"] == 0.5
    assert mine.policy_kwargs["lora_rank"] == 2
    assert (mine.n_envs, mine.env_kwargs["prompts"]) == (3, "count")
    other = _config("--env", "DPOK-SD15-v0")
    assert other.preset == "published-model"
    assert other.env_kwargs["prompts"] == "dpok"
    assert other.env_kwargs["reward"] == {"image-reward": 1.0}
    assert other.env_kwargs["dtype"] == "bfloat16"
    assert (other.n_envs, other.eval_images, other.checkpointing_minutes) == (8, 32, 15.0)
    exact = _config("--env", "DPOK-Mixture-v0")
    assert (exact.preset, exact.algo_kwargs["kl_placement"]) == ("exact-objective", "reward")


def test_a_preset_does_not_change_a_task() -> None:
    config = _config("--env", "DPOK-Shapes-Location-v0")
    assert config.preset == "laptop"
    assert config.env_kwargs["prompts"] == "a blue square right of an orange circle"
    assert config.env_kwargs["reward"] == {"shapes-preference": 1.0}
    assert config.env_kwargs["num_inference_steps"] == 10
    assert config.policy_kwargs["lora_rank"] == _config("--env", "DPOK-Shapes-v0").policy_kwargs["lora_rank"]
    assert _config("--env", "DPOK-Mixture-Ring-v0").preset == "exact-objective"


#: Another value of every option, "no" for one that is on; "--resume" and its like are in test_resume.py,
#: "--config" and "--dry-run" in test_recipe.py and test_dry_run.py.
OTHER = {
    "seed": "1",
    "env": "DPOK-SD15-v0",
    "algo": "grpo",
    "preset": "paper",
    "images": "7",
    "n_envs": "3",
    "eval_images": "3",
    "device": "cpu",
    "checkpointing_steps": "3",
    "checkpointing_minutes": "3.5",
    "checkpoints_total_limit": "3",
    "model": "sd15",
    "prompts": "count",
    "reward": "jpeg-compressibility",
    "num_inference_steps": "3",
    "sampler": "ode",
    "eta": "0.7",
    "sde_steps": "2 4",
    "guidance_scale": "0.7",
    "negative_prompt": "a dog",
    "image_size": "128",
    "long_prompts": "skip",
    "timestep_spacing": "trailing",
    "dtype": "bfloat16",
    "model_kwargs": "vae_tiling=true",
    "max_prompt_bytes": "100",
    "non_finite": "mask",
    "decode_batch_size": "3",
    "reward_workers": "2",
    "reward_weight": "0.7",
    "kl_coef": "0.7",
    "reference_info": "",
    "reference_log_prob_coef": "0.7",
    "kl_estimator": "output-mse",
    "kl_placement": "reward",
    "target_kl": "2.5",
    "use_critic": "",
    "critic_kind": "network",
    "vf_learning_rate": "0.7",
    "vf_batch_size": "None",
    "vf_epochs": "3",
    "center_advantage": "no",
    "normalize_loss": "no",
    "gamma": "0.7",
    "gae_lambda": "0.7",
    "n_epochs": "3",
    "timestep_fraction": "0.7",
    "clip_range": "0.7",
    "clip_type": "clamp",
    "ratio": "joint",
    "skip_last_steps": "1",
    "step_weighting": "output",
    "learning_rate": "0.7",
    "final_lr_fraction": "0.7",
    "warmup_fraction": "0.7",
    "images_per_iteration": "6",
    "batch_size": "None",
    "micro_batch_size": "auto",
    "max_grad_norm": "0.7",
    "anchor_coef": "0.7",
    "anchor_images": "3",
    "normalize_rewards": "",
    "held_out_reward": "jpeg-compressibility",
    "guidance_gradient": "conditional",
    "lora_rank": "3",
    "lora": "a_folder",
    "target_modules": "attention",
    "precision": "bfloat16",
    "gradient_checkpointing": "",
    "max_batch_size": "8",
    "critic_hidden": "3",
    "critic_kwargs": "look_fraction=0.2",
    "optimizer_kwargs": "weight_decay=0.1",
}


@pytest.mark.slow
def test_no_option_is_ignored():
    default = _config()
    names = {field.name for field in dataclasses.fields(RunOptions)} - {
        "out",
        "resume",
        "resume_from_checkpoint",
        "trust",
        "config",
        "dry_run",
    }
    names |= default.env_kwargs.keys() | default.algo_kwargs.keys() | default.policy_kwargs.keys()
    assert names == OTHER.keys()
    ignored = []
    for name, value in OTHER.items():
        option = name.replace("_", "-")
        words = [f"--no-{option}"] if value == "no" else [f"--{option}", value]
        if name == "sde_steps":  # a pair
            words = [f"--{option}", *value.split()]
        if _config(*filter(None, words)) == default:
            ignored.append(name)
    assert not ignored


def test_values_have_their_types():
    config = _config(
        *(
            "--kl-placement",
            "reward",
            "--use-critic",
            "--batch-size",
            "None",
            "--n-epochs",
            "3",
            "--target-kl",
            "2.5",
        ),
        *("--skip-last-steps", "1", "--micro-batch-size", "auto", "--max-batch-size", "8", "--eta", "0.5"),
        *("--target-modules", "to_q", "to_k", "--model-kwargs", "vae_tiling=true", "revision=main"),
    )
    expected = {"kl_placement": "reward", "use_critic": True, "batch_size": None, "n_epochs": 3, "target_kl": 2.5}
    expected |= {"skip_last_steps": 1, "micro_batch_size": "auto"}
    actual = {name: config.algo_kwargs[name] for name in expected}
    assert actual == expected
    assert [type(value) for value in actual.values()] == [type(value) for value in expected.values()]
    assert (config.policy_kwargs["max_batch_size"], config.env_kwargs["eta"]) == (8, 0.5)
    assert config.policy_kwargs["target_modules"] == ["to_q", "to_k"]
    assert config.env_kwargs["model_kwargs"] == {"vae_tiling": True, "revision": "main"}
    default = _config()
    changed = {name for name, value in default.algo_kwargs.items() if config.algo_kwargs[name] != value}
    assert changed == expected.keys()


def test_config_yaml(tmp_path):
    config = _config(
        "--image-size", "64", "128", "--target-modules", "to_q", "to_k", "--prompts", "three green squares"
    )
    config.write(tmp_path)
    assert Config.read(tmp_path) == config
    text = (tmp_path / "config.yaml").read_text()
    assert "!!" not in text  # nothing that only Python can read
    assert yaml.safe_load(text)["env_kwargs"]["image_size"] == [64, 128]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("eval_images:", "eval_image:"), "'eval_image'; did you mean 'eval_images'?"),
        (lambda text: text.replace("seed: 0\n", ""), "lacks the key 'seed'"),
        (lambda text: text.replace("kl_coef:", "kl_cof:"), "argument of dpok 'kl_cof'; did you mean 'kl_coef'?"),
        (lambda text: text.replace("eta:", "etta:"), "argument of DPOK-Shapes-v0 'etta'; did you mean 'eta'?"),
        (lambda text: text.replace("lora_rank:", "lora_rang:"), "'lora_rang'; did you mean 'lora_rank'?"),
        (
            lambda text: text.replace("  eta: 1.0\n", ""),  # as of a version that did not have it
            "the argument 'eta' of DPOK-Shapes-v0 is missing; add it, or train anew with this version",
        ),
        (lambda text: text.replace("algo: dpok", "algo: dpokk"), "unknown algorithm 'dpokk'; did you mean 'dpok'?"),
        (lambda text: text.replace("images: 2240", "images: many"), "images must be an integer of at least 1"),
        (lambda text: "[" + text, "is damaged"),
        (lambda text: "- a list", "is damaged: it is no mapping"),
    ],
)
def test_mistakes_in_config_yaml(tmp_path, change, message):
    _config().write(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=r"key|argument|unknown|damaged|must be") as caught:
        Config.read(tmp_path)
    assert message in str(caught.value)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run folder: it has no config\.yaml"):
        Config.read(tmp_path)


def test_a_folder_of_that_name_does_not_make_a_prompt_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()
    assert _config("--env", "DPOK-SD15-v0", "--prompts", "cat").env_kwargs["prompts"] == "cat"
    (tmp_path / "dog").write_text("a dog")
    assert _config("--env", "DPOK-SD15-v0", "--prompts", "dog").env_kwargs["prompts"] == str(tmp_path / "dog")


def test_the_held_out_reward():
    def held_out(*options):
        return parse(["--reward", "shapes-quality", *options]).config.algo_kwargs["held_out_reward"]

    assert held_out() == "auto"
    assert held_out("--held-out-reward", "None") is None
    written = held_out("--held-out-reward", "shapes-alignment=2,jpeg-compressibility")
    assert written == {"shapes-alignment": 2.0, "jpeg-compressibility": 1.0}
    assert parse(["--held-out-reward", "./here:there"]).config.code() == ["the reward './here:there'"]


def test_a_folder_with_a_reward_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "my_reward").mkdir()
    monkeypatch.chdir(tmp_path)
    weights = _config("--reward", "my_reward=0.5,shapes-quality").env_kwargs["reward"]
    assert weights == {str(tmp_path / "my_reward"): 0.5, "shapes-quality": 1.0}


def test_an_environment_of_another_module(tmp_path, monkeypatch):
    register = "dpok_gym:DenoisingVectorEnv"
    text = f"import gymnasium\ngymnasium.register('Mine-v0', vector_entry_point={register!r}, kwargs={{'eta': 0.5}})\n"
    (tmp_path / "my_envs.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config = _config("--env", "my_envs:Mine-v0")
    assert (config.env_kwargs["eta"], config.preset) == (0.5, "published-model")
    with pytest.raises(ValueError, match="there is no environment 'no_envs:Mine-v0'"):
        _config("--env", "no_envs:Mine-v0")


def test_what_users_register_an_id_with_stays(tmp_path, monkeypatch):
    """The preset of published models has other steps, and half precision, which this model's function does not know."""
    kwargs = {"model": "mixture", "prompts": "ring of six", "reward": "mixture-bump", "num_inference_steps": 7}
    register = f"gymnasium.register('Ring-v0', vector_entry_point='dpok_gym:DenoisingVectorEnv', kwargs={kwargs!r})"
    (tmp_path / "my_ids.py").write_text(f"import gymnasium\n{register}\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = _config("--env", "my_ids:Ring-v0")
    assert config.env_kwargs["num_inference_steps"] == 7
    assert config.env_kwargs["dtype"] == "float32"
    assert config.preset == "published-model"
    assert config.make_agent(config.make_env(2), "cpu").policy.gradient_checkpointing is False


def test_an_algorithm_of_another_module(tmp_path, monkeypatch):
    text = """
from agents import DPOK

class Mine(DPOK):
    '''Like DPOK.

    Args:
        curiosity: how much it wants to know, in [0, 1].
    '''

    def __init__(self, policy="DenoisingPolicy", env=None, *, curiosity: float = 0.5, **kwargs):
        super().__init__(policy, env, **kwargs)
        self.curiosity = curiosity
"""
    (tmp_path / "my_algorithm.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config = _config("--algo", "my_algorithm:Mine", "--curiosity", "0.75", "--kl-coef", "0.5")
    assert (config.algo_kwargs["curiosity"], config.algo_kwargs["kl_coef"]) == (0.75, 0.5)
    with pytest.raises(ValueError, match="did you mean '--curiosity'"):
        _config("--algo", "my_algorithm:Mine", "--curiosty", "0.75")


def test_rewards_are_read():
    assert parse_reward("shapes-alignment") == {"shapes-alignment": 1.0}
    assert parse_reward("a=2, b=-0.5,c") == {"a": 2.0, "b": -0.5, "c": 1.0}
    assert parse_reward({"a": 3}) == {"a": 3}
    assert parse_reward("http://a:1 https://b=0.5,http://c/d=2,mine:f=3,http://g") == {
        "http://a:1 https://b": 0.5,
        "http://c/d": 2.0,
        "mine:f": 3.0,
        "http://g": 1.0,
    }
    for wrong in ("", "=1", "a,a", "a=1=2", "http://a?b=c"):
        with pytest.raises(ValueError, match="reward"):
            parse_reward(wrong)
