"""One token that attention counts many times, against diffusers' own attention with as many tokens."""

import copy
import logging
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from dpok_gym.models.repeated_token import RepeatedTokenProcessor, give_processor

REPEATS = 256
#: Of version 3.0, and of version 3.5: normalised queries and keys, and a layer with a second attention.
SETTINGS: dict[str, dict[str, Any]] = {
    "3.0": {},
    "3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}


def make_transformer(**settings: Any) -> Any:
    network = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
        **settings,
    )
    return network.eval()


def inputs(n_tokens: int = 5) -> list[Tensor]:
    """Returns latents, the text with one row of zeros at its end, pooled features and timesteps."""
    text = torch.cat([torch.randn(2, n_tokens, 16), torch.zeros(2, 1, 16)], dim=1)
    return [torch.randn(2, 4, 4, 4), text, torch.randn(2, 8), torch.tensor([900.0, 20.0])]


def with_rows(given: list[Tensor]) -> list[Tensor]:
    latents, text, pooled, timesteps = given
    return [latents, torch.cat([text[:, :-1], text[:, -1:].expand(-1, REPEATS, -1)], dim=1), pooled, timesteps]


def run(network: Any, given: list[Tensor], **attention_kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    """Returns the output, and the gradients of a function of it by all weights."""
    network.zero_grad()
    output = network(*given, joint_attention_kwargs=attention_kwargs or None).sample
    output.square().mean().backward()
    return output.detach(), [value.grad.clone() for value in network.parameters() if value.grad is not None]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_counts_as_many_rows(settings: dict[str, Any], checkpointing: bool, caplog: Any) -> None:
    plain = make_transformer(**settings)
    counting = copy.deepcopy(plain)
    assert give_processor(counting)
    if checkpointing:
        counting.enable_gradient_checkpointing()
    given = inputs()
    expected, gradients = run(plain, with_rows(given))
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        output, ours = run(counting, given, num_repeats=REPEATS)
    assert not caplog.messages  # diffusers warns of arguments that a layer does not know
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert len(ours) == len(gradients) == len(list(plain.parameters()))
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(counting, given)[0], expected, atol=1e-3)  # once is not 256 times


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_without_repeats_it_is_diffusers_own(settings: dict[str, Any]) -> None:
    plain = make_transformer(**settings)
    counting = copy.deepcopy(plain)
    assert give_processor(counting)
    given = with_rows(inputs())
    assert torch.equal(run(counting, given)[0], run(plain, given)[0])


def test_half_precision_counts_nearly_as_many() -> None:
    network = make_transformer(**SETTINGS["3.5"]).bfloat16()
    given = [value.bfloat16() for value in inputs()]
    expected = run(network, with_rows(given))[0]
    give_processor(network)
    torch.testing.assert_close(run(network, given, num_repeats=REPEATS)[0], expected, rtol=0.02, atol=0.02)


def test_attention_of_another_kind_stays() -> None:
    class Other(JointAttnProcessor2_0):
        pass

    network = make_transformer(**SETTINGS["3.5"])
    assert give_processor(network)
    assert give_processor(network)  # a second time changes nothing
    own = Other()
    network.transformer_blocks[1].attn.set_processor(own)
    assert not give_processor(network)
    assert network.transformer_blocks[1].attn.processor is own
    kinds = {type(layer) for layer in network.attn_processors.values()}
    assert kinds == {RepeatedTokenProcessor, Other}
