"""The alignment Wₐ: from the space hidden states leave the model in to the space its inputs come in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffmas_ops import latent_project

ALIGNMENTS = ("identity", "ridge", "learned")


class Alignment(nn.Module):
    """Maps the last hidden state to the next input embedding: `ρ · (h Wₐ) / ‖h Wₐ‖`.

    ρ is the mean row norm of tokens as the model's input. Wₐ is the identity ("identity"), the ridge solution
    `(WₒᵀWₒ + λI)⁻¹ WₒᵀWᵢ` of LatentMAS (arXiv 2511.20639; "ridge"), or trained from one of the two ("learned").
    With tied embeddings the ridge solution is the identity up to λ, and no product is taken. A learned Wₐ is kept in
    float32, whatever the model's dtype.

    Args:
        input_embedding: tokens as the model's input, `[vocab, hidden]`. output_embedding: the head's weight, alike.
        tied: they are one weight, up to a factor.
        kind: "identity", "ridge" or "learned".
        initial: what a learned Wₐ starts at, "identity" or "ridge".
        ridge: λ.
    """

    def __init__(
        self,
        input_embedding: Tensor,
        output_embedding: Tensor,
        kind: str = "identity",
        *,
        initial: str = "identity",
        tied: bool = False,
        ridge: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        if kind not in ALIGNMENTS:
            raise ValueError(f"alignment is {kind!r}; allowed: {', '.join(ALIGNMENTS)}")
        if initial not in ALIGNMENTS[:2]:
            raise ValueError(f"alignment_initial is {initial!r}; allowed: {', '.join(ALIGNMENTS[:2])}")
        #: The kind this alignment had before any training.
        self.initial = initial if kind == "learned" else kind
        self.kind, self.backend = kind, backend
        wide = input_embedding.detach().to(torch.promote_types(input_embedding.dtype, torch.float32))
        self.target_norm = float(wide.norm(dim=-1).mean())
        weight = None
        if self.initial == "ridge" and not tied:
            weight = ridge_alignment(input_embedding, output_embedding, ridge)
        if kind == "learned":
            eye = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
            self.weight = nn.Parameter(eye if weight is None else weight.to(wide.dtype))
        else:
            weight = None if weight is None else weight.to(input_embedding.dtype)
            self.register_buffer("weight", weight, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[rows, hidden]` to `[rows, hidden]`, in the dtype of `hidden`."""
        return latent_project(hidden, self.weight, self.target_norm, backend=self.backend)


def ridge_alignment(input_embedding: Tensor, output_embedding: Tensor, ridge: float = 1e-5) -> Tensor:
    """`(WₒᵀWₒ + λI)⁻¹ WₒᵀWᵢ`, float64 `[hidden, hidden]` (LatentMAS, arXiv 2511.20639)."""
    w_in, w_out = input_embedding.detach().double(), output_embedding.detach().double()
    gram = w_out.T @ w_out
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, w_out.T @ w_in)
