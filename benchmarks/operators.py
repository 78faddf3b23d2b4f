"""Which experiments there are of an operator's case."""

from __future__ import annotations

import torch

from benchmarks import attention, moves
from benchmarks.cases import Append, Attention, Case, Concat, Expect, LatentRollout, Merge, Project
from benchmarks.experiment import Experiment

_BUILDERS = {
    Attention: {
        "forward": attention.forward,
        "backward": attention.backward,
        "token backward": attention.token_backward,
    },
    LatentRollout: {"backward": attention.latent_backward, "forward": attention.latent_forward},
    Append: {"forward": moves.append_forward, "backward": moves.append_backward},
    Concat: {"forward": moves.concat_forward, "backward": moves.concat_backward},
    Project: {"forward": moves.project_forward, "backward": moves.project_backward},
    Expect: {"forward": moves.expect_forward, "backward": moves.expect_backward},
    Merge: {"forward": moves.merge_forward},
}


def directions(case: Case) -> tuple[str, ...]:
    """What is measured of a case; a call of one token a row takes the deferred backward."""
    found = tuple(_BUILDERS[type(case)])
    if type(case) is Attention:
        return ("forward", "token backward" if case.new == 1 else "backward")
    return found


def build(case: Case, direction: str, device: str) -> Experiment:
    """The experiment of `case` in one of its `directions`, with the same random inputs every time."""
    torch.manual_seed(0)
    return _BUILDERS[type(case)][direction](case, device)
