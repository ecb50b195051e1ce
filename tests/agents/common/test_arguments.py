"""Every argument is written once, shown everywhere, and checked by its name."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from agents import (
    AWM,
    DDPO,
    DPOK,
    GRPO,
    REINFORCE,
    RWR,
    BestOfN,
    DenoisingAlgorithm,
    DenoisingPolicy,
    DiffusionDPO,
    DiffusionNFT,
    DRaFT,
    ForwardProcess,
    OnlineForwardProcess,
    PolicyGradient,
    RewardWeightedSFT,
    list_algorithms,
)
from agents.algorithms.registry import load_algorithm
from agents.common.arguments import check_arguments, describe_arguments, show_inherited_arguments
from dpok_gym import DenoisingVectorEnv

ALGORITHMS = [DPOK, DDPO, GRPO, REINFORCE, RewardWeightedSFT, RWR, BestOfN, DiffusionNFT, AWM, DiffusionDPO, DRaFT]


def own_arguments(cls: type) -> set[str]:
    """Returns the names in a class's own constructor."""
    parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
    named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    return {name for name in named[1:] if not name.startswith("_")}


def test_these_are_all_algorithms() -> None:
    assert {load_algorithm(name) for name in list_algorithms()} == set(ALGORITHMS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_signature_names_every_argument_of_every_base(algorithm: type[DenoisingAlgorithm]) -> None:
    parameters = inspect.signature(algorithm).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    assert list(kinds)[:2] == ["policy", "env"]
    assert kinds.pop("policy") == kinds.pop("env") == inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds.values()) == {inspect.Parameter.KEYWORD_ONLY}
    bases = [base for base in algorithm.__mro__ if issubclass(base, DenoisingAlgorithm) and "__init__" in vars(base)]
    assert len(bases) >= 2
    assert set(parameters) == set.union(*[own_arguments(base) for base in bases])
    assert {"learning_rate", "seed", "policy_kwargs", "images_per_iteration"} <= set(parameters)
    for base in (PolicyGradient, ForwardProcess, OnlineForwardProcess):
        if issubclass(algorithm, base):
            assert own_arguments(base) <= set(parameters)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, DenoisingPolicy, DenoisingVectorEnv, DenoisingAlgorithm])
def test_every_argument_has_a_text(algorithm: type) -> None:
    described = describe_arguments(algorithm)
    undocumented = [name for name, argument in described.items() if len(argument.doc) < 10]
    assert undocumented == []
    for name, argument in described.items():
        assert argument.name == name
        assert "\n" not in argument.doc
        assert argument.annotation is not None
        assert argument.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_docstring_has_the_arguments_of_the_bases(algorithm: type[DenoisingAlgorithm]) -> None:
    doc = inspect.getdoc(algorithm) or ""
    arguments = doc.split("\nArgs:\n")[1].split("\n\n")[0]
    for name in describe_arguments(algorithm):
        assert arguments.count(f"\n    {name}: ") + arguments.startswith(f"    {name}: ") == 1, name
    assert "learning rate of the denoiser, at least 0" in arguments
    assert doc.count("\nArgs:\n") == 1
    assert max(len(line) for line in doc.splitlines()) <= 120


def test_a_subclass_describes_its_own_default_and_text_first() -> None:
    described = describe_arguments(DRaFT)
    assert described["micro_batch_size"].default == 16
    assert "decoder" in described["micro_batch_size"].doc
    assert describe_arguments(DPOK)["micro_batch_size"].default == 128
    assert describe_arguments(RWR)["batch_size"].default == 64
    assert list(described)[:6] == ["policy", "env", "n_last_steps", "kl_coef", "max_kl", "micro_batch_size"]


def test_constructors_without_open_ends_are_described_alone() -> None:
    class Base:
        """Base.

        Args:
            hidden: never seen.
        """

        def __init__(self, hidden: int = 0) -> None: ...

    class Closed(Base):
        """Closed.

        Args:
            first: the first
                one, in two lines.
            second: the second one.

        Raises:
            ValueError: never.
        """

        def __init__(self, first: int, *, second: str = "b", _private: bool = True) -> None: ...

    described = describe_arguments(Closed)
    assert list(described) == ["first", "second"]
    first, second = described.values()
    assert (first.annotation, first.default, first.doc) == (
        int,
        inspect.Parameter.empty,
        "the first one, in two lines.",
    )
    assert (second.annotation, second.default, second.doc) == (str, "b", "the second one.")


