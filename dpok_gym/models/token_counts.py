"""The lengths of many prompts in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import CLIPTokenizer

#: Prompts whose words are tokenized together: enough for the tokenizer's threads, and little memory.
_CHUNK = 10_000


def count_tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Iterator[int]:
    """Yields the number of tokens of each prompt, start and end included.

    No token of CLIP reaches across a space, so each distinct word is tokenized once: a million prompts take seconds.

    Args:
        tokenizer: a tokenizer of this kind.
        prompts: N texts.
    """
    n_special = tokenizer.num_special_tokens_to_add()
    known: dict[str, int] = {}
    for first in range(0, len(prompts), _CHUNK):
        chunk = [prompt.split(" ") for prompt in prompts[first : first + _CHUNK]]
        new = sorted({word for words in chunk for word in words}.difference(known))
        if new:
            ids = tokenizer(new, add_special_tokens=False)["input_ids"]
            known |= zip(new, map(len, ids), strict=True)
        for words in chunk:
            yield n_special + sum(map(known.__getitem__, words))
