"""The formats of prompt files."""

from collections import Counter

import numpy as np
import pytest

from dpok_gym.prompts import PromptSet, load_prompts


def test_files(tmp_path):
    path = tmp_path / "prompts.list"
    path.write_bytes("\ufeff# animals\r\na cat\r\n\r\n  ein Löwe #1  \n#a dog\na bird".encode())
    for spec in (path, str(path)):
        assert load_prompts(spec) == PromptSet(str(path), ("a cat", "ein Löwe #1", "a bird"))


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
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="is a folder, and not a file of prompts"):
            load_prompts(folder)


WEIGHTED = (("a cat", 3.0), ("a dog, asleep", 1.0))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bench.json", '{"a cat": {"category": "pets", "weight": 3}, "a dog, asleep": {"category": "pets"}}'),
        ("upper.json", '{"a cat": {"Weight": 3}, "a dog, asleep": {}}'),
        ("list.json", '[{"caption": "a cat", "weight": 3}, "a dog, asleep"]'),
        ("lines.jsonl", '{"text": "a cat", "weight": "3"}\n\n{"text": "a dog, asleep"}\n'),
        ("null.jsonl", '{"text": "a cat", "weight": 3}\n{"text": "a dog, asleep", "weight": null}\n'),
        ("table.csv", 'id,Prompt,weight\n1,a cat,3\n2,"a dog, asleep",1\n'),
        ("blank.csv", 'prompt,weight\na cat,3\n"a dog, asleep",\n'),
        ("short.csv", 'prompt,weight\na cat,3\n"a dog, asleep"\n'),
        ("drawbench.csv", 'Prompts,Category,Weight\na cat,Pets,3\n"a dog, asleep",Pets,1\n'),
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


def test_tsv_has_no_quotation_marks(tmp_path):
    """PartiPrompts: 1,632 prompts, one of which begins with a quoted word."""
    texts = [f"prompt number {n}" for n in range(1632)]
    texts[850] = '"G I G G L E" painted in letters'
    texts[851] = 'a sign that says "Start", in "red'
    rows = ["Prompt\tCategory\tChallenge\tNote", *(f"{text}\tAbstract\tBasic\t" for text in texts)]
    (tmp_path / "PartiPrompts.tsv").write_text("\n".join(rows) + "\n")
    prompts = load_prompts(tmp_path / "PartiPrompts.tsv")
    assert prompts.train == tuple(texts)
    assert prompts.lines == tuple(range(2, 1634))


def test_commas_of_an_only_column(tmp_path):
    lines = ["Prompt", "a cat, asleep", '"a dog, awake"', 'a sign, "stop"d', '"two\nlines, ""red"""', "", "a fish"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    prompts = load_prompts(tmp_path / "a.csv")
    assert prompts.train == ("a cat, asleep", "a dog, awake", 'a sign, "stop"d', 'two\nlines, "red"', "a fish")
    assert prompts.lines == (2, 3, 4, 5, 8)


def test_separators_that_are_no_new_line(tmp_path):
    for name in ("a.csv", "a.tsv", "a.txt"):
        (tmp_path / name).write_text("prompt\na cat\u2028asleep\x0b\na dog\n", encoding="utf-8")
        assert load_prompts(tmp_path / name).train[-2:] == ("a cat\u2028asleep" + "\x0b" * (name != "a.txt"), "a dog")


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
        ("a.jsonl", '{"prompt": "a cat"}\n\n{', "line 3: Expecting property name"),
        ("a.csv", 'prompt\na cat\n"a dog\n', "line 3: unexpected end of data; a cell with commas or"),
        ("a.csv", 'prompt\n"Stop" says, a sign\n', "line 2: ',' expected after '\"'"),
        (
            "a.csv",
            'prompt\na cat\n"a dog", asleep\n',
            "line 3 has 2 cells, and the header has 1; write quotation marks",
        ),
        ("a.csv", "id,prompt\n\n1,a cat\n2,a dog, asleep\n", "line 4 has 3 cells, and the header has 2"),
        ("a.csv", "Prompt;Category\na cat;animals\n", "line 1: its cells are separated by semicolons"),
        ("a.tsv", "prompt\tid\na cat\t1\ta\n", "line 2 has 3 cells, and the header has 2; cells are separated by tabs"),
        (
            "a.tsv",
            "id\tprompt\n1\ta cat\n2\n",
            r"must be a text that is not blank, not None \(1 of 2 are wrong, in line 3",
        ),
        (
            "a.parquet",
            "PAR1",
            r"is of a format that is not read; save it as a .jsonl, .csv or .txt, such as with pandas",
        ),
        ("a.jsonl", '"a cat"', "line 1: each line must be an object, such as"),
        (
            "a.jsonl",
            '{"prompt": "a cat"}\n{"promt": "a dog"}',
            "none of the fields 'promt' is named 'prompt', 'prompts'",
        ),
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


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.txt", "# animals\na cat\n\na dog\n", (2, 4)),
        ("a.jsonl", '\n{"text": "a cat"}\n{"text": "a dog"}', (2, 3)),
        ("a.csv", "prompt\na cat\na dog\n", (2, 3)),
        ("a.json", '["a cat", "a dog"]', ()),
    ],
)
def test_lines_are_known(tmp_path, name, content, lines):
    (tmp_path / name).write_text(content)
    assert load_prompts(tmp_path / name).lines == lines


def test_a_blank_prompt_is_found_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(['{"text": "a cat"}', '{"text": " "}', "", '{"text": ""}']))
    with pytest.raises(
        ValueError, match=r"must be a text that is not blank, not ' ' \(2 of 3 are wrong, in line 2, 4\)"
    ):
        load_prompts(path)


def test_large_file(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"a picture of {n} cats" for n in range(100_000)))
    prompts = load_prompts(path)
    assert len(prompts.train) == 100_000
    assert prompts.train[-1] == "a picture of 99999 cats"
