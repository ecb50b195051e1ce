"""What is said of pipelines that are not supported."""

import re

import diffusers
import pytest

from dpok_gym.models.pipelines import FAMILIES
from dpok_gym.models.unsupported import REASONS, describe_unsupported


@pytest.mark.parametrize("pattern", REASONS)
def test_each_reason_is_that_of_a_pipeline(pattern: str) -> None:
    """Each name of the pattern, too: a misspelt one would say nothing."""
    pipelines = [name for name in dir(diffusers) if name.endswith("Pipeline") and name not in FAMILIES]
    first = {name: next((known for known in REASONS if re.search(known, name)), None) for name in pipelines}
    parts = re.split(r"\|(?![^(]*\))", pattern)
    for part in parts:
        assert [name for name, known in first.items() if known == pattern and re.search(part, name)], part


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("QwenImagePipeline", "rescales each token"),
        ("QwenImageEditPipeline", "it draws from another image"),
        ("ZImagePipeline", "lists of prompts"),
        ("WanPipeline", "it draws videos"),
        ("WanImageToVideoPipeline", "it draws videos"),
        ("HunyuanVideoPipeline", "it draws videos"),
        ("LTXPipeline", "it draws videos"),
        ("CogVideoXPipeline", "it draws videos"),
        ("SanaVideoPipeline", "it draws videos"),
        ("SanaSprintPipeline", "take the Sana model that it comes from"),
        ("StableCascadeCombinedPipeline", "it is two models"),
        ("AuraFlowPipeline", "its steps would fit"),
        ("StableDiffusionInpaintPipeline", "take the plain text-to-image pipeline"),
        ("StableDiffusionXLPAGPipeline", "without PAG"),
    ],
)
def test_what_is_said(pipeline: str, reason: str) -> None:
    text = describe_unsupported(pipeline, ["APipeline", "BPipeline"])
    assert text.startswith(f"it is a {pipeline}, and only APipeline, BPipeline are supported: ")
    assert reason in text


def test_a_pipeline_that_nothing_is_known_of() -> None:
    assert describe_unsupported("MyPipeline", ["APipeline"]) == "it is a MyPipeline, and only APipeline are supported"
