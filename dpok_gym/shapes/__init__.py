"""The embedded world of coloured shapes: scenes, captions, a judge, and the small model trained on them."""

from pathlib import Path

#: Folder of the embedded model, an ordinary diffusers ``StableDiffusionPipeline``.
WEIGHTS = Path(__file__).parent / "weights"

#: Folder of the reward ``shapes-preference``, made by :mod:`dpok_gym.shapes.choices`.
PREFERENCE = Path(__file__).parent / "preference"

#: Folder of the embedded flow-matching model, an ordinary diffusers ``StableDiffusion3Pipeline``.
FLOW_WEIGHTS = Path(__file__).parent / "flow_weights"
