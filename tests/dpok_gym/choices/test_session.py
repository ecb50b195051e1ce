"""Who is asked what: repeats, several people, undo, restarts, and what the file then holds."""

import pytest

from dpok_gym.choices.records import read_choices
from dpok_gym.choices.session import HELD_FOR, REPEAT_AFTER
from dpok_gym.choices.store import ChoiceStore
from dpok_gym.utils.files import WriteError
from tests.dpok_gym.choices.support import Clock, answer, make_pairs, make_session


def ask_all(session, who, verdict="left"):
    """Answers until nothing is left."""
    asked = []
    while (question := answer(session, who, verdict)) is not None:
        asked.append(question)
    return asked


def test_a_round_asks_for_each_pair_once_and_for_a_tenth_again_with_the_sides_swapped(tmp_path):
    make_pairs(tmp_path, 60)
    session = make_session(tmp_path)
    asked = ask_all(session, "ada")
    new = [question for question in asked if question.repeat_of is None]
    repeats = [question for question in asked if question.repeat_of is not None]
    assert sorted(question.pair.number for question in new) == list(range(60))
    assert len(repeats) == 6
    places = {question.id: place for place, question in enumerate(asked)}
    for question in repeats:
        assert question.repeat_of is not None
        original = asked[places[question.repeat_of]]
        assert (question.pair, question.left) == (original.pair, 1 - original.left)
        distance = places[question.id] - places[original.id]
        assert distance > REPEAT_AFTER or places[question.id] >= 60  # at the end there is nothing else to ask
    assert 15 < sum(question.left for question in new) < 45
    choices = read_choices(session.store.path)
    assert [choice.id for choice in choices] == [question.id for question in asked]
    assert [choice.preferred for choice in choices] == [question.left for question in asked]
    assert sum(choice.repeat_of is not None for choice in choices) == 6


@pytest.mark.parametrize(
    ("verdict", "reason"), [("left", None), ("right", None), ("tie", "tie"), ("both-bad", "both-bad"), ("skip", "skip")]
)
def test_the_file_has_all_of_a_choice(tmp_path, verdict, reason):
    (pair,) = make_pairs(tmp_path, 1, sources=(None, "runs/mine"))
    clock = Clock()
    session = make_session(tmp_path, clock=clock)
    question = session.question("ada")
    clock.now = 2.5
    assert session.answer("ada", 0, question.id, verdict)
    (choice,) = read_choices(tmp_path / "choices.jsonl")
    side = {"left": question.left, "right": 1 - question.left}.get(verdict)
    assert (choice.prompt, choice.images, choice.sha256) == (pair.prompt, pair.images, pair.sha256)
    assert (choice.preferred, choice.reason) == (side, reason)
    assert (choice.who, choice.left, choice.milliseconds) == ("ada", question.left, 2500)
    assert choice.origins is not None
    assert [origin["run"] for origin in choice.origins] == [None, "runs/mine"]
    assert choice.when is not None
    assert choice.when.endswith("+00:00")


def test_the_pages_time_counts_if_it_can_be_true(tmp_path):
    make_pairs(tmp_path, 3)
    clock = Clock()
    session = make_session(tmp_path, clock=clock)
    for measured, expected in ((1200, 1200), (10**8, 2000), (None, 2000)):
        question = session.question("ada")
        clock.now += 2
        session.answer("ada", question.pair.number, question.id, "tie", measured)
        assert session.store.choices[-1].milliseconds == expected


def test_two_people_get_different_pairs_but_for_those_that_everybody_gets(tmp_path):
    make_pairs(tmp_path, 40)
    session = make_session(tmp_path, repeats=0, shared=0.1)
    of: dict[str, list[int]] = {"ada": [], "bob": []}
    for _ in range(40):
        looks_at = [session.question(who) for who in of]
        numbers = [question.pair.number for question in looks_at if question is not None]
        assert len(set(numbers)) == len(numbers)
        for who, asked in of.items():
            question = answer(session, who)
            asked += [] if question is None else [question.pair.number]
    assert set(of["ada"]) | set(of["bob"]) == set(range(40))
    assert sorted(set(of["ada"]) & set(of["bob"])) == [9, 19, 29, 39]
    assert abs(len(of["ada"]) - len(of["bob"])) <= 1


def test_a_pair_that_nobody_answers_goes_to_others_after_a_while(tmp_path):
    make_pairs(tmp_path, 1)
    clock = Clock()
    session = make_session(tmp_path, clock=clock)
    of_ada = session.question("ada")
    assert session.question("bob") is None
    assert session.progress("bob").left == 1
    clock.now = HELD_FOR
    assert session.question("bob").pair == of_ada.pair
    assert session.answer("ada", 0, of_ada.id, "left")  # she comes back, and her answer counts too


def test_a_skipped_pair_goes_to_another_person(tmp_path):
    make_pairs(tmp_path, 2)
    session = make_session(tmp_path, repeats=1)
    assert len(ask_all(session, "ada", "skip")) == 2  # what was skipped is not repeated
    assert [question.pair.number for question in ask_all(session, "bob", "tie")][:2] == [0, 1]


def test_an_answer_counts_once(tmp_path):
    make_pairs(tmp_path, 3)
    session = make_session(tmp_path)
    old = answer(session, "ada")
    assert not session.answer("ada", old.pair.number, old.id, "right")  # a double click
    current = session.question("ada")
    assert not session.answer("ada", current.pair.number, old.id, "right")
    assert not session.answer("bob", current.pair.number, current.id, "right")
    assert not session.answer("ada", 99, "x", "right")
    with pytest.raises(ValueError, match="no verdict 'best'"):
        session.answer("ada", current.pair.number, current.id, "best")
    assert len(session.store.choices) == 1
    assert session.question("ada") == current


