"""DPOK in one file: reinforcement learning teaches a diffusion model to count.

DPOK (Fan et al., NeurIPS 2023, https://arxiv.org/abs/2305.16381) fine-tunes a text-to-image diffusion model with a
reward. Here the model is the small embedded one, the prompt is "three green squares", and the reward is a judge that
looks at the finished image. Task, settings and random numbers are those of ``dpok train``:
``tests/docs/test_dpok_single_file.py`` shows that losses and weights equal the library's. Six minutes on one core:

    python docs/dpok_single_file.py --seed 0 --out before_after.png

Denoising is a Markov decision process (Sec. 4.1 of the paper):

    state   s_t = (z, x_t, t)       the prompt, the noisy latent, the denoising step
    action  a_t = x_{t-1}           the next latent
    policy  p_theta(x_{t-1} | x_t, z) = N( mu_theta(x_t, t, z), sigma_t^2 I )
    reward  r(x_0, z) at the last step, 0 before

DPOK minimises (Eq. 8), with p_pre the pre-trained model,

    E_z [  alpha E_{p_theta(x_{0:T} | z)}[ -r(x_0, z) ]
         + beta  sum_t E_{p_theta(x_t | z)}[ KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ]  ]

The centred ratio, the trust region and the choice of steps are not the paper's; ``docs/explanation/algorithms.md`` says
why.

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

# What the numbers are for. The values are the library's.
INITIAL, STEPS, BATCHES, NEW_WEIGHTS, EVALUATION_INITIAL, EVALUATION_STEPS = 1, 2, 3, 4, 6, 7
Noise = list[tuple[np.random.Generator, np.random.Generator]]  # of each image: one for x_T, one for its steps


def make_generator(seed: int, purpose: int, *index: int) -> np.random.Generator:
    """Makes the generator of a purpose and of an image or an iteration, so that no draw depends on another one."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *index)))


def draw_noise(generators: Iterable[np.random.Generator], shape: Sequence[int]) -> Tensor:
    """Draws standard normal numbers (N, *shape), each row from its own generator."""
    return torch.from_numpy(np.stack([generator.standard_normal(shape, np.float32) for generator in generators]))


# ---------------------------------------------------------------------------------------------------------- the policy


