"""Makes the shipped reward ``shapes-preference`` from nothing: ``python -m dpok_gym.shapes.choices``.

A simulated person compares images of the shapes world. A network first learns to match captions and clean scenes; then
a reward is fitted to the choices, starting from this network (:mod:`dpok_gym.rewards.preference.fit`). The judge
decides the choices and nothing else, so that it stays an honest measure of the reward.

The images come in groups of five around two captions: a true caption of a random scene, and the same with one attribute
wrong. The five are the scene itself, encoded and decoded by the autoencoder, and two images by the pre-trained model
for each caption. The model takes 10 denoising steps, in every fourth batch 20. Half of the choices are hard: between
two images of a group, under one of its captions. The other half are easy: one of the images is from a group about
something else. The person prefers the image with the higher ``alignment + 0.2 quality`` of the judge, is asked only if
these differ by 0.03 or more, and errs in 5 % of the choices.

On one core it takes about 20 minutes to draw and compare 20,000 images, 12 to learn captions (4,000 steps of 64
scenes) and 4 to learn the choices (6 epochs of 18,000). An interrupted run continues where it stopped, if started with
the same ``--work``: this folder keeps images, choices, checkpoints and log.

Letters used for shapes: G groups in a batch, N images, H = W = 64 pixels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.rewards.preference.data import load_comparisons
from dpok_gym.rewards.preference.fit import fit, make_network
from dpok_gym.rewards.preference.network import PreferenceNetwork
from dpok_gym.rewards.preference.reward import PreferenceReward
from dpok_gym.samplers.process import DenoisingProcess
from dpok_gym.shapes import PREFERENCE
from dpok_gym.shapes.captions import CATEGORIES, Request, all_requests, corrupt, sample_requested_scenes
from dpok_gym.shapes.detection import detect_objects
from dpok_gym.shapes.judge import alignment, quality
from dpok_gym.shapes.scenes import IMAGE_SIZE, Scenes, render
from dpok_gym.shapes.training import minimise, seeded_generator
from dpok_gym.utils.files import replacing
from dpok_gym.utils.images import to_uint8

#: A request and the same with one attribute wrong.
Captions = tuple[Request, Request]

BATCHES, GROUPS = 100, 40  # GROUPS are drawn together, in one batch
CLUSTER = 4  # neighbouring groups whose images are compared with each other
CHOICES_PER_CLUSTER = 20  # 20,000 choices in all
DENOISING_STEPS = (10, 10, 10, 20)  # of the batches, in turn
CATEGORY_SHARES = (1, 2, 2, 3)  # colour, count, composition, location: harder categories get more examples
DECODE_BATCH_SIZE = 16  # images that the autoencoder encodes or decodes at a time

HARD_SHARE = 0.5  # share of the choices that are between images of one group
QUALITY_WEIGHT = 0.2
JUST_NOTICEABLE = 0.03  # least difference in utility; the person is not asked about images that are closer
ERROR_RATE = 0.05

CAPTION_STEPS, CAPTION_BATCH, CAPTION_LEARNING_RATE = 4000, 64, 1e-3
#: The first steps show only scenes of one object, where the network finds out about colours and shapes much sooner than
#: in scenes of several.
ONE_OBJECT_STEPS, ONE_OBJECT_SHARES, CAPTION_SHARES = 500, (1, 0, 0, 0), (1, 1, 1, 5)
EPOCHS, LEARNING_RATE = 6, 7e-4


@torch.no_grad()
def sample_images(
    process: DenoisingProcess, prompts: Sequence[str], rngs: Sequence[np.random.Generator]
) -> NDArray[np.uint8]:
    """Draws one image for each prompt with the pre-trained model.

    Args:
        process: the model and its sampler.
        prompts: N texts.
        rngs: N generators; image k takes x_T and all of its noise from the k-th one.

    Returns:
        (N, H, W, 3).
    """
    shape = process.model.latent_shape

    def noise(step: int) -> Tensor:
        return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))

    latents = noise(0)  # x_T, the first that each generator gives
    for step in process.denoise(latents, process.encode(prompts), noise):
        latents = step.next_latents
    return to_uint8(_decode(process.model, latents))


@torch.no_grad()
def reconstruct(model: TextToImageModel, images: Tensor) -> NDArray[np.uint8]:
    """Encodes images (N, 3, H, W) in [0, 1] with the model's autoencoder and decodes them again, (N, H, W, 3)."""
    latents = torch.cat([model.encode_images(part) for part in images.split(DECODE_BATCH_SIZE)])
    return to_uint8(_decode(model, latents))