def test_undo_asks_the_same_again(tmp_path):
    make_pairs(tmp_path, 4)
    session = make_session(tmp_path)
    assert not session.undo("ada")
    first, second = answer(session, "ada"), answer(session, "ada")
    answer(session, "bob")
    assert session.undo("ada")
    again = session.question("ada")
    assert (again.pair, again.left) == (second.pair, second.left)
    assert again.id != second.id
    assert not session.answer("ada", second.pair.number, second.id, "left")  # from an old tab
    assert session.undo("ada")
    assert session.question("ada").pair == first.pair
    assert not session.undo("ada")
    assert {choice.who for choice in read_choices(session.store.path)} == {"bob"}
    assert answer(session, "ada", "right").pair == first.pair
    assert len(read_choices(session.store.path)) == 2


def test_undo_of_a_repeat_asks_for_the_repeat(tmp_path):
    make_pairs(tmp_path, 1)
    session = make_session(tmp_path, repeats=1)
    original, repeat = answer(session, "ada"), answer(session, "ada")
    session.undo("ada")
    again = session.question("ada")
    assert (again.repeat_of, again.left) == (original.id, repeat.left)


def test_a_restart_changes_nothing(tmp_path):
    make_pairs(tmp_path, 30)
    session, others = make_session(tmp_path), []
    for k in range(20):
        others.append(answer(session, "ada", "tie"))
        if k % 7 == 3:
            session.undo("ada")
    shown = session.question("ada")
    session.store.close()
    restarted = make_session(tmp_path)
    assert restarted.question("ada") == shown
    restarted = make_session(tmp_path)
    assert restarted.answer("ada", shown.pair.number, shown.id, "left", 700)  # the page was open meanwhile
    assert restarted.store.choices[-1].milliseconds == 700
    assert not restarted.answer("ada", shown.pair.number, shown.id, "left")
    assert restarted.progress("ada").done == session.progress("ada").done + 1


def test_progress(tmp_path):
    make_pairs(tmp_path, 20)
    clock = Clock()
    session = make_session(tmp_path, clock=clock)
    assert session.progress("ada") == (progress := session.progress("ada"))
    assert (progress.done, progress.left, progress.seconds_left) == (0, 22, None)
    for seconds in (2, 3, 100):
        session.question("ada")
        clock.now += seconds
        answer(session, "ada")
    progress = session.progress("ada")
    assert (progress.done, progress.left, progress.seconds, progress.seconds_left) == (3, 19, 105, 57)
    for left in range(19, 0, -1):
        assert session.progress("ada").left == left
        answer(session, "ada")
    assert session.question("ada") is None
    assert session.progress("ada").left == 0


@pytest.mark.parametrize("name", ["repeats", "shared"])
def test_shares_are_checked(tmp_path, name):
    make_pairs(tmp_path, 1)
    with pytest.raises(ValueError, match="must lie in"):
        make_session(tmp_path, **{name: 1.5})


# ------------------------------------------------------------------------------------------------------------- the file


def test_what_a_kill_left_of_a_line_is_removed(tmp_path):
    make_pairs(tmp_path, 3)
    session = make_session(tmp_path)
    kept = answer(session, "ada")
    path = session.store.path
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    session = make_session(tmp_path)
    assert path.read_bytes() == whole
    answer(session, "ada")
    assert read_choices(path)[0].id == kept.id
    path.write_bytes(whole[:-1])  # whole but for the line break
    make_session(tmp_path)
    assert path.read_bytes() == whole


def test_an_answer_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    make_pairs(tmp_path, 2)
    session = make_session(tmp_path)
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(session.store.path.read_text().count("\n")))
    answer(session, "ada")
    assert synced == [1]


def test_a_full_disk_loses_nothing_that_was_there(tmp_path, monkeypatch):
    make_pairs(tmp_path, 2)
    session = make_session(tmp_path)
    answer(session, "ada")
    before = session.store.path.read_bytes()
    question = session.question("ada")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(WriteError, match=r"choices.jsonl cannot be written: No space left on device"):
            session.answer("ada", question.pair.number, question.id, "left")
    assert session.store.path.read_bytes() == before
    assert session.question("ada") == question  # and it is asked again
    answer(session, "ada")
    assert len(read_choices(session.store.path)) == 2


def test_lines_of_others_are_kept(tmp_path):
    """Such as those that were imported, which have no id, and are of other images."""
    pairs = make_pairs(tmp_path, 2)
    path = tmp_path / "choices.jsonl"
    path.write_text('{"prompt": "x", "images": ["images/0a.png", "images/1b.png"], "preferred": 0}\n')
    session = make_session(tmp_path, repeats=0)
    assert [question.pair for question in ask_all(session, "ada")] == pairs
    assert len(ChoiceStore(path).choices) == 3


def test_a_request_does_not_look_through_all_choices(tmp_path):
    class Unread(list):
        def __iter__(self):
            raise AssertionError("a request looks through the file of choices")

    make_pairs(tmp_path, 4)
    session = make_session(tmp_path)
    answer(session, "ada")
    session.store.choices = Unread(session.store.choices)
    answer(session, "ada")
    assert session.following("ada") is not None
    assert session.progress("ada").done == 2
