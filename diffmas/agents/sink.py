"""Where a model's attention rests: how many first columns take much of it, whatever comes later.

A model that was trained on text reads its first token from everywhere, less for what it says than as a place for
attention to go to. A hand-over of latent steps alone takes that place away.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedTokenizerBase

from diffmas.agents.topology import AUTO, Topology
from diffmas.models.agent_model import AgentModel, evaluating
from diffmas.models.attention_masses import AttentionMasses
from diffmas_ops import KVTrace

#: No sink is known to take more columns than this.
MOST = 4
#: What a column of a sink takes at least of the attention of later tokens, layers and heads together: some five times
#: an even share of the text below.
_SHARE = 0.1
_TOKENS = 64
_TEXT = (
    "The lamp on the desk was still warm when she came back. Someone had read the letters, put them back in the wrong "
    "order and left a window open, so that there was snow on the floor. She shut it, sat down and counted: nothing "
    "seemed to be missing. Then she saw that one of the envelopes was not hers."
)


def find_sinks(
    topology: Topology,
    models: Mapping[str, AgentModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase | None],
) -> int | dict[str, int]:
    """:func:`find_sink` of all models on which a trace is handed over; of several, by name where they differ.

    Raises:
        ValueError: a model without a tokenizer.
    """
    receiving = dict.fromkeys(topology.model_of(agent) for agent in topology.agents if topology.sharing(agent))
    found = {}
    for name in receiving or (topology.model_of(topology.last),):
        if (tokenizer := tokenizers.get(name)) is None:
            where = f" for model {name}" if len(models) > 1 else ""
            raise ValueError(
                f"handover_sink is {AUTO!r} without a tokenizer{where}; allowed: tokenizer=…, which it is found with, "
                "or a number"
            )
        found[name] = find_sink(models[name], tokenizer)
    numbers = set(found.values())
    return numbers.pop() if len(numbers) == 1 else found


@torch.no_grad()
def find_sink(model: AgentModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of a text's first columns, up to the last of them that is one, are where later tokens' attention rests.

    The model reads a fixed text once; asked is the second half of its tokens.
    """
    ids = torch.tensor(tokenizer.encode(_TEXT)[:_TOKENS], device=model.device)
    trace = KVTrace.allocate(batch=1, capacity=len(ids), **model.trace_sizes)
    call = trace.open([len(ids)])
    call.attend = masses = AttentionMasses(call, len(ids) // 2)
    with evaluating(model):
        model.run(call, input_ids=ids)
    shares = masses.mean()[0].mean(0)[:MOST].tolist()
    return max((column + 1 for column, share in enumerate(shares) if share >= _SHARE), default=0)
