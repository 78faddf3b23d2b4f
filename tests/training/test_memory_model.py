"""The memory model against measured peaks, what it counts against real traces, and what is chosen from it."""

import contextlib

import pytest
import torch
import transformers
from hybrids import TARGETS, hybrid
from tiny_models import causal_lm, with_lora

from diffmas.agents import room
from diffmas.agents.costs import BACKWARD, PHASES, Attention, Plan, Shape, Work
from diffmas.agents.topology import TOPOLOGIES, Agent, Topology
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem
from diffmas.training.batching import ItemLengths, LengthGrouped, fit
from diffmas.training.memory import MemoryModel, ModelMemory, calibrate, counted, measure, plan_of
from diffmas_ops import KVTrace
from diffmas_ops.scores import Scores

VOCAB = 300
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def build(topology="relay", latent_steps=3, checkpointing="none", dtype=torch.float32, **options):
    model = with_lora(causal_lm("llama", dtype=dtype, **SIZES), embeddings=False).train()
    topology = TOPOLOGIES[topology] if isinstance(topology, str) else topology
    return MultiAgentSystem(model, topology, latent_steps=latent_steps, checkpointing=checkpointing, **options)


def forward(system, prompts, answers):
    def ids(lengths):
        return torch.arange(sum(lengths)) % VOCAB

    return lambda: system([ids(p) for p in prompts], prompts, ids(answers), answers, return_logits=False).loss


def reality(system, prompts, answers):
    """Bytes held after the forward, and the peak over forward and backward."""
    system.zero_grad()
    loss, held, peak = measure(forward(system, prompts, answers), "cpu")
    _, _, extra = measure(loss.backward, "cpu")
    return held, max(peak, held + extra)


@pytest.mark.parametrize(
    "topology, latent_steps, checkpointing, dtype, detach",
    [
        ("relay", 6, "prefill", torch.bfloat16, False),
        ("hierarchical", 3, "all", torch.float32, False),
        ("hierarchical", 3, "none", torch.float32, True),
    ],
)
def test_predicts_what_is_measured(topology, latent_steps, checkpointing, dtype, detach):
    check_predictions(build(topology, latent_steps, checkpointing, dtype, detach_trace=detach))


CHAIN = Topology("chain", (Agent("reader"), Agent("solver", ("reader",))))


def recurrent(family, latent_steps=3, checkpointing="none"):
    model = hybrid(family, **SIZES).float()
    model = with_lora(model, targets=TARGETS, embeddings=False).train()
    return MultiAgentSystem(model, CHAIN, latent_steps=latent_steps, checkpointing=checkpointing)


@pytest.mark.parametrize("family, latent_steps, checkpointing", [("qwen3_next", 0, "none"), ("lfm2", 2, "all")])
def test_predicts_what_recurrent_layers_keep(family, latent_steps, checkpointing):
    """States row by row, and chunks that short prompts do not fill."""
    check_predictions(recurrent(family, latent_steps, checkpointing), ((70, 30, [1.0] * 5),))


def sizes_by_layer(family):
    """Layers of different heads and sizes, and values smaller than keys."""
    options = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, max_position_embeddings=512,
    )  # fmt: skip
    if family == "gemma4":
        options |= dict(
            head_dim=8, global_head_dim=16, num_global_key_value_heads=1, hidden_size_per_layer_input=0,
            num_kv_shared_layers=0, vocab_size_per_layer_input=VOCAB, sliding_window=5,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        )  # fmt: skip
        model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**options))
    else:
        options |= dict(
            num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
            v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
            moe_intermediate_size=12,
        )  # fmt: skip
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**options))
    model.config._experts_implementation = "eager"
    return MultiAgentSystem(model, CHAIN, latent_steps=3)


