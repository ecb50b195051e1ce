"""Wrong values for every argument in Python: each is an error of one line that names the argument."""

import dataclasses
import math
import re
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from agents import DPOK, DenoisingPolicy, evaluate, load_run
from agents.algorithms.registry import list_algorithms, load_algorithm
from agents.common.arguments import describe_arguments
from agents.common.policy import DenoisingPolicy as Policy
from agents.common.steering import SVDD, BestOf, FKSteering
from dpok_gym import DenoisingVectorEnv
from dpok_gym.models import load_model
from dpok_gym.models.lora import LoRA
from dpok_gym.prompts import load_prompts
from dpok_gym.rewards import make_reward
from dpok_gym.rewards.preference.reward import PreferenceReward
from tests.bad_input.support import WRONG, contents, describe, kind_of, refused


def _wrong_values(annotation, *further):
    """Returns the values that are wrong for a type, as its annotation says it; and further ones."""
    values = [*WRONG.get(kind_of(annotation), []), *further]
    # None is how an optional argument is left out.
    return [value for value in values if value is not None or "None" not in str(annotation)]


def _cases(owner, further=(), left_out=()):
    further = dict(further)
    cases = []
    for argument in describe_arguments(owner).values():
        if argument.name in left_out:
            continue
        for value in _wrong_values(argument.annotation, *further.get(argument.name, ())):
            cases.append(pytest.param(argument.name, value, id=f"{argument.name}-{describe(value)}"))
    return cases


def _of(values):
    """Returns the cases of a table: for each name, its wrong values."""
    return [
        pytest.param(name, value, id=f"{name}-{describe(value)}") for name, wrong in values.items() for value in wrong
    ]


ENVIRONMENT: dict[str, list[Any]] = {
    "num_envs": [0, None, 10**7],
    "model": [None, 3, "", "a\0b", [], b"shapes", "shapes:", {}],
    "prompts": [None, 3, [], "", [" "], [3], ["a red dragon"], "conut", "missing.txt", b"x"],
    "reward": [
        *[None, 3, "", {}, [], "shapes-alignmen", "no_such_module:reward", "os:", {"shapes-alignment": "1"}],
        *[{"shapes-alignment": math.nan}, {"shapes-alignment": 1e39}, {"shapes-alignment": {"weihgt": 1}}],
        *[{"shapes-alignment": {"normalize": value}} for value in ("x", [1], [0, 0], [math.nan, 1], 3)],
    ],
    "num_inference_steps": [0, 1001, None],
    "eta": [-1, 1.1, "x"],
    "guidance_scale": [None],
    "negative_prompt": ["a red dragon", 3, "a red circle"],
    "image_size": [0, -8, 7, 1.5, "64", [64], [64, 64, 64], {}, 10**6, True, np.ones(2)],
    "device": ["", "x", "cuda:99", "cpu:x", 3, None, "meta", []],
    "model_kwargs": [{"varient": "fp16"}, {"dtype": "float32"}, {"compile": "yes"}, {"allow_pickle": 1}],
    "max_prompt_bytes": [0, 1, 10**6],
    "decode_batch_size": [0, 1.5, -1, "x", True, [], 10**30],
    "reward_workers": [10**6],
    "autoreset_mode": ["x", 3, None, []],
    "render_mode": ["ansi", 3, [], np.ones(2)],
}


@pytest.mark.parametrize(("name", "value"), _cases(DenoisingVectorEnv, ENVIRONMENT))
def test_environment(name, value):
    arguments = {"num_envs": 2, "model": "shapes", "device": "cpu", "num_inference_steps": 2} | {name: value}
    names = {"max_prompt_bytes": ["bytes"], "model_kwargs": ["load_model", "True or False"], "prompts": ["prompt"]}
    with refused(name, *names.get(name, ["prompt"] if name == "negative_prompt" else [])):
        DenoisingVectorEnv(**arguments)


@pytest.fixture(scope="module")
def env():
    """A mixture, whose agents are made in a millisecond."""
    settings = {"model": "mixture", "prompts": "mixture", "reward": "mixture-bump", "device": "cpu"}
    return DenoisingVectorEnv(2, num_inference_steps=2, **settings)


