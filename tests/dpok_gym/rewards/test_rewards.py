"""The contract of rewards: what a spec may be, what a function may return, and what is made of it."""

import io
import math
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpok_gym import rewards
from dpok_gym.rewards import list_rewards, make_reward, networks, preference, register_reward, registry, remote
from tests.support import assert_same

PROMPTS = ["a cat", "a dog"]


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry.REWARDS, "_entries", dict(registry.REWARDS._entries))
    monkeypatch.setattr(registry, "_loaded", {})


def length(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def returning(value):
    def fixed(images, prompts):
        return value

    return fixed


class Ones(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, images, prompts):
        assert not torch.is_grad_enabled()
        return self.weight.expand(len(prompts))


def test_a_callable_is_one_component(images):
    batch = make_reward(length)(images, ["a", "abc"])
    assert batch.total.tolist() == [1.0, 3.0]
    assert list(batch.components) == ["length"]
    assert batch.components["length"].tolist() == [1.0, 3.0]
    assert batch.valid.tolist() == [True, True]
    assert (batch.total.dtype, batch.valid.dtype) == (torch.float32, torch.bool)


def test_a_module_is_named_by_its_class_and_runs_without_grad(images):
    batch = make_reward(Ones())(images, PROMPTS)
    assert list(batch.components) == ["Ones"]
    assert not batch.total.requires_grad
    assert not batch.components["Ones"].requires_grad


def test_a_callable_may_return_components(images):
    batch = make_reward(returning({"sharp": torch.tensor([1.0, 2.0]), "bright": [0.5, -4.0]}))(images, PROMPTS)
    assert batch.total.tolist() == [1.5, -2.0]
    assert {name: values.tolist() for name, values in batch.components.items()} == {
        "sharp": [1.0, 2.0],
        "bright": [0.5, -4.0],
    }


def test_weighted_sum(images):
    register_reward("length", lambda: length)
    register_reward("parts", lambda: returning({"sharp": [1.0, 2.0], "bright": [10.0, 20.0]}))
    batch = make_reward({"length": 2, "parts": np.float32(-0.5), Ones(): 0.25})(images, ["a", "abc"])
    # 2 * 1 - 0.5 * (1 + 10) + 0.25 and 2 * 3 - 0.5 * (2 + 20) + 0.25
    assert batch.total.tolist() == [-3.25, -4.75]
    assert batch.weights == {"length": 2.0, "sharp": -0.5, "bright": -0.5, "Ones": 0.25}
    assert {name: values.tolist() for name, values in batch.components.items()} == {
        "length": [1.0, 3.0],
        "sharp": [1.0, 2.0],
        "bright": [10.0, 20.0],
        "Ones": [1.0, 1.0],
    }


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        (1, 2),
        np.array([1.0, 2.0]),
        np.array([1, 2]),
        torch.tensor([1, 2]),
        torch.tensor([1.0, 2.0], dtype=torch.float16),
        [torch.tensor(1.0), torch.tensor(2.0)],
    ],
)
def test_tensor_like_values(images, value):
    assert make_reward(returning(value))(images, PROMPTS).total.tolist() == [1.0, 2.0]


def test_returned_values_are_copied(images):
    buffer = torch.tensor([1.0, 2.0])
    batch = make_reward(returning(buffer))(images, PROMPTS)
    buffer.zero_()
    assert batch.components["fixed"].tolist() == [1.0, 2.0]


def test_weighted_components_add_up_to_the_total(images):
    parts = returning({"sharp": [1.0, 2.0], "bright": [10.0, 20.0]})
    reward = make_reward({length: {"weight": 2.0, "normalize": [1.0, 0.5]}, parts: -0.5})
    scores = reward.components(images, ["a", "abc"])
    weighted = reward.weigh(scores)
    assert {name: values.tolist() for name, values in weighted.items()} == {
        "length": [0.0, 8.0],
        "sharp": [-0.5, -1.0],
        "bright": [-5.0, -10.0],
    }
    assert torch.equal(torch.stack([*weighted.values()]).sum(0), reward.combine(scores, ["a", "abc"]).total)


