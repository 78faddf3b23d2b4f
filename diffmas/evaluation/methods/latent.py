"""Latent steps without any training, with the ridge alignment: LatentMAS (arXiv 2511.20639)."""

from diffmas.evaluation.methods.base import ALL_CONTROLS, Method

LATENT = Method("latent", "latent steps, no training", settings={"alignment": "ridge"}, controls=ALL_CONTROLS)
