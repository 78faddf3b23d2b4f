"""Bridges: hidden states of one agent as inputs that another one reads, whatever models the two run on.

The receiver's own layers write the keys and values of what it reads. So the two models may have any sizes, tokenizers
and families, and gradients go through the receiver and the bridge back into the sender.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffmas.agents.topology import Topology
from diffmas.models.agent_model import AgentModel
from diffmas.models.alignment import ridge_alignment
from diffmas_ops import latent_project

BRIDGES = ("linear", "mlp")
INITIAL = ("tokens", "random")
#: Sender and receiver.
Edge = tuple[str, str]


@dataclass(frozen=True)
class States:
    """Hidden states of every row: `packed [states of all rows, hidden]`, of which row b has `lengths[b]`."""

    packed: Tensor
    lengths: list[int]

    def rows(self) -> tuple[Tensor, ...]:
        """Each row's own, `[states, hidden]`."""
        return self.packed.split(self.lengths)

    def of_rows(self, rows: Sequence[int]) -> States:
        """Those of other rows of the batch."""
        own = self.rows()
        return States(torch.cat([own[row] for row in rows]), [self.lengths[row] for row in rows])


def row_by_row(parts: Sequence[States]) -> States:
    """Of every row, its states in each of `parts`, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    lengths = [sum(own) for own in zip(*(part.lengths for part in parts), strict=True)]
    if all(len(set(part.lengths)) == 1 for part in parts):
        alike = [part.packed.unflatten(0, (-1, part.lengths[0])) for part in parts]
        return States(torch.cat(alike, 1).flatten(0, 1), lengths)
    rows = zip(*(part.rows() for part in parts), strict=True)
    return States(torch.cat([states for row in rows for states in row]), lengths)


@dataclass(frozen=True)
class BridgeOptions:
    """What bridges are made of, and what they start at; the names are those of a run's settings.

    Args:
        bridge: "linear", or "mlp": beside the linear map, one with a hidden layer of four times the receiver's width.
        bridge_initial: "tokens": the map that takes the sender's output embeddings of tokens to the receiver's input
            embeddings of the same tokens, by least squares; "random".

    Raises:
        ValueError: an unknown value, named.
    """

    bridge: str = "linear"
    bridge_initial: str = "tokens"

    def __post_init__(self) -> None:
        if self.bridge not in BRIDGES:
            raise ValueError(f"bridge is {self.bridge!r}; allowed: {', '.join(BRIDGES)}")
        if self.bridge_initial not in INITIAL:
            raise ValueError(f"bridge_initial is {self.bridge_initial!r}; allowed: {', '.join(INITIAL)}")

    @classmethod
    def of(cls, settings: Any) -> BridgeOptions:
        """From whatever has attributes of these names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


class Bridge(nn.Module):
    """`ρ y / ‖y‖` with `y = f(x / rms(x))`: a hidden state x of the sender as an input of the receiver.

    f is linear; as an MLP, `A x + C gelu(B x)`. ρ is the mean row norm of tokens as the receiver's input. Weights are
    kept in float32, whatever the models' dtypes (in float64 where the receiver is).

    Args:
        width: of the sender's hidden states.
        inputs: every token as the receiver's input, `[vocab, receiver's hidden]`.
        options: see there.
        initial: `[width, receiver's hidden]`, what A starts at; None: at random, the same every time.
        backend: of the operators.
    """

    def __init__(
        self, width: int, inputs: Tensor, options: BridgeOptions, initial: Tensor | None = None, backend: str = "auto"
    ):
        super().__init__()
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        self.target_norm, self.backend, self.receiver_dtype = float(wide.norm(dim=-1).mean()), backend, inputs.dtype
        sizes, where = (width, inputs.shape[1]), dict(dtype=wide.dtype, device=wide.device)
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.RMSNorm(sizes[0], eps=1e-6, elementwise_affine=False)
        self.linear = _linear(*sizes, generator, where)
        if initial is not None:
            with torch.no_grad():
                self.linear.weight.copy_(initial.T)
        self.hidden: nn.Module | None = None
        if options.bridge == "mlp":
            self.hidden = nn.Sequential(
                _linear(sizes[0], 4 * sizes[1], generator, where),
                nn.GELU(),
                _linear(4 * sizes[1], sizes[1], None, where),
            )

    def forward(self, states: Tensor) -> Tensor:
        """`[rows, sender's hidden]` to `[rows, receiver's hidden]`, in the receiver's dtype."""
        x = self.norm(states.to(self.linear.weight.dtype))
        y = self.linear(x)
        if self.hidden is not None:
            y = y + self.hidden(x)
        return latent_project(y, None, self.target_norm, backend=self.backend).to(self.receiver_dtype)


