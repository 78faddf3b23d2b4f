"""What families other than plain ones go through in use: scaled positions, trace controls, commands that go on."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.models import configurations
from benchmarks.models.comparison import EXACT, QUICK, REFUSED, check, ragged
from diffmas import chat, train
from diffmas.agents.controls import noise
from diffmas.agents.topology import load_topology
from diffmas.agents.trajectory import HandedOver
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem

YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
PLAIN = dict(rope_type="default", rope_theta=1e4)


@pytest.mark.parametrize(
    "family, rope, moves",
    [
        ("gemma3_text", dict(full_attention=YARN, sliding_attention=PLAIN), True),
        ("gemma3_text", dict(full_attention=DYNAMIC, sliding_attention=PLAIN), False),
        ("deepseek_v3", YARN | dict(mscale=0.9, mscale_all_dim=0.7), True),
    ],
)
def test_scaled_positions(family, rope, moves, monkeypatch):
    """Frequencies of one kind of layer too, whatever moves; those that change with the length where nothing does."""
    # transformers adds to what it is given.
    own = configurations.OVERRIDES.get(family, {}) | {"rope_parameters": copy.deepcopy(rope)}
    monkeypatch.setitem(configurations.OVERRIDES, family, own)
    cases = (QUICK[0], QUICK[4])
    chain, moving = check(family, "own", cases)
    assert chain.verdict == EXACT
    assert moving.verdict == (EXACT if moves else REFUSED)
    assert moves or "frequencies change with the length (rope_type 'dynamic'" in moving.why


class NoText:
    """A tokenizer for answers that nobody reads."""

    eos_token_id = chat_template = None

    def decode(self, tokens, **options):
        return ""


def received(system, rows):
    """The trace that the last agent gets, and what it answers to noise in its place."""
    prompts, _ = ragged([agent.name for agent in system.topology.agents], 4)
    packed = [(torch.cat([p[r] for r in rows]), [len(p[r]) for r in rows]) for p in prompts.values()]
    ids, lengths = zip(*packed, strict=True)
    decoding, seeds = Decoding(max_new_tokens=4, temperature=0), [9 + r for r in rows]
    with torch.no_grad():
        trace = system.trajectory.communicate(ids, lengths).trace
    answers = system.generate(ids, lengths, NoText(), decoding, seeds=seeds, control=noise)
    return trace, [answer.tokens for (answer,) in answers]


@pytest.mark.parametrize("family", ["gemma4_text", "deepseek_v3"])
def test_noise_for_layers_of_their_own_sizes(family):
    """Its norms are those of what was written, without what fills values up; a row's does not know of the others."""
    system = MultiAgentSystem(configurations.causal_lm(family, "own"), load_topology("relay"), latent_steps=2).eval()
    trace, together = received(system, range(4))
    for row in range(4):
        assert received(system, [row])[1] == [together[row]]
    before = [x.clone() for x in trace.storage.buffers()]
    noise(HandedOver(trace, []), range(4))
    sizes = {g.slot: g for g in system.agent_model.layers.values()}
    for drawn, own in zip(trace.storage.buffers(), before, strict=True):
        assert torch.allclose(*(x[..., :2, :].norm(dim=-1) for x in (drawn, own)))
    filled = [g for g in sizes.values() if g.value_dim < g.head_dim]
    assert bool(filled) == (family == "deepseek_v3")
    for g in filled:
        values = trace.storage.layer(g.slot).values[:, :, :2]
        assert values[..., : g.value_dim].all() and not values[..., g.value_dim :].any()


@pytest.fixture
def base(tmp_path, monkeypatch):
    """`base(family)`: folder of a tiny model with the embedded base's tokenizer."""
    tokenizer = build_tokenizer()

    def build(family):
        monkeypatch.setitem(configurations.TINY, "vocab_size", len(tokenizer))
        config = configurations.configuration(family, "own")
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        torch.manual_seed(0)
        model = configurations.model_class(family)(config).float()
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return build


def test_a_run_with_states_is_evaluated_goes_on_and_is_talked_to(base, tmp_path, capsys):
    chain = "name: chain\nagents:\n  - {name: sender}\n  - {name: solver, receives: [sender]}\n"
    (tmp_path / "chain.yaml").write_text(chain)
    flags = dict(
        model=base("qwen3_next"), task="relay", topology=tmp_path / "chain.yaml", latent_steps=1, max_steps=2,
        learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=1, eval_size=3, max_new_tokens=2,
        temperature=0, save_steps=1, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    run, again = tmp_path / "run", tmp_path / "again"
    # With every control of its trace.
    assert train.main([f"--{k}={v}" for k, v in flags.items()] + [f"--output_dir={run}"]) == 0
    assert "another row's trace" in capsys.readouterr().out
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-2")
    rest = [f"--output_dir={again}", "--resume_from_checkpoint=True", "--disable_final_eval=True"]
    assert train.main([f"--{k}={v}" for k, v in flags.items()] + rest) == 0
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (run, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    assert chat.main(["--run", str(run), "--once", "evidence=A3 B14", "question=Recall B"]) == 0
    assert "Where the answer looked" in capsys.readouterr().out
