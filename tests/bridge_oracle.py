"""The oracle of teams with bridges: every row alone, every agent on a plain transformers model of its own.

Nothing of diffmas or diffmas_ops; caches grow by `torch.cat`, bridges are written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from oracle import ancestors, entering, rotate
from torch import Tensor
from transformers import DynamicCache


def plain(model):
    """The causal model, without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def mean_norm(model) -> Tensor:
    """Of tokens as they enter the layers."""
    causal = plain(model)
    return entering(causal.get_decoder(), input_ids=torch.arange(causal.config.vocab_size)[None]).norm(dim=1).mean()


def cross(states: Tensor, weights: dict[str, Tensor], norm: Tensor) -> Tensor:
    """`states [m, sender's hidden]` as inputs of the receiver, whose tokens have mean norm `norm`."""
    x = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = x @ weights["linear.weight"].T + weights["linear.bias"]
    if "hidden.0.weight" in weights:
        inner = F.gelu(x @ weights["hidden.0.weight"].T + weights["hidden.0.bias"])
        y = y + inner @ weights["hidden.2.weight"].T + weights["hidden.2.bias"]
    return norm * y / y.norm(dim=-1, keepdim=True)


def trajectory(
    models, dag, bridged, prompts, answer, *, weights, handover="full", latent_steps, detach=False, project=None,
    turn=lambda name: None, bridge_states="latent",
):  # fmt: skip
    """Logits `[answer tokens, vocab]` of one row.

    Args:
        models: by agent; agents that share one share the object.
        dag: agent -> senders, in topological order; `bridged`: agent -> those of them whose hidden states it reads.
        weights: by (sender, receiver), the bridge's parameters by name.
        handover: of the other senders, "full" or "latent".
        project: by model's id, Wₐ; None: the identity.
        bridge_states: "latent": the prompt's last one and those of latent steps; or "full": all of the prompt's.
        turn: told of an agent before its model reads for it.
    """
    sharing = {name: tuple(s for s in senders if s not in bridged.get(name, ())) for name, senders in dag.items()}
    norms = {id(model): mean_norm(model) for model in models.values()}
    written, states = {}, {}
    for name in dag:
        causal = plain(models[name])
        decoder, layers = causal.get_decoder(), range(causal.config.num_hidden_layers)
        norm, weight = norms[id(models[name])], (project or {}).get(id(models[name]))
        cache, length = DynamicCache(), 0
        turn(name)
        for sender in ancestors(sharing, name):
            position, prompt, pairs = written[sender]
            skip = 0 if handover == "full" else prompt
            for layer, (k, v) in enumerate(pairs):
                k = rotate(k[:, :, skip:], length - position - skip, decoder.rotary_emb.inv_freq)
                v = v[:, :, skip:]
                cache.update(*((k.detach(), v.detach()) if detach else (k, v)), layer)
            length += pairs[0][0].shape[2] - skip
        begin = length

        def read(cache=cache, decoder=decoder, **inputs):
            return decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[0]

        # Token by token, in the senders' order.
        for sender in (s for s in dag[name] if s in bridged.get(name, ())):
            handed = states[sender].detach() if detach else states[sender]
            for one in cross(handed, weights[sender, name], norm):
                read(inputs_embeds=one[None, None])
                length += 1
        if name == list(dag)[-1]:
            ids = torch.cat((prompts[name], answer))[None]
            logits = causal(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
            return logits[len(prompts[name]) - 1 : -1]
        own = read(input_ids=prompts[name][None])
        hidden, thought = own[-1], list(own) if bridge_states == "full" else [own[-1]]
        for _ in range(latent_steps):
            y = hidden if weight is None else hidden @ weight
            hidden = read(inputs_embeds=(norm * y / y.norm())[None, None])[-1]
            thought.append(hidden)
        pairs = [(cache.layers[i].keys[:, :, begin:], cache.layers[i].values[:, :, begin:]) for i in layers]
        written[name] = (begin, length - begin + len(prompts[name]), pairs)
        states[name] = torch.stack(thought)


def batch(models, dag, bridged, prompts, answers, **options) -> tuple[Tensor, Tensor]:
    """Mean answer loss and packed logits of a batch: `prompts[name][b]`, `answers[b]`."""
    rows = range(len(answers))
    logits = [
        trajectory(models, dag, bridged, {n: p[b] for n, p in prompts.items()}, answers[b], **options) for b in rows
    ]
    packed = torch.cat(logits)
    return F.cross_entropy(packed, torch.cat(answers), reduction="sum") / packed.shape[0], packed
