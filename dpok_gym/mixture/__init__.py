"""A diffusion model with a known answer: Gaussian mixtures in one or two dimensions, drawn as a dot on a sheet.

The exact score of such data is known at every noise level (:mod:`dpok_gym.mixture.data`), so the pre-trained denoiser
(:mod:`dpok_gym.mixture.model`) is exact, and so are the answers that fine-tuning should find
(:mod:`dpok_gym.mixture.exact`).
"""
