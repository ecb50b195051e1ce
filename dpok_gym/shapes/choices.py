"""Makes the shipped reward ``shapes-preference`` from nothing: ``python -m dpok_gym.shapes.choices``.

A simulated person compares pictures of the embedded world; a network learns to match captions and clean scenes; from
there, a reward is fitted to the choices (:mod:`dpok_gym.rewards.preference_fit`). The judge is heard in the choices
only, so that it stays the honest measure.

The pictures come in groups of five around two captions, a true one of a random scene and the same with one attribute
wrong: the scene through the autoencoder, and two drawings by the pre-trained model for each caption. They take 10
denoising steps, in every fourth batch 20. Under a caption are compared two pictures of its group, which is hard, or,
as often, one of them and one of a group about something else, which is easy. The person likes the higher
``alignment + 0.2 quality`` of the judge better, is asked only where these differ by 0.03 or more, and says the wrong
one in 5 % of the choices.

On one core: about 20 minutes of drawing and comparing 20,000 pictures, 12 of captions (4,000 steps of 64 scenes) and 4
of choices (6 epochs of 18,000). Interrupted, it goes on where it stopped; pictures, choices, checkpoints and log are in
``--work``.

Letters used for shapes: G groups in a batch, N pictures, H = W = 64 pixels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dpok_gym import diffusion
from dpok_gym.files import replacing
from dpok_gym.images import to_uint8
from dpok_gym.models import load_model
from dpok_gym.rewards.preference import PreferenceNetwork
from dpok_gym.rewards.preference_data import load_comparisons
from dpok_gym.rewards.preference_fit import fit, make_network
from dpok_gym.shapes import PREFERENCE
from dpok_gym.shapes.captions import CATEGORIES, Request, all_requests, sample_requested_scenes, spoil
from dpok_gym.shapes.judge import align, quality, read
from dpok_gym.shapes.pretrain import fit as minimise
from dpok_gym.shapes.pretrain import seeded
from dpok_gym.shapes.scenes import IMAGE_SIZE, Scenes, render
from dpok_gym.vector_env import DenoisingVectorEnv

#: What is asked for, and the same with one attribute wrong.
Captions = tuple[Request, Request]

BATCHES, GROUPS = 100, 40  # drawn at a time
CLUSTER = 4  # groups whose pictures are compared with each other
CHOICES_PER_CLUSTER = 20  # 20,000 in all
DENOISING_STEPS = (10, 10, 10, 20)  # of the batches, in turn
CATEGORY_SHARES = (1, 2, 2, 3)  # colour, count, composition, location: the more there is to say, the more examples

HARD_SHARE = 0.5  # of the choices, between pictures of one group
QUALITY_WEIGHT = 0.2
JUST_NOTICEABLE = 0.03  # difference in what the person sees; closer pictures are not compared
ERROR_RATE = 0.05

CAPTION_STEPS, CAPTION_BATCH, CAPTION_LEARNING_RATE = 4000, 64, 1e-3
#: At first only scenes of one object: colours and shapes are found there quickly, and slowly in fuller ones.
ONE_OBJECT_STEPS, ONE_OBJECT_SHARES, CAPTION_SHARES = 500, (1, 0, 0, 0), (1, 1, 1, 5)
EPOCHS, LEARNING_RATE = 6, 7e-4


def draw(env: DenoisingVectorEnv, prompts: Sequence[str], rngs: Sequence[np.random.Generator]) -> NDArray[np.uint8]:
    """Pictures (N, H, W, 3) by the pre-trained model, for as many prompts as the environment has places."""
    observation, _ = env.begin_episodes(rngs, {"prompt": list(prompts)})
    done = False
    while not done:
        mean, std = env.pretrained_transition(observation)
        noise = np.stack([rng.standard_normal(mean.shape[1:], np.float32) for rng in rngs])
        action, _ = diffusion.sample_with_log_prob(mean, std, torch.from_numpy(noise))
        observation, _, done, infos = env.advance(action.numpy())
    return np.stack([info["image"] for info in infos])


@torch.no_grad()
def reconstruct(pictures: Tensor) -> NDArray[np.uint8]:
    """Pictures (N, 3, H, W) in [0, 1] through the embedded autoencoder and back, (N, H, W, 3)."""
    vae = load_model("shapes", "cpu").vae  # type: ignore[attr-defined]  # no other model of the interface has to have one
    latents = torch.cat([vae.encode(2 * part - 1).latent_dist.mean for part in pictures.split(16)])
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(16)])
    return to_uint8(decoded / 2 + 0.5)


def draw_groups(
    env: DenoisingVectorEnv, scenes: Scenes, captions: Sequence[Captions], seed: Sequence[int]
) -> NDArray[np.uint8]:
    """Draws the five pictures of each group, (G, 5, H, W, 3) uint8."""
    prompts = [str(caption) for pair in captions for caption in pair for _ in range(2)]
    drawn = draw(env, prompts, [np.random.default_rng([*seed, k]) for k in range(len(prompts))])
    true = reconstruct(render(scenes))
    return np.concatenate([true[:, None], drawn.reshape(len(captions), 4, *drawn.shape[1:])], axis=1)


def describe(seed: int, batch: int) -> tuple[Scenes, list[Captions]]:
    """The scenes of a batch's groups and the two captions of each."""
    generator = torch.Generator().manual_seed(1_000_000 * seed + batch)
    scenes, requests = sample_requested_scenes(GROUPS, generator, CATEGORY_SHARES)
    return scenes, [(request, spoil(request, generator)) for request in requests]


def name(batch: int, group: int, k: int) -> str:
    """The path of a group's k-th picture in the folder."""
    return f"pictures/{batch:03}-{group:02}-{k}.png"


