"""The prompt sets of the shapes world."""

import hashlib
from collections import Counter

import pytest

from dpok_gym.prompts import PromptSet, load_prompts
from dpok_gym.shapes.captions import CATEGORIES, NUMBERS, RELATIONS, all_requests, parse_prompt
from dpok_gym.shapes.prompts import unseen_prompts
from dpok_gym.shapes.scenes import COLOURS, SHAPES


def pairs(texts):
    return {frozenset(parse_prompt(text).kinds) for text in texts}


@pytest.mark.parametrize("name", [*CATEGORIES, "shapes"])
def test_every_word_of_the_shapes_world_is_trained(name):
    prompts = load_prompts(name)
    said = " ".join(prompts.train).replace("squares", "square")
    for word in (*COLOURS, *SHAPES):
        assert word in said
    if name in ("count", "shapes"):
        assert all(number in said for number in NUMBERS[1:])
    if name in ("location", "shapes"):
        assert all(relation in said for relation in RELATIONS)
        assert all(relation in " ".join(prompts.held_out) for relation in RELATIONS)


def test_split_of_the_shapes_world():
    sets = {category: load_prompts(category) for category in CATEGORIES}
    for category, prompts in sets.items():
        texts = [str(request) for request in all_requests(category)]
        assert sorted(prompts.train + prompts.held_out) == sorted(texts)
        assert len(prompts.held_out) / len(texts) == pytest.approx(0.2, abs=0.01)
    # A mirrored wording is on the same side of the split, and both sets hold out the same pairs.
    for seen in ("composition", "location"):
        for unseen in ("composition", "location"):
            assert not pairs(sets[seen].train) & pairs(sets[unseen].held_out)


def test_shapes_is_balanced_and_keeps_the_split():
    prompts = load_prompts("shapes")
    for texts, each in ((prompts.train, 19), (prompts.held_out, 5)):
        assert Counter(parse_prompt(text).category for text in texts) == dict.fromkeys(CATEGORIES, each)
    for category in CATEGORIES:
        assert not set(load_prompts(category).held_out) & set(prompts.train)
        assert not set(load_prompts(category).train) & set(prompts.held_out)


def test_the_split_never_changes():
    # Written down: results on held-out prompts are comparable only as long as these are the same.
    assert load_prompts("colour").held_out == (
        "a green circle",
        "a blue triangle",
        "a blue star",
        "a purple triangle",
        "an orange square",
    )


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("colour", "35e281d99080"),
        ("count", "07307c063b87"),
        ("composition", "2254982581e2"),
        ("location", "6478b79c8492"),
        ("shapes", "cac043b4579d"),
    ],
)
def test_no_set_ever_changes(name, digest):
    prompts = load_prompts(name)
    text = "\n".join([*prompts.train, "", *prompts.held_out])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest


def test_unseen_prompts_of_a_set_that_holds_some_out():
    prompts = PromptSet("mine", ("a red star",), ("a blue star", "a red circle"))
    assert unseen_prompts(prompts) == ("a blue star", "a red circle")
    assert unseen_prompts(load_prompts("shapes")) == load_prompts("shapes").held_out


def test_unseen_prompts_are_those_of_the_trained_categories():
    assert unseen_prompts(load_prompts(["a red star", "a red star"])) == load_prompts("colour").held_out
    both = load_prompts("location").held_out + load_prompts("count").held_out
    assert unseen_prompts(load_prompts(["a red star above a red circle", "two red stars"])) == both


def test_no_unseen_prompt_asks_for_objects_that_training_shows():
    shown = load_prompts("composition").held_out[0]  # held out by the named set, but not by this one
    first, second = parse_prompt(shown).kinds
    mirrored = f"a {second} and a {first}".replace("a orange", "an orange")
    trained = [shown, "a green circle", "a red star above a blue star"]
    unseen = unseen_prompts(PromptSet("mine", tuple(trained)))
    assert {parse_prompt(text).category for text in unseen} == {"composition", "colour", "location"}
    assert not pairs(trained) & pairs(unseen)
    assert mirrored in load_prompts("composition").held_out
    assert "a green circle" in load_prompts("colour").held_out
    assert len(unseen) == len(set(unseen))


def test_unseen_prompts_of_other_worlds():
    with pytest.raises(ValueError, match="cannot judge the prompt 'a dog'"):
        unseen_prompts(PromptSet("mine", ("a red star", "a dog")))
