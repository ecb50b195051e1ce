"""A world with known answers: a diffusion model of Gaussian mixtures, whose points are drawn as a dot on a sheet.

The score of a Gaussian mixture is known at every noise level (:mod:`dpok_gym.mixture.data`). So the pre-trained
denoiser (:mod:`dpok_gym.mixture.model`) is exact, and what fine-tuning should find can be computed
(:mod:`dpok_gym.mixture.exact`). Points have one or two dimensions.
"""