def test_rewards_cannot_harm_each_other(images):
    """A function that writes into its arguments changes nothing for the next one, nor for the caller."""
    seen = []

    def vandal(images, prompts):
        score = images.mean((1, 2, 3)).clone()
        images.zero_()
        prompts.clear()
        return score

    def witness(images, prompts):
        seen.append((images.clone(), list(prompts)))
        return images.mean((1, 2, 3))

    before, prompts = images.clone(), list(PROMPTS)
    for spec in ({vandal: 1.0, witness: 1.0}, vandal):
        batch = make_reward(spec)(images, prompts)
        assert torch.equal(batch.components["vandal"], before.mean((1, 2, 3)))
        assert torch.equal(images, before)
        assert prompts == PROMPTS
    ((seen_images, seen_prompts),) = seen
    assert torch.equal(seen_images, before)
    assert seen_prompts == PROMPTS


def test_rewards_of_ddpo_pytorch_and_trl(images):
    """Their rewards take metadata of the prompts too, and return scores with a dict of anything."""

    def brightness(images, prompts, metadata):
        assert metadata == [{} for _ in prompts]
        return images.mean((1, 2, 3)), {"images": images}

    def optional(images, prompts, metadata=None):
        return images.mean((1, 2, 3)).numpy(), {}

    for function in (brightness, optional):
        batch = make_reward({function: 2.0})(images, PROMPTS)
        assert torch.allclose(batch.total, 2 * images.mean((1, 2, 3)))
        assert list(batch.components) == [function.__name__]


@pytest.mark.parametrize("function", [lambda images: images, lambda a, b, c, d: a, lambda images, *, prompts: images])
def test_rewards_with_other_arguments_are_refused_at_once(function):
    with pytest.raises(TypeError, match=r"takes \(.*\); it must take \(images, prompts\), or \(images, prompts, meta"):
        make_reward(function)


def test_a_reward_has_no_memory(images):
    """Its answer does not depend on what it was asked before."""
    spec = {"jpeg-compressibility": {"weight": 2.0, "normalize": [-2.0, 0.5]}, length: 0.1}
    reward, fresh = make_reward(spec), make_reward(spec)
    reward(1 - images, ["something else", "and more"])
    assert_same(reward(images, PROMPTS), fresh(images, PROMPTS))


def test_a_reward_is_returned_as_it_is():
    reward = make_reward(length, non_finite="mask")
    assert make_reward(reward) is reward


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("jpeg-compresibility", ValueError, "did you mean 'jpeg-compressibility'.*shapes-alignment.*register_reward"),
        ("zzz", ValueError, "unknown reward 'zzz'; there are: .*'module:name', or a folder"),
        ({}, ValueError, "mapping of rewards is empty"),
        ({"jpeg-compressibility": "1"}, TypeError, "weight of the reward 'jpeg-compressibility' must be a number"),
        ({"jpeg-compressibility": None}, TypeError, "must be a number, not None"),
        ({"jpeg-compressibility": True}, TypeError, "must be a number, not True"),
        ({"jpeg-compressibility": math.nan}, ValueError, "must be finite, not nan"),
        ({"jpeg-compressibility": -math.inf}, ValueError, "must be finite, not -inf"),
        ({"zzz": 1.0}, ValueError, "unknown reward 'zzz'"),
        ({3: 1.0}, TypeError, "not 3"),
        ({Ones(): 1.0, Ones().eval(): 1.0}, ValueError, "two rewards are named 'Ones'"),
        (3, TypeError, "must be a registered name, a callable, or a mapping"),
        (["jpeg-compressibility"], TypeError, "must be a registered name"),
        (None, TypeError, "not None"),
    ],
)
def test_bad_specs(spec, error, message):
    with pytest.raises(error, match=message):
        make_reward(spec)


def test_a_reward_that_is_made_can_be_masked_still():
    reward = make_reward(length)
    assert make_reward(reward) is reward
    masked = make_reward(reward, "mask")
    assert (masked.non_finite, masked.names) == ("mask", reward.names)
    assert make_reward(masked) is masked  # "error" is the default of the environment, too
    with pytest.raises(ValueError, match="non_finite must be one of"):
        make_reward(reward, "ignore")