RESET_OPTIONS: dict[str, list[Any]] = {
    "prompt": [3, "", "x", ["two modes"], [3, 3], {}, 1.5],
    "latent": [3, "x", np.ones(2), math.nan, {}, []],
    "reset_mask": [3, "x", np.ones(2), np.zeros(2, bool), True],
}
#: For each method, an argument and the word that its error must have: wrong values.
METHODS: dict[tuple[str, str, str], list[Any]] = {
    ("reset", "seed", "seed"): [-1, 1.5, "x", [1], [1, "x"], object(), math.nan, True],
    ("reset", "options", "options"): [3, "x", [1], {"promt": "a"}, {1: 2}, np.ones(2)],
    ("step", "actions", "action"): [3, "x", None, np.ones(2), math.nan, {}, [], object()],
    ("optimal_value", "beta", "beta"): [0, -1, math.nan, "x", None, 1e39],
}
METHODS |= {("reset", "options", name): [{name: value} for value in values] for name, values in RESET_OPTIONS.items()}


@pytest.mark.parametrize(
    ("method", "argument", "word", "value"),
    [(*names, value) for names, values in METHODS.items() for value in values],
    ids=lambda value: value if isinstance(value, str) else describe(value),
)
def test_methods_of_an_environment(env, method, argument, word, value):
    env.reset(seed=0)
    with refused(word):
        getattr(env, method)(**{argument: value})
    env.step(np.zeros(env.action_space.shape, np.float32))  # it is as it was


def _algorithm_cases():
    further = {
        "policy": [None, 3, "", "MlpPolicy", Policy.__mro__[1], object()],
        "images_per_iteration": [0],
        "n_envs": [3],
        "device": ["cuda:99", "", "x", 3, None],
        "learning_rate": ["x", math.nan, -1, None, 1e39],
        "warmup_fraction": [1],
        "target_kl": [0, -1, math.nan, "x"],
        "policy_kwargs": [{"lora_rnak": 2}, {"lora_rank": -1}, {"critic_hidden": 0}, {"precision": "half"}],
        "seed": [2**32],
    }
    known: set[str] = set()
    cases = []
    for algorithm in list_algorithms():
        for case in _cases(load_algorithm(algorithm), further, left_out={"env", "tensorboard_log", *known}):
            cases.append(pytest.param(algorithm, *case.values, id=f"{algorithm}-{case.id}"))
        known |= describe_arguments(load_algorithm(algorithm)).keys()
    return cases


@pytest.mark.parametrize(("algorithm", "name", "value"), _algorithm_cases())
def test_algorithms(env, algorithm, name, value):
    arguments = {"policy": "DenoisingPolicy", "device": "cpu"} | {name: value}
    names = [name, *(value if name == "policy_kwargs" and isinstance(value, dict) else ())]
    with refused(*map(str, names)):
        load_algorithm(algorithm)(env=env, **arguments)


@pytest.mark.parametrize("value", [None, 3, "", "x", "CartPole-v1", "DPOK-Shape-v0", object()], ids=describe)
def test_environments_of_algorithms(value):
    with refused("env"):
        DPOK("DenoisingPolicy", value)


POLICY: dict[str, list[Any]] = {
    "target_modules": ["x", "", None, 3, [], [3], ["x"], {}],
    "lora_rank": [10**5],
    "optimizer_class": [None, 3, "x"],
}


@pytest.mark.parametrize(
    ("name", "value"), _cases(DenoisingPolicy, POLICY, left_out={"process", "use_sde", "critic_kind"})
)
def test_policies(shapes_env, name, value):
    with refused(name, "layer", "LoRA"):
        DPOK("DenoisingPolicy", shapes_env, device="cpu", policy_kwargs={name: value})


@pytest.fixture(scope="module")
def shapes_env():
    return DenoisingVectorEnv(2, model="shapes", device="cpu", num_inference_steps=2)


LOAD_MODEL: dict[str, list[Any]] = {
    "name_or_path": [*WRONG["path"], "no/such/model/here", "os:path", "no_such_module:model"],
    "device": ["", "x", "cuda:99", 3, None, "meta"],
    "dtype": ["x", "", "float64", None, 3, torch.float32],
    "image_size": [0, 7, 1.5, "64", [64], {}, 10**6, -8],
    "negative_prompt": [3, [], b"x", "a red dragon"],
    "true_cfg_scale": [0.5, -1, math.nan, math.inf, "x", None, [2.0], 2.0],
    "revision": [3, [], b"x"],
    "variant": [3, [], b"x", "fp99"],
    "allow_pickle": WRONG["switch"],
    "vae_tiling": WRONG["switch"],
    "compile": WRONG["switch"],
    "config": [3, "", [], b"x"],
    "imagesize": [64],
}


