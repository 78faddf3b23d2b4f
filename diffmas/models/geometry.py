"""What a model's attention layers are, found by running it: sizes, masks, and how keys turn with their positions.

Configurations name the same thing in many ways and leave much unsaid. So the model reads a few tokens at the first
positions and once more further on, with an attention function that writes down what it is given and passes every token
its own value. What a layer computes then depends on positions through its keys alone: a layer's keys at the two places
differ by how they turn, and a candidate that explains the difference is how they do.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.keywords import carried, carry_keywords
from diffmas.models.outline import decoder_of, input_embedding
from diffmas_ops import Rotary
from diffmas_ops.kv_concat.reference import rotate

_PROBE = "diffmas_probe"
#: Frequencies that do not depend on the sequence length: a key can be re-phased after it was written.
_STATIC = ("default", "linear", "llama3", "yarn", "proportional")
_TOKENS = 4
#: How far apart the two readings are at most: far enough for slow frequencies to show, near enough for float32 angles.
_APART = 997
#: Values of a mask that stands for a pattern: 0 sees all, n > 0 a window of n, -n a chunk of n.
_NEITHER = torch.iinfo(torch.int64).min


@dataclass(frozen=True, eq=False)
class LayerGeometry:
    """One attention layer.

    Attributes:
        slot: which of a trace's layers it writes.
        num_heads: of its queries; num_kv_heads: of its keys and values.
        head_dim: of a trace's columns: the larger of the sizes of keys and values.
        value_dim: of its values, and of what it returns.
        window: columns a query sees, the last of them its own; None: all.
        chunk: a query sees the columns of its own chunk of so many; None: all.
        rotary: how its keys turn; None: not at all.
        offset: dims in front of those that turn.
        immovable: why its keys cannot be moved to other positions; None where they can.
        changes: the rope type of frequencies that change with the length, and the position where; None: they never do.
    """

    slot: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    chunk: int | None = None
    rotary: Rotary | None = None
    offset: int = 0
    immovable: str | None = None
    changes: tuple[str, int] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are as large, and keys stand in a trace as they are."""
        return self.value_dim == self.head_dim and not self.offset


@dataclass
class _Sighting:
    """What the attention function of a layer was given, once."""

    module: nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


def geometry_of(model: PreTrainedModel) -> dict[int, LayerGeometry]:
    """The attention layers of `model` by their `layer_idx`.

    Raises:
        UnsupportedModelError: attention outside transformers' interface, a mask of another pattern, a layer that
            attends twice, keys of another number than values.
    """
    config = model.config.get_text_config(decoder=True)
    apart = max(1, min(_APART, _last_position(config) - _TOKENS))
    with _probing(model), torch.no_grad(), _other_scales(model):
        try:
            near = _read(model, 0)
        except _NoKeywords:
            lists = (child for child in decoder_of(model).children() if isinstance(child, nn.ModuleList))
            carry_keywords(layer for child in lists for layer in child)
            near = _read(model, 0)
        far = _read(model, apart)
    if not near:
        raise UnsupportedModelError(f"model {type(model).__name__} does not use transformers' attention interface")
    _check_once(model, near)
    candidates = list(_candidates(model, config))
    geometry = {}
    for slot, (one, other) in enumerate(zip(near, far, strict=True)):
        sizes = _sizes(model, slot, one)
        geometry[one.layer] = replace(sizes, **_mask(model, one), **_turn(one, other, apart, candidates, config))
    return geometry


def keys_at(model: PreTrainedModel, begin: int) -> list[Tensor]:
    """The keys that its attention layers write of a few tokens from position `begin` on.

    Raises:
        UnsupportedModelError: the model has no code for these positions.
    """
    with _probing(model), torch.no_grad():
        return [seen.key for seen in _read(model, begin)]


