"""DPOK in one file: reinforcement learning teaches a diffusion model to count.

DPOK (Fan et al., NeurIPS 2023, https://arxiv.org/abs/2305.16381) fine-tunes a text-to-image diffusion model with a
reward. Here the model is the small embedded one, the prompt is "three green squares", and the reward is a judge that
looks at the finished image. The task and the settings are those of ``dpok train``, and so are the random numbers:
``tests/docs/test_dpok_single_file.py`` shows that the losses and the weights equal the library's to 1e-5.

    python docs/dpok_single_file.py --seed 0 --out before_after.png

takes about 10 minutes on a laptop.

Denoising is a Markov decision process (Sec. 4.1 of the paper):

    state   s_t = (z, x_t, t)       the prompt, the noisy latent, the denoising step
    action  a_t = x_{t-1}           the next latent
    policy  p_theta(x_{t-1} | x_t, z) = N( mu_theta(x_t, t, z), sigma_t^2 I )
    reward  r(x_0, z) at the last step, 0 before

DPOK minimises (Eq. 8), with p_pre the pre-trained model,

    E_z [  alpha E_{p_theta(x_{0:T} | z)}[ -r(x_0, z) ]
         + beta  sum_t E_{p_theta(x_t | z)}[ KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ]  ]

Letters used for shapes: B transitions, N images, T denoising steps, D = C * h * w = 256 dimensions of a latent x.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image, ImageDraw
from torch import Tensor, nn

from dpok_gym.shapes import WEIGHTS
from dpok_gym.shapes.judge import judge

PROMPT = "three green squares"
NUM_INFERENCE_STEPS = 10  # T
IMAGES_PER_ITERATION = 64  # drawn between two updates
BATCH_SIZE = 64  # transitions of an optimiser step, so an iteration has 10 of them
REWARD_WEIGHT, KL_COEF = 1.0, 1e-3  # alpha, and beta: the price of a nat in units of the reward
CLIP_RANGE = 1.0  # nats: how far a transition may move in an iteration
LORA_RANK = 16
LEARNING_RATE, FINAL_LR_FRACTION, WARMUP_FRACTION = 3e-3, 0.05, 0.1
MAX_GRAD_NORM = 1.0
EVALUATION_IMAGES = 256

# ------------------------------------------------------------------------------------------------------ random numbers

# What the numbers are for. Each image has generators of its own, so it does not matter how many are drawn side by side.
INITIAL_NOISE, ACTION_NOISE, BATCHES, WEIGHTS_OF_LORA, EVALUATION_INITIAL_NOISE, EVALUATION_ACTION_NOISE = (
    1,
    2,
    3,
    4,
    6,
    7,
)


def make_generator(seed: int, purpose: int, *index: int) -> np.random.Generator:
    """Makes the generator of a purpose and, for example, an image: there is no state that runs on between images."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *index)))


def draw_noise(generators: Iterable[np.random.Generator], shape: Sequence[int]) -> Tensor:
    """Draws standard normal numbers, (N, *shape): each row from its own generator."""
    return torch.from_numpy(np.stack([generator.standard_normal(shape, np.float32) for generator in generators]))


# ---------------------------------------------------------------------------------------------------------- the policy


