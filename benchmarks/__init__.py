"""Measurements: every operator, and the training step, against what a user would run instead."""

import os

# The profiler that counts peak memory announces every start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import diffmas_ops  # noqa: F401  (before torch; see diffmas_ops.threads)
