"""The trajectory of DiffMAS (arXiv 2604.21794): agents read, think in latent steps, and hand their traces over.

Every agent reads its prompt behind what its senders handed over, then takes m latent steps: its last hidden state,
aligned and rescaled, is its next input. The last agent takes none: it answers. Senders hand over their traces, or over
a bridge their hidden states, which the receiver reads. Nothing here knows how latent steps are executed
(:data:`~diffmas.agents.latent_rollouts.LatentRollout`), how answers are decoded, or what is reported.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index

import torch
from torch import Tensor

from diffmas.agents.bridges import Bridges, States, row_by_row
from diffmas.agents.latent_rollouts import LatentRollout, step_by_step
from diffmas.agents.topology import Agent, Topology
from diffmas.models.adapters import WithAdapter
from diffmas.models.agent_model import AgentModel, Lengths
from diffmas.models.errors import UnsupportedModelError
from diffmas_ops import KVTrace, Segment, kv_concat

_logger = logging.getLogger(__name__)


@dataclass
class AgentState:
    """The trace an agent writes, and where in it each agent's segment stands.

    `segments[name]`: per row, the columns `begin … prompt_end` of the prompt part and `prompt_end … end` of the
    latent part; what was read over bridges is the beginning of the former.
    `states[name]`: the hidden states that an agent hands over, where it does.
    """

    trace: KVTrace
    segments: dict[str, tuple[list[int], list[int], list[int]]]
    states: dict[str, States] = field(default_factory=dict)


@dataclass
class HandedOver:
    """What an agent gets of its senders: their columns in its trace, and the hidden states of each bridge."""

    trace: KVTrace
    states: list[States]


@dataclass
class Trajectory:
    """Who reads what, behind whose trace.

    Args:
        model: what the agents run on; where they run on several, what the last one does.
        topology: who hands over to whom, and what.
        latent_steps: m ≥ 0, for every agent but the last.
        detach_trace: cut the gradient at every hand-over; only the last agent's own forward is differentiated.
        latent_rollout: how latent steps are executed.
        allocate: makes traces, as :meth:`KVTrace.allocate` does.
        bridges: by sender and receiver, of every hand-over of hidden states.
        others: the other models, by the names that the topology has for them.

    Raises:
        ValueError: `latent_steps` below 0; a sink whose size is still to be found.
        UnsupportedModelError: a topology that moves keys that cannot be moved, or states of recurrent layers at all, or
            that hands the trace of one model over to another.
    """

    model: AgentModel
    topology: Topology
    latent_steps: int = 10
    detach_trace: bool = False
    latent_rollout: LatentRollout = step_by_step
    allocate: Callable[..., KVTrace] = KVTrace.allocate
    bridges: Bridges | None = None
    others: Mapping[str, AgentModel] = field(default_factory=dict)
    #: The first tokens of agents whose columns are handed over as a sink; None once they were seen to differ.
    _sinks: dict[str, Tensor] | None = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if index(self.latent_steps) < 0:
            raise ValueError(f"latent_steps is {self.latent_steps}; allowed: integers ≥ 0")
        self._sink = {agent.name: self.topology.sink_of(agent) for agent in self.topology.agents}
        # One adapter of all agents that name none is whichever is active.
        named = self.topology.agents if self.topology.names_adapters else ()
        self._models = {agent.name: self._base(agent).with_adapter(self.topology.adapter_of(agent)) for agent in named}
        for agent in self.topology.agents:
            self._check_received(agent)

    def _base(self, agent: Agent) -> AgentModel:
        """What the agent runs on, whatever its adapter."""
        return self.others.get(self.topology.model_of(agent), self.model)

    @property
    def models(self) -> dict[str, AgentModel]:
        """All models that agents run on, by the topology's names for them, the last agent's first."""
        return {name: self.others.get(name, self.model) for name in self.topology.model_names}

    def _check_received(self, agent: Agent) -> None:
        """Raise where the agent's model cannot attend to what its senders hand over."""
        topology, model, senders = self.topology, self._base(agent), self.topology.sharing(agent)
        for sender in (other for other in topology.agents if other.name in senders):
            if (own := topology.model_of(agent)) != (other := topology.model_of(sender)):
                sizes = f"{self._base(sender).outline} there, {model.outline} here"
                raise UnsupportedModelError(
                    f"handover is {topology.handover!r} from agent {sender.name} to agent {agent.name}, and keys and "
                    f"values of model {other} mean nothing to model {own} ({sizes}); allowed: bridge"
                )
        if not senders or topology.continues(agent) is not None:
            return
        kind, team = type(model.language_model).__name__, f"topology {topology.name!r}"
        if model.recurrent:
            task = f"merge those agent {agent.name} receives"
            if topology.handover == "latent":
                task = "leave out the prompts (handover 'latent')"
            raise UnsupportedModelError(
                f"model {kind} has recurrent layers ({model.recurrent}): their state can only be continued; {team} "
                f"would have to {task}; allowed: a chain of agents with handover 'full'"
            )
        if model.immovable is not None and (topology.handover == "latent" or len(senders) > 1):
            raise UnsupportedModelError(
                f"model {kind}: its keys cannot be moved, in {model.immovable}; {team} with handover "
                f"{topology.handover!r} moves them; allowed: handover 'full' and at most one sender an agent"
            )

    def communicate(
        self,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        reserve: Lengths | None = None,
        control: Callable[[HandedOver], HandedOver] | None = None,
    ) -> AgentState:
        """Run every agent but the last; what the last one attends to, before its own prompt.

        Args:
            prompt_ids: per agent in the order of the topology, int64 `[tokens]`, the rows' prompts packed.
            prompt_lengths: per agent, the rows' prompt lengths, each ≥ 1.
            reserve: columns a row to leave room for behind the last prompt; None lets the trace grow.
            control: what the last agent gets instead of what it was handed.

        Raises:
            ValueError: prompts that do not fit the agents, or each other, named.
        """
        self.check(prompt_ids, prompt_lengths)
        states: dict[str, AgentState] = {}
        agents = self.topology.agents
        lengths = dict(zip((a.name for a in agents), prompt_lengths, strict=True))
        if any(self._sink.values()):
            self._compare_sinks(prompt_ids, lengths)
        for agent, ids in zip(agents[:-1], prompt_ids[:-1], strict=True):
            with torch.no_grad() if self.detach_trace else contextlib.nullcontext():
                state = self._receive(agent, states, lengths, reserve)
                self._write(agent, state, ids, lengths[agent.name], states)
            states[agent.name] = state
        received = self._receive(agents[-1], states, lengths, reserve)
        handed = HandedOver(received.trace, self._handed_to(agents[-1], states))
        if control is not None:
            handed = control(handed)
            received.trace = handed.trace
        if self.detach_trace:
            received.trace.detach_()
        self._cross(agents[-1], received.trace, handed.states)
        return received

    def model_of(self, agent: Agent) -> AgentModel | WithAdapter:
        """What the agent runs on, with calls that run with its adapter."""
        return self._models.get(agent.name) or self._base(agent)

    def _write(
        self, agent: Agent, state: AgentState, ids: Tensor, lengths: Lengths, others: dict[str, AgentState]
    ) -> None:
        """The agent reads what came over bridges and its prompt, and thinks: all behind what its trace held."""
        trace, model = state.trace, self.model_of(agent)
        begin = trace.host_lengths
        crosses = any(agent.name == sender for sender, _ in self.topology.bridge_edges)
        self._cross(agent, trace, self._handed_to(agent, others))
        if crosses and self.topology.bridge_states == "full":
            read = States(model.read(trace, lengths, input_ids=ids), list(lengths))
            hidden = read.packed[torch.tensor(lengths, device=read.packed.device).cumsum(0) - 1]
        else:
            hidden = model.read(trace, lengths, input_ids=ids, outputs=[(n - 1, n) for n in lengths])
            read = States(hidden, [1] * len(lengths))
        prompt_end, thought = trace.host_lengths, []
        if self.latent_steps:
            thought = self.latent_rollout(model, self.latent_steps, trace, hidden)
        state.segments[agent.name] = (begin, prompt_end, trace.host_lengths)
        if crosses:
            state.states[agent.name] = row_by_row([read, *(States(h, [1] * len(lengths)) for h in thought)])

    def _handed_to(self, agent: Agent, states: dict[str, AgentState]) -> list[States]:
        """Over bridges, sender by sender."""
        return [states[sender].states[sender] for sender in self.topology.bridged(agent)]

    def _cross(self, agent: Agent, trace: KVTrace, handed: Sequence[States]) -> None:
        """The agent reads what was `handed` to it over bridges, the senders' states one after the other."""
        if not handed:
            return
        bridges = (self.bridges[sender, agent.name] for sender in self.topology.bridged(agent))
        inputs = row_by_row([replace(x, packed=bridge(x.packed)) for bridge, x in zip(bridges, handed, strict=True)])
        # Only its keys and values go on.
        outputs = [(n - 1, n) for n in inputs.lengths]
        self.model_of(agent).read(trace, inputs.lengths, inputs_embeds=inputs.packed, outputs=outputs, latent=False)

    def _receive(
        self, agent: Agent, states: dict[str, AgentState], lengths: dict[str, Lengths], reserve: Lengths | None
    ) -> AgentState:
        """What its senders hand over: the trace the agent goes on with, or their segments put together in a new one."""
        if (sender := self.topology.continues(agent)) is not None:
            return states[sender]
        segments, located = [], {}
        length = [0] * len(lengths[agent.name])
        for name in self.topology.attended(agent.name):
            holder = next(states[s] for s in self.topology.sharing(agent) if name in states[s].segments)
            if (sink := self._sink[agent.name]) and not segments:
                # Every trace begins with a sink: its writer's own first columns, or the one that was received.
                segments.append(Segment(holder.trace, length, [sink] * len(length)))
                length = segments[0].end
            begin, prompt_end, end = holder.segments[name]
            begin = begin if self.topology.handover == "full" else prompt_end
            segments.append(Segment(holder.trace, begin, end))
            moved = [at - b for at, b in zip(length, begin, strict=True)]
            located[name] = tuple([x + by for x, by in zip(xs, moved, strict=True)] for xs in (begin, prompt_end, end))
            length = located[name][2]
        capacity = max(x + more for x, more in zip(length, self._room(agent, lengths, reserve), strict=True))
        model = self._base(agent)
        options = dict(capacity=capacity, grow=reserve is None, backend=model.backend)
        if segments:
            trace = kv_concat(segments, rotary=model.rotaries, allocate=self.allocate, **options)
        else:
            trace = self.allocate(batch=len(length), **model.trace_sizes, **options)
        return AgentState(trace, located)

    def _compare_sinks(self, prompt_ids: Sequence[Tensor], lengths: dict[str, Lengths]) -> None:
        """Say once where what goes along as a sink is not the same for all rows, and so tells something of them."""
        for agent, ids in zip(self.topology.agents, prompt_ids, strict=True):
            sink = self._sink[agent.name]
            if self._sinks is None or not sink or agent.name not in self.topology.leading:
                continue
            what = f"the first {sink} tokens of agent {agent.name}'s prompts differ by row"
            first = torch.stack([own[:sink] for own in ids.split(list(lengths[agent.name]))])
            differ = not (first == self._sinks.setdefault(agent.name, first[:1].clone())).all()
            if bridged := self.topology.bridged(agent):
                what, differ = f"agent {agent.name} reads hidden states of {', '.join(bridged)} first", True
            if differ:
                self._sinks = None
                _logger.warning(
                    "%s: the sink that is handed over (handover_sink) carries them, and trace controls leave it in "
                    "place",
                    what,
                )

    def _room(self, agent: Agent, lengths: dict[str, Lengths], reserve: Lengths | None) -> list[int]:
        """Columns a row that `agent`, and those who go on writing its trace, will add."""
        bridged = self.topology.states_read(agent, lengths, self.latent_steps)
        own = [more + n for more, n in zip(bridged, lengths[agent.name], strict=True)]
        if agent is self.topology.last:
            return own if reserve is None else [n + more for n, more in zip(own, reserve, strict=True)]
        own = [n + self.latent_steps for n in own]
        for heir in self.topology.agents:
            if self.topology.continues(heir) == agent.name:
                return [n + more for n, more in zip(own, self._room(heir, lengths, reserve), strict=True)]
        return own

    def check(self, prompt_ids: Sequence[Tensor], prompt_lengths: Sequence[Lengths]) -> None:
        """Raise `ValueError` where prompts do not fit the agents, or each other."""
        names = [a.name for a in self.topology.agents]
        if not len(prompt_ids) == len(prompt_lengths) == len(names):
            raise ValueError(
                f"prompt_ids has {len(prompt_ids)} and prompt_lengths {len(prompt_lengths)} entries; "
                f"allowed: one per agent ({', '.join(names)})"
            )
        for name, ids, lengths in zip(names, prompt_ids, prompt_lengths, strict=True):
            if len(lengths) != len(prompt_lengths[0]) or min(lengths, default=0) < 1 or sum(lengths) != ids.numel():
                raise ValueError(
                    f"prompt_lengths of agent {name} is {list(lengths)} for {ids.numel()} tokens; allowed: "
                    f"{len(prompt_lengths[0])} lengths ≥ 1 that sum to the number of tokens"
                )
            if name in self.topology.leading and min(lengths) < (sink := self._sink[name]):
                raise ValueError(
                    f"handover_sink is {sink}, and a prompt of agent {name} has {min(lengths)} tokens; allowed: "
                    "as many as its shortest prompt has"
                )