def _last_position(config) -> int:
    limits = [configured(config, name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    rope = getattr(config, "rope_parameters", None) or {}
    limits += [config_.get("original_max_position_embeddings") for config_ in _rope_parameters(rope)]
    limits.append(configured(config, "original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=_APART + _TOKENS)


def configured(config, name: str) -> Any:
    """What a configuration says, of all layers together; None where it says nothing, or not the same of all."""
    try:
        return getattr(config, name, None)
    except (RuntimeError, ValueError):
        return None


def _rope_parameters(rope: dict) -> list[dict]:
    """`rope_parameters`, of every kind of layer where it has several."""
    nested = [inner for inner in rope.values() if isinstance(inner, dict)]
    return nested or [rope]


class _NoKeywords(UnsupportedModelError):
    """Attention that does not get a forward's keywords."""


def _watch(module, query, key, value, attention_mask, trace_call=None, **options):
    """transformers attention function that writes down what it is given; every token gets its own value."""
    trace_call = carried("trace_call") if trace_call is None else trace_call
    if not isinstance(trace_call, list):
        raise _NoKeywords(
            f"model with {type(module).__name__} does not hand its forward's keywords on to its attention"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModelError(f"attention of {type(module).__name__} has no layer_idx")
    trace_call.append(_Sighting(module, layer, query, key, value, attention_mask, options))
    heads, kv_heads = query.shape[1], value.shape[1]
    if key.shape[2] != query.shape[2] or heads % kv_heads:
        raise UnsupportedModelError(
            f"attention of {type(module).__name__} has {key.shape[2]} keys in {kv_heads} heads for {query.shape[2]} "
            f"queries in {heads}; allowed: a key for every query, heads that divide"
        )
    return value.repeat_interleave(heads // kv_heads, 1).transpose(1, 2).contiguous(), None


def _pattern(mask_function=None, local_size=None, **sizes) -> Tensor:
    """transformers mask function: a mask that says what its pattern is, in every element."""
    length = sizes.get("q_length") or len(sizes["cache_position"])
    code = _NEITHER
    with contextlib.suppress(IndexError, RuntimeError, TypeError):
        local = [local_size, -local_size] if local_size else [0]
        code = next((c for c in local if _follows(mask_function, c)), _NEITHER)
    return torch.full((sizes.get("batch_size", 1), 1, length, length), code, dtype=torch.int64)


def _follows(mask_function, code: int) -> bool:
    """Whether a mask function sees what `code` says, around every place where that changes."""
    size = abs(code) or 5
    for query in {0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 3}:
        first = 0 if code == 0 else max(0, query - size + 1) if code > 0 else query // size * size
        near = {0, 1, first - 1, first, first + 1, query - 1, query, query + 1}
        columns = torch.tensor(sorted(c for c in near if c >= 0))
        sees = mask_function(torch.tensor(0), torch.tensor(0), torch.tensor(query), columns)
        if not torch.equal(sees.expand(columns.shape), (columns >= first) & (columns <= query)):
            return False
    return True


AttentionInterface.register(_PROBE, _watch)
AttentionMaskInterface.register(_PROBE, _pattern)


@contextlib.contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """With the watching attention function, in evaluation mode."""
    before, modes = model.config._attn_implementation, [(m, m.training) for m in model.modules()]
    try:
        model.set_attn_implementation(_PROBE)
        model.eval()
        yield
    finally:
        model.set_attn_implementation(before)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _other_scales(model: PreTrainedModel) -> Iterator[None]:
    """With other values in the vectors of attention modules: ones and zeros would hide a norm behind the rotation."""
    vectors = [
        p
        for module in model.modules()
        if hasattr(module, "layer_idx")
        for p in module.parameters()
        if p.dim() == 1 and p.is_floating_point()
    ]
    before = [p.detach().clone() for p in vectors]
    generator = torch.Generator().manual_seed(0)
    try:
        for p in vectors:
            scale, shift = torch.rand(2, *p.shape, generator=generator)
            p.mul_((0.5 + scale).to(p)).add_(shift.to(p))
        yield
    finally:
        for p, value in zip(vectors, before, strict=True):
            p.copy_(value)


def _read(model: PreTrainedModel, begin: int) -> list[_Sighting]:
    embedding = input_embedding(model)
    device = embedding.weight.device
    tokens = torch.arange(1, 1 + _TOKENS, device=device) % embedding.num_embeddings
    positions = torch.arange(begin, begin + _TOKENS, device=device)
    seen: list[_Sighting] = []
    inputs = dict(input_ids=tokens[None], position_ids=positions[None], use_cache=False, trace_call=seen)
    try:
        decoder_of(model)(**inputs)
    except UnsupportedModelError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"model {type(model).__name__} cannot read packed tokens at positions {begin} … {begin + _TOKENS - 1}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return sorted(seen, key=lambda sighting: sighting.layer)


def _check_once(model: PreTrainedModel, sightings: Sequence[_Sighting]) -> None:
    twice = [layer for layer, times in Counter(s.layer for s in sightings).items() if times > 1]
    if twice:
        raise UnsupportedModelError(
            f"model {type(model).__name__} attends more than once in layers {twice}; allowed: once a layer"
        )


def _sizes(model: PreTrainedModel, slot: int, seen: _Sighting) -> LayerGeometry:
    (_, key_heads, _, key_dim), (_, kv_heads, _, value_dim) = seen.key.shape, seen.value.shape
    if key_heads != kv_heads:
        raise UnsupportedModelError(
            f"model {type(model).__name__} has {key_heads} heads of keys and {kv_heads} of values; allowed: as many"
        )
    return LayerGeometry(slot, seen.query.shape[1], kv_heads, max(key_dim, value_dim), value_dim)


def _mask(model: PreTrainedModel, seen: _Sighting) -> dict[str, Any]:
    """Window or chunk, as the model masks the layer."""
    if getattr(seen.module, "is_causal", True) is False or seen.options.get("is_causal") is False:
        raise UnsupportedModelError(f"layer {seen.layer} of {type(model).__name__} is not causal")
    if seen.mask is None:
        return {}
    code = seen.mask.flatten()[0].item()
    if code == _NEITHER or code != int(code) or not (seen.mask == code).all():
        raise UnsupportedModelError(
            f"layer {seen.layer} of {type(model).__name__} has an attention mask of its own; "
            "allowed: causal, a sliding window, chunks"
        )
    return {} if code == 0 else {"window": int(code)} if code > 0 else {"chunk": int(-code)}


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A way in which keys may turn; `kind`: the rope type of its frequencies, `limit`: where they change."""

    rotary: Rotary | None
    offset: int = 0
    kind: str = "default"
    limit: int | None = None


def _candidates(model: PreTrainedModel, config) -> Iterator[_Candidate]:
    """All that the model's own frequencies allow."""
    yield _Candidate(None)
    for inv_freq, kind in _frequencies(model, config):
        changing = kind not in _STATIC
        for interleaved in (False, True):
            yield _Candidate(
                Rotary(inv_freq, interleaved), kind=kind, limit=_last_position(config) if changing else None
            )


def _frequencies(model: PreTrainedModel, config) -> Iterator[tuple[Tensor, str]]:
    """Frequencies and their rope type: buffers of rotary modules, and what the configuration says of those without."""
    found: list[Tensor] = []
    kinds_of: list[str] = []
    for module in decoder_of(model).modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name or buffer.dim() != 1:
                continue
            kinds = getattr(module, "rope_type", "default")
            kind = kinds.get(name.removesuffix("_inv_freq"), "default") if isinstance(kinds, dict) else kinds
            # Frequencies that change later may begin as others stay.
            alike = zip(found, kinds_of, strict=True)
            if not any(f.shape == buffer.shape and torch.equal(f, buffer) and k == kind for f, k in alike):
                found.append(buffer.detach().clone())
                kinds_of.append(kind)
                yield found[-1], kind
    rope = getattr(config, "rope_parameters", None) or {}
    thetas = {p.get("rope_theta") for p in _rope_parameters(rope)} | {configured(config, "rope_theta"), 10000.0}
    dims = {configured(config, name) for name in ("rotary_dim", "qk_rope_head_dim", "head_dim")}
    dims.add(config.hidden_size // (configured(config, "num_attention_heads") or 1))
    for theta in sorted(filter(None, thetas)):
        for dim in sorted(d for d in dims if d and d % 2 == 0):
            device = cast(Tensor, input_embedding(model).weight).device
            inv_freq = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
            if not any(f.shape == inv_freq.shape and torch.allclose(f.double(), inv_freq) for f in found):
                found.append(inv_freq)
                yield inv_freq, "default"


def _turn(one: _Sighting, other: _Sighting, apart: int, candidates: Sequence[_Candidate], config) -> dict[str, Any]:
    """How the layer's keys turn, by the candidate that explains best what they are `apart` positions further on."""
    before, after = (s.key[0].transpose(0, 1).double() for s in (one, other))
    placed = [replace(c, offset=offset) for c in candidates for offset in _offsets(c, before.shape[-1])]
    errors = [_error(c, before, after, apart) for c in placed]
    least = min(errors)
    # Where two explain it alike, the layer may have either: that which changes is the careful answer.
    alike = [i for i, error in enumerate(errors) if error == least] or [0]
    best = next((i for i in alike if placed[i].limit is not None), alike[0])
    tolerance = 1e-3 if one.key.dtype in (torch.float32, torch.float64) else 30 * torch.finfo(one.key.dtype).eps
    if not errors[best] <= tolerance:
        return {"immovable": f"no rotation explains how keys change with their positions (error {errors[best]:.1g})"}
    chosen = placed[best]
    turn: dict[str, Any] = {"rotary": chosen.rotary, "offset": chosen.offset}
    if chosen.limit is not None:
        turn["immovable"] = f"frequencies change with the length (rope_type {chosen.kind!r})"
        turn["changes"] = (chosen.kind, chosen.limit)
    return turn


def _offsets(candidate: _Candidate, dim: int) -> list[int]:
    """Where in `dim` dims those that turn may begin: at the front, or at the end."""
    if candidate.rotary is None:
        return [0]
    turned = 2 * candidate.rotary.inv_freq.numel()
    return sorted({0, dim - turned}) if turned <= dim else []


def _error(candidate: _Candidate, before: Tensor, after: Tensor, apart: int) -> float:
    """Relative difference of `after` from `before [tokens, heads, dim]` turned by `apart` positions."""
    if (rotary := candidate.rotary) is not None:
        angles = apart * rotary.inv_freq.double()
        before = before.roll(-candidate.offset, -1)
        after = after.roll(-candidate.offset, -1)
        before = rotate(before, angles.cos(), angles.sin(), rotary.interleaved)
    size = after.norm()
    return float((after - before).norm() / size) if size > 0 else float("nan")
