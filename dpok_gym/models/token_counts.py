"""The lengths of many prompts in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import CLIPTokenizer

#: Words that are tokenized together: enough for the tokenizer's threads, and little memory.
_CHUNK = 10_000


def count_tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Iterator[int]:
    """Yields the number of tokens of each prompt, start and end included.

    No token of CLIP reaches across a space, so each distinct word is tokenized once: a million prompts take seconds.

    Args:
        tokenizer: a tokenizer of this kind.
        prompts: N texts.
    """
    words: set[str] = set()
    for prompt in prompts:
        words.update(prompt.split(" "))
    distinct, lengths = list(words), dict[str, int]()
    for first in range(0, len(distinct), _CHUNK):
        chunk = distinct[first : first + _CHUNK]
        lengths |= zip(chunk, map(len, tokenizer(chunk, add_special_tokens=False)["input_ids"]), strict=True)
    n_special = tokenizer.num_special_tokens_to_add()
    for prompt in prompts:
        yield n_special + sum(map(lengths.__getitem__, prompt.split(" ")))
