import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from dpok_gym.prompts import SHAPES_CATEGORIES, PromptSet, list_prompt_sets, load_prompts
from dpok_gym.shapes import captions
from dpok_gym.shapes.captions import NUMBERS, RELATIONS, all_requests, parse_prompt
from dpok_gym.shapes.scenes import COLOURS, SHAPES


def test_sample_is_uniform_over_train_and_reproducible():
    prompts = PromptSet("pets", ("a cat", "a dog", "a fish"), ("a bird",))
    draws = prompts.sample(np.random.default_rng(0), 3000)
    assert draws == prompts.sample(np.random.default_rng(0), 3000)
    counts = Counter(draws)
    assert set(counts) == {"a cat", "a dog", "a fish"}
    assert all(900 < count < 1100 for count in counts.values())  # 1000 +- 26 (one standard deviation)


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
    ],
)
def test_load_errors(spec, error, message):
    with pytest.raises(error, match=message):
        load_prompts(spec)


def test_files(tmp_path):
    path = tmp_path / "prompts.list"
    path.write_bytes("\ufeff# animals\r\na cat\r\n\r\n  ein Löwe #1  \n#a dog\na bird".encode())
    for spec in (path, str(path)):
        assert load_prompts(spec) == PromptSet(str(path), ("a cat", "ein Löwe #1", "a bird"))


def test_a_named_set_wins_over_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colour").write_text("a cat\n")
    assert load_prompts("colour").name == "colour"
    assert load_prompts("./colour").train == ("a cat",)


def test_bad_files(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("# nothing\n\n")
    binary.write_bytes(b"a c\xff\xfet")
    with pytest.raises(ValueError, match=r"no prompt in the file '.*empty\.txt'"):
        load_prompts(empty)
    with pytest.raises(ValueError, match=r"'.*binary\.txt' is not UTF-8"):
        load_prompts(str(binary))
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        load_prompts(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        load_prompts(tmp_path)


WEIGHTED = (("a cat", 3.0), ("a dog, asleep", 1.0))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bench.json", '{"a cat": {"category": "pets", "weight": 3}, "a dog, asleep": {"category": "pets"}}'),
        ("list.json", '[{"caption": "a cat", "weight": 3}, "a dog, asleep"]'),
        ("lines.jsonl", '{"text": "a cat", "weight": "3"}\n\n{"text": "a dog, asleep"}\n'),
        ("null.jsonl", '{"text": "a cat", "weight": 3}\n{"text": "a dog, asleep", "weight": null}\n'),
        ("table.csv", 'id,Prompt,weight\n1,a cat,3\n2,"a dog, asleep",1\n'),
        ("blank.csv", 'prompt,weight\na cat,3\n"a dog, asleep",\n'),
        ("short.csv", 'prompt,weight\na cat,3\n"a dog, asleep"\n'),
        ("table.TSV", "\ufeffweight\tcaption\r\n3\ta cat\r\n1\ta dog, asleep\r\n"),
    ],
)
def test_formats(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    prompts = load_prompts(str(path))
    assert tuple(zip(prompts.train, prompts.weights, strict=True)) == WEIGHTED
    counts = Counter(prompts.sample(np.random.default_rng(0), 4000))
    assert 2900 < counts["a cat"] < 3100  # 3000 +- 27 (one standard deviation)
    assert counts.total() == 4000


def test_equal_weights_are_none(tmp_path):
    path = tmp_path / "drawbench.json"
    path.write_text('{"a cat": {"category": "pets"}, "a dog": {"category": "pets"}}')
    assert load_prompts(path) == PromptSet(str(path), ("a cat", "a dog"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read as JSON: Expecting"),
        ("a.json", "3", "neither an object with the prompts as its keys nor a list"),
        ("a.json", "{}", "there is no prompt in the file"),
        ("a.json", "[3]", r"prompt 0 of .* must be a text that is not blank, not 3"),
        ("a.json", '{"a cat": {"weight": "much"}}', "the weight of the prompt 'a cat' must be a number, not 'much'"),
        (
            "a.json",
            '{"a cat": {"weight": -1}, "a dog": {}}',
            "must be 2 finite numbers, one for each prompt, none negat",
        ),
        ("a.jsonl", '"a cat"', "each line must be an object, such as"),
        ("a.jsonl", '{"prompt": "a cat"}\n{"promt": "a dog"}', "none of the fields 'promt' is named 'prompt', 'text'"),
        ("a.csv", "id,words\n1,a cat\n", "none of the fields 'id', 'words' is named"),
        ("a.csv", "prompt\n", "there is no prompt in the file"),
        ("a.csv", "prompt,weight\na cat,?\n", "the weight of the prompt 'a cat' must be a number, not '?'"),
        ("a.json", '{"prompts": ["a cat", "a dog"]}', "the prompt 'prompts' must have an object of fields"),
        ("a.json", '{"a cat": 3}', "the prompt 'a cat' must have an object of fields, such as {}, not 3"),
    ],
)
def test_files_that_are_not_of_their_format(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no file of prompts at"):
        load_prompts(f"elsewhere/{name}")


@pytest.mark.parametrize("weights", [(1.0,), (1.0, float("nan")), (0.0, 0.0), (2.0, -1.0)])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="the weights of 'pets' must be 2 finite numbers"):
        PromptSet("pets", ("a cat", "a dog"), weights=weights)


def test_large_file(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"a picture of {n} cats" for n in range(100_000)))
    prompts = load_prompts(path)
    assert len(prompts.train) == 100_000
    assert prompts.train[-1] == "a picture of 99999 cats"


@pytest.mark.parametrize("name", list_prompt_sets())
def test_named_sets(name):
    prompts = load_prompts(name)
    assert prompts.name == name
    assert prompts == load_prompts(name)
    assert prompts.held_out
    assert len(set(prompts.train)) == len(prompts.train)
    assert not set(prompts.train) & set(prompts.held_out)


@pytest.mark.parametrize("name", [*SHAPES_CATEGORIES, "shapes"])
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
    assert SHAPES_CATEGORIES == captions.CATEGORIES

    def pairs(texts):
        return {frozenset(parse_prompt(text).kinds) for text in texts}

    sets = {category: load_prompts(category) for category in SHAPES_CATEGORIES}
    for category, prompts in sets.items():
        texts = [str(request) for request in all_requests(category)]
        assert sorted(prompts.train + prompts.held_out) == sorted(texts)
        assert len(prompts.held_out) / len(texts) == pytest.approx(0.2, abs=0.01)
    # Said the other way round it is not unseen, and what composition has not seen, location has not.
    for seen in ("composition", "location"):
        for unseen in ("composition", "location"):
            assert not pairs(sets[seen].train) & pairs(sets[unseen].held_out)


def test_shapes_is_balanced_and_keeps_the_split():
    prompts = load_prompts("shapes")
    for texts, each in ((prompts.train, 19), (prompts.held_out, 5)):
        assert Counter(parse_prompt(text).category for text in texts) == dict.fromkeys(SHAPES_CATEGORIES, each)
    for category in SHAPES_CATEGORIES:
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


def test_dpok():
    assert load_prompts("dpok-colour") == PromptSet(
        "dpok-colour", ("A green colored rabbit.",), ("A green colored cat.",)
    )
    together = load_prompts("dpok")
    each = [load_prompts(f"dpok-{category}") for category in SHAPES_CATEGORIES]
    assert together.train == tuple(prompts.train[0] for prompts in each)
    assert together.held_out == tuple(prompts.held_out[0] for prompts in each)


def test_import_is_light():
    code = "import sys, dpok_gym.prompts; assert not {'diffusers', 'transformers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