def _decode(model: TextToImageModel, latents: Tensor) -> Tensor:
    return torch.cat([model.decode(part) for part in latents.split(DECODE_BATCH_SIZE)])


def draw_groups(
    process: DenoisingProcess, scenes: Scenes, captions: Sequence[Captions], seed: Sequence[int]
) -> NDArray[np.uint8]:
    """Draws the five images of each group, (G, 5, H, W, 3).

    Args:
        process: draws the images of the captions.
        scenes: G scenes.
        captions: the two captions of each.
        seed: the randomness is a function of these integers and of an image's place in the batch.
    """
    prompts: list[str] = []
    for true, wrong in captions:
        prompts += [str(true)] * 2 + [str(wrong)] * 2
    drawn = sample_images(process, prompts, [np.random.default_rng([*seed, k]) for k in range(len(prompts))])
    reconstructed = reconstruct(process.model, render(scenes))
    return np.concatenate([reconstructed[:, None], drawn.reshape(len(captions), 4, *drawn.shape[1:])], axis=1)


def describe(seed: int, batch: int) -> tuple[Scenes, list[Captions]]:
    """Draws the scenes of a batch's groups and the two captions of each."""
    generator = torch.Generator().manual_seed(1_000_000 * seed + batch)
    scenes, requests = sample_requested_scenes(GROUPS, generator, CATEGORY_SHARES)
    return scenes, [(request, corrupt(request, generator)) for request in requests]


def image_path(batch: int, group: int, k: int) -> str:
    """Returns the path of a group's k-th image, relative to the work folder."""
    return f"images/{batch:03}-{group:02}-{k}.png"


