"""The names of the tensors in the LoRA files of other tools, and how they become those of peft.

===========  ====================================================  =============================================
format       names                                                 alpha
===========  ====================================================  =============================================
peft         ``base_model.model.<layer>.lora_A.weight``            in ``adapter_config.json``
diffusers    ``unet.<layer>.lora_A.weight``, ``transformer. ...``  in the header, ``lora_adapter_metadata``
older        ``unet.<layer>.lora.down.weight``                     alpha is the rank
2023         ``<layer>.processor.to_q_lora.down.weight``           alpha is the rank
kohya        ``lora_unet_<layer with _>.lora_down.weight``         a tensor ``lora_unet_<layer with _>.alpha``
OneTrainer   ``lora_transformer_<layer with _>.lora_down.weight``  a tensor ``lora_transformer_ ... .alpha``
authors      ``diffusion_model.<layer>.lora_A.weight``             perhaps a tensor ``... .alpha``
XLabs        ``double_blocks. ... .qkv_lora1.down.weight``         alpha is the rank
===========  ====================================================  =============================================

The last two, and perhaps kohya's, name the layers as the models' authors do. diffusers has converters of these for the
UNets of Stable Diffusion, for FLUX.1 and for FLUX.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffusers import loaders
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

#: Endings of the names of a layer's two matrices, and how all of peft's names begin.
A, B = ".lora_A.weight", ".lora_B.weight"
PEFT = "base_model.model."

#: Names whose dots are underscores begin so, and those of the models' authors.
_FLAT = ("lora_unet_", "lora_transformer_")
_OF_AUTHORS = ("diffusion_model.", "double_blocks.", "single_blocks.")
_TEXT_ENCODERS = re.compile(r"text_encoder(_\d)?\.|text_encoders\.|lora_te\d?_")

#: The class of diffusers that converts the authors' names, for each denoiser that has one. It is the same for all UNets
#: of Stable Diffusion; this one also knows XL's numbers of blocks.
_CONVERTERS = {
    "UNet2DConditionModel": "StableDiffusionXLLoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
}

#: What only names of other formats match, and what those are called. None of them is B A x.
_NOT_READ = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.b?oft_": "OFT",
    r"\.lora_mid\.": "LoCon with a Tucker decomposition",
    r"\.b1\.weight$": "GLoRA",
    r"\.on_input$": "IA3",
    r"\.(diff|diff_b|w_norm|b_norm)$": "differences of whole weights",
    r"lora_controlnet": "Control-LoRA",
    r"lora_embedding_": "a LoRA of embeddings",
    r"\.lora_B\.bias$": "a LoRA with biases",
    r"vera_lambda": "VeRA",
    r"^(emb_params|string_to_param)": "a textual inversion",
}

#: The width of the text features of each generation of Stable Diffusion.
_FAMILY_OF_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
#: Names of matrices that read the text features, in all formats.
_READS_TEXT = re.compile(r"attn2[._](processor\.)?to_k[._](lora_A|lora_down|lora\.down)")


def check_format(tensors: Mapping[str, Tensor]) -> None:
    """Makes sure that the tensors are those of a LoRA of the denoiser alone."""
    for pattern, name in _NOT_READ.items():
        found = next((key for key in tensors if re.search(pattern, key)), None)
        if found is not None:
            raise ValueError(f"its format is {name} ({found}), which is not read here; only plain LoRAs are")
    if not any("lora" in key for key in tensors):
        raise ValueError("it holds no LoRA weights; give a file that save_lora(), diffusers, peft or kohya wrote")
    of_text = [key for key in tensors if _TEXT_ENCODERS.match(key)]
    if of_text:
        raise ValueError(
            f"it changes the text encoder too ({len(of_text)} tensors, such as {of_text[0]}), and only the denoiser is "
            "fine-tuned here; make it part of a model with diffusers: pipe.load_lora_weights(file), pipe.fuse_lora(), "
            "pipe.unload_lora_weights(), pipe.save_pretrained(folder); then take that folder as the model"
        )
    for key, value in tensors.items():
        if not value.is_floating_point():
            if key.endswith(".alpha") and value.numel() == 1:
                continue
            raise ValueError(f"its {key} is of the type {value.dtype}, and weights are floating-point numbers")
        if not value.float().isfinite().all():  # some of the 8-bit types have no such test
            raise ValueError(f"it has values that are not finite, in {key}; train it again")


def check_family(tensors: Mapping[str, Tensor], network: nn.Module) -> None:
    """Makes sure that a LoRA of Stable Diffusion is of the model's own generation, if its attention tells that."""
    own = getattr(getattr(network, "config", None), "cross_attention_dim", None)
    for key, value in tensors.items():
        if _READS_TEXT.search(key) and value.dim() == 2:
            family = _FAMILY_OF_WIDTH.get(value.shape[1])
            if family and (own is None or isinstance(own, int)) and value.shape[1] != own:
                here = (
                    f"is of {_FAMILY_OF_WIDTH[own]}" if own in _FAMILY_OF_WIDTH else f"has a {type(network).__name__}"
                )
                raise ValueError(f"it is of {family}, and the model here {here}")
            return


