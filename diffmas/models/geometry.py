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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.in_place import own_forwards
from diffmas.models.keywords import carried, carry_keywords
from diffmas.models.outline import attend_with, decoder_of, input_embedding
from diffmas.models.rotation import Candidate, Change, candidates_of, position_limits, rotary_buffers, turning
from diffmas_ops import Rotary

_PROBE = "diffmas_probe"
_TOKENS = 4
#: How far apart the two readings are at most: far enough for slow frequencies to show, near enough for float32 angles.
_APART = 997
#: The last position that a model is asked for.
_FARTHEST = 2**24
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
        turn: how its keys turn, by frequencies as they are at the time.
        immovable: why its keys cannot be moved to other positions; None where they can.
        changes: how its keys depend on the longest row of a forward; None: they do not.
    """

    slot: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    chunk: int | None = None
    turn: Candidate = Candidate(None)
    immovable: str | None = None
    changes: Change | None = None

    @property
    def rotary(self) -> Rotary | None:
        """How its keys turn; None: not at all."""
        return self.turn.rotary

    @property
    def offset(self) -> int:
        """Dims in front of those that turn."""
        return self.turn.offset

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


class _Sightings:
    """No list: hooks that move a forward's inputs to another device make new lists of those they find."""

    def __init__(self) -> None:
        self.all: list[_Sighting] = []


def geometry_of(model: PreTrainedModel) -> dict[int, LayerGeometry]:
    """The attention layers of `model` by their `layer_idx`.

    Raises:
        UnsupportedModelError: attention outside transformers' interface, a mask of another pattern, a layer that
            attends twice, keys of another number than values.
    """
    config = model.config.get_text_config(decoder=True)
    apart = max(1, min(_APART, _nearest_limit(config) - _TOKENS))
    with _probing(model), torch.no_grad(), _other_scales(model):
        try:
            near = _read(model, _positions())
        except _NoKeywords:
            lists = (child for child in decoder_of(model).children() if isinstance(child, nn.ModuleList))
            carry_keywords(layer for child in lists for layer in child)
            near = _read(model, _positions())
        if not near:
            raise UnsupportedModelError(f"model {type(model).__name__} does not use transformers' attention interface")
        _check_once(model, near)
        if changing := _changing(model, position_limits(config), _far(model, config)):
            # What was seen of a longer row may have left its frequencies behind.
            near = _read(model, _positions())
        far = _read(model, _positions(apart))
    candidates = candidates_of(model, config)
    geometry = {}
    for slot, (one, other) in enumerate(zip(near, far, strict=True)):
        sizes = _sizes(model, slot, one)
        turn = turning(one.key[0], other.key[0], apart, candidates, changing=one.layer in changing)
        moved: dict[str, Any] = {"immovable": turn} if isinstance(turn, str) else {"turn": turn}
        kind = "none" if isinstance(turn, str) or turn.frequencies is None else turn.frequencies.kind
        if one.layer in changing or (isinstance(turn, Candidate) and not turn.is_static):
            # What cannot be seen is as the rope type says.
            limit, once = changing.get(one.layer, (_nearest_limit(config), kind == "longrope"))
            moved["changes"] = Change(kind, limit, once)
            moved["immovable"] = f"frequencies change with the length (rope_type {kind!r}, from position {limit} on)"
        geometry[one.layer] = replace(sizes, **_mask(model, one), **moved)
    return geometry


