"""Prompt sets, their names, and prompts as bytes."""

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from dpok_gym.prompts import (
    PROMPT_SETS,
    PromptSet,
    list_prompt_sets,
    load_prompts,
    prompt_to_bytes,
    prompts_from_bytes,
    register_prompts,
)


@pytest.fixture
def restored_names(monkeypatch):
    """Names registered in the test are forgotten after it."""
    monkeypatch.setattr(PROMPT_SETS, "_entries", dict(PROMPT_SETS._entries))


def test_sample_is_uniform_over_train_and_reproducible():
    prompts = PromptSet("pets", ("a cat", "a dog", "a fish"), ("a bird",))
    draws = prompts.sample(np.random.default_rng(0), 3000)
    assert draws == prompts.sample(np.random.default_rng(0), 3000)
    counts = Counter(draws)
    assert set(counts) == {"a cat", "a dog", "a fish"}
    assert all(900 < count < 1100 for count in counts.values())  # 1000 +- 26 (one standard deviation)


def test_weighted_draws_are_those_of_numpy():
    weights = np.random.default_rng(1).random(50)
    prompts = PromptSet("numbers", tuple(map(str, range(50))), weights=tuple(weights))
    ours, theirs = np.random.default_rng(0), np.random.default_rng(0)
    for n in (1, 7, 1000):
        expected = theirs.choice(50, n, p=weights / weights.sum())
        assert prompts.sample(ours, n) == [str(index) for index in expected]
    assert ours.random() == theirs.random()


def test_duplicates_weigh_and_lists_become_tuples():
    prompts = PromptSet("pets", ["a cat", "a cat", "a dog"])
    assert prompts.train == ("a cat", "a cat", "a dog")
    assert prompts.held_out == ()
    assert hash(prompts) == hash(PromptSet("pets", ("a cat", "a cat", "a dog")))


@pytest.mark.parametrize(
    ("train", "held_out", "error", "message"),
    [
        ((), (), ValueError, "'pets' is empty"),
        (("a cat", " "), (), ValueError, r"prompt 1 of 'pets' \(train\).*not ' '"),
        (("a cat", 7), (), ValueError, r"prompt 1 of 'pets' \(train\).*not 7"),
        (("a cat",), ("a dog", ""), ValueError, r"prompt 1 of 'pets' \(held_out\)"),
        ("a cat", (), TypeError, "must be a list of texts, not 'a cat'"),
        (("a cat",), None, TypeError, r"\(held_out\) must be a list of texts, not None"),
    ],
)
def test_bad_prompt_sets(train, held_out, error, message):
    with pytest.raises(error, match=message):
        PromptSet("pets", train, held_out)