class Policy:
    """p_theta(x_{t-1} | x_t, z): a denoiser with a LoRA, and the sampler's Gaussian steps."""

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
        torch.manual_seed(int(make_generator(seed, NEW_WEIGHTS).integers(2**62)))
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=attention + other))
        self.parameters: list[nn.Parameter] = [value for value in self.unet.parameters() if value.requires_grad]
        self._make_table(pipeline.scheduler)

    def _make_table(self, scheduler: DDIMScheduler) -> None:
        """The steps of DDIM with eta = 1 (Song et al. 2021, Eq. 12 and 16), as columns (T, 1, 1, 1)."""
        scheduler.set_timesteps(NUM_INFERENCE_STEPS)
        self.timesteps = scheduler.timesteps  # 901, 801, ..., 1
        previous = self.timesteps - scheduler.config.num_train_timesteps // NUM_INFERENCE_STEPS
        alphas = scheduler.alphas_cumprod.double()  # float64, as 1 - a / b subtracts nearly equal numbers
        alpha = alphas[self.timesteps].view(-1, 1, 1, 1)  # x_t = sqrt(alpha) x_0 + sqrt(1 - alpha) eps
        alpha_prev = torch.where(previous >= 0, alphas[previous], scheduler.final_alpha_cumprod).view(alpha.shape)
        # Eq. 16: sigma_t^2, the variance of x_{t-1} given x_t.
        variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        # Eq. 12: x_{t-1} = sqrt(alpha_prev) x_0 + sqrt(1 - alpha_prev - sigma_t^2) eps + sigma_t noise.
        # This network predicts v, so x_0 = sqrt(alpha) x_t - sqrt(1 - alpha) v, and eps = sqrt(1 - alpha) x_t +
        # sqrt(alpha) v (Salimans & Ho 2022, App. D). Hence mu_theta is linear in x_t and v.
        signal, direction = alpha_prev.sqrt(), (1 - alpha_prev - variance).sqrt()
        self.sample_coef = (signal * alpha.sqrt() + direction * (1 - alpha).sqrt()).float()
        self.output_coef = (signal * -(1 - alpha).sqrt() + direction * alpha.sqrt()).float()
        self.std = variance.sqrt().float()  # sigma_t

        # The last two steps have hardly any noise. What they draw cannot be seen, so they get no policy gradient. But
        # the KL holds them.
        self.explores = (self.std >= 0.1 * self.std.max()).flatten()  # (T,)

    def mean(self, x: Tensor, step: Tensor, pretrained: bool = False) -> Tensor:
        """mu_theta(x_t, t, z), or that of p_pre, (B, C, h, w), of latents (B, C, h, w) at steps (B,)."""
        if pretrained:
            self.unet.disable_adapters()
        v = self.unet(x, self.timesteps[step], self.text.expand(len(x), -1, -1)).sample
        if pretrained:
            self.unet.enable_adapters()
        return self.sample_coef[step] * x + self.output_coef[step] * v

    @torch.no_grad()
    def draw(self, noise: Noise) -> tuple[Tensor, Tensor]:
        """Draws x_T ~ N(0, I), then T times x_{t-1} ~ p_theta(x_{t-1} | x_t, z), of N images.

        Returns the latents x_T, ..., x_0, (N, T + 1, C, h, w), and the means of the steps, (N, T, C, h, w).
        """
        initial, actions = zip(*noise, strict=True)
        latents, means = [draw_noise(initial, self.latent_shape)], []
        for index in range(NUM_INFERENCE_STEPS):
            means.append(self.mean(latents[-1], torch.full((len(noise),), index)))
            latents.append(means[-1] + self.std[index] * draw_noise(actions, self.latent_shape))
        return torch.stack(latents, dim=1), torch.stack(means, dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns the images (N, 3, H, W) in [0, 1] of finished latents (N, C, h, w)."""
        chunks = latents.split(16)  # small enough for a processor's cache
        pixels = torch.cat([self.vae.decode(chunk / self.vae.config.scaling_factor).sample for chunk in chunks])
        return (pixels / 2 + 0.5).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------------ the loss

# The log-probability of an action is log N(x; mu, sigma^2 I) = -||x - mu||^2 / (2 sigma^2) + constant. p_theta, p_old
# and p_pre have the same sigma_t, so log-ratios and KLs have a closed form, exactly 0 where the means are equal.


def log_ratio(action: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """log p_theta(x_{t-1} | x_t, z) - log p_old(x_{t-1} | x_t, z) in nats, (B,)."""
    return ((mean - old_mean) * (action - 0.5 * (mean + old_mean)) / std.square()).flatten(1).sum(1)


def kl_divergence(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """KL( N(mean, std^2 I) || N(other_mean, std^2 I) ) = ||mean - other_mean||^2 / (2 std^2) in nats, (B,)."""
    return (0.5 * ((mean - other_mean) / std).square()).flatten(1).sum(1)


def dpok_loss(
    policy: Policy, x: Tensor, step: Tensor, action: Tensor, old_mean: Tensor, advantage: Tensor, scale: float
) -> Tensor:
    """The mean over B transitions of  -alpha A rho + beta KL( p_theta || p_pre ),  divided by D and a scale.

    Its gradient is that of Eq. 9,

        E[ -alpha r(x_0, z) sum_t grad log p_theta(x_{t-1} | x_t, z)
           + beta sum_t grad KL( p_theta(x_{t-1} | x_t, z) || p_pre(x_{t-1} | x_t, z) ) ]

    with the advantage A in place of r, which takes away noise and leaves the expectation as it is; and with the
    importance ratio rho = p_theta / p_old (App. A.6), because optimiser steps have been taken since p_old drew the
    images. x, action and old_mean are (B, C, h, w): x_t, x_{t-1} and mu_old; step and advantage are (B,).
    """
    std, dims = policy.std[step], x[0].numel()  # (B, 1, 1, 1), and D
    mean = policy.mean(x, step)
    # A ratio of densities in 256 dimensions is soon 0 or huge, so the published codes take its D-th root. Adding
    # KL( p_old || p_theta ) centres its logarithm: the mean over p_old is 0 (GRPO-Guard, Wang et al. 2025).
    log_rho = log_ratio(action, mean, old_mean, std)
    old_kl = kl_divergence(mean, old_mean, std)
    log_rho = (log_rho + old_kl) / dims
    # The trust region: a transition that has moved too far gets no gradient that would move it still further.
    too_far = (old_kl.detach() > CLIP_RANGE) & (advantage * log_rho.detach() > 0)
    policy_gradient = dims * (-advantage * log_rho.exp()).masked_fill(too_far | ~policy.explores[step], 0)
    with torch.no_grad():
        pretrained_mean = policy.mean(x, step, pretrained=True)
    penalty = kl_divergence(mean, pretrained_mean, std)
    return ((REWARD_WEIGHT * policy_gradient + KL_COEF * penalty) / (dims * scale)).mean()


# -------------------------------------------------------------------------------------------------- training (the loop)


def reward_of(images: Tensor) -> Tensor:
    """r(x_0, z), (N,): the share of the prompt that an image shows, and a little for clean drawing."""
    verdict = judge(images, [PROMPT] * len(images))
    return verdict.alignment + 0.2 * verdict.quality


def train(policy: Policy, seed: int, n_images: int) -> None:
    """Algorithm 1: draw images with the current model, take their rewards, follow the gradient of Eq. 9; repeat."""
    optimizer = torch.optim.AdamW(policy.parameters, weight_decay=0.0, eps=1e-15)  # an eps far below any gradient
    all_advantages = np.zeros(0)
    for iteration in range(math.ceil(n_images / IMAGES_PER_ITERATION)):
        # x_{0:T} ~ p_theta(x_{0:T} | z), and r(x_0, z).
        numbers = range(iteration * IMAGES_PER_ITERATION, (iteration + 1) * IMAGES_PER_ITERATION)
        noise = [(make_generator(seed, INITIAL, k), make_generator(seed, STEPS, k)) for k in numbers]
        latents, old_means = policy.draw(noise)
        rewards = reward_of(policy.decode(latents[:, -1]))

        # A = r - b, where the baseline b is the mean reward; the paper learns a value function (App. A.5). AdamW does
        # not notice that the loss is divided by the std of all A so far, but the limit of the gradient's norm does.
        advantages = rewards - rewards.mean()
        all_advantages = np.append(all_advantages, advantages.double().numpy())
        scale = float(all_advantages.std())

        # The rate rises at first, because Adam's first steps have the full length whatever the gradient is. Then it
        # falls, which averages out the noise of the last updates.
        done = min(numbers.stop / n_images, 1)
        shape = min(done / WARMUP_FRACTION, 1) * (1 - (1 - FINAL_LR_FRACTION) * done)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * shape

        # All transitions of the iteration in a random order, each once; they are numbered by image * T + step.
        order = make_generator(seed, BATCHES, iteration, 0).permutation(len(numbers) * NUM_INFERENCE_STEPS)
        for batch in order.reshape(-1, BATCH_SIZE):
            image, step = (torch.from_numpy(part) for part in np.divmod(batch, NUM_INFERENCE_STEPS))
            action, old_mean = latents[image, step + 1], old_means[image, step]
            loss = dpok_loss(policy, latents[image, step], step, action, old_mean, advantages[image], scale)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters, MAX_GRAD_NORM)
            optimizer.step()
        print(f"{numbers.stop:5} images   mean reward {rewards.mean():.3f}", flush=True)


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate(policy: Policy, seed: int) -> tuple[Tensor, Tensor, float]:
    """Draws images with noise that training never uses, the same before and after it.

    Returns the images (N, 3, H, W), whether each is fully aligned (shows all of the prompt and nothing else), (N,), and
    the KL to the pre-trained model in nats per image, over the steps that explore.
    """
    seeds = range(1_000_000 * (seed + 1), 1_000_000 * (seed + 1) + EVALUATION_IMAGES)
    noise = [(make_generator(k, EVALUATION_INITIAL), make_generator(k, EVALUATION_STEPS)) for k in seeds]
    latents, means = policy.draw(noise)
    images = policy.decode(latents[:, -1])
    kl = 0.0
    for index in policy.explores.nonzero().flatten():
        step = index.expand(len(images))
        with torch.no_grad():
            pretrained_mean = policy.mean(latents[:, index], step, pretrained=True)
        kl += kl_divergence(means[:, index], pretrained_mean, policy.std[step]).mean().item()
    return images, judge(images, [PROMPT] * len(images)).alignment == 1, kl


def save_picture(rows: dict[str, tuple[Tensor, Tensor]], path: str, columns: int = 8) -> None:
    """Draws the first images of each row, with a frame around the fully aligned ones."""
    side, gap, line = 128, 8, 28
    canvas = Image.new("RGB", (columns * (side + gap) + gap, len(rows) * (side + gap + line) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (label, (images, aligned)) in enumerate(rows.items()):
        top = row * (side + gap + line) + line
        text = f'"{PROMPT}", {label} training: {aligned.float().mean():.1%} fully aligned (framed)'
        pen.text((gap, top - 24), text, "black", font_size=15)
        for column in range(min(columns, len(images))):
            left = column * (side + gap) + gap
            pixels = (255 * images[column]).round().byte().permute(1, 2, 0).numpy()
            canvas.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
            if aligned[column]:
                pen.rectangle((left - 4, top - 4, left + side + 3, top + side + 3), outline="green", width=4)
    canvas.save(path)


def main() -> None:
    """Evaluates, trains, evaluates again."""
    parser = argparse.ArgumentParser(description=f"DPOK in one file: teaches a diffusion model to draw {PROMPT!r}")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise, batches and first weights, at least 0")
    parser.add_argument("--images", type=int, default=2240, help="images drawn in training, in steps of 64")
    parser.add_argument("--out", default="before_after.png", help="picture of the same seeds before and after training")
    arguments = parser.parse_args()

    policy = Policy(arguments.seed)
    images, aligned, _ = evaluate(policy, arguments.seed)
    print(f"before: {aligned.float().mean():.1%} fully aligned", flush=True)
    rows = {"before": (images, aligned)}
    save_picture(rows, arguments.out)  # now, so that a path that cannot be written is known before the training
    train(policy, arguments.seed, arguments.images)
    images, aligned, kl = evaluate(policy, arguments.seed)
    print(f"after: {aligned.float().mean():.1%} fully aligned, {kl:.1f} nats from the pre-trained model")
    save_picture(rows | {"after": (images, aligned)}, arguments.out)


if __name__ == "__main__":
    main()
