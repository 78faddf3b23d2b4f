"""Measurements: every operator, and the training step, against what a user would run instead."""
