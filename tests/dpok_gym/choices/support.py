"""What the tests of choosing share: a folder of pairs, and sessions on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from dpok_gym.choices.pairs import IMAGES, Pair, begin, hash_file, read_pairs, write_pairs
from dpok_gym.choices.session import Question, Session
from dpok_gym.choices.store import ChoiceStore


class Clock:
    """A time that only the test moves on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_pairs(folder: Path, n: int, prompt: str = "a red star", sources: tuple[Any, Any] = (None, None)) -> list[Pair]:
    """Writes ``n`` pairs of small images; ``sources`` are the runs that the two images of each are from."""
    settings = {"seed": 0}
    begin(folder, settings)
    pairs = []
    for k in range(n):
        images = (folder / IMAGES / f"{k}a.png", folder / IMAGES / f"{k}b.png")
        for side, image in enumerate(images):
            Image.new("RGB", (8, 8), (k % 256, 40 * side, k // 256)).save(image)
        first, second = ({"model": "shapes", "run": run, "seed": k, "step": 0} for run in sources)
        pairs.append(Pair(k, prompt, images, (hash_file(images[0]), hash_file(images[1])), (first, second)))
    write_pairs(folder, settings, pairs)
    return pairs


def make_session(folder: Path, **settings: Any) -> Session:
    """Opens the folder as ``dpok label`` does when it starts."""
    return Session(ChoiceStore(folder / "choices.jsonl"), read_pairs(folder), **settings)


def answer(session: Session, who: str, verdict: str = "left") -> Question | None:
    """Answers what a person is asked; returns the question, None if nothing is left."""
    question = session.question(who)
    if question is not None:
        assert session.answer(who, question.pair.number, question.id, verdict)
    return question