@pytest.mark.parametrize("non_finite", ["ignore", None, True])
def test_bad_non_finite(non_finite):
    with pytest.raises(ValueError, match="non_finite must be one of 'error', 'mask'"):
        make_reward(length, non_finite=non_finite)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "reward 'fixed' returned NoneType, which is no tensor.*shape \\(2,\\)"),
        ("good", TypeError, "returned str"),
        (["good", "bad"], TypeError, "returned list"),
        ([[1.0], [1.0, 2.0]], TypeError, "returned list"),
        (1.0, ValueError, r"shape \(2,\), but the shape is \(\)"),
        (torch.zeros(3), ValueError, r"the 2 images, shape \(2,\), but the shape is \(3,\)"),
        (torch.zeros(2, 1), ValueError, r"shape is \(2, 1\)"),
        ({"sharp": torch.zeros(3)}, ValueError, r"reward 'sharp' must return .*shape is \(3,\)"),
        ({}, ValueError, "reward 'fixed' returned an empty mapping"),
    ],
)
def test_bad_returned_values(images, value, error, message):
    with pytest.raises(error, match=message):
        make_reward(returning(value))(images, PROMPTS)


def test_components_of_the_same_name(images):
    register_reward("length", lambda: returning({"sharp": [1.0, 2.0]}))
    with pytest.raises(ValueError, match="two rewards have a component named 'sharp'"):
        make_reward({"length": 1.0, returning({"sharp": [1.0, 2.0]}): 1.0})(images, PROMPTS)


@pytest.mark.parametrize(
    ("bad_images", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "floating-point tensor .*not torch.uint8"),
        (np.zeros((2, 3, 8, 8)), TypeError, "not ndarray"),
        (torch.zeros(3, 3, 8, 8), ValueError, r"\(2, 3, H, W\) for 2 prompts, not \(3, 3, 8, 8\)"),
        (torch.zeros(2, 8, 8, 3), ValueError, r"not \(2, 8, 8, 3\)"),
        (torch.zeros(3, 8, 8), ValueError, r"not \(3, 8, 8\)"),
    ],
)
def test_bad_images(bad_images, error, message):
    with pytest.raises(error, match=message):
        make_reward(length)(bad_images, PROMPTS)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_non_finite_reward_names_reward_and_prompt(images, number):
    with pytest.raises(
        rewards.NonFiniteError, match=f"reward 'sharp' for the prompt 'a dog' is not finite \\({number}; 1 of 2"
    ):
        make_reward(returning({"bright": [1.0, 2.0], "sharp": [1.0, number]}))(images, PROMPTS)


def test_a_non_finite_reward_is_masked(images):
    function = returning({"bright": [1.0, 2.0], "sharp": [3.0, math.nan]})
    batch = make_reward({function: 2.0}, non_finite="mask")(images, PROMPTS)
    assert batch.total.tolist() == [8.0, 0.0]
    assert batch.valid.tolist() == [True, False]
    assert batch.components["bright"].tolist() == [1.0, 2.0]
    assert batch.components["sharp"].isnan().tolist() == [False, True]


def test_a_sum_that_overflows_is_not_finite(images):
    weights = {returning([1.0, 1e38]): 10.0}
    with pytest.raises(ValueError, match="weighted sum of the rewards for the prompt 'a dog'"):
        make_reward(weights)(images, PROMPTS)
    batch = make_reward(weights, non_finite="mask")(images, PROMPTS)
    assert batch.total.tolist() == [10.0, 0.0]
    assert batch.valid.tolist() == [True, False]


def test_a_broken_image_has_no_reward(images):
    images[0, 1, 2, 3] = math.nan

    def needs_finite(images, prompts):
        assert images.isfinite().all()
        return torch.ones(len(prompts))

    with pytest.raises(rewards.NonFiniteError, match="the image for the prompt 'a cat' is not finite"):
        make_reward(needs_finite)(images, PROMPTS)
    batch = make_reward(needs_finite, non_finite="mask")(images, PROMPTS)
    assert batch.total.tolist() == [0.0, 1.0]
    assert batch.valid.tolist() == [False, True]
    assert batch.components["needs_finite"].isnan().tolist() == [True, False]
    assert images.isnan().sum() == 1  # the caller's image is left alone


class Contrast:
    """Has a gradient; asks the prompts, too."""

    differentiable = True

    def score(self, images, prompts):
        return images.square().mean((1, 2, 3)) * length(images, prompts)

    __call__ = score


class Redness(Contrast):
    def score(self, images, prompts):
        return images[:, 0].mean((1, 2))

    __call__ = score