def test_load_passes_on_prompt_sets_lists_and_single_texts():
    prompts = PromptSet("pets", ("a cat",), ("a dog",))
    assert load_prompts(prompts) is prompts
    assert load_prompts(["a cat", "a dog"]).train == ("a cat", "a dog")
    assert load_prompts(("a cat",)).train == ("a cat",)
    assert load_prompts("A cat, on the moon.") == PromptSet("text", ("A cat, on the moon.",))
    assert load_prompts("rabbit").train == ("rabbit",)
    assert load_prompts("a black/white cat and/or dog").train == ("a black/white cat and/or dog",)
    assert load_prompts("/imagine a cat").train == ("/imagine a cat",)
    assert load_prompts(["data/prompts"]).train == ("data/prompts",)
    assert load_prompts("a shape").train == ("a shape",)  # near a name, but plainly a prompt
    assert load_prompts(["shape"]).train == ("shape",)
    assert len(load_prompts("a cat " * 1000).train[0]) == 6000  # too long to be asked for as a file name


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ([], ValueError, "is empty"),
        (["a cat", None], ValueError, "prompt 1 .*not None"),
        ("", ValueError, "not blank"),
        ("  ", ValueError, "not blank"),
        (3, TypeError, "name of a set .*not 3"),
        (None, TypeError, "not None"),
        ("color", ValueError, "did you mean 'colour'.*give a list"),
        ("dpok-color", ValueError, "did you mean 'dpok-colour'"),
        ("missing/prompts.txt", FileNotFoundError, "no file of prompts at 'missing/prompts.txt'"),
        ("data/prompts.parquet", FileNotFoundError, "no file of prompts at 'data/prompts.parquet'"),
        ("my prompts.YAML", FileNotFoundError, "no file of prompts at 'my prompts.YAML'"),
        ("data/prompts", FileNotFoundError, "no file of prompts at 'data/prompts'"),
        ("./my prompts", FileNotFoundError, "no file of prompts at './my prompts'"),
        ("~/no such prompts", FileNotFoundError, "no file of prompts at '~/no such prompts'"),
        ("tests", FileNotFoundError, "'tests' is a folder, and not a file"),
    ],
)
def test_load_errors(spec, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    with pytest.raises(error, match=message):
        load_prompts(spec)


def test_a_named_set_wins_over_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colour").write_text("a cat\n")
    assert load_prompts("colour").name == "colour"
    assert load_prompts("./colour").train == ("a cat",)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, float("nan")), (0.0, 0.0), (2.0, -1.0)])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="the weights of 'pets' must be 2 finite numbers"):
        PromptSet("pets", ("a cat", "a dog"), weights=weights)


@pytest.mark.parametrize("name", list_prompt_sets())
def test_named_sets(name):
    prompts = load_prompts(name)
    assert prompts.name == name
    assert prompts == load_prompts(name)
    assert prompts.held_out
    assert len(set(prompts.train)) == len(prompts.train)
    assert not set(prompts.train) & set(prompts.held_out)


def test_names_are_sorted():
    names = list_prompt_sets()
    assert names == sorted(names)
    assert {"dpok", "dpok-colour", "dpok-count", "dpok-composition", "dpok-location", "shapes", "mixture"} <= set(names)


def test_dpok():
    assert load_prompts("dpok-colour") == PromptSet(
        "dpok-colour", ("A green colored rabbit.",), ("A green colored cat.",)
    )
    together = load_prompts("dpok")
    each = [load_prompts(f"dpok-{category}") for category in ("colour", "count", "composition", "location")]
    assert together.train == tuple(prompts.train[0] for prompts in each)
    assert together.held_out == tuple(prompts.held_out[0] for prompts in each)


PETS = PromptSet("pets", ("a cat", "a dog"), ("a fish",))


def make_pets():
    return PETS


def test_a_registered_set_is_loaded_by_its_name(restored_names):
    register_prompts("pets-set", PETS)
    register_prompts("pets-function", make_pets)
    register_prompts("pets-place", "no_such_module:make")  # a place is not imported yet
    assert load_prompts("pets-set") is PETS
    assert load_prompts("pets-function") is PETS
    assert {"pets-set", "pets-function", "pets-place"} <= set(list_prompt_sets())
    with pytest.raises(ValueError, match="did you mean 'pets-set'"):
        load_prompts("pets-sett")