def draw_images(folder: Path, seed: int, n_batches: int) -> None:
    """Draws the images of all batches that are not in the folder yet."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    model = load_model("shapes", "cpu")
    processes = [DenoisingProcess(model, num_inference_steps=steps) for steps in DENOISING_STEPS]
    for batch in range(n_batches):
        if (folder / image_path(batch, GROUPS - 1, 4)).exists():  # the last image of a batch to be written
            continue
        scenes, captions = describe(seed, batch)
        groups = draw_groups(processes[batch % len(processes)], scenes, captions, (seed, batch))
        for group, images in enumerate(groups):
            for k, image in enumerate(images):
                with replacing(folder / image_path(batch, group, k)) as part:
                    Image.fromarray(image).save(part, format="PNG")
        print(f"{5 * GROUPS * (batch + 1)} images", flush=True)


def utilities(images: Tensor, captions: Sequence[Request]) -> Tensor:
    """Returns how much the person likes each image under each caption.

    Args:
        images: (N, 3, H, W) in [0, 1].
        captions: C requests.

    Returns:
        (C, N) float32.
    """
    scenes = detect_objects(images)
    aligned = torch.stack([alignment(scenes, [caption] * len(scenes)) for caption in captions])
    return aligned + QUALITY_WEIGHT * quality(images, scenes)


def choose(seen: Tensor, rng: np.random.Generator) -> Iterator[tuple[int, int, int, int]]:
    """Makes the person's choices in a cluster.

    Args:
        seen: (2 CLUSTER, 5 CLUSTER) float32, the utilities of its images under its captions, both group by group.
        rng: source of randomness.

    Yields:
        The number of the caption, the numbers of the two images, and which of the two is preferred, 0 or 1.
    """
    n_captions, n_images = seen.shape
    for hard in rng.random(CHOICES_PER_CLUSTER) < HARD_SHARE:
        difference = 0.0
        while abs(difference) < JUST_NOTICEABLE:
            caption = int(rng.integers(n_captions))
            a, b = 5 * (caption // 2) + rng.choice(5, 2, replace=False)
            if not hard:
                b = (a + 5 * rng.integers(1, CLUSTER)) % n_images
            a, b = rng.permutation([a, b]).tolist()
            difference = (seen[caption, b] - seen[caption, a]).item()
        errs = rng.random() < ERROR_RATE
        yield caption, a, b, int((difference > 0) != errs)


def compare_images(folder: Path, seed: int, n_batches: int) -> Path:
    """Compares the images, and writes ``choices.jsonl``.

    Its lines have the form that :mod:`dpok_gym.rewards.preference.data` reads. The further field ``utilities``, those
    of the two images, serves to measure how well a reward agrees with the choices without their errors.

    Returns:
        The path of the file.
    """
    lines = []
    for batch in range(n_batches):
        _, captions = describe(seed, batch)
        rng = np.random.default_rng([seed, batch])
        for first in range(0, GROUPS, CLUSTER):
            groups = range(first, first + CLUSTER)
            paths = [image_path(batch, group, k) for group, k in product(groups, range(5))]
            images = np.stack([np.asarray(Image.open(folder / path)) for path in paths])
            requests = list(chain.from_iterable(captions[group] for group in groups))
            seen = utilities(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, requests)
            for caption, a, b, preferred in choose(seen, rng):
                line = {
                    "prompt": str(requests[caption]),
                    "images": [paths[a], paths[b]],
                    "preferred": preferred,
                    "who": "simulated",
                    "when": datetime.now(UTC).isoformat(timespec="seconds"),
                    "utilities": [round(seen[caption, k].item(), 4) for k in (a, b)],
                }
                lines.append(json.dumps(line) + "\n")
    path = folder / "choices.jsonl"
    with replacing(path) as file:
        file.write_text("".join(lines), encoding="utf-8")
    return path


def learn_captions(folder: Path) -> PreferenceNetwork:
    """Trains a network to tell true captions of clean scenes from wrong ones; the reward starts from it.

    ImageReward starts in the same way from BLIP, which had learned to match images and captions. Each scene has its
    true caption and one with a wrong attribute. No choice, no judge and no image of the pre-trained model is involved.

    Args:
        folder: of the checkpoint and the log.
    """
    torch.manual_seed(0)
    requests = chain.from_iterable(map(all_requests, CATEGORIES))
    network = make_network(map(str, requests), IMAGE_SIZE)

    def loss(step: int) -> Tensor:
        generator = seeded_generator(step)
        shares = ONE_OBJECT_SHARES if step < ONE_OBJECT_STEPS else CAPTION_SHARES
        scenes, requests = sample_requested_scenes(CAPTION_BATCH, generator, shares)
        wrong = [corrupt(request, generator) for request in requests]
        captions = network.tokenize([str(request) for request in requests + wrong])
        features = network.encode_images(render(scenes)).repeat(2, 1, 1)  # of the same scenes for both captions
        right_score, wrong_score = network.score_features(features, captions).chunk(2)
        return -(F.logsigmoid(right_score) + F.logsigmoid(-wrong_score)).mean()

    modules = nn.ModuleDict({"network": network})
    minimise("captions", modules, loss, CAPTION_STEPS, CAPTION_LEARNING_RATE, folder)
    return network


def main(arguments: Iterable[str] | None = None) -> None:
    """Draws, compares and fits, or continues where an interrupted run stopped, and writes the reward's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("choices"), help="folder of images, choices and log")
    parser.add_argument("--out", type=Path, default=PREFERENCE, help="folder of the finished reward")
    parser.add_argument("--batches", type=int, default=BATCHES, help="number of batches, each of 200 choices")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the choices")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and choices")
    options = parser.parse_args(arguments)
    draw_images(options.work, options.seed, options.batches)
    path = options.work / "choices.jsonl"
    if not path.exists():
        compare_images(options.work, options.seed, options.batches)

    def log(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with (options.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    result = fit(
        load_comparisons(path, IMAGE_SIZE),
        reward=PreferenceReward(learn_captions(options.work)),
        epochs=options.epochs,
        learning_rate=LEARNING_RATE,
        seed=options.seed,
        checkpoint=options.work / "reward.pt",
        log=log,
    )
    result.reward.save(options.out)
    print(f"agreement on {result.held_out.choices} choices held out: {result.held_out.agreement:.3f}")


if __name__ == "__main__":
    main()