@pytest.mark.parametrize("family", ["gemma4", "deepseek_v3", "qwen3_next", "lfm2"])
def test_counts_what_a_trace_holds(family):
    system = recurrent(family) if family in ("qwen3_next", "lfm2") else sizes_by_layer(family)
    prompts = [[5, 90], [7, 3]]
    ids = [torch.arange(sum(p)) % VOCAB for p in prompts]
    bare, plan = counted(system), plan_of(system, prompts, [1, 1])
    with torch.no_grad():
        state, held, _ = measure(lambda: system.trajectory.communicate(ids, prompts, [1, 1]), "cpu")
    kept = [x for buffers in (state.trace.storage.buffers(), state.trace.states) for x in buffers]
    exactly = sum(x.numel() * x.element_size() for x in kept)
    assert bare.traces(plan) == exactly == pytest.approx(held, abs=600)
    assert (bare.models["default"].state > 1000) == bool(system.agent_model.recurrent)
    # Experts that a token does not take are no work of its.
    if family == "deepseek_v3":
        linear = [p for n, p in system.agent_model.language_model.model.layers.named_parameters() if p.dim() > 1]
        stacks = [p for p in linear if p.dim() == 3]
        routers = 2 * 4 * 32
        expected = sum(p.numel() for p in linear) - sum(p.numel() // 2 for p in stacks) - routers
        assert Shape.of(system.agent_model).weights == expected


def test_states_count_where_decoding_is_refused(monkeypatch):
    system, prompts = recurrent("qwen3_next"), [[5, 9], [7, 3]]
    columns = room.column_bytes(system.agent_model) * sum(plan_of(system, prompts, [1, 1]).columns)
    least = columns + 2 * system.agent_model.state_bytes
    for free in (least, least - 1):
        monkeypatch.setattr(room, "available_bytes", lambda device, free=free: free)
        with contextlib.nullcontext() if free == least else pytest.raises(ValueError, match="2 rows are decoded"):
            room.check_decoding(system.trajectory, prompts, Decoding(max_rows=2), all_rows=False)


#: Long prompts before a short one and the other way round; many rows; ragged rows.
BATCHES = ((200, 40, [1.0, 0.4]), (60, 150, [1.0] * 4))


def check_predictions(system, batches=BATCHES):
    latent_steps = system.latent_steps
    parameter = next(p for p in system.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    numbers = torch.random.get_rng_state()
    model = calibrate(system)
    assert torch.equal(torch.random.get_rng_state(), numbers) and system.latent_steps == latent_steps
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    agents = len(system.topology.agents)
    for first, last, rows in batches:
        prompts = [[int(r * (first if k + 1 < agents else last)) for r in rows] for k in range(agents)]
        answers = [24] * len(rows)
        held, peak = reality(system, prompts, answers)
        plan = plan_of(system, prompts, answers)
        print(f"\nheld {model.saved(plan) / held:.3f}, peak {model.peak(plan) / peak:.3f} of what was measured")
        assert model.saved(plan) == pytest.approx(held, rel=0.15)
        assert model.peak(plan) == pytest.approx(peak, rel=0.15)


#: A small model that reads and thinks for a large one, or the other way round; both kinds of hand-over.
SIZES_OF = {"small": dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2), "large": dict(hidden_size=64)}
TEAM = (("reader", (), 0), ("checker", ("reader",), 1), ("solver", ("checker", "reader"), 1))


def of_two_models(order, bridge_states="latent", latent_steps=3, checkpointing="none", **options):
    agents = tuple(Agent(name, senders, model=order[model]) for name, senders, model in TEAM)
    topology = Topology("two", agents, models={name: {} for name in SIZES_OF}, bridge_states=bridge_states)
    models = {
        name: with_lora(causal_lm("llama", dtype=torch.float32, **SIZES | sizes), embeddings=False).train()
        for name, sizes in SIZES_OF.items()
    }
    options = dict(latent_steps=latent_steps, checkpointing=checkpointing, bridge_initial="random") | options
    return MultiAgentSystem(models, topology, **options)


@pytest.mark.parametrize(
    "order, bridge_states, checkpointing",
    [
        (("small", "large"), "latent", "none"),
        (("large", "small"), "latent", "none"),
        (("large", "small"), "full", "prefill"),
        (("small", "large"), "full", "all"),
        (("large", "small"), "latent", "all"),
    ],
)
def test_predicts_what_several_models_take(order, bridge_states, checkpointing):
    """Whichever of them reads much, and whichever the last agent runs on."""
    check_predictions(of_two_models(order, bridge_states, checkpointing=checkpointing))


def test_counts_the_traces_of_several_models():
    system = of_two_models(("large", "small"))
    prompts = [[5, 90], [7, 3], [4, 4]]
    ids = [torch.arange(sum(p)) % VOCAB for p in prompts]
    plan, made = plan_of(system, prompts, [1, 1]), []

    def allocate(**options):
        made.append(KVTrace.allocate(**options))
        return made[-1]

    system.trajectory.allocate = allocate
    with torch.no_grad():
        system.trajectory.communicate(ids, prompts, [1, 1])
    exactly = sum(x.numel() * x.element_size() for trace in made for x in trace.storage.buffers())
    assert len(made) == len(plan.columns) == 2 and counted(system).traces(plan) == exactly


DIAMOND = {"root": (), "left": ("root",), "right": ("root",), "join": ("right", "left", "root"), "end": ("join",)}


@pytest.mark.parametrize("handover", ["full", "latent"])
@pytest.mark.parametrize("topology", ["sequential", "hierarchical", "relay", "single", "diamond"])
def test_plan_is_what_a_trajectory_does(topology, handover, monkeypatch):
    agents = tuple(Agent(*item) for item in DIAMOND.items()) if topology == "diamond" else TOPOLOGIES[topology].agents
    system = build(Topology(topology, agents, handover), 2)
    calls, traces = [], []
    make, open_call = KVTrace.__init__, KVTrace.open

    def spy_make(self, *args, **kwargs):
        make(self, *args, **kwargs)
        traces.append(self.batch * self.capacity)

    def spy_open(self, *args):
        call = open_call(self, *args)
        calls.append((call.total, sum(self.host_lengths)))
        return call

    monkeypatch.setattr(KVTrace, "__init__", spy_make)
    monkeypatch.setattr(KVTrace, "open", spy_open)
    prompts, answers = [[3 + k, 9 - k, 4] for k in range(len(agents))], [5, 1, 2]
    forward(system, prompts, answers)()
    plan = plan_of(system, prompts, answers)
    assert sorted(plan.columns) == sorted(traces)
    done = iter(calls)
    for call in plan.calls:
        steps = [next(done) for _ in range(call.steps)]
        assert call.tokens == sum(tokens for tokens, _ in steps)
        assert call.columns(Attention(1, 1)) == sum(columns for _, columns in steps)
    assert next(done, None) is None


def test_flops_by_enumeration():
    """Every token through every weight, every query with every key before it."""
    plan = Plan.of(TOPOLOGIES["relay"], 2, [[3, 1], [2, 4]], [1, 2])
    shape = Shape.dense(layers=2, hidden=8, intermediate=12, heads=4, kv_heads=2, head_dim=3, vocab=11, item=2,
                        accumulator=4, adapter=5)  # fmt: skip
    layer = 8 * (4 + 2 + 2) * 3 + 4 * 3 * 8 + 3 * 8 * 12
    assert shape.weights == 2 * layer
    per_token, per_pair = 2 * (2 * layer + 5), 4 * 2 * 4 * 3
    # relay hands over latent steps alone: the sender's own trace, then one that starts with two columns.
    pairs = {"prefill": 1 + 2 + 3 + 1, "latent": (4 + 5) + (2 + 3), "answer": sum(range(3, 6)) + sum(range(3, 9))}
    tokens = {"prefill": 4, "latent": 4, "answer": 9}
    work = plan.work({"default": shape})
    for phase in PHASES:
        head = 2 * 3 * 8 * 11 if phase == "answer" else 0
        assert work[phase].flops == per_token * tokens[phase] + per_pair * pairs[phase] + head
        backward = (per_token + 2 * 5) * tokens[phase] + 2.5 * per_pair * pairs[phase] + head
        assert work[phase + BACKWARD].flops == backward
    # Weights once per latent step, trace columns as far as each step got, the step's own columns written.
    assert work["latent"].bytes == 2 * (2 * (2 * layer + 5) + shape.column * (pairs["latent"] + 4))
    again = plan.work({"default": shape}, "prefill")
    assert again["latent" + BACKWARD] == work["latent" + BACKWARD]
    assert again["prefill" + BACKWARD] == work["prefill" + BACKWARD] + work["prefill"]
    assert Work(6, 4).seconds(2, 1) == 4


@pytest.mark.parametrize("mask", [{}, {"window": 3}, {"chunk": 4}], ids=str)
def test_what_queries_see_by_enumeration(mask):
    layers = Attention(1, 1, **mask)
    for before in range(10):
        for count in range(1, 8):
            first = [Scores(1.0, **mask).first_seen(p) for p in range(before, before + count)]
            assert layers.pairs(before, count) == sum(before + i + 1 - f for i, f in enumerate(first))
            assert layers.columns(before, count) == before + count - min(first)


class Rows:
    """A collator whose items are `(prompt lengths, answer length)`."""

    def __call__(self, items):
        prompts, answers = zip(*items, strict=True)
        return {"prompt_lengths": [list(p) for p in zip(*prompts, strict=True)], "answer_lengths": list(answers)}


def lengths(count=600):
    return ItemLengths([((8 + i % 50, 5), 4) for i in range(count)], Rows(), show_progress=False)


def test_lengths_of_items():
    counted = lengths()
    assert counted.totals == [17 + i % 50 for i in range(600)]
    assert counted.longest(3) == ([[57, 57, 57], [5, 5, 5]], [4, 4, 4])


SHAPE = Shape.dense(2, 8, 12, 4, 2, 3, 11, 2, 4)
MODELS = {
    mode: MemoryModel({"default": ModelMemory(24, 48, read=read, latent=latent)}, logit=66, logit_chunk=5)
    for mode, read, latent in (("none", 1000, 1000), ("prefill", 100, 1000), ("all", 100, 100))
}


def chosen(budget, *, rows=(1, 2, 4, 8), modes=tuple(MODELS), rates=(1e12, 1e11)):
    def plan(count):
        return Plan.of(TOPOLOGIES["relay"], 3, *lengths().longest(count))

    choice = fit({m: MODELS[m] for m in modes}, plan, {"default": SHAPE}, rows=rows, budget=budget, rates=rates)
    assert choice.peak == MODELS[choice.checkpointing].peak(plan(choice.rows)) <= budget
    return choice


def test_fits_the_largest_batch_that_memory_allows():
    whole = chosen(1e12, modes=["none"])
    assert whole.rows == 8
    assert chosen(0.99 * whole.peak, modes=["none"]).rows == 4
    with pytest.raises(ValueError, match=r"a micro-batch of 1 rows needs .* GB .*allowed: .*--checkpointing all"):
        chosen(1000)


def test_latent_steps_are_the_last_to_be_recomputed():
    none = chosen(1e12, rows=[8])
    prefill = chosen(0.99 * none.peak, rows=[8])
    all_ = chosen(0.99 * prefill.peak, rows=[8])
    assert [c.checkpointing for c in (none, prefill, all_)] == ["none", "prefill", "all"]


@pytest.mark.parametrize("copy, expected", [(1e6, (8, "all")), (1e15, (1, "none"))])
def test_cost_decides_between_rows_and_recomputation(copy, expected):
    """Where reading weights is the cost, rows that share it are worth a recomputation."""
    budget = chosen(1e12, rows=[8], modes=["all"]).peak
    choice = chosen(budget, rows=[1, 8], modes=["none", "all"], rates=(1e12, copy))
    assert (choice.rows, choice.checkpointing) == expected


def test_grouped_order_depends_on_seed_and_epoch():
    sampler, twin = (LengthGrouped(lengths().totals, 4, seed=1) for _ in range(2))
    first = list(sampler)
    torch.manual_seed(5)
    assert sorted(first) == list(range(600)) and list(twin) == first
    sampler.set_epoch(1)
    second = list(sampler)
    twin.set_epoch(1)
    assert second != first and list(twin) == second
    totals = lengths().totals
    spread = [max(batch) - min(batch) for i in range(0, 600, 4) if (batch := [totals[j] for j in second[i : i + 4]])]
    assert sum(spread) / len(spread) < 3
