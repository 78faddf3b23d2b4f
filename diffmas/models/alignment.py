"""The alignment: from the space hidden states leave the model in to the space its inputs come in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffmas_ops import latent_project

ALIGNMENTS = ("identity", "ridge", "learned", "soft")
#: Those that are a matrix found without training.
FITTED = ALIGNMENTS[:2]


@dataclass(frozen=True)
class AlignmentOptions:
    """Which alignment, and how gradients go back over it; the names are those of a run's settings.

    Args:
        alignment: "identity", "ridge", "learned" or "soft".
        alignment_initial: what a learned one starts at, "identity" or "ridge".
        alignment_temperature: T > 0 of a soft one; `alignment_temperature_learned`: what its training starts at.
        alignment_top_k: the likeliest tokens that a soft one takes; 0: all.
        latent_grad_clip: most that a gradient may grow relative to what it is the gradient of, from an input back to
            the hidden state it was made of; 0: any growth; default: 1 for a soft one, 0 for others. See
            :func:`clipped`.

    Raises:
        ValueError: a value outside its range, named.
    """

    alignment: str = "identity"
    alignment_initial: str = "identity"
    alignment_temperature: float = 0.7
    alignment_temperature_learned: bool = False
    alignment_top_k: int = 0
    latent_grad_clip: float | None = None

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment is {self.alignment!r}; allowed: {', '.join(ALIGNMENTS)}")
        if self.alignment_initial not in FITTED:
            raise ValueError(f"alignment_initial is {self.alignment_initial!r}; allowed: {', '.join(FITTED)}")
        if not (self.alignment_temperature > 0 and math.isfinite(self.alignment_temperature)):
            raise ValueError(f"alignment_temperature is {self.alignment_temperature}; allowed: above 0 and finite")
        if self.alignment_top_k < 0:
            raise ValueError(f"alignment_top_k is {self.alignment_top_k}; allowed: integers ≥ 0 (0: all tokens)")
        if not (self.grad_clip >= 0 and math.isfinite(self.grad_clip)):
            raise ValueError(f"latent_grad_clip is {self.latent_grad_clip}; allowed: 0 (off) or above, and finite")

    @classmethod
    def of(cls, settings: Any) -> AlignmentOptions:
        """From whatever has attributes of these names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @property
    def untrained(self) -> AlignmentOptions:
        """The alignment before any training."""
        initial = self.alignment_initial if self.alignment == "learned" else self.alignment
        return replace(self, alignment=initial, alignment_temperature_learned=False)

    @property
    def grad_clip(self) -> float:
        """The bound on a gradient's growth; 0: none."""
        if self.latent_grad_clip is None:
            # Without one, a softmax upon a softmax throws a training off within its first steps.
            return float(self.alignment == "soft")
        return self.latent_grad_clip

    @property
    def trains(self) -> bool:
        """Whether the alignment has parameters of its own."""
        return self.alignment == "learned" or (self.alignment == "soft" and self.alignment_temperature_learned)


IDENTITY = AlignmentOptions()


def clipped(align: Callable[[Tensor], Tensor], hidden: Tensor, limit: float) -> Tensor:
    """`align(hidden)`, whose gradient at a row h of `hidden` is cut to `‖∂h‖ ‖h‖ ≤ limit · ‖∂e‖ ‖e‖`; 0: not cut.

    Both sides say how much the loss changes when h, or e = align(h), changes by a given part of itself. Taken as it is,
    h in its own direction and rescaled, that never grows; a sharp softmax lets it grow tenfold and more, a step at a
    time. A row's bound scales with the row's own gradient: it is the same in every batch and for every scale of the
    loss.
    """
    if not limit or not (torch.is_grad_enabled() and hidden.requires_grad):
        return align(hidden)
    source = hidden.view_as(hidden)
    aligned = align(source)
    # Wide enough that the squares of a half-precision gradient stay in range.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad():
        ratio = limit * _norms(aligned, wide) / _norms(source, wide)
    arriving: list[Tensor] = []

    def arrive(gradient: Tensor) -> None:
        arriving[:] = [_norms(gradient, wide)]

    def cut(gradient: Tensor) -> Tensor:
        norms, bound = _norms(gradient, wide), ratio * arriving.pop()
        return torch.where(norms > bound, gradient.to(wide) * (bound / norms), gradient.to(wide)).to(gradient.dtype)

    aligned.register_hook(arrive)
    source.register_hook(cut)
    return aligned


def _norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).norm(dim=-1, keepdim=True)


class Alignment(nn.Module):
    """Maps the last hidden state to the next input embedding: `ρ · (h Wₐ) / ‖h Wₐ‖`.

    ρ is the mean row norm of tokens as the model's input. Wₐ is the identity ("identity"), the ridge solution
    `(WₒᵀWₒ + λI)⁻¹ WₒᵀWᵢ` of LatentMAS (arXiv 2511.20639; "ridge"), or trained from one of the two ("learned").
    With tied embeddings the ridge solution is the identity up to λ, and no product is taken. A learned Wₐ is kept in
    float32, whatever the model's dtype.

    Args:
        input_embedding: tokens as the model's input, `[vocab, hidden]`. output_embedding: the head's weight, alike.
        tied: they are one weight, up to a factor.
        options: which one, of those that are a matrix.
        ridge: λ.
    """

    def __init__(
        self,
        input_embedding: Tensor,
        output_embedding: Tensor,
        options: AlignmentOptions = IDENTITY,
        *,
        tied: bool = False,
        ridge: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        self.options, self.backend = options, backend
        wide = input_embedding.detach().to(torch.promote_types(input_embedding.dtype, torch.float32))
        self.target_norm = float(wide.norm(dim=-1).mean())
        weight = None
        if options.untrained.alignment == "ridge" and not tied:
            weight = ridge_alignment(input_embedding, output_embedding, ridge)
        if options.trains:
            eye = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
            self.weight = nn.Parameter(eye if weight is None else weight.to(wide.dtype))
        else:
            weight = None if weight is None else weight.to(input_embedding.dtype)
            self.register_buffer("weight", weight, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[rows, hidden]` to `[rows, hidden]`, in the dtype of `hidden`."""
        return clipped(self._project, hidden, self.options.grad_clip)

    def _project(self, hidden: Tensor) -> Tensor:
        return latent_project(hidden, self.weight, self.target_norm, backend=self.backend)


def ridge_alignment(input_embedding: Tensor, output_embedding: Tensor, ridge: float = 1e-5) -> Tensor:
    """`(WₒᵀWₒ + λI)⁻¹ WₒᵀWᵢ`, float64 `[hidden, hidden]` (LatentMAS, arXiv 2511.20639)."""
    w_in, w_out = input_embedding.detach().double(), output_embedding.detach().double()
    gram = w_out.T @ w_out
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, w_out.T @ w_in)
