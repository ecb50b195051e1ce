"""Small tools that know nothing of diffusion."""