def test_a_subclass_of_ones_own_shows_all_of_them_too() -> None:
    class Mine(DDPO):
        """An algorithm of one's own.

        Args:
            policy: "DenoisingPolicy".
            env: a denoising environment.
            strength: of the new term.

        Raises:
            ValueError: never.
        """

        def __init__(self, policy: Any = "DenoisingPolicy", env: Any = None, *, strength: float = 0.5, **kwargs: Any):
            super().__init__(policy, env, **kwargs)

    parameters = inspect.signature(Mine).parameters
    assert list(parameters)[:3] == ["policy", "env", "strength"]
    assert set(parameters) == {"strength", *inspect.signature(DDPO).parameters}
    doc = inspect.getdoc(Mine) or ""
    assert doc.index("strength: of the new term.") < doc.index("score_function: ") < doc.index("Raises:")

    class Bare(DDPO):
        pass

    assert list(inspect.signature(Bare).parameters) == list(inspect.signature(DDPO).parameters)


class OnlyEnv(PolicyGradient):
    """Takes the environment first, and no policy."""

    def __init__(self, env: Any, *, sharpness: float = 2.0, **kwargs: Any) -> None:
        """Makes it.

        Args:
            env: the environment.
            sharpness: a number.
        """
        self.sharpness = sharpness
        super().__init__(env=env, **kwargs)


class OnlyNames(PolicyGradient):
    """Takes names only."""

    def __init__(self, *, sharpness: float = 2.0, **kwargs: Any) -> None:
        self.sharpness = sharpness
        super().__init__(**kwargs)


@pytest.mark.parametrize(("algorithm", "positional"), [(OnlyEnv, ["env"]), (OnlyNames, [])])
def test_a_constructor_may_take_policy_and_environment_in_another_way(algorithm: Any, positional: list[str]) -> None:
    """Positional arguments come first, and are those that the constructor itself takes so."""
    parameters = inspect.signature(algorithm).parameters.values()
    found = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert found == positional
    assert {"policy", "env", "sharpness", "clip_range", "seed"} <= {parameter.name for parameter in parameters}


def test_arguments_may_be_documented_in_the_constructor() -> None:
    assert describe_arguments(OnlyEnv)["sharpness"].doc == "a number."


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl_coef", "reward_weight", "clip_range", "learning_rate", "gamma", "max_grad_norm"])
def test_a_text_is_no_number(make_agent: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}.* (must be a number|must lie in \[0, 1\]).*, got 'x'$"):
        make_agent(**{name: "x"})


def test_a_class_without_a_section_of_arguments_gets_one() -> None:
    class Base:
        """Base.

        Args:
            size: of it.
        """

        def __init__(self, size: int = 1) -> None: ...

    class Derived(Base):
        """Derived."""

    show_inherited_arguments(Derived)
    assert inspect.getdoc(Derived) == "Derived.\n\nArgs:\n    size: of it."
    assert str(inspect.signature(Derived)) == "(size: int = 1)"


# --- Misspelt arguments


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_misspelt_argument_is_named_with_the_nearest_one(algorithm: Any) -> None:
    name = algorithm.__name__
    with pytest.raises(
        TypeError, match=rf"{name} has no argument 'learning_rat'; did you mean 'learning_rate'\? There"
    ):
        algorithm("DenoisingPolicy", None, learning_rat=1e-3)


@pytest.mark.parametrize(
    ("algorithm", "misspelt", "nearest"),
    [
        (DPOK, "kl_weight", "reward_weight"),
        (DPOK, "groupsize", None),
        (GRPO, "groupsize", "group_size"),
        (RWR, "temperatur", "temperature"),
        (DDPO, "n_epoch", "n_epochs"),
    ],
)
def test_the_nearest_is_one_of_the_algorithms_own(
    algorithm: type[DenoisingAlgorithm], misspelt: str, nearest: str | None
) -> None:
    with pytest.raises(TypeError) as error:
        algorithm(**{misspelt: 1})
    assert ("did you mean" in str(error.value)) == (nearest is not None)
    assert nearest is None or f"did you mean {nearest!r}?" in str(error.value)


@pytest.mark.parametrize("name", ["lora_rnk", "lora_ranks"])
def test_a_misspelt_argument_of_the_policy(make_agent: Callable[..., Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"DenoisingPolicy has no argument '{name}'; did you mean 'lora_rank'\?"):
        make_agent(policy_kwargs={name: 3})


def test_the_sampler_is_no_argument_of_the_policy(make_agent: Callable[..., Any]) -> None:
    """The environment decides how to sample."""
    for name, value in {"guidance_scale": 2.0, "num_inference_steps": 4, "eta": 0.5, "model": "shapes"}.items():
        with pytest.raises(TypeError, match=f"DenoisingPolicy has no argument '{name}'"):
            make_agent(policy_kwargs={name: value})


def test_known_arguments_pass() -> None:
    check_arguments(DPOK, {"kl_coef": 1.0, "n_epochs": 2, "seed": 3, "use_critic": False, "_init_setup_model": True})
    check_arguments(DenoisingVectorEnv, {"eta": 1.0, "prompts": "count"})
    check_arguments(DPOK, {})