@pytest.mark.parametrize(("name", "value"), _of(LOAD_MODEL))
def test_load_model(name, value):
    names = {"name_or_path": "model", "negative_prompt": "prompt", "variant": "model"}
    with refused(name, names.get(name, name)):
        load_model(**({"name_or_path": "shapes", "device": "cpu"} | {name: value}))


CLASSES: dict[Any, dict[str, list[Any]]] = {
    BestOf: {"n_particles": [0, None]},
    FKSteering: {"temperature": [0, None], "resample_every": [0]},
    SVDD: {"temperature": [None, "x", np.ones(2)]},
}


@pytest.mark.parametrize(("method", "name", "value"), [
    pytest.param(method, field.name, value, id=f"{method.__name__}-{field.name}-{describe(value)}")
    for method, further in CLASSES.items()
    for field in dataclasses.fields(method)
    for value in _wrong_values(get_type_hints(method)[field.name], *further.get(field.name, ()))
])  # fmt: skip
def test_steering(method, name, value):
    with refused(name):
        method(**{name: value})


EVALUATE: dict[str, list[Any]] = {
    "policy": [None, 3, "x", object()],
    "env": [None, 3, "x", object()],
    "prompts": [None, 3, "two modes", [], [3], [""], ["no such mixture"], [b"x"], {}],
    "seed": [-1, 1.5, "x", None, math.nan, True],
    "steering": [None, 3, "best-of", BestOf],
}


@pytest.mark.parametrize(("name", "value"), _of(EVALUATE))
def test_evaluate(env, name, value):
    agent = DPOK("DenoisingPolicy", env, device="cpu")
    arguments = {"policy": agent.policy, "env": env, "prompts": ["two modes"], "seed": 0} | {name: value}
    with refused(name.removesuffix("s")):
        evaluate(**arguments)


@pytest.mark.parametrize("value", [*WRONG["path"], "nowhere", "."], ids=describe)
@pytest.mark.parametrize("function", [load_run, PreferenceReward.load], ids=["load_run", "reward"])
def test_folders(tmp_path, monkeypatch, function, value):
    monkeypatch.chdir(tmp_path)
    with refused("folder"):
        function(value)
    assert not contents(tmp_path)


@pytest.mark.parametrize("value", [*WRONG["path"], "nowhere", "."], ids=describe)
def test_folders_of_loras(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    model = load_model("shapes", "cpu")
    with refused("LoRA"):
        LoRA.from_folder(model.denoiser, value, model.lora_prefix)
    assert not contents(tmp_path)


@pytest.mark.parametrize("value", [None, 3, 1.5, "", [], [""], [3], b"x", "nowhere.txt", "shapse", {}], ids=describe)
def test_prompts(value):
    with refused("prompt"):
        load_prompts(value)


@pytest.mark.parametrize(
    "value", [None, 3, "", {}, [], "jpeg-compresibility", "a:b", "http://", {"a": {}}, {3: 1}], ids=describe
)
def test_rewards(value):
    with refused("reward"):
        make_reward(value)


@pytest.mark.parametrize(
    "returned",
    [None, 3, "x", [1], [1, "x"], [math.nan] * 2, {}, {"a": [1]}, torch.ones(3), torch.ones(2, 2), {"a": None}],
    ids=lambda value: re.sub(r"\W+", "_", str(value)),
)
def test_what_a_reward_returns(returned):
    reward = make_reward({lambda images, prompts: returned: 1.0})
    with refused("reward"):
        reward(torch.zeros(2, 3, 8, 8), ["a", "b"])


@pytest.mark.parametrize(
    "images",
    [None, 3, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8), torch.zeros(1, 3, 8, 8), "x"],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_images_for_a_reward(images):
    with refused("images"):
        make_reward("jpeg-compressibility")(images, ["a", "b"])


@pytest.mark.parametrize("value", [None, "x", -1, math.nan, math.inf, 1e39, [], True], ids=describe)
def test_learn(env, value):
    with refused("total_timesteps"):
        DPOK("DenoisingPolicy", env, device="cpu").learn(value)
