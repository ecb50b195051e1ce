"""Who is asked about which pair, on which side each image is shown, and what becomes of the answers."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

from dpok_gym.choices.pairs import Pair
from dpok_gym.choices.records import Choice, Reason
from dpok_gym.choices.store import ChoiceStore
from dpok_gym.utils.validation import check_fraction

#: What a person can answer.
VERDICTS = ("left", "right", "tie", "both-bad", "skip")
#: A pair is repeated once its person has made so many further choices, or if nothing else is left to ask.
REPEAT_AFTER = 15
#: Seconds after which a pair that somebody has looked at, and not answered, may be shown to others.
HELD_FOR = 600


@dataclass(frozen=True)
class Question:
    """A pair as it is shown to a person.

    Attributes:
        id: that of the choice that answers it. It is the same after a restart, and another one after an undo.
        pair: the pair.
        left: 0 or 1, the image on the left.
        repeat_of: id of the person's earlier choice, which this one repeats with the sides swapped; None if it is new.
    """

    id: str
    pair: Pair
    left: Literal[0, 1]
    repeat_of: str | None


@dataclass(frozen=True)
class Progress:
    """How far a person is.

    Attributes:
        done: choices made, skipped ones included.
        left: choices to make; with several people at most so many, since they share the pairs.
        seconds: time used for the choices.
        seconds_left: an estimate for those that are left; None before the first choice.
    """

    done: int
    left: int
    seconds: float
    seconds_left: float | None


@dataclass
class _Made:
    """What one person has chosen, kept up to date so that no request looks through the file.

    Attributes:
        choices: theirs, in the order of the file.
        numbers: the pairs of these.
        to_repeat: number and choice of those that will be repeated, by the choice's id, in the order of the file.
        seconds: the times that are known.
    """

    choices: list[Choice] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)
    to_repeat: dict[str, tuple[int, Choice]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def add(self, number: int, choice: Choice, is_repeated: bool) -> None:
        self.choices.append(choice)
        self.numbers.add(number)
        if choice.milliseconds is not None:
            self.seconds.append(choice.milliseconds / 1000)
        if choice.repeat_of is not None:
            self.to_repeat.pop(choice.repeat_of, None)
        elif choice.id is not None and choice.reason != "skip" and is_repeated:
            self.to_repeat[choice.id] = number, choice


class Session:
    """People's choices between the pairs of a folder.

    A pair goes to one person, but a share of the pairs goes to everybody, to measure how well people agree. While one
    person looks at a pair, nobody else gets it. A share of a person's pairs is shown to them again, sides swapped.
    Everything but the time follows from the seed and the file of choices, so a restart changes nothing.

    Args:
        store: the file of choices.
        pairs: the pairs.
        seed: of the sides.
        repeats: share of the pairs that is repeated, in [0, 1].
        shared: share of the pairs that goes to everybody, in [0, 1].
        clock: the time in seconds, from any moment on.

    Raises:
        ValueError: if a share is out of range.
    """

    def __init__(
        self,
        store: ChoiceStore,
        pairs: Sequence[Pair],
        *,
        seed: int = 0,
        repeats: float = 0.1,
        shared: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.pairs = store, pairs
        self._seed, self._clock = seed, clock
        check_fraction("the share of repeats", repeats)
        check_fraction("the share of pairs for everybody", shared)
        self._is_repeated = [_is_every(number, repeats, 0.5) for number in range(len(pairs))]
        self._is_shared = [_is_every(number, shared, 0) for number in range(len(pairs))]
        self._number_of = {_key(pair): pair.number for pair in pairs}
        self._open: dict[str, tuple[Question, float]] = {}  # what each person looks at, and since when
        self._index()

    def question(self, who: str) -> Question | None:
        """Returns what a person is asked now, the same until it is answered; None if nothing is left."""
        if who not in self._open:
            question = next(self._candidates(who), None)
            if question is None:
                return None
            self._open[who] = question, self._clock()
        return self._open[who][0]

    def following(self, who: str) -> Question | None:
        """Returns what comes after the present question, unless others get it first; None if it is unknown."""
        present = self.question(who)
        return next((other for other in self._candidates(who) if other != present), None)

    def answer(self, who: str, number: int, question_id: str, verdict: str, milliseconds: int | None = None) -> bool:
        """Takes an answer; it is on the disk when this returns.

        Args:
            who: the person.
            number: the pair's.
            question_id: the question's.
            verdict: one of :data:`VERDICTS`.
            milliseconds: as the page measured them; they count only if the server has waited for as long.

        Returns:
            False if the question was answered already or is no longer asked. Nothing is written then.

        Raises:
            WriteError: if the file cannot be written.
            ValueError: if there is no such verdict.
        """
        if verdict not in VERDICTS:
            raise ValueError(f"there is no verdict {verdict!r}")
        question, shown = self._open.get(who, (None, None))
        if question is None:  # the server was started anew meanwhile
            question = next((asked for asked in self._candidates(who) if asked.pair.number == number), None)
        if question is None or question.id != question_id:
            return False
        waited = None if shown is None else round(1000 * (self._clock() - shown))
        if milliseconds is None or not 0 <= milliseconds <= (1000 * HELD_FOR if waited is None else waited):
            milliseconds = waited
        is_side = verdict in ("left", "right")
        side = question.left if verdict == "left" else 1 - question.left
        choice = Choice(
            question.pair.prompt,
            question.pair.images,
            cast(Literal[0, 1], side) if is_side else None,
            None if is_side else cast(Reason, verdict),
            who,
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            question.left,
            milliseconds,
            question.id,
            question.repeat_of,
            question.pair.sha256,
            question.pair.origins,
        )
        self.store.add(choice)
        self._note(choice)
        self._open.pop(who, None)
        return True

    def undo(self, who: str) -> bool:
        """Takes a person's last choice back, and asks the same again; False if there is none."""
        last = next((choice for choice in reversed(self._made[who].choices) if choice.id is not None), None)
        if last is None:
            return False
        self.store.undo(last)
        self._index()
        number = self._number_of[_key(last)]
        if number not in self._held(who):
            original = next((choice for choice in self._made[who].choices if choice.id == last.repeat_of), None)
            self._open[who] = self._question(who, number, original if last.repeat_of else None), self._clock()
        return True

    def progress(self, who: str) -> Progress:
        """Returns how far a person is."""
        made = self._made[who]
        # Of what is still new to the person, a share will be repeated.
        left = len(made.to_repeat) + sum(1 + self._is_repeated[number] for number in self._new(who))
        seconds_left = statistics.median(made.seconds) * left if made.seconds else None
        return Progress(len(made.choices), left, sum(made.seconds), seconds_left)

    def _index(self) -> None:
        """Looks through all choices. It is needed at the start and after an undo only."""
        self._made: defaultdict[str, _Made] = defaultdict(_Made)
        self._taken: set[int] = set()  # pairs that somebody has answered
        for choice in self.store.choices:
            self._note(choice)

    def _note(self, choice: Choice) -> None:
        number = self._number_of.get(_key(choice))
        if number is None:
            return  # a pair that is not in the folder any more
        if choice.who is not None:
            self._made[choice.who].add(number, choice, self._is_repeated[number])
        if choice.reason != "skip":
            self._taken.add(number)

    def _candidates(self, who: str) -> Iterator[Question]:
        """Yields what a person may be asked: repeats that are due, then new pairs, then repeats before their time."""
        made, held = self._made[who], self._held(who)
        repeats = [(number, choice) for number, choice in made.to_repeat.values() if number not in held]
        recent = {choice.id for choice in made.choices[-REPEAT_AFTER:]}
        for number, choice in repeats:
            if choice.id not in recent:
                yield self._question(who, number, choice)
        for number in self._new(who):
            if number not in held:
                yield self._question(who, number)
        for number, choice in repeats:
            if choice.id in recent:
                yield self._question(who, number, choice)

    def _new(self, who: str) -> Iterator[int]:
        """Yields the pairs that are left for a person and new to them, held ones included."""
        mine = self._made[who].numbers
        for number, is_shared in enumerate(self._is_shared):
            if number not in mine and (is_shared or number not in self._taken):
                yield number

    def _held(self, who: str) -> set[int]:
        """Returns the pairs that other people look at."""
        now = self._clock()
        return {
            question.pair.number
            for other, (question, shown) in self._open.items()
            if other != who and now - shown < HELD_FOR
        }

    def _question(self, who: str, number: int, original: Choice | None = None) -> Question:
        pair, repeat_of = self.pairs[number], original.id if original else None
        left = self._hash(who, *pair.sha256, "side")[-1] & 1
        if original is not None and original.left is not None:
            left = 1 - original.left
        attempt = 0
        while (name := self._hash(who, *pair.sha256, number, repeat_of, attempt).hex()[:20]) in self.store.ids:
            attempt += 1  # it was taken back
        return Question(name, pair, cast(Literal[0, 1], left), repeat_of)

    def _hash(self, *parts: object) -> bytes:
        return hashlib.sha256("\n".join(map(str, (self._seed, *parts))).encode()).digest()


def _key(item: Pair | Choice) -> tuple[str, tuple[Path, Path]]:
    return item.prompt, item.images


def _is_every(number: int, share: float, phase: float) -> bool:
    """Returns whether a pair belongs to a share of them, which is spread evenly."""
    return int((number + 1) * share + phase) > int(number * share + phase)
