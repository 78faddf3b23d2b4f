"""How a layer's keys turn with their positions: candidates from a model's frequencies, and what explains its keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffmas.models.outline import decoder_of, input_embedding
from diffmas_ops import Rotary
from diffmas_ops.kv_concat.reference import rotate

#: Rope types whose frequencies do not depend on the length.
_STATIC = ("default", "linear", "llama3", "yarn", "proportional")


class Change(NamedTuple):
    """Keys that depend on how far the longest row of a forward goes.

    Attributes:
        kind: the rope type of their frequencies.
        limit: the first position that changes them.
        once: whether they are the same for all positions from there on.
    """

    kind: str
    limit: int
    once: bool


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Those by which keys turn: a buffer of the model, as it is at the time, or fixed ones.

    `kind`: their rope type. `decoder`, `path`, `name`: the buffer of the decoder's module at `path`, and its name;
    `decoder` None: they are `fixed`.
    """

    kind: str
    decoder: nn.Module | None = None
    path: str = ""
    name: str = ""
    fixed: Tensor | None = None
    _made: dict[bool, tuple[Tensor, int, Rotary]] = field(default_factory=dict, repr=False)

    @property
    def current(self) -> Tensor:
        found = self.fixed if self.decoder is None else self.decoder.get_submodule(self.path)._buffers[self.name]
        assert found is not None
        return found

    def rotary(self, interleaved: bool) -> Rotary:
        """Made anew only where they were changed: casting a model rounds them."""
        now = self.current
        version = 0 if now.is_inference() else now._version
        made = self._made.get(interleaved)
        if made is None or made[0] is not now or made[1] != version:
            # Kept beyond the inference that may have asked first.
            with torch.inference_mode(False):
                self._made[interleaved] = made = (now, version, Rotary(now.detach().clone(), interleaved))
        return made[2]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A way in which keys may turn; `frequencies` None: not at all. `offset`: dims in front of those that turn."""

    frequencies: Frequencies | None
    interleaved: bool = False
    offset: int = 0

    @property
    def rotary(self) -> Rotary | None:
        return None if self.frequencies is None else self.frequencies.rotary(self.interleaved)

    @property
    def is_static(self) -> bool:
        """Whether its rope type says that it does not depend on the length."""
        return self.frequencies is None or self.frequencies.kind in _STATIC


def candidates_of(model: PreTrainedModel, config) -> list[Candidate]:
    """All that the model's own frequencies allow."""
    found = [Candidate(None)]
    for frequencies in _frequencies(model, config):
        found += [Candidate(frequencies, interleaved) for interleaved in (False, True)]
    return found


def rotary_buffers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """The buffers of frequencies in a model's decoder, behind the path of their module, the module, and their name."""
    for path, module in decoder_of(model).named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1:
                yield path, module, name, buffer


def configured(config, name: str) -> Any:
    """What a configuration says, of all layers together; None where it says nothing, or not the same of all."""
    try:
        return getattr(config, name, None)
    except (RuntimeError, ValueError):
        return None


def position_limits(config) -> list[int]:
    """The lengths that a configuration names: of what a model was made for, or where its frequencies change."""
    limits = [configured(config, name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits += [of.get("original_max_position_embeddings") for of in _rope_parameters(config)]
    limits.append(configured(config, "original_max_position_embeddings"))
    return [limit for limit in limits if limit]


def _rope_parameters(config) -> list[dict]:
    """`rope_parameters`, of every kind of layer where it has several."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [inner for inner in rope.values() if isinstance(inner, dict)]
    return nested or [rope]


def _frequencies(model: PreTrainedModel, config) -> Iterator[Frequencies]:
    """Buffers of rotary modules, and what the configuration says of those without."""
    found: list[Frequencies] = []
    for path, module, name, buffer in rotary_buffers(model):
        kinds = getattr(module, "rope_type", "default")
        kind = kinds.get(name.removesuffix("_inv_freq"), "default") if isinstance(kinds, dict) else kinds
        if not any(f.kind == kind and torch.equal(f.current, buffer) for f in found):
            found.append(Frequencies(kind, decoder_of(model), path, name))
            yield found[-1]
    thetas = {p.get("rope_theta") for p in _rope_parameters(config)} | {configured(config, "rope_theta"), 10000.0}
    dims = {configured(config, name) for name in ("rotary_dim", "qk_rope_head_dim", "head_dim")}
    dims.add(config.hidden_size // (configured(config, "num_attention_heads") or 1))
    known = [f.current.double() for f in found]
    for theta in sorted(filter(None, thetas)):
        for dim in sorted(d for d in dims if d and d % 2 == 0):
            device = input_embedding(model).weight.device
            inv_freq = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
            if not any(f.shape == inv_freq.shape and torch.allclose(f, inv_freq) for f in known):
                known.append(inv_freq)
                yield Frequencies("default", fixed=inv_freq)


def turning(
    before: Tensor, after: Tensor, apart: int, candidates: Sequence[Candidate], *, changing: bool
) -> Candidate | str:
    """The candidate that explains best how keys `before` become `after`, `apart` positions further on; or why none.

    `before`, `after`: `[heads, tokens, dim]`. `changing`: whether they were seen to change with the length, which tells
    frequencies that begin alike apart.
    """
    tolerance = 1e-3 if before.dtype in (torch.float32, torch.float64) else 30 * torch.finfo(before.dtype).eps
    before, after = (keys.transpose(0, 1).double() for keys in (before, after))
    placed = [replace(c, offset=offset) for c in candidates for offset in _offsets(c, before.shape[-1])]
    errors = [_error(c, before, after, apart) for c in placed]
    best = min(range(len(placed)), key=lambda i: (errors[i] != errors[i], errors[i], placed[i].is_static is changing))
    if not errors[best] <= tolerance:
        return f"no rotation explains how keys change with their positions (error {errors[best]:.1g})"
    return placed[best]


def _offsets(candidate: Candidate, dim: int) -> list[int]:
    """Where in `dim` dims those that turn may begin: at the front, or at the end."""
    if candidate.frequencies is None:
        return [0]
    turned = 2 * candidate.frequencies.current.numel()
    return sorted({0, dim - turned}) if turned <= dim else []


def _error(candidate: Candidate, before: Tensor, after: Tensor, apart: int) -> float:
    """Relative difference of `after` from `before [tokens, heads, dim]` turned by `apart` positions."""
    if (rotary := candidate.rotary) is not None:
        angles = apart * rotary.inv_freq.double()
        before = before.roll(-candidate.offset, -1)
        after = after.roll(-candidate.offset, -1)
        before = rotate(before, angles.cos(), angles.sin(), rotary.interleaved)
    size = after.norm()
    return float((after - before).norm() / size) if size > 0 else float("nan")