def _changing(model: PreTrainedModel, limits: Sequence[int], far: int) -> dict[int, tuple[int, bool]]:
    """Layers whose queries or keys depend on how far the forward goes.

    By layer, the first position that changes them, and whether all positions from there on do so alike. Keys are looked
    at as far on as the nearest of the `limits` that a configuration names allows: there, other frequencies turn them
    by whole angles, which 16 bits show too. Where frequencies change slowly, the limit is the configuration's.
    """
    last = max(_TOKENS - 1, min(*limits, _APART) - 1 if limits else _APART)
    first = [0, last // 2, last - 1, last]
    if far <= last:
        return {}
    near = _read(model, first)

    def others(sightings: Sequence[_Sighting]) -> list[Tensor]:
        return [torch.cat((s.query[0, :, :-1], s.key[0, :, :-1])) for s in sightings]

    reached = {first[-1]: others(near)}

    def at(last: int) -> list[Tensor]:
        if last not in reached:
            if len(reached) > 1:
                # Some remember the longest row, until a short one comes.
                _read(model, _positions())
            reached[last] = others(_read(model, [*first[:-1], last]))
        return reached[last]

    def differ(slot: int, one: int, other: int) -> bool:
        x, y = at(one)[slot].double(), at(other)[slot].double()
        return bool((x - y).norm() > 8 * torch.finfo(near[slot].key.dtype).eps * x.norm())

    found = {}
    for slot, sighting in enumerate(near):
        if not differ(slot, first[-1], far):
            continue
        below, limit = first[-1], far
        while limit - below > 1:
            middle = (below + limit) // 2
            below, limit = (below, middle) if differ(slot, first[-1], middle) else (middle, limit)
        once = not differ(slot, limit, far) and not differ(slot, limit, (limit + far) // 2)
        found[sighting.layer] = (max([n for n in limits if n <= limit], default=limit), once)
    return found


def keys_at(model: PreTrainedModel, begin: int) -> list[Tensor]:
    """The keys that its attention layers write of a few tokens from position `begin` on.

    Raises:
        UnsupportedModelError: the model has no code for these positions.
    """
    with _probing(model), torch.no_grad():
        return [seen.key for seen in _read(model, _positions(begin))]


def _nearest_limit(config) -> int:
    return min(position_limits(config), default=_APART + _TOKENS)


def _far(model: PreTrainedModel, config) -> int:
    """A position beyond all where frequencies may change; of a model without any, the last that it has for sure."""
    if next(rotary_buffers(model), None) is None:
        return _nearest_limit(config) - 1
    return min(4 * max(position_limits(config), default=_APART), _FARTHEST)


class _NoKeywords(UnsupportedModelError):
    """Attention that does not get a forward's keywords."""


def _watch(module, query, key, value, attention_mask, trace_call=None, **options):
    """transformers attention function that writes down what it is given; every token gets its own value."""
    trace_call = carried("trace_call") if trace_call is None else trace_call
    if not isinstance(trace_call, _Sightings):
        raise _NoKeywords(
            f"model with {type(module).__name__} does not hand its forward's keywords on to its attention"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModelError(f"attention of {type(module).__name__} has no layer_idx")
    trace_call.all.append(_Sighting(module, layer, query, key, value, attention_mask, options))
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
    """With the watching attention function and the modules' own code, in evaluation mode."""
    before, modes = model.config._attn_implementation, [(m, m.training) for m in model.modules()]
    try:
        attend_with(model, _PROBE)
        model.eval()
        with own_forwards(model):
            yield
    finally:
        attend_with(model, before)
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


def _positions(begin: int = 0) -> list[int]:
    return list(range(begin, begin + _TOKENS))


def _read(model: PreTrainedModel, positions: Sequence[int]) -> list[_Sighting]:
    """What the layers' attention is given of a few tokens at `positions`."""
    embedding = input_embedding(model)
    device = embedding.weight.device
    tokens = torch.arange(1, 1 + _TOKENS, device=device) % embedding.num_embeddings
    at = torch.tensor([positions], device=device)
    seen = _Sightings()
    inputs = dict(input_ids=tokens[None], position_ids=at, use_cache=False, trace_call=seen)
    try:
        decoder_of(model)(**inputs)
    except UnsupportedModelError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"model {type(model).__name__} cannot read packed tokens at positions {positions[0]} … {positions[-1]}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return sorted(seen.all, key=lambda sighting: sighting.layer)


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
