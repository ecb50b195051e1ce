"""Attention in which one token stands for many equal ones.

Without its T5 encoder, Stable Diffusion 3 reads 256 rows of zeros in the place of T5's tokens. The text has no
positions, so these rows stay equal in every layer. One row is enough, if attention counts it 256 times. In bfloat16
the logarithm of 256 is rounded, so the row counts 252 times.

Letters used for sizes: B images, N tokens of the image, L tokens of the text, F features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F


class RepeatedTokenProcessor(JointAttnProcessor2_0):
    """The joint attention of Stable Diffusion 3, which can count the last token of the text several times.

    Without ``num_repeats`` it is diffusers' own, so a network that has it draws in any pipeline.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_repeats: int = 1,
        **unused: Any,
    ) -> Any:
        """Returns what the image and the text attend to.

        Args:
            attn: the layer.
            hidden_states: (B, N, F) of the image.
            encoder_hidden_states: (B, L, F) of the text; None in a layer that reads the image alone.
            attention_mask: not used, as in diffusers.
            num_repeats: how often the last token of the text counts.
            unused: as in diffusers.
        """
        if num_repeats == 1 or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **unused)

        def by_head(values: Tensor) -> Tensor:
            return values.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, tokens, F / heads)

        image: list[Tensor] = [by_head(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        text_layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text: list[Tensor] = [by_head(layer(encoder_hidden_states)) for layer in text_layers]
        for own, norms in ((image, (attn.norm_q, attn.norm_k)), (text, (attn.norm_added_q, attn.norm_added_k))):
            for index, norm in enumerate(norms):
                if norm is not None:
                    own[index] = norm(own[index])
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        # A token that counts n times has n times the weight: log n in the exponent.
        counts = query.new_zeros(1, 1, 1, key.shape[2])
        counts[..., -1] = math.log(num_repeats)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=counts)
        n_image = hidden_states.shape[1]
        of_image, of_text = mixed.transpose(1, 2).flatten(2).split([n_image, key.shape[2] - n_image], dim=1)
        for layer in attn.to_out:
            of_image = layer(of_image)
        return of_image, of_text if attn.context_pre_only else attn.to_add_out(of_text)


def give_processor(denoiser: Any) -> bool:
    """Puts :class:`RepeatedTokenProcessor` in the place of diffusers' own attention.

    Args:
        denoiser: a ``SD3Transformer2DModel``, changed in place. A network that is made of its config has to be asked
            again.

    Returns:
        Whether all layers have it now. Attention of another kind, such as that of xformers, stays.
    """
    layers = [layer for block in denoiser.transformer_blocks for layer in (block.attn, block.attn2) if layer]
    for layer in layers:
        if type(layer.processor) is JointAttnProcessor2_0:
            layer.set_processor(RepeatedTokenProcessor())
    return all(isinstance(layer.processor, RepeatedTokenProcessor) for layer in layers)