def test_a_place_is_imported_when_the_set_is_loaded(restored_names, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    register_prompts("birds", "my_birds:make")
    with pytest.raises(ImportError, match="the prompt set 'birds' cannot be imported from 'my_birds:make'"):
        load_prompts("birds")
    (tmp_path / "my_birds.py").write_text(
        "from dpok_gym.prompts import PromptSet\ndef make():\n    return PromptSet('birds', ('a finch',))\n"
    )
    assert load_prompts("birds").train == ("a finch",)
    monkeypatch.delitem(sys.modules, "my_birds")


def test_a_function_may_be_registered_again_and_another_may_not(restored_names):
    for text in ("a cat", "a dog"):

        def make(text=text):
            return PromptSet("pets", (text,))

        make.__qualname__ = "make"  # as the cell of a notebook defines it
        register_prompts("pets", make)
        assert load_prompts("pets").train == (text,)
    register_prompts("zoo", PETS)
    register_prompts("zoo", PromptSet("pets", ("a cat", "a dog"), ("a fish",)))  # an equal set is the same
    for name, prompts in {"pets": make_pets, "zoo": PromptSet("zoo", ("a lion",)), "dpok": PETS}.items():
        with pytest.raises(ValueError, match=f"the prompt set '{name}' is already registered"):
            register_prompts(name, prompts)


@pytest.mark.parametrize(
    ("name", "prompts", "error", "message"),
    [
        ("", PETS, ValueError, "must be a text that is not blank, got ''"),
        (7, PETS, ValueError, "must be a text that is not blank, got 7"),
        ("pets", ["a cat"], TypeError, "the prompts 'pets' must be a PromptSet, a function or 'module:function'"),
        ("pets", "a cat", ValueError, "the place of the prompts 'pets' must be written 'module:function', not 'a cat'"),
        ("pets", "my_module:", ValueError, "must be written 'module:function', not 'my_module:'"),
    ],
)
def test_what_cannot_be_registered(restored_names, name, prompts, error, message):
    with pytest.raises(error, match=message):
        register_prompts(name, prompts)
    assert "pets" not in list_prompt_sets()


def test_a_function_that_makes_no_prompt_set(restored_names):
    def make() -> Any:
        return ["a cat"]

    register_prompts("pets", make)
    with pytest.raises(TypeError, match=r"registered for the prompts 'pets' must return a PromptSet, not \['a cat'\]"):
        load_prompts("pets")


def test_prompts_become_bytes_and_back():
    prompts = ["a cat", "ein Löwe", "猫 🐈!", "", "x" * 16]
    rows = prompt_to_bytes(prompts, 16)
    assert rows.dtype == np.uint8
    assert rows.shape == (5, 16)
    assert rows[0].tolist() == [*b"a cat", *[0] * 11]
    assert rows[1].tolist() == [*"ein Löwe".encode(), *[0] * 7]  # ö takes two bytes
    assert rows[4].min() > 0  # a prompt may fill its row
    assert prompts_from_bytes(rows) == prompts
    assert prompts_from_bytes(prompt_to_bytes([], 16)) == []


def test_a_prompt_that_is_too_long_in_bytes():
    prompt_to_bytes(["ö" * 8], 16)
    with pytest.raises(ValueError, match=r"the prompt 'öööööööö!' has 17 bytes in UTF-8, but max_prompt_bytes is 16"):
        prompt_to_bytes(["a cat", "ö" * 8 + "!"], 16)
    with pytest.raises(ValueError, match="raise max_prompt_bytes") as caught:
        prompt_to_bytes(["x" * 1700], 16)
    assert len(str(caught.value)) < 250


def test_prompts_that_bytes_cannot_keep():
    with pytest.raises(ValueError, match=r"'a cat\\x00' has a NUL character"):  # it would be lost in the padding
        prompt_to_bytes(["a cat\0"], 16)
    with pytest.raises(ValueError, match=r"the prompt '\\ud800' cannot be written as UTF-8"):
        prompt_to_bytes(["\ud800"], 16)
    with pytest.raises(ValueError, match="max_prompt_bytes must be an integer of at least 1, got 0"):
        prompt_to_bytes(["a cat"], 0)


def test_bytes_that_are_no_prompts():
    rows = prompt_to_bytes(["a cat", "ein Löwe"], 8 + 1)
    rows[1, -1] = 0xC3  # the first half of a character
    with pytest.raises(ValueError, match="row 1 of the observed prompts is not UTF-8"):
        prompts_from_bytes(rows)
    for wrong in (rows[0], rows[None], rows.astype(np.int64)):
        with pytest.raises(ValueError, match=r"an array \(N, max_prompt_bytes\) of uint8, not "):
            prompts_from_bytes(wrong)


def test_import_is_light():
    heavy = "{'torch', 'diffusers', 'transformers', 'scipy'}"
    code = f"import sys, dpok_gym.prompts as p; p.load_prompts('dpok'); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