def test_a_differentiable_sum(images):
    parts = {Contrast(): -2.0, Redness(): {"weight": 3.0, "normalize": [0.25, 0.5]}}
    reward = make_reward(parts | {"jpeg-compressibility": 0.0})  # what only informs needs no gradient
    reward.check_differentiable()
    images.requires_grad_()
    prompts = ["a", "abc"]
    total = reward.differentiable(images, prompts)
    torch.testing.assert_close(total, reward(images, prompts).total)
    (gradient,) = torch.autograd.grad(total.sum(), images)
    expected = -2 * 2 * images.detach() / images[0].numel() * torch.tensor([1.0, 3.0])[:, None, None, None]
    expected[:, 0] += 3 / 0.5 / images[0, 0].numel()
    torch.testing.assert_close(gradient, expected)


def test_differentiable_rewards_cannot_harm_each_other(images):
    class Vandal(Contrast):
        def score(self, images, prompts):
            score = images.sum((1, 2, 3))
            images.mul_(0)
            prompts.clear()
            return score

    latents = images.clone().requires_grad_()
    decoded, prompts = 2 * latents, list(PROMPTS)  # no leaf, so that it may be written into
    total = make_reward({Vandal(): 1.0, Redness(): 1.0}).differentiable(decoded, prompts)
    torch.testing.assert_close(total, 2 * images.sum((1, 2, 3)) + 2 * images[:, 0].mean((1, 2)))
    assert torch.equal(decoded, 2 * images)
    assert prompts == PROMPTS


def test_what_has_no_gradient(images):
    for made in (length, "jpeg-compressibility", {Contrast(): 1.0, length: 0.5}):
        name = "jpeg-compressibility" if isinstance(made, str) else "length"
        with pytest.raises(ValueError, match=f"'{name}' has no gradient; .*differentiable = True and a method score"):
            make_reward(made).check_differentiable()
    with pytest.raises(ValueError, match="every reward has the weight 0"):
        make_reward({Redness(): 0.0}).check_differentiable()
    refused = Redness()
    refused.differentiable = False
    with pytest.raises(ValueError, match="'Redness' has no gradient"):
        make_reward(refused).check_differentiable()


def test_names_are_loaded_when_made_and_once(images):
    loaded = []

    def factory():
        loaded.append(1)
        return length

    register_reward("length", factory)
    assert not loaded
    reward = make_reward("length")
    assert len(loaded) == 1
    reward(images, PROMPTS)
    make_reward({"length": 2.0})
    assert len(loaded) == 1


def test_only_the_name_that_was_registered_anew_is_loaded_again(images):
    loaded = []

    def make_factory(name):
        def factory():
            loaded.append(name)
            return length

        factory.__qualname__ = name  # not local to this test, so that it may be defined again
        return factory

    for name in ("one", "two"):
        register_reward(name, make_factory(name))
    spec = {"one": 1.0, "two": 1.0}
    make_reward(spec)
    register_reward("one", make_factory("one"))
    make_reward(spec)
    assert loaded == ["one", "two", "one"]


def test_registering():
    def factory():
        return length

    register_reward("length", factory)
    register_reward("length", factory)  # the same again does no harm
    assert "length" in list_rewards()
    with pytest.raises(ValueError, match="'length' is already registered"):
        register_reward("length", lambda: length)
    with pytest.raises(ValueError, match="name of a reward must be a text that is not blank"):
        register_reward(" ", factory)
    with pytest.raises(TypeError, match="must be a callable or 'module:function', not 3"):
        register_reward("three", 3)  # type: ignore[arg-type]
    for text in ("dpok_gym.rewards.jpeg", "dpok_gym.rewards.jpeg:", ":function"):
        with pytest.raises(ValueError, match="must be written 'module:function'"):
            register_reward("three", text)


@pytest.mark.parametrize("factory", ["no_such_module_of_ours:function", "dpok_gym.rewards.jpeg:no_such_function"])
def test_a_factory_that_cannot_be_imported(factory):
    register_reward("broken", factory)
    with pytest.raises(ImportError, match=f"reward 'broken' cannot be imported from '{factory}': .*no_such"):
        make_reward("broken")