def to_peft_names(tensors: Mapping[str, Tensor], network: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Returns the tensors by peft's names; an alpha that is a tensor is in the second matrix then.

    Args:
        tensors: of any format that the head of this module lists.
        network: the denoiser that they are of.
        prefix: the model's ``lora_prefix``, such as "unet.".

    Raises:
        ValueError: if the names are of the models' authors, and diffusers cannot convert them.
    """
    for start in (PEFT, prefix):
        if any(key.startswith(start) for key in tensors):
            tensors = {key.removeprefix(start): value for key, value in tensors.items()}
            break
    tensors = _with_alphas(tensors)
    if any(key.startswith(_FLAT) for key in tensors):
        tensors = _with_dots(tensors, network) or _convert(tensors, network, prefix)
    elif any(key.startswith(_OF_AUTHORS) for key in tensors):
        tensors = _convert(tensors, network, prefix)
    return convert_unet_state_dict_to_peft(tensors)  # type: ignore[no-any-return]


def _with_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiplies each second matrix by its layer's alpha / rank, where there is such a tensor.

    diffusers' converters leave out the alphas of single layers.
    """
    scaled = dict(tensors)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        layer = key.removesuffix(".alpha")
        pairs = ((f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"), (layer + B, layer + A))
        up, down = next((pair for pair in pairs if scaled.keys() >= set(pair)), ("", ""))
        if not up or not scaled[down].numel() or tensors[key].numel() != 1:
            raise ValueError(f"its {key} has no layer, or is no number")
        rank = scaled[down].flatten(1).shape[0] if scaled[down].dim() > 1 else 1
        scaled[up] = scaled[up].float() * (float(scaled.pop(key)) / rank)
    return scaled


def _with_dots(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor] | None:
    """Returns tensors whose names have underscores by peft's names, or None if a layer has no such name here."""
    layers = {name.replace(".", "_"): name for name, _ in network.named_modules()}
    renamed = {}
    for key, value in tensors.items():
        start = next((start for start in _FLAT if key.startswith(start)), "")
        layer, _, rest = key.removeprefix(start).partition(".")
        if layer not in layers:
            return None
        renamed[f"{layers[layer]}.{rest.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"] = value
    return renamed


def _convert(tensors: Mapping[str, Tensor], network: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Returns tensors with the authors' names of layers by diffusers' names, as diffusers itself converts them."""
    kind = type(network).__name__
    example = next(key for key in tensors if key.startswith((*_FLAT, *_OF_AUTHORS)))
    if kind not in _CONVERTERS:
        raise ValueError(
            f"it names the layers as the model's authors do ({example}), and diffusers has no converter of these names "
            f"for a {kind}; take the file in the format of diffusers, of peft or of OneTrainer"
        )
    try:
        converter = getattr(loaders, _CONVERTERS[kind])
        converted = converter.lora_state_dict(dict(tensors), unet_config=getattr(network, "config", None))
    except Exception as error:  # it raises many kinds
        raise ValueError(f"diffusers cannot convert its names of layers, such as {example}: {error}") from error
    state = converted[0] if isinstance(converted, tuple) else converted  # some converters also return alphas
    return {key.removeprefix(prefix): value for key, value in state.items()}