def _linear(inputs: int, outputs: int, generator: torch.Generator | None, where: dict) -> nn.Linear:
    """Without a generator, of zero."""
    linear = nn.Linear(inputs, outputs, **where)
    drawn = torch.zeros(outputs, inputs) if generator is None else torch.randn(outputs, inputs, generator=generator)
    with torch.no_grad():
        linear.weight.copy_(drawn * inputs**-0.5)
        linear.bias.zero_()
    return linear


class Bridges(nn.Module):
    """The bridges of a team, by sender and receiver."""

    def __init__(self, bridges: Mapping[Edge, Bridge]):
        super().__init__()
        self._edges = list(bridges)
        self.bridges = nn.ModuleList(bridges.values())

    def __getitem__(self, edge: Edge) -> Bridge:
        return cast(Bridge, self.bridges[self._edges.index(edge)])

    def __len__(self) -> int:
        return len(self._edges)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by `sender->receiver.name`, as a run keeps them."""
        for (sender, receiver), bridge in zip(self._edges, self.bridges, strict=True):
            for name, parameter in bridge.named_parameters():
                yield f"{sender}->{receiver}.{name}", parameter


def make_bridges(
    topology: Topology,
    models: Mapping[str, AgentModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase | None],
    options: BridgeOptions,
) -> Bridges:
    """A bridge for every hand-over of hidden states; `models` and `tokenizers` by the topology's names.

    Raises:
        ValueError: bridges between models that start at tokens, and a tokenizer is missing, or they share too few.
    """
    named = {agent.name: topology.model_of(agent) for agent in topology.agents}
    made = {}
    for edge in topology.bridge_edges:
        names = [named[agent] for agent in edge]
        sender, receiver = (models[name] for name in names)
        (_, outputs), (inputs, _) = sender.embeddings(), receiver.embeddings()
        initial = None
        if options.bridge_initial == "tokens" and sender is receiver:
            initial = ridge_alignment(inputs, outputs)
        elif options.bridge_initial == "tokens":
            ends = zip(names, map(tokenizers.get, names), (len(outputs), len(inputs)), strict=True)
            there, here = shared_tokens(*ends)
            initial = ridge_alignment(inputs[here].to(outputs.device), outputs[there])
        made[edge] = Bridge(outputs.shape[1], inputs, options, initial, receiver.backend)
    return Bridges(made)


def shared_tokens(
    sender: tuple[str, PreTrainedTokenizerBase | None, int], receiver: tuple[str, PreTrainedTokenizerBase | None, int]
) -> tuple[Tensor, Tensor]:
    """Ids of the tokens that stand for the same text in both vocabularies, int64 `[tokens]` each.

    `sender`, `receiver`: a model's name, its tokenizer, and how many tokens it has embeddings of.

    Raises:
        ValueError: a tokenizer is missing, or no token is shared.
    """
    found = []
    for name, tokenizer, known in (sender, receiver):
        if tokenizer is None:
            raise ValueError(
                f"bridge_initial is 'tokens', and model {name} comes without a tokenizer; allowed: random, or a "
                "tokenizer for every model"
            )
        # A space before a word is spelled in one of two ways.
        found.append({text.replace("▁", "Ġ"): i for text, i in tokenizer.get_vocab().items() if i < known})
    texts = sorted(found[0].keys() & found[1].keys())
    if not texts:
        raise ValueError(
            f"bridge_initial is 'tokens', and models {sender[0]} and {receiver[0]} have no token in common; allowed: "
            "random"
        )
    there, here = (torch.tensor([vocabulary[text] for text in texts]) for vocabulary in found)
    return there, here