class Policy:
    """p_theta(x_{t-1} | x_t, z): a denoiser with a LoRA, and the sampler's Gaussian steps.

    Attributes:
        std: (T,) sigma_t of each step.
        explores: (T,) bool, whether a step has enough noise to explore anything.
        kl_weight: (T,) weight of each step in the KL.
    """

    def __init__(self, seed: int) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS)
        self.vae = pipeline.vae.to(memory_format=torch.channels_last)  # faster convolutions; nothing else changes
        self.unet = pipeline.unet.to(memory_format=torch.channels_last).eval()
        self.latent_shape = (self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)
        with torch.no_grad():
            self.text = pipeline.encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=False)[0]

        # The LoRA adds B A x to each layer's output. B is zero at first, so p_theta begins as p_pre.
        attention = ["to_q", "to_k", "to_v", "to_out.0"]
        other = ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
        torch.manual_seed(int(make_generator(seed, WEIGHTS_OF_LORA).integers(2**62)))
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=attention + other))
        self.parameters: list[nn.Parameter] = [value for value in self.unet.parameters() if value.requires_grad]

        self._make_table(pipeline.scheduler)

    def _make_table(self, scheduler: DDIMScheduler) -> None:
        """The transitions of DDIM (Song et al. 2021, Eq. 12 and 16) with eta = 1, as coefficients of each step."""
        scheduler.set_timesteps(NUM_INFERENCE_STEPS)
        self.timesteps = scheduler.timesteps  # 901, 801, ..., 1
        previous = self.timesteps - scheduler.config.num_train_timesteps // NUM_INFERENCE_STEPS
        alphas = (
            scheduler.alphas_cumprod.double()
        )  # in float64: 1 - a / b is the difference of two nearly equal numbers
        alpha = alphas[self.timesteps]  # x_t = sqrt(alpha) x_0 + sqrt(1 - alpha) eps
        alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod.double())
        # Eq. 16: sigma_t^2, the variance of x_{t-1} given x_t.
        variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        # Eq. 12: x_{t-1} = sqrt(alpha_prev) x_0 + sqrt(1 - alpha_prev - sigma_t^2) eps + sigma_t noise.
        # This network predicts v, so x_0 = sqrt(alpha) x_t - sqrt(1 - alpha) v, and eps = sqrt(1 - alpha) x_t +
        # sqrt(alpha) v (Salimans & Ho 2022, App. D). Hence mu_theta is linear in x_t and v.
        signal, direction = alpha_prev.sqrt(), (1 - alpha_prev - variance).sqrt()
        self.sample_coef = (signal * alpha.sqrt() + direction * (1 - alpha).sqrt()).float()
        self.output_coef = (signal * -(1 - alpha).sqrt() + direction * alpha.sqrt()).float()
        self.std = variance.sqrt().float()

        # The last two steps have hardly any noise. What they draw cannot be seen, so they get no policy gradient. But
        # the KL holds them, with weights by which a change of v costs no more there than at a step that explores.
        self.explores = self.std >= 0.1 * self.std.max()
        noise_to_output = self.std / self.output_coef.abs()  # the KL of a change of v goes with 1 / its square
        held = (noise_to_output / noise_to_output[self.explores].min()).clamp(max=1) ** 2
        self.kl_weight = torch.where(self.explores, 1.0, held)

    def mean(self, x: Tensor, step: Tensor, pretrained: bool = False) -> Tensor:
        """mu_theta(x_t, t, z), or that of p_pre, (B, C, h, w), of latents (B, C, h, w) at steps (B,)."""
        if pretrained:
            self.unet.disable_adapters()
        v = self.unet(x, self.timesteps[step], self.text.expand(len(x), -1, -1)).sample
        if pretrained:
            self.unet.enable_adapters()
        return _expand(self.sample_coef[step]) * x + _expand(self.output_coef[step]) * v

    @torch.no_grad()
    def draw(self, initial: list[np.random.Generator], actions: list[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Draws N images: x_T ~ N(0, I), then T times x_{t-1} ~ p_theta(x_{t-1} | x_t, z).

        Returns:
            The latents x_T, ..., x_0, (N, T + 1, C, h, w), and the means that they were drawn with, (N, T, C, h, w).
        """
        latents, means = [draw_noise(initial, self.latent_shape)], []
        for index in range(NUM_INFERENCE_STEPS):
            means.append(self.mean(latents[-1], torch.full((len(initial),), index)))
            latents.append(means[-1] + self.std[index] * draw_noise(actions, self.latent_shape))
        return torch.stack(latents, dim=1), torch.stack(means, dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns the images (N, 3, H, W) in [0, 1] of finished latents (N, C, h, w)."""
        chunks = latents.split(16)  # small enough for a processor's cache
        pixels = torch.cat([self.vae.decode(chunk / self.vae.config.scaling_factor).sample for chunk in chunks])
        return (pixels / 2 + 0.5).clamp(0, 1)


def _expand(values: Tensor) -> Tensor:
    return values[:, None, None, None]


# ------------------------------------------------------------------------------------------------------------ the loss

# Both p_theta and p_old are Gaussians with the same fixed sigma_t, and
#
#     log N(x; mu, sigma^2 I) = -||x - mu||^2 / (2 sigma^2) + constant.
#
# The difference of two such numbers, and their KL, have a closed form, which is exactly 0 where the means are equal.


def log_ratio(action: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """log p_theta(x_{t-1} | x_t, z) - log p_old(x_{t-1} | x_t, z) in nats, (B,)."""
    return ((mean - old_mean) * (action - 0.5 * (mean + old_mean)) / _expand(std).square()).flatten(1).sum(1)


def kl_divergence(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """KL( N(mean, std^2 I) || N(other_mean, std^2 I) ) = ||mean - other_mean||^2 / (2 std^2) in nats, (B,)."""
    return (0.5 * ((mean - other_mean) / _expand(std)).square()).flatten(1).sum(1)


def dpok_loss(
    policy: Policy, x: Tensor, step: Tensor, action: Tensor, old_mean: Tensor, advantage: Tensor, scale: float
) -> Tensor:
    """The mean over B transitions of  -alpha A rho + beta KL( p_theta || p_pre ),  divided by D and a scale.

    Its gradient is that of Eq. 9, over the transitions of a batch:

        E[ -alpha r(x_0, z) sum_t grad log p_theta(x_{t-1} | x_t, z)
           + beta sum_t grad KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ]

    with the advantage A in place of r, which leaves the expectation as it is and takes away noise; and with the
    importance ratio rho = p_theta / p_old (App. A.6), as the images were drawn before the latest optimiser steps.

    Args:
        policy: p_theta.
        x: (B, C, h, w) x_t.
        step: (B,) int64 in [0, T).
        action: (B, C, h, w) x_{t-1}.
        old_mean: (B, C, h, w) of the policy that drew the action.
        advantage: (B,).
        scale: the standard deviation of the advantages; AdamW does not notice it, but the limit of the gradient's norm.
    """
    std, dims = policy.std[step], x[0].numel()
    mean = policy.mean(x, step)
    # A ratio of densities in 256 dimensions is soon 0 or huge, so the published codes take its D-th root. Adding
    # KL( p_old || p_theta ) centres its logarithm: the mean over p_old is 0 (GRPO-Guard, Wang et al. 2025).
    log_rho = log_ratio(action, mean, old_mean, std)
    old_kl = kl_divergence(mean, old_mean, std)
    log_rho = (log_rho + old_kl) / dims
    # The trust region: a transition that has moved too far gets no gradient that would move it still further.
    masked = (old_kl.detach() > CLIP_RANGE) & (advantage * log_rho.detach() > 0) | ~policy.explores[step]
    policy_gradient = dims * (-advantage * log_rho.exp()).masked_fill(masked, 0)
    with torch.no_grad():
        pretrained_mean = policy.mean(x, step, pretrained=True)
    penalty = policy.kl_weight[step] * kl_divergence(mean, pretrained_mean, std)
    return ((REWARD_WEIGHT * policy_gradient + KL_COEF * penalty) / (dims * scale)).mean()


# -------------------------------------------------------------------------------------------------- training (the loop)


def reward_of(images: Tensor) -> Tensor:
    """r(x_0, z), (N,): the share of the prompt that an image shows, and a little for clean drawing."""
    verdict = judge(images, [PROMPT] * len(images))
    return verdict.alignment + 0.2 * verdict.quality


def train(policy: Policy, seed: int, n_images: int) -> None:
    """Algorithm 1: draw images with the current model, take their rewards, follow the gradient of Eq. 9; repeat."""
    optimizer = torch.optim.AdamW(policy.parameters, lr=LEARNING_RATE, weight_decay=0.0, eps=1e-15)
    all_advantages = np.zeros(0)
    n_iterations = math.ceil(n_images / IMAGES_PER_ITERATION)
    for iteration in range(n_iterations):
        # x_{0:T} ~ p_theta(x_{0:T} | z), and r(x_0, z).
        numbers = range(iteration * IMAGES_PER_ITERATION, (iteration + 1) * IMAGES_PER_ITERATION)
        latents, old_means = policy.draw(
            [make_generator(seed, INITIAL_NOISE, number) for number in numbers],
            [make_generator(seed, ACTION_NOISE, number) for number in numbers],
        )
        rewards = reward_of(policy.decode(latents[:, -1]))

        # A = r - b. The mean reward is the baseline b; the paper learns a value function (App. A.5).
        advantages = rewards - rewards.mean()
        all_advantages = np.append(all_advantages, advantages.double().numpy())

        # The rate rises at first, because Adam's first steps have the full length whatever the gradient is. Then it
        # falls, which averages out the noise of the last updates.
        done = min((iteration + 1) * IMAGES_PER_ITERATION / n_images, 1.0)
        rate = LEARNING_RATE * min(done / WARMUP_FRACTION, 1) * (1 - (1 - FINAL_LR_FRACTION) * done)
        optimizer.param_groups[0]["lr"] = rate

        # All transitions of the iteration in a random order, each once; transition number image * T + step.
        order = make_generator(seed, BATCHES, iteration, 0).permutation(len(numbers) * NUM_INFERENCE_STEPS)
        losses = []
        for batch in order.reshape(-1, BATCH_SIZE):
            image, step = torch.from_numpy(batch // NUM_INFERENCE_STEPS), torch.from_numpy(batch % NUM_INFERENCE_STEPS)
            loss = dpok_loss(
                policy,
                x=latents[image, step],
                step=step,
                action=latents[image, step + 1],
                old_mean=old_means[image, step],
                advantage=advantages[image],
                scale=float(all_advantages.std()),
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters, MAX_GRAD_NORM)
            optimizer.step()
            losses.append(loss.item())
        print(f"{numbers.stop:5} images   reward {rewards.mean():.3f}   loss {np.mean(losses):+.4f}", flush=True)


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate(policy: Policy, seed: int) -> tuple[Tensor, Tensor, float]:
    """Draws images with noise that training never uses, the same before and after it.

    Returns:
        The images (N, 3, H, W); whether each shows the prompt in full and nothing else, (N,) bool; and the KL to the
        pre-trained model in nats per image, the sum over the steps that explore.
    """
    images, kl = [], 0.0
    for first in range(0, EVALUATION_IMAGES, 64):
        seeds = [1_000_000 * (seed + 1) + number for number in range(first, min(first + 64, EVALUATION_IMAGES))]
        latents, means = policy.draw(
            [make_generator(image_seed, EVALUATION_INITIAL_NOISE) for image_seed in seeds],
            [make_generator(image_seed, EVALUATION_ACTION_NOISE) for image_seed in seeds],
        )
        images.append(policy.decode(latents[:, -1]))
        for index in policy.explores.nonzero().flatten():
            step = index.expand(len(seeds))
            with torch.no_grad():
                pretrained_mean = policy.mean(latents[:, index], step, pretrained=True)
            kl += kl_divergence(means[:, index], pretrained_mean, policy.std[step]).sum().item()
    pictures = torch.cat(images)
    return pictures, judge(pictures, [PROMPT] * len(pictures)).alignment == 1, kl / EVALUATION_IMAGES


def save_picture(rows: dict[str, tuple[Tensor, Tensor]], path: str, columns: int = 8) -> None:
    """Draws the first images of each row, with a frame around those that show the prompt in full."""
    side, gap, line = 128, 8, 24
    canvas = Image.new("RGB", (columns * (side + gap) + gap, len(rows) * (side + gap + line) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (label, (images, aligned)) in enumerate(rows.items()):
        top = row * (side + gap + line) + line
        pen.text((gap, top - 16), f'"{PROMPT}", {label}: {aligned.float().mean():.1%} show it (framed)', "black")
        for column in range(min(columns, len(images))):
            left = column * (side + gap) + gap
            pixels = (255 * images[column]).round().byte().permute(1, 2, 0).numpy()
            canvas.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
            if aligned[column]:
                pen.rectangle((left - 4, top - 4, left + side + 3, top + side + 3), outline="green", width=4)
    canvas.save(path)


def main() -> None:
    """Evaluates, trains, evaluates again."""
    parser = argparse.ArgumentParser(
        description="DPOK in one file: teach a diffusion model to draw 'three green squares'"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of noise, batches and first weights, at least 0")
    parser.add_argument("--images", type=int, default=2240, help="images drawn in training, at least 1")
    parser.add_argument("--out", default="before_after.png", help="picture of the same seeds before and after training")
    arguments = parser.parse_args()

    policy = Policy(arguments.seed)
    before, aligned_before, _ = evaluate(policy, arguments.seed)
    print(f"before: {aligned_before.float().mean():.1%} fully aligned")
    train(policy, arguments.seed, arguments.images)
    after, aligned_after, kl = evaluate(policy, arguments.seed)
    print(f"after: {aligned_after.float().mean():.1%} fully aligned, {kl:.1f} nats from the pre-trained model")
    save_picture({"before": (before, aligned_before), "after": (after, aligned_after)}, arguments.out)


if __name__ == "__main__":
    main()
