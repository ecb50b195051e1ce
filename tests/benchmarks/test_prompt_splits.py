"""Prompts to train on, and those that the training never shows."""

from benchmarks.prompt_splits import paraphrase, prompt_splits, prompts_of
from dpok_gym.shapes.captions import CATEGORIES, parse_prompt


def objects_of(text: str) -> tuple[frozenset, int]:
    request = parse_prompt(text)
    return frozenset(request.kinds), len(request.kinds)


def test_the_kinds_of_prompts() -> None:
    splits = prompt_splits()
    assert {name: len(texts) for name, texts in splits.items()} == {
        "training": 120,
        "objects": 40,
        "category": 40,
        "paraphrases": 43,
    }
    categories = {name: {parse_prompt(text).category for text in texts} for name, texts in splits.items()}
    assert categories["training"] == categories["objects"] == {*CATEGORIES} - {"location"}
    assert categories["category"] == {"location"}
    texts = [text for name in splits for text in splits[name]]
    assert len({*texts}) == len(texts)  # nothing is in two of them


def test_the_training_shows_no_held_out_object() -> None:
    shown = {objects_of(text) for text in prompt_splits()["training"]}
    for name in ("objects", "category"):
        assert shown.isdisjoint(objects_of(text) for text in prompt_splits()[name])
    assert {objects_of(text) for text in prompt_splits()["paraphrases"]} <= shown


def test_a_paraphrase_asks_for_the_same() -> None:
    assert paraphrase("a red star and a blue square") == "a blue square and a red star"
    assert prompts_of("paraphrases").held_out == ()
