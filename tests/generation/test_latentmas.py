"""Our training-free system is LatentMAS (arXiv 2511.20639), and stays it in a batch.

The algorithm, from the paper: Wₐ = (WₒᵀWₒ + λI)⁻¹WₒᵀWᵢ with λ = 1e-5, output embedding Wₒ, input embedding Wᵢ. An agent
reads its prompt behind the caches of all agents before it; then, m times, its last layer's hidden state h becomes the
input e = hWₐ, scaled to the mean norm of the input embedding's rows, as the published implementation does. What all
that has written into the cache is handed to the next agent; the last one reads its prompt and decodes. Their h, like
ours, is taken behind the model's final norm: there is nothing in which the definitions differ.
"""

import pytest
import torch
from tiny_models import VOCAB, causal_lm, clone, packed
from transformers import DynamicCache

from diffmas.agents.topology import load_topology
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem

AGENTS, ROWS, LATENT_STEPS, NEW = 4, 16, 10, 24


@torch.no_grad()
def latentmas(model, prompts, pad=None):
    """Greedy tokens `[rows][NEW]` of `prompts[agent][row]`, on one DynamicCache.

    Several rows are batched in the published way: padded on the left, pads hidden from the call that brings them in,
    but not from any call after it.
    """
    w_in, w_out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    size = w_in.shape[1]
    realign = torch.linalg.inv(w_out.T @ w_out + 1e-5 * torch.eye(size, dtype=w_in.dtype)) @ w_out.T @ w_in
    rho = w_in.norm(dim=1).mean()
    cache = DynamicCache()

    def forward(mask, **inputs):
        seen = torch.ones(len(mask), cache.get_seq_length(), dtype=torch.long)
        output = model(
            **inputs, attention_mask=torch.cat((seen, mask), 1), past_key_values=cache, output_hidden_states=True
        )
        return output.hidden_states[-1][:, -1], output.logits[:, -1]

    def read(rows):
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), -1 if pad is None else pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
        return forward(mask, input_ids=ids)

    one = torch.ones(len(prompts[0]), 1, dtype=torch.long)
    for rows in prompts[:-1]:
        hidden, _ = read(rows)
        for _ in range(LATENT_STEPS):
            aligned = hidden @ realign
            hidden, _ = forward(one, inputs_embeds=(rho * aligned / aligned.norm(dim=-1, keepdim=True)).unsqueeze(1))
    _, logits = read(prompts[-1])
    tokens = []
    for _ in range(NEW):
        tokens.append(logits.argmax(-1, keepdim=True))
        _, logits = forward(one, input_ids=tokens[-1])
    return torch.cat(tokens, 1).tolist()


@pytest.fixture(scope="module")
def model():
    model = causal_lm("qwen3", initializer_range=0.15).eval()
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    return model


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (AGENTS, ROWS), generator=generator).tolist()
    return [[torch.randint(0, VOCAB, (n,), generator=generator) for n in agent] for agent in lengths]


@pytest.fixture(scope="module")
def alone(model, prompts):
    twin = clone(model)
    return [latentmas(twin, [[agent[row]] for agent in prompts])[0] for row in range(ROWS)]


def decode(model, prompts, tokenizer, alignment="ridge"):
    system = MultiAgentSystem(
        model, load_topology("sequential", "full"), latent_steps=LATENT_STEPS, alignment=alignment
    )
    ids, lengths = zip(*(packed(rows) for rows in prompts), strict=True)
    answers = system.generate(ids, lengths, tokenizer, Decoding(max_new_tokens=NEW, temperature=0))
    return [row[0].tokens for row in answers]


def test_batch_of_one(model, prompts, alone, tokenizer):
    for row in range(ROWS):
        assert decode(model, [[agent[row]] for agent in prompts], tokenizer) == [alone[row]]
    assert len({tuple(tokens) for tokens in alone}) > ROWS / 2
    # The alignment and the latent steps matter to these answers.
    assert decode(model, prompts, tokenizer, "identity") != alone


def test_batch_of_sixteen(model, prompts, alone, tokenizer):
    assert decode(model, prompts, tokenizer) == alone
    published = latentmas(clone(model), prompts, pad=0)
    changed = sum(theirs != ours for theirs, ours in zip(published, alone, strict=True))
    assert changed > ROWS / 2
