"""A row's samples share its trace: read once, kept once, however many they are."""

import copy

import pytest
import torch
from stock import prompts
from tiny_models import causal_lm, packed

import diffmas_ops
from diffmas.agents.topology import TOPOLOGIES
from diffmas.generation import Decoding, engine, pool
from diffmas.generation.pool import OwnTraces, Prompt, SharedTraces
from diffmas.system import MultiAgentSystem


@pytest.fixture
def system(tokenizer):
    return MultiAgentSystem(causal_lm("qwen3", vocab_size=len(tokenizer)), TOPOLOGIES["single"])


def decode(system, rows, tokenizer, step=engine.eager_step, **options):
    ids, lengths = packed(rows)
    decoding = Decoding(**dict(max_new_tokens=12) | options)
    found = engine.generate(system.trajectory, [ids], [lengths], tokenizer, decoding, step=step)
    return [[answer.tokens for answer in row] for row in found]


@pytest.mark.parametrize("max_rows", [3, 8, 64])
def test_prompts_are_read_and_kept_once(system, tokenizer, max_rows):
    reads, columns = [], []
    read = system.agent_model.read

    def counting(trace, lengths, **inputs):
        reads.extend(lengths)
        return read(trace, lengths, **inputs)

    def step(model, traces, tokens):
        used = [c for c in (traces.storage, getattr(traces, "_shared", None)) if c is not None]
        columns.append(sum(c.rows * c.capacity for c in used))
        assert len(tokens) <= max_rows
        return engine.eager_step(model, traces, tokens)

    system.agent_model.read = counting
    rows = prompts(3, 500, longest=400)
    samples = 7
    shared = decode(system, rows, tokenizer, step, samples=samples, max_rows=max_rows)
    assert sorted(reads) == sorted(map(len, rows))
    assert len({tuple(tokens) for row in shared for tokens in row}) > 1
    # Three prompts with room, and short tails: 21 copies of the longest prompt would be 8400 columns.
    assert max(columns) <= 3 * (400 + 64) + 2 * max_rows * 16
    assert [row[:1] for row in shared] == decode(system, rows, tokenizer, samples=1)


@pytest.mark.parametrize(
    "scores",
    [
        {}, dict(softcap=0.7), *(dict(window=n) for n in (1, 4, 19, 100)),
        *(dict(chunk=n) for n in (1, 7, 20, 42, 100)),
        dict(window=9, chunk=20), dict(window=3, chunk=5, softcap=0.7, sinks=torch.arange(4.0)),
    ],
    ids=str,
)  # fmt: skip
def test_attention_over_both_parts(scores):
    """Values of steps against the operator on whole traces, samples unevenly spread over their rows, one come late."""
    shape = dict(num_layers=1, num_kv_heads=2, head_dim=8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    trace = diffmas_ops.KVTrace.allocate(batch=3, capacity=40, **shape)
    lengths = [1, 40, 17]
    k, v = normal(58, 2, 8), normal(58, 2, 8)
    diffmas_ops.cached_attention(normal(58, 4, 8), k, v, trace.open(lengths), layer=0)
    order = [1, 0, 1, 2, 1]

    def tokens(traces):
        logits = torch.empty(0)
        found = [Prompt(trace, row, logits, order.count(row)) for row in range(3)]
        slots = traces.admit([found[row] for row in order[:-1]])
        outs = []
        again = torch.Generator().manual_seed(1)
        for step in range(8):
            if step in (0, 3):
                slots += traces.admit([found[order[-1]]]) if step else []
                traces.plan(slots)
            q, k, v = (torch.randn(len(slots), n, 8, dtype=torch.float64, generator=again) for n in (4, 2, 2))
            traces.open()
            outs.append(diffmas_ops.cached_attention(q, k, v, traces, layer=0, **scores))
            traces.close()
        return torch.cat(outs), traces.position_ids

    (own, positions), (shared, shared_positions) = tokens(OwnTraces(trace)), tokens(SharedTraces(trace))
    assert (
        positions.tolist()
        == shared_positions.tolist()
        == [[lengths[row] + n for row, n in zip(order, (8, 8, 8, 8, 5), strict=True)]]
    )
    assert torch.allclose(own, shared, rtol=0, atol=1e-12)


def test_rows_and_columns_grow_by_doubling():
    trace = diffmas_ops.KVTrace.allocate(num_layers=1, batch=1, num_kv_heads=1, capacity=3, head_dim=8)
    keys, values = trace.storage.layer(0)
    keys.fill_(5), values.fill_(6)
    trace.host_lengths = [3]
    columns = pool.Columns(trace)
    assert columns.copy(trace, 0) == 0
    sizes = []
    for n in range(4, 300):
        columns.reserve(n)
        sizes.append(columns.capacity)
    assert sorted(set(sizes)) == [6, 12, 24, 48, 96, 192, 384]
    keys, values = columns.layer(0)
    assert (keys[0, 0, :3] == 5).all() and (values[0, 0, :3] == 6).all()
    assert [columns.enter() for _ in range(4)] == [1, 2, 3, 4]
    assert columns.rows == 8
    columns.leave(2)
    assert columns.copy(trace, 0) == 2 and columns.lengths == [3, 0, 3, 0, 0]


def test_long_answers(tokenizer):
    """Many doublings, in float64 equal to a trace that had the room from the beginning."""
    model = causal_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=4096, num_hidden_layers=1)
    system = MultiAgentSystem(model, TOPOLOGIES["single"])
    model.generation_config.eos_token_id = None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.chat_template = None
    rows = [torch.tensor([3]), torch.tensor([4, 5])]
    decoding = dict(max_new_tokens=700, temperature=1.0, top_p=0.99)
    grown = decode(system, rows, tokenizer, **decoding)
    room, engine._FIRST_ROOM = engine._FIRST_ROOM, 4096
    try:
        assert decode(system, rows, tokenizer, **decoding) == grown
    finally:
        engine._FIRST_ROOM = room
    assert [len(row[0]) for row in grown] == [700, 700]
