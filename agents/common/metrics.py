"""The meaning of the log's columns: one entry for each number that an algorithm of this package logs.

The reference pages are made of this table, so a number is explained once. Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass

from agents.common.monitor import CLIPPED, DIVERSITY_LEFT, EQUAL_SHARE, LARGE_KL, RUNAWAY


@dataclass(frozen=True)
class Metric:
    """One column of the log.

    Attributes:
        meaning: what the number is.
        unit: its unit, and its range if it has one.
        healthy: what is normal, and what another value says.
    """

    meaning: str
    unit: str
    healthy: str


#: The part of a column's name that differs between runs, such as the name of a reward.
NAME = "<name>"

_SHARE = "a share, in [0, 1]"
_REWARD = "that of the reward"
_NONE = "no unit"
_ANY = "It says nothing about health."

#: The columns by name, in the order in which people read them.
METRICS: dict[str, Metric] = {
    # The images of an iteration, and their rewards.
    "rollout/total_reward": Metric(
        "Mean reward of the iteration's images: the weighted sum of all components. `normalize_rewards` changes "
        "what is trained on, and not this.",
        _REWARD,
        "It rises over tens of iterations, and goes up and down between two of them. If it does not rise, see the "
        "guide about that.",
    ),
    f"rollout/{NAME}": Metric(
        "Mean of one component of the reward, by its name, before it is weighted.",
        "that of the component",
        "It rises, or stays, while the total rises. If one falls, the others rise at its expense.",
    ),
    "rollout/held_out_reward": Metric(
        "Mean of a reward that is not trained on, of at most 16 of the images: the weighted sum of its parts.",
        "that of the held-out reward",
        "It rises with the training reward. If it falls while the training reward rises, the model pleases the reward "
        "alone (reward hacking).",
    ),
    f"held_out/{NAME}": Metric(
        "Mean of one part of the held-out reward, by its name, before it is weighted, as evaluations have it.",
        "that of the part",
        "As the held-out reward, unless its weight is below 0.",
    ),
    "rollout/aligned_share": Metric(
        "Share of the images that show all of their prompt and nothing else, by the judge of an embedded world.",
        _SHARE,
        "It rises. It is there if a judge is among the rewards or the held-out ones.",
    ),
    "rollout/reward_std": Metric(
        "Standard deviation of the reward between images of the same prompt. It is what a policy gradient learns from.",
        _REWARD,
        "Above 0. It falls as the model gets good. If it is 0 at the beginning, there is nothing to learn.",
    ),
    "rollout/equal_share": Metric(
        "Share of the images whose prompt gives all of its images the same reward. They teach nothing.",
        _SHARE,
        f"Near 0. Above {EQUAL_SHARE}, a warning comes: take a finer reward, or other prompts.",
    ),
    "rollout/valid_share": Metric(
        "Share of the images whose reward is a finite number.",
        _SHARE,
        "1. A smaller one says that the reward fails for some images, which are left out.",
    ),
    "rollout/images": Metric("Images drawn since the training began.", "images", _ANY),
    "rollout/ep_rew_mean": Metric(
        "Mean reward of the latest 100 images. Stable-Baselines3 logs it; it is smoother than the total reward.",
        _REWARD,
        "As the total reward.",
    ),
    "rollout/ep_len_mean": Metric(
        "Length of an episode. Stable-Baselines3 logs it.",
        "denoising steps",
        "Always the number of denoising steps, T.",
    ),
    # What the images look like, whatever the reward says.
    "images/diversity": Metric(
        "How much two images of the same prompt differ: the root mean square difference of their thumbnails of 16 x 16 "
        "pixels.",
        "pixel values, in [0, 1]",
        f"It may fall a little. Below {DIVERSITY_LEFT:.0%} of what it was at first, a warning comes: the model draws "
        "one image again and again.",
    ),
    "images/brightness": Metric(
        "Mean of all pixels.",
        "pixel values, in [0, 1]",
        f"It stays where it was. If it moves by more than {RUNAWAY}, a warning comes.",
    ),
    "images/saturation": Metric(
        "How strong the colours are: the largest channel of a pixel less its smallest one; the mean over the pixels.",
        "pixel values, in [0, 1]",
        f"It stays where it was. If it moves by more than {RUNAWAY}, a warning comes.",
    ),
    "images/contrast": Metric(
        "Standard deviation of the grey values of an image.",
        "pixel values, in [0, 1]",
        "It stays near its first value. A fall to 0 says that the images are of one colour.",
    ),
    # How far the model has moved.
    "train/kl_to_reference": Metric(
        "KL of the policy to the pre-trained model, over the denoising steps that explore. It says how far the model "
        "has moved. In training, only `DPOK` and `GRPO` with a `kl_coef` above 0 have it, and `DRaFT` with `max_kl`. "
        "The evaluation afterwards has it for every algorithm.",
        "nats per image, at least 0",
        "0 before the first step, then 1 to 30. If it stays exactly 0, nothing is learned. "
        f"Above {LARGE_KL:.0f}, a warning comes: look at the images.",
    ),
    "train/kl_of_last_steps": Metric(
        "The KL of the steps that DRaFT learns through, whether they explore or not.",
        "nats per image, at least 0",
        "The last two steps have hardly any noise, so their KL is far above that of the others.",
    ),
    "train/late_output_mse": Metric(
        "How much the denoiser's output has moved at the steps that explore nothing: the mean squared difference to "
        "the pre-trained model's output.",
        "squared units of the denoiser's output, at least 0",
        "Below 0.1. More says that the last steps drift, which no reward asked for.",
    ),
    "train/distance_to_reference": Metric(
        "Mean squared difference of the denoiser's output and the pre-trained model's.",
        "squared units of the denoiser's output, at least 0",
        "0 at first, then it rises slowly. It is there if `kl_coef` is above 0.",
    ),
    "train/distance_to_old": Metric(
        "Mean squared difference of the denoiser's output and the old policy's.",
        "squared units of the denoiser's output, at least 0",
        "Small and steady. If it grows, the policy runs away from its old self: take a smaller learning rate.",
    ),
    "train/kl_coef": Metric(
        "The weight of the KL, if `target_kl` adapts it.",
        "reward per nat",
        "It settles. If it falls to 1e-4 of its first value and stays there, the reward does not lead as far as the "
        "target.",
    ),
    # How the updates go.
    "train/policy_gradient_loss": Metric(
        "The first term of the loss, -A rho with its weights. Its value means little: its gradient is what counts.",
        "that of the loss",
        "Near 0, on both sides of it. It does not have to fall.",
    ),
    "train/clip_fraction": Metric(
        "Share of the trained steps whose importance ratio was clipped or left out, as the policy had moved too far.",
        _SHARE,
        f"Below 0.3. Above {CLIPPED}, a warning comes: the learning rate is too large, or an iteration has too many "
        "optimiser steps.",
    ),
    "train/mean_ratio": Metric(
        'Mean importance ratio of the trained steps, in the form that the argument `ratio` chooses. "joint" is the '
        "probability of a step under the new policy, divided by that under the old one. The others are roots of it, of "
        "the order of the dimensions of a latent.",
        _NONE,
        'Close to 1: 0.9 to 1.1 for "joint". Roots are always near 1, so look at `train/clip_fraction` instead.',
    ),
    "train/grad_norm": Metric(
        "Norm of the denoiser's gradient, before it is cut to `max_grad_norm`.",
        "that of the loss, per weight",
        "Steady, and above 0. A jump of a hundred times says that one batch went wrong.",
    ),
    "train/loss_scale": Metric(
        "What DPOK divides its loss by: the dimensions of a latent, times the standard deviation of the advantages.",
        _NONE,
        "It settles after a few iterations.",
    ),
    "train/learning_rate": Metric(
        "Learning rate of the denoiser.", _NONE, "It follows the schedule: a short rise, then a fall."
    ),
    "train/n_updates": Metric("Optimiser steps taken since the training began.", "steps", _ANY),
    "train/anchor_loss": Metric(
        "The anchor's loss, before `anchor_coef`: the denoising loss on images of the pre-trained model.",
        "squared units of the denoiser's output, at least 0",
        "It stays near its first value. A rise says that the model forgets.",
    ),
    # The critic.
    "train/explained_variance": Metric(
        "How much of the reward the critic foresees: 1 less the variance of its error, divided by the variance of the "
        "reward.",
        "a share, at most 1",
        "Above 0, and better the nearer to 1. 0 is as good as always saying the mean. Below 0 the critic does harm: "
        'draw more images in an iteration, or take `critic_kind="reward"` or `use_critic=False`.',
    ),
    "train/value_loss": Metric(
        "Mean squared error of the critic that is a network.",
        "squared units of the reward, at least 0",
        "It falls. It stays above 0, as nobody can foresee all of the reward.",
    ),
    "train/vf_learning_rate": Metric("Learning rate of the critic that is a network.", _NONE, _ANY),
    # Losses of the algorithms of the forward process, of DRaFT and of preferences.
    "train/denoising_loss": Metric(
        "How well the denoiser removes noise from the images that are learned from: the mean squared error, without "
        "weights.",
        "squared units of the denoiser's output, at least 0",
        "It falls a little. It does not go to 0.",
    ),
    "train/matching_loss": Metric(
        "DiffusionNFT's loss on better and worse images.",
        "that of the loss",
        "It falls at first, and then goes sideways.",
    ),
    "train/reward": Metric(
        "Mean reward of the images that DRaFT draws again to differentiate them.", _REWARD, "As the total reward."
    ),
    "train/preference_loss": Metric(
        "DiffusionDPO's loss, -log sigmoid of the margin.",
        "nats",
        "0.69 at first, which is a coin's, and lower later. Near 0, the pairs are known by heart.",
    ),
    "train/implicit_accuracy": Metric(
        "Share of the noisy pairs in which the winner's implicit reward is the higher one.",
        _SHARE,
        "0.5 at first, then 0.6 to 0.9.",
    ),
    "train/reward_margin": Metric(
        "The winner's implicit reward less the loser's.", "nats", "0 at first, then above 0. It rises slowly."
    ),
    "train/winner_reward": Metric(
        "Implicit reward of the preferred images: how much better the model denoises them than the pre-trained model "
        "does, times beta / 2.",
        "nats",
        "Near 0 or above. Far below 0, the model gets worse at the preferred images too: take fewer steps, or a larger "
        "beta.",
    ),
    "train/loser_reward": Metric(
        "Implicit reward of the images that were not preferred.", "nats", "Below the winner's."
    ),
    "train/winner_error": Metric(
        "Denoising loss of the preferred images.",
        "squared units of the denoiser's output, at least 0",
        "It stays, or falls.",
    ),
    "train/loser_error": Metric(
        "Denoising loss of the images that were not preferred.",
        "squared units of the denoiser's output, at least 0",
        "It rises a little. If it rises much, so does the winner's in the end.",
    ),
    "train/loser_scale": Metric(
        "With `sdpo`, the share of the loser's gradient that is left.",
        _SHARE,
        "1, or a little less. Near 0, only the winners are learned.",
    ),
    # The clock.
    "time/rollout_images_per_second": Metric(
        "Images drawn and rewarded in a second.", "images per second", "Steady. A fall says that the reward got slow."
    ),
    "time/update_images_per_second": Metric(
        "Images learned from in a second of the update.", "images per second", _ANY
    ),
    "time/fps": Metric("Denoising steps in a second, since the training began.", "denoising steps per second", _ANY),
    "time/iterations": Metric("Iterations done.", "iterations", _ANY),
    "time/time_elapsed": Metric("Time since the training began.", "seconds", _ANY),
    "time/total_timesteps": Metric("Denoising steps drawn since the training began.", "denoising steps", _ANY),
}