class Sized:
    def __init__(self):
        self.scale = 2.0

    def __call__(self, images, prompts):
        return self.scale * length(images, prompts)


def test_rewards_of_other_modules(images, monkeypatch):
    module: Any = types.ModuleType("mine")
    module.length, module.Sized, module.make, module.three = length, Sized, lambda: length, 3
    module.Choosy = type("Choosy", (Sized,), {"__init__": lambda self, scale: None})
    monkeypatch.setitem(sys.modules, "mine", module)
    assert make_reward("mine:length")(images, ["a", "abc"]).total.tolist() == [1.0, 3.0]
    assert make_reward({"mine:Sized": 1.0, "mine:make": 1.0})(images, ["a", "abc"]).total.tolist() == [3.0, 9.0]
    with pytest.raises(TypeError, match="'mine:three' must return a callable"):
        make_reward("mine:three")
    with pytest.raises(TypeError, match="the class 'Choosy' of the reward 'mine:Choosy' needs arguments"):
        make_reward("mine:Choosy")
    with pytest.raises(
        ImportError,
        match=r"reward 'mine:four', read as 'module:name' .*http:// missing.*, cannot be imported .*: .*four",
    ):
        make_reward("mine:four")


def test_a_factory_that_returns_no_reward():
    register_reward("broken", lambda: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="factory of the reward 'broken' must return a callable, not 3"):
        make_reward("broken")


def test_built_in_names():
    names = {"jpeg-compressibility", "jpeg-incompressibility", "image-reward", "pickscore", "hpsv2", "hpsv2.1"}
    names |= {"clip-score", "aesthetic", "shapes-alignment", "shapes-quality", "mixture-linear", "mixture-quadratic"}
    names |= {"mixture-bump"}
    assert names <= set(list_rewards())
    assert list_rewards() == sorted(list_rewards())


@pytest.mark.slow
def test_import_is_light():
    """The package and its registry need no torch; making a reward needs none of the libraries of the others."""
    code = """
import sys
from dpok_gym.rewards import list_rewards, register_reward
import dpok_gym.rewards.networks, dpok_gym.rewards.preference, dpok_gym.rewards.remote
assert "image-reward" in list_rewards()
register_reward("mine", "mine:factory")
assert "torch" not in sys.modules
from dpok_gym.rewards import RemoteReward, make_reward
assert not {"diffusers", "transformers", "scipy", "PIL", "httpx2", "starlette"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    for package in (rewards, networks, preference, remote):
        assert package.__all__
        assert {*package.__all__} <= {*dir(package)}
        for name in package.__all__:
            assert getattr(package, name).__module__.startswith("dpok_gym.") or name == "RewardFunction"
        with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
            package.no_such_name  # noqa: B018


def test_jpeg_sizes_equal_pillow(images):
    expected = []
    for image in images:
        pixels = np.round(image.numpy().transpose(1, 2, 0) * np.float32(255)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        expected.append(np.float32(len(buffer.getvalue()) / 1000))
    assert make_reward("jpeg-incompressibility")(images, PROMPTS).total.tolist() == expected
    assert make_reward("jpeg-compressibility")(images, PROMPTS).total.tolist() == [-size for size in expected]
    # Out of range is clamped, not wrapped around.
    over = make_reward("jpeg-incompressibility")(torch.full((1, 3, 16, 16), 1.5), ["white"])
    white = make_reward("jpeg-incompressibility")(torch.ones(1, 3, 16, 16), ["white"])
    assert over.total == white.total


def test_detail_costs_kilobytes(images):
    flat = torch.full_like(images, 0.3)
    batch = torch.stack([flat[0], flat[0] + 0.1 * images[0], images[0]])
    sizes = make_reward("jpeg-incompressibility")(batch, ["flat", "grainy", "noise"]).total
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def test_a_definition_may_be_run_again(images):
    """As the cell of a notebook is."""
    for value in (1.0, 2.0):

        class Constant:
            def __call__(self, images, prompts, value=value):
                return torch.full((len(images),), value)

        Constant.__qualname__ = "Constant"  # not local to this test
        register_reward("constant", Constant)
        assert make_reward("constant")(images, PROMPTS).total.tolist() == [value] * len(images)
    for _ in range(2):
        with pytest.raises(ValueError, match="'constant' is already registered"):
            register_reward("constant", lambda: length)