def draw_pictures(folder: Path, seed: int, n_batches: int) -> None:
    """Draws the pictures of all batches that are not there yet."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    envs = [
        DenoisingVectorEnv(4 * GROUPS, reward=_no_reward, num_inference_steps=steps, decode_batch_size=16, device="cpu")
        for steps in DENOISING_STEPS
    ]
    for batch in range(n_batches):
        if (folder / name(batch, GROUPS - 1, 4)).exists():  # the last one to be written
            continue
        scenes, captions = describe(seed, batch)
        for group, pictures in enumerate(draw_groups(envs[batch % len(envs)], scenes, captions, (seed, batch))):
            for k, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / name(batch, group, k))
        print(f"{5 * GROUPS * (batch + 1)} pictures", flush=True)


def utilities(pictures: Tensor, captions: Sequence[Request]) -> Tensor:
    """What the person sees in pictures (N, 3, H, W) under each of the captions, (captions, N) float32."""
    scenes = read(pictures)
    clean = quality(pictures, scenes)
    return torch.stack([align(scenes, [caption] * len(scenes)) for caption in captions]) + QUALITY_WEIGHT * clean


def choose(seen: Tensor, rng: np.random.Generator) -> Iterator[tuple[int, int, int, int]]:
    """The person's choices in a cluster.

    Args:
        seen: (2 CLUSTER, 5 CLUSTER) float32, the utilities of its pictures under its captions, both group by group.
        rng: source of randomness.

    Yields:
        The caption, the two pictures, and which of them is preferred, 0 or 1.
    """
    n_captions, n_pictures = seen.shape
    for hard in rng.random(CHOICES_PER_CLUSTER) < HARD_SHARE:
        difference = 0.0
        while abs(difference) < JUST_NOTICEABLE:
            caption = int(rng.integers(n_captions))
            a, b = 5 * (caption // 2) + rng.choice(5, 2, replace=False)
            if not hard:
                b = (a + 5 * rng.integers(1, CLUSTER)) % n_pictures
            a, b = rng.permutation([a, b]).tolist()
            difference = (seen[caption, b] - seen[caption, a]).item()
        errs = rng.random() < ERROR_RATE
        yield caption, a, b, int((difference > 0) != errs)


def compare_pictures(folder: Path, seed: int, n_batches: int) -> Path:
    """Compares the pictures, and writes ``choices.jsonl``.

    The lines are as :mod:`dpok_gym.rewards.preference_data` reads them. Besides, they have ``utilities``, what the
    person saw in the two pictures, for measuring how well the reward agrees with the choices without their errors.
    """
    lines = []
    for batch in range(n_batches):
        _, captions = describe(seed, batch)
        rng = np.random.default_rng([seed, batch])
        for first in range(0, GROUPS, CLUSTER):
            groups = range(first, first + CLUSTER)
            names = [name(batch, group, k) for group in groups for k in range(5)]
            pictures = np.stack([np.asarray(Image.open(folder / path)) for path in names])
            requests = [caption for group in groups for caption in captions[group]]
            seen = utilities(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, requests)
            for caption, a, b, preferred in choose(seen, rng):
                line = {
                    "prompt": str(requests[caption]),
                    "pictures": [names[a], names[b]],
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


def _no_reward(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.zeros(len(prompts))


def learn_captions(folder: Path) -> PreferenceNetwork:
    """A network that tells true captions of clean scenes from wrong ones, for the reward to start from.

    As ImageReward starts from BLIP, which was taught to match pictures and captions. Each scene has its true caption
    and one with a wrong attribute. No choice and no judge is involved, and no picture of the pre-trained model.
    """
    torch.manual_seed(0)
    requests = [request for category in CATEGORIES for request in all_requests(category)]
    network = make_network([str(request) for request in requests], IMAGE_SIZE)

    def loss(step: int) -> Tensor:
        generator = seeded(step)
        shares = ONE_OBJECT_SHARES if step < ONE_OBJECT_STEPS else CAPTION_SHARES
        scenes, requests = sample_requested_scenes(CAPTION_BATCH, generator, shares)
        wrong = [spoil(request, generator) for request in requests]
        seen, captions = network.look(render(scenes)), [str(request) for request in requests + wrong]
        right_score, wrong_score = network.judge(seen.repeat(2, 1, 1), network.read(captions)).chunk(2)
        return -(F.logsigmoid(right_score) + F.logsigmoid(-wrong_score)).mean()

    minimise("captions", nn.ModuleDict({"it": network}), loss, CAPTION_STEPS, CAPTION_LEARNING_RATE, folder)
    return network


def main(arguments: Iterable[str] | None = None) -> None:
    """Draws, compares and fits, or goes on where an interrupted run stopped, and writes the reward's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("choices"), help="folder of pictures, choices and log")
    parser.add_argument("--out", type=Path, default=PREFERENCE, help="folder of the finished reward")
    parser.add_argument("--batches", type=int, default=BATCHES, help="of 200 choices")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw_pictures(options.work, options.seed, options.batches)
    path = options.work / "choices.jsonl"
    if not path.exists():
        compare_pictures(options.work, options.seed, options.batches)

    def log(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with (options.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    checkpoint = options.work / "reward.pt"
    found = fit(
        load_comparisons(path, IMAGE_SIZE),
        network=learn_captions(options.work),
        epochs=options.epochs,
        learning_rate=LEARNING_RATE,
        seed=options.seed,
        checkpoint=checkpoint,
        log=log,
    )
    found.reward.save(options.out)
    print(f"agreement on {found.held_out.choices} choices held out: {found.held_out.agreement:.3f}")


if __name__ == "__main__":
    main()
