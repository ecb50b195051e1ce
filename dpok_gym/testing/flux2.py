"""FLUX.2-klein, small.

"flux2-klein" is like the base models, which are not distilled. It draws 256 x 256 images from 16 x 64 x 64 latents by
default: tests are faster with a smaller ``image_size``. Its tokenizer is another one than the other pipelines have; it
reads any text.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dpok_gym.testing.parts import WORDS

#: Features of a token in each layer. The denoiser reads three layers, so the text encoder has more than 27.
_TEXT_WIDTH, _TEXT_LAYERS = 16, 28

#: A chat as Qwen3 reads it. What the assistant thought comes before its answer; nothing if it is not to think.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
"""


def save(folder: Path, family: str, tokenizer: CLIPTokenizer) -> None:
    """Saves the pipeline; see :func:`dpok_gym.testing.save_tiny_pipeline`. The CLIP tokenizer is not needed."""
    qwen = _make_tokenizer()
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_make_vae(),
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(qwen),
                hidden_size=_TEXT_WIDTH,
                intermediate_size=2 * _TEXT_WIDTH,
                num_hidden_layers=_TEXT_LAYERS,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                tie_word_embeddings=True,
                pad_token_id=qwen.pad_token_id,
            )
        ),
        tokenizer=qwen,
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * _TEXT_WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=False,
    )
    pipeline.save_pretrained(folder)


def _make_tokenizer() -> Qwen2TokenizerFast:
    """Returns a tokenizer of single bytes and the words of :data:`WORDS`."""
    tokens, merges = sorted(ByteLevel.alphabet()), []
    for word in WORDS:
        start, *rest = ["\u0120", *word]  # the mark stands for a space
        for letter in rest:
            merges.append((start, letter))
            start += letter
            tokens.append(start)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    qwen = Qwen2TokenizerFast(vocab=vocabulary, merges=merges, model_max_length=131072)
    qwen.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    qwen.chat_template = _CHAT_TEMPLATE
    return qwen


def _make_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        batch_norm_eps=0.01,  # larger than the real one, so that whoever forgets it gets other images
    )
    # The moments of the latents, which training would have found.
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return vae
