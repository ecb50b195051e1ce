"""What every model has from the base class: the memory of encoded prompts, options, and defaults."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpok_gym.models import TextToImageModel
from dpok_gym.models.conditioning_cache import ConditioningCache

#: Bytes of one prompt's conditioning in the model below: five float32 and one int64.
BYTES = 5 * 4 + 8


class Counting(TextToImageModel):
    """A model that notes which prompts it was asked to encode."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "counting"
        self.device = torch.device("cpu")
        self.batches: list[list[str]] = []
        self.checked: list[list[str]] = []

    def find_unreadable(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        self.checked.append(list(prompts))
        for index, prompt in enumerate(prompts):
            if prompt.startswith("unreadable"):
                yield index, f"the prompt {prompt!r} cannot be read"

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.batches.append(list(prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return {"values": lengths[:, None] + torch.arange(5.0), "length": lengths}

    def text_features(self, conditioning: dict[str, Tensor]) -> Tensor:
        return conditioning["values"]

    def predict(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@pytest.fixture
def model() -> Counting:
    return Counting()


def test_each_distinct_prompt_is_encoded_once(model: Counting) -> None:
    conditioning = model.encode(["a", "bbb", "a", "cc"])
    assert model.batches == [["a"], ["bbb"], ["cc"]]
    assert conditioning["length"].tolist() == [1, 3, 1, 2]
    assert conditioning["values"].tolist() == [[n + i for i in range(5)] for n in (1, 3, 1, 2)]
    again = model.encode(["cc", "dddd", "a"])
    assert again["length"].tolist() == [2, 4, 1]
    assert model.batches == [["a"], ["bbb"], ["cc"], ["dddd"]]
    assert model.encode(("bbb",))["values"].shape == (1, 5)
    assert len(model.batches) == 4


def test_the_memory_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpok_gym.models.base.CONDITIONING_CACHE_BYTES", 2 * BYTES + 3)
    monkeypatch.setattr("dpok_gym.models.base.MIN_PROMPTS_KEPT", 1)
    model = Counting()
    for prompts, encoded in (
        (["a"], ["a"]),
        (["a", "a"], []),
        (["bb", "a", "bb", "a"], ["bb"]),
        (["ccc", "ccc", "a"], ["ccc"]),  # there is room for two: "bb" was used least recently
        (["ccc", "a"], []),
        (["bb"], ["bb"]),
        (["a", "bb"], []),  # "ccc" had to go
        (["ccc", "bb", "a"], ["ccc"]),  # more at a time than are kept
    ):
        model.batches.clear()
        lengths = model.encode(prompts)["length"].tolist()
        assert lengths == [len(prompt) for prompt in prompts]
        assert model.batches == ([encoded] if encoded else []), prompts
        assert model._conditioning.num_bytes <= 2 * BYTES + 3


def test_cache_counts_its_bytes() -> None:
    cache = ConditioningCache(100)
    for size in (10, 8, 4):
        cache.add(f"prompt {size}", {"values": torch.zeros(size)})
    assert (cache.num_bytes, len(cache)) == (4 * (10 + 8 + 4), 3)
    assert cache.get("prompt 10") is not None
    cache.add("new", {"values": torch.zeros(8, dtype=torch.float64)})  # 64 bytes: the 32 and 16 of two others go
    assert [name in cache for name in ("prompt 10", "prompt 8", "prompt 4", "new")] == [False, False, False, True]
    assert cache.num_bytes == 64
    cache.add("huge", {"values": torch.zeros(26)})
    assert (cache.num_bytes, len(cache)) == (0, 0)
    assert cache.get("huge") is None
    cache.add("small", {"values": torch.zeros(1)})
    cache.clear()
    assert (cache.num_bytes, len(cache)) == (0, 0)


def test_some_prompts_are_kept_whatever_they_take() -> None:
    cache = ConditioningCache(100, min_entries=2)
    for name in ("first", "second", "third"):
        cache.add(name, {"values": torch.zeros(50)})
    assert [name in cache for name in ("first", "second", "third")] == [False, True, True]
    assert cache.num_bytes == 2 * 4 * 50


def test_encoding_is_the_callers_own(model: Counting) -> None:
    first = model.encode(["a", "bb"])
    kept = {name: values.clone() for name, values in first.items()}
    for values in first.values():
        values.zero_()
    again = model.encode(["a", "bb"])
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    assert len(model.batches) == 2


def test_what_is_kept_is_no_view_of_a_batch(model: Counting) -> None:
    """A view would keep the whole batch in memory, and the bound would count one row of it."""
    model.encode(["a", "bb", "ccc"])
    kept = model._conditioning.get("bb")
    assert kept is not None
    assert kept["values"].untyped_storage().nbytes() == 5 * 4


def test_encoding_does_not_depend_on_the_callers_mode(model: Counting) -> None:
    with torch.inference_mode():
        conditioning = model.encode(["a"])
        assert not model._conditioning.get("a")["values"].is_inference()  # type: ignore[index]
    assert conditioning["values"].dtype == torch.float32
    weight = torch.ones(5, requires_grad=True)
    (model.encode(["a"])["values"] * weight).sum().backward()  # with an inference tensor, this is an error
    assert weight.grad is not None


def test_prompts_are_checked_before_they_are_encoded(model: Counting) -> None:
    with pytest.raises(ValueError, match="the prompt 'unreadable' cannot be read"):
        model.encode(["a", "unreadable"])
    assert model.batches == []
    model.encode(["a"])
    model.checked.clear()
    model.encode(["a", "b"])
    assert model.checked == [["b"]]  # what is kept has been checked


@pytest.mark.parametrize("prompts", [[], "a dog", ()])
def test_encode_takes_a_list(model: Counting, prompts: Any) -> None:
    with pytest.raises(ValueError, match="encode takes a list of at least one prompt"):
        model.encode(prompts)


def test_defaults_of_a_small_model(model: Counting) -> None:
    assert [model.num_forward_passes(scale) for scale in (1, 1.0, 0.0, 7.5)] == [1, 1, 2, 2]
    assert (model.options, model.lora_layers, model.lora_prefix) == ({}, {}, "")
    model.offload_text_encoder()
    assert model.configured(None, None) is model
    assert model.with_options() is model
    for options in ({"image_size": 8}, {"negative_prompt": ""}):
        with pytest.raises(ValueError, match="'counting' draws images of one size, without a negative prompt"):
            model.with_options(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'counting' has no encoder for images"):
        model.encode_images(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="no pipeline for the model 'counting'"):
        model.to_pipeline(nn.Linear(1, 1))
