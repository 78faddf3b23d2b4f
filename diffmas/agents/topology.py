"""Who hands its trace to whom: a DAG of agents with one last agent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffmas.agents.topology_file import TopologyError, adapter_options, agent_entries, model_options
from diffmas.models.adapters import DEFAULT, NONE
from diffmas.support.yaml_file import read_yaml

#: What goes from an agent to one that receives from it: its trace, the latent part of it, or its hidden states.
HANDOVERS = ("full", "latent", "bridge")
BRIDGE = "bridge"
#: Which hidden states go over a bridge: from the end of the sender's prompt on, or from its beginning.
BRIDGE_STATES = ("latent", "full")
#: A sink whose size the model is asked for.
AUTO = "auto"
#: Whose adapters agents have: one of all, or one a role.
ADAPTERS = ("shared", "per_role")
#: What says something else than the name of a role's adapter.
_SAID = (DEFAULT, NONE)


@dataclass(frozen=True)
class Agent:
    """One agent of a team.

    Args:
        senders: whom it receives from.
        role: which prompt it gets; default: its name.
        prompt: its own prompt, as :class:`~diffmas.prompts.Prompts` holds it for a role; default: that of its role.
        chat_template_kwargs: what its chat template is told beside, or instead of, what every agent's is.
        adapter: the name of the adapter it runs with; "none": without any; default: what the topology says.
        bridges: those of its senders whose hidden states it reads, whatever the topology's hand-over is.
        model: the name of the model it runs on; default: the one that the whole system is given.
    """

    name: str
    senders: tuple[str, ...] = ()
    role: str = ""
    prompt: Mapping[str, str] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ""
    bridges: tuple[str, ...] = ()
    model: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", self.role or self.name)


@dataclass(frozen=True)
class Topology:
    """Agents in topological order; the last one, the only agent nobody receives from, answers.

    Args:
        name: shown in reports.
        agents: in any order; senders refer to names.
        handover: what a receiver attends to of each agent before it: "full" (prompt and latent steps) or
            "latent" (latent steps only); or "bridge": it reads hidden states of its senders. Default: "full", and
            bridges between agents of different models.
        adapters: "shared", one adapter of all agents that name none; "per_role", one of each role. The last agent's is
            called "default" either way.
        adapter_options: by adapter, `path` of a folder that it starts from, and whether it trains (`train`).
        handover_sink: how many columns go in front of latent steps that are handed over: the first ones of the first
            agent before a receiver, where a model's attention rests; "auto": as many as the model is found to rest on.
            Of several models, a mapping by their names.
        models: by name, what :func:`~diffmas.models.pretrained.load_base` takes; agents refer to them.
        bridge_states: which hidden states go over bridges: "latent", the one that the sender's prompt ends with and
            those of its latent steps, or "full", those of its whole prompt and its latent steps.

    Raises:
        TopologyError: no agent, a name twice, an unknown or repeated sender, a cycle, more than one last agent,
            an unknown hand-over, a sink that is neither, unknown states of bridges.
    """

    name: str
    agents: tuple[Agent, ...]
    handover: str = ""
    handover_sink: int | str | Mapping[str, int] = 0
    adapters: str = "shared"
    adapter_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bridge_states: str = "latent"
    _ancestors: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)
    _attended: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.handover not in ("", *HANDOVERS):
            raise TopologyError(f"handover is {self.handover!r}; allowed: {', '.join(HANDOVERS)}")
        if self.bridge_states not in BRIDGE_STATES:
            raise TopologyError(f"bridge_states is {self.bridge_states!r}; allowed: {', '.join(BRIDGE_STATES)}")
        sinks = sink.values() if isinstance(sink := self.handover_sink, Mapping) else [0 if sink == AUTO else sink]
        if any(type(number) is not int or number < 0 for number in sinks):
            raise TopologyError(f"handover_sink is {sink!r}; allowed: integers ≥ 0, {AUTO}, or a mapping by model")
        _check_names(self.agents)
        ordered = _sort(self.agents)
        received = {s for agent in ordered for s in agent.senders}
        if len(last := [a.name for a in ordered if a.name not in received]) != 1:
            raise TopologyError(f"agents nobody receives from are {last}; allowed: exactly one, the last agent")
        object.__setattr__(self, "agents", tuple(ordered))
        self._check_models()
        self._check_adapters()
        if not self.handover:
            self._choose_handover()
        object.__setattr__(self, "_ancestors", self._reaching(lambda agent: agent.senders))
        object.__setattr__(self, "_attended", self._reaching(self.sharing))

    def _reaching(self, senders: Callable[[Agent], tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """By agent, all from whom a way leads to it along its `senders`, in topological order."""
        found: dict[str, tuple[str, ...]] = {}
        for agent in self.agents:
            known = {name for sender in senders(agent) for name in (*found[sender], sender)}
            found[agent.name] = tuple(other.name for other in self.agents if other.name in known)
        return found

    def _choose_handover(self) -> None:
        """Traces within a model, bridges between models."""
        models = {agent.name: self.model_of(agent) for agent in self.agents}
        agents = []
        for agent in self.agents:
            crossing = [s for s in agent.senders if s in agent.bridges or models[s] != models[agent.name]]
            agents.append(replace(agent, bridges=tuple(crossing)))
        object.__setattr__(self, "agents", tuple(agents))
        object.__setattr__(self, "handover", "full")

    def _check_models(self) -> None:
        for agent in self.agents:
            if agent.model and agent.model not in self.models:
                allowed = ", ".join(self.models) or "none, the topology names no models"
                raise TopologyError(f"model of agent {agent.name} is {agent.model!r}; allowed: {allowed}")
        for name in self.models:
            if not name.isidentifier() or name == DEFAULT:
                raise TopologyError(f"models has {name!r}; allowed: letters, digits and _, and not {DEFAULT}")
            if name in self.adapter_names:
                raise TopologyError(f"models has {name!r}, which an adapter is called; allowed: another name")
        for what, given in (("models", self.models), ("handover_sink", self.handover_sink)):
            named = given if isinstance(given, Mapping) else ()
            if unused := [name for name in named if name not in self.model_names]:
                allowed = ", ".join(self.model_names)
                raise TopologyError(f"{what} has {unused}, which no agent runs on; allowed: {allowed}")

    def _check_adapters(self) -> None:
        if self.adapters not in ADAPTERS:
            raise TopologyError(f"adapters is {self.adapters!r}; allowed: {', '.join(ADAPTERS)}, or a mapping by name")
        for agent in self.agents:
            if not (name := self.adapter_of(agent)).isidentifier():
                raise TopologyError(f"adapter of agent {agent.name} is {name!r}; allowed: letters, digits and _")
            if self.adapters == "per_role" and agent is not self.last and not agent.adapter and name in _SAID:
                raise TopologyError(
                    f"role of agent {agent.name} is {name!r}, which cannot name its adapter; allowed: another role, or "
                    "an adapter of its own"
                )
        if (last := self.last).adapter not in ("", DEFAULT, NONE):
            raise TopologyError(
                f"adapter of agent {last.name} is {last.adapter!r}; allowed: {DEFAULT} or {NONE}, of the last agent"
            )
        if unused := [name for name in self.adapter_options if name not in self.adapter_names]:
            raise TopologyError(
                f"adapters has {unused}, which no agent runs with; allowed: {', '.join(self.adapter_names)}"
            )

    def with_agents(self, agents: Iterable[Agent], name: str = "") -> Topology:
        """The same of other agents: of models and adapters that none of them runs with, nothing is said."""
        agents = tuple(agents)
        used = {agent.model for agent in agents}
        models = {name: options for name, options in self.models.items() if name in used}
        bare = replace(self, name=name or self.name, agents=agents, adapter_options={}, models=models)
        options = {n: o for n, o in self.adapter_options.items() if n in bare.adapter_names}
        return replace(bare, adapter_options=options)

    def adapter_of(self, agent: Agent) -> str:
        """The name of the adapter that `agent` runs with; "none": without any."""
        if agent.adapter:
            return agent.adapter
        own = self.adapters == "per_role" and agent.role != self.last.role
        return agent.role if own else DEFAULT

    @property
    def names_adapters(self) -> bool:
        """Whether any agent has one that is said; otherwise all run with whatever is active on their model."""
        return self.adapters != "shared" or bool(self.adapter_options) or any(a.adapter for a in self.agents)

    def model_of(self, agent: Agent) -> str:
        """The name of the model that `agent` runs on."""
        return agent.model or DEFAULT

    @property
    def model_names(self) -> tuple[str, ...]:
        """All models that there are, the last agent's first."""
        return tuple(dict.fromkeys(self.model_of(agent) for agent in (self.last, *self.agents)))

    @property
    def thinking_models(self) -> tuple[str, ...]:
        """Those on which an agent takes latent steps; of a single agent, the one it runs on."""
        return tuple(dict.fromkeys(self.model_of(agent) for agent in self.agents[:-1] or self.agents))

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """All adapters that there are, the default one first."""
        return self._adapter_names(self.agents)

    def adapters_on(self, model: str) -> tuple[str, ...]:
        """Those of one model, the default one first: a run keeps that in any case."""
        return self._adapter_names([agent for agent in self.agents if self.model_of(agent) == model])

    def _adapter_names(self, agents: Iterable[Agent]) -> tuple[str, ...]:
        used = dict.fromkeys(self.adapter_of(agent) for agent in agents)
        return (DEFAULT, *(name for name in used if name not in (NONE, DEFAULT)))

    @property
    def adapter_paths(self) -> dict[str, str]:
        """The folders that adapters start from, by name."""
        return {name: options["path"] for name, options in self.adapter_options.items() if options.get("path")}

    def trained_on(self, model: str) -> tuple[str, ...]:
        """The adapters of one model that an agent runs with and that are not frozen."""
        used = {self.adapter_of(agent) for agent in self.agents if self.model_of(agent) == model}
        options = self.adapter_options
        return tuple(n for n in self.adapters_on(model) if n in used and options.get(n, {}).get("train", True))

    @property
    def last(self) -> Agent:
        return self.agents[-1]

    def ancestors(self, name: str) -> tuple[str, ...]:
        """All agents whose work reaches agent `name`, in whatever way, in topological order."""
        return self._ancestors[name]

    def attended(self, name: str) -> tuple[str, ...]:
        """All agents whose columns agent `name` attends to before its own, in topological order."""
        return self._attended[name]

    def bridged(self, agent: Agent) -> tuple[str, ...]:
        """Those of an agent's senders whose hidden states it reads."""
        return agent.senders if self.handover == BRIDGE else tuple(s for s in agent.senders if s in agent.bridges)

    def sharing(self, agent: Agent) -> tuple[str, ...]:
        """Those of an agent's senders whose traces it attends to."""
        return tuple(sender for sender in agent.senders if sender not in self.bridged(agent))

    @property
    def bridge_edges(self) -> tuple[tuple[str, str], ...]:
        """Sender and receiver of every hand-over of hidden states, in the receivers' order."""
        return tuple((sender, agent.name) for agent in self.agents for sender in self.bridged(agent))

    def states_of(self, sender: str, prompts: Mapping[str, Sequence[int]], latent_steps: int) -> list[int]:
        """How many hidden states of every row go over a bridge; `prompts`: the rows' prompt lengths, by agent."""
        return [latent_steps + (n if self.bridge_states == "full" else 1) for n in prompts[sender]]

    def states_read(self, agent: Agent, prompts: Mapping[str, Sequence[int]], latent_steps: int) -> list[int]:
        """How many hidden states every row of `agent` reads, of all its senders."""
        handed = [self.states_of(sender, prompts, latent_steps) for sender in self.bridged(agent)]
        return [sum(row) for row in zip([0] * len(prompts[agent.name]), *handed, strict=True)]

    def continues(self, agent: Agent) -> str | None:
        """The sender whose trace `agent` goes on writing in place, or None where it needs a trace of its own."""
        senders = self.sharing(agent)
        if self.handover != "full" or len(senders) != 1:
            return None
        receivers = [a for a in self.agents if senders[0] in self.sharing(a)]
        return senders[0] if len(receivers) == 1 else None

    def sink_of(self, agent: Agent) -> int:
        """Columns in front of what a receiver on the agent's model attends to; 0 but for latent hand-overs.

        Raises:
            TopologyError: how many is still to be found.
        """
        if self.handover != "latent":
            return 0
        if isinstance(sink := self.handover_sink, str):
            raise TopologyError(f"handover_sink is {sink!r}; allowed: the number that a system finds")
        return sink.get(self.model_of(agent), 0) if isinstance(sink, Mapping) else sink

    @property
    def leading(self) -> tuple[str, ...]:
        """The agents whose first columns are somebody's sink."""
        first = {names[0] for agent in self.agents if (names := self.attended(agent.name))}
        return tuple(agent.name for agent in self.agents if agent.name in first)

    @property
    def prompts(self) -> dict[str, Mapping[str, str]]:
        """Prompts that agents bring along, by role."""
        return {agent.role: agent.prompt for agent in self.agents if agent.prompt is not None}

    def to_dict(self) -> dict[str, Any]:
        """The YAML form :func:`load_topology` reads."""
        agents = [
            {"name": a.name, "role": a.role, "receives": list(a.senders)}
            | ({} if a.prompt is None else {"prompt": dict(a.prompt)})
            | ({"chat_template_kwargs": dict(a.chat_template_kwargs)} if a.chat_template_kwargs else {})
            | ({"adapter": a.adapter} if a.adapter else {})
            | ({"bridges": list(a.bridges)} if a.bridges else {})
            | ({"model": a.model} if a.model else {})
            for a in self.agents
        ]
        whole: dict[str, Any] = {
            "name": self.name,
            "handover": self.handover,
            "handover_sink": dict(sink) if isinstance(sink := self.handover_sink, Mapping) else sink,
            "agents": agents,
        }
        options = {name: dict(options) for name, options in self.adapter_options.items()}
        whole |= {"adapters": self.adapters, "adapter_options": options}
        if self.bridge_states != "latent":
            whole["bridge_states"] = self.bridge_states
        return whole | ({"models": {n: dict(o) for n, o in self.models.items()}} if self.models else {})

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        handover: str | None = None,
        handover_sink: int | str | None = None,
        adapters: str | None = None,
        bridge_states: str | None = None,
    ) -> Topology:
        """From the YAML form.

        `{name, handover, handover_sink, bridge_states, models, adapters, agents: [{name, receives, role or prompt or
        fields, adapter, model}]}`. `bridges` beside `receives` names those whose hidden states the agent reads.

        `prompt` is the agent's own, a text or `{system, user, text}`; `fields` are those of an item that it sees: all
        that `prompt` names have to be among them, and without one they are the prompt, a line each. Beside them may be
        `chat_template_kwargs`, a mapping. `adapters` is "shared", "per_role", or a mapping of adapters that agents name
        to `{path, train}`. `models` is a mapping of models that agents name to `{model_name_or_path, gguf_file, dtype,
        quantization, random_weights}`; those that are the same in all of these are one model.
        """
        models = model_options(data.get("models") or {}) if isinstance(data, Mapping) else {}
        agents = tuple(Agent(**entry) for entry in agent_entries(data, models))
        if not isinstance(name := data.get("name", "custom"), str):
            raise TopologyError(f"name is {name!r}; allowed: a string")
        sink = data.get("handover_sink", 0) if handover_sink is None else handover_sink
        kept, options = data.get("adapters", "shared"), data.get("adapter_options") or {}
        if isinstance(kept, Mapping):
            kept, options = "shared", kept
        options = adapter_options(options)
        named = dict.fromkeys(agent.model for agent in agents if agent.model)
        merged = [n for n in models if n not in named and models[n] in [models.get(name) for name in named]]
        models = {name: options for name, options in models.items() if name not in merged}
        said = handover or data.get("handover") or ""
        states = bridge_states or data.get("bridge_states") or "latent"
        return cls(name, agents, said, sink, adapters or kept, options, models, states)


def _check_names(agents: tuple[Agent, ...]) -> None:
    names = [a.name for a in agents]
    if not names:
        raise TopologyError("agents is empty; allowed: at least one agent")
    if repeated := {n for n in names if names.count(n) > 1}:
        raise TopologyError(f"agent names {sorted(repeated)} appear more than once")
    for agent in agents:
        if unknown := [s for s in agent.senders if s not in names]:
            raise TopologyError(f"agent {agent.name} receives from unknown {unknown}; allowed: {', '.join(names)}")
        if len(set(agent.senders)) < len(agent.senders):
            raise TopologyError(f"agent {agent.name} receives from the same agent twice: {list(agent.senders)}")
        if unknown := [s for s in agent.bridges if s not in agent.senders]:
            allowed = ", ".join(agent.senders) or "none, it receives from nobody"
            raise TopologyError(f"bridges of agent {agent.name} has {unknown}; allowed: {allowed}")


def _sort(agents: tuple[Agent, ...]) -> list[Agent]:
    ordered: list[Agent] = []
    waiting = list(agents)
    while waiting:
        done = {a.name for a in ordered}
        ready = next((a for a in waiting if done.issuperset(a.senders)), None)
        if ready is None:
            raise TopologyError(f"agents {', '.join(a.name for a in waiting)} receive from each other in a cycle")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _chain(*names: str) -> tuple[Agent, ...]:
    return tuple(Agent(n, (names[i - 1],) if i else ()) for i, n in enumerate(names))


#: Built-in topologies. `sequential` is the paper's; `stitch` gives every agent the question alone and concatenates.
TOPOLOGIES = {
    "sequential": Topology("sequential", _chain("planner", "critic", "refiner", "solver")),
    "hierarchical": Topology(
        "hierarchical",
        (
            Agent("math_expert"),
            Agent("science_expert"),
            Agent("code_expert"),
            Agent("summarizer", ("math_expert", "science_expert", "code_expert")),
        ),
    ),
    "stitch": Topology(
        "stitch",
        (Agent("planner"), Agent("critic"), Agent("refiner"), Agent("solver", ("planner", "critic", "refiner"))),
    ),
    "relay": Topology("relay", _chain("sender", "solver"), "latent"),
    # A sender of another model than the solver's, which is the one that is given.
    "two_models": Topology(
        "two_models",
        (Agent("sender", model="other"), Agent("solver", ("sender",))),
        models={"other": {"model_name_or_path": "embedded-llama"}},
    ),
    "senders": Topology(
        "senders", (Agent("sender"), Agent("second_sender"), Agent("solver", ("sender", "second_sender")))
    ),
    "single": Topology("single", (Agent("single"),)),
}


def alone(topology: Topology) -> Topology:
    """The one agent that a team is compared with, on the last one's model; of a topology of one agent, that itself."""
    single, model = TOPOLOGIES["single"], topology.last.model
    if len(topology.agents) == 1:
        return topology
    models = {name: options for name, options in topology.models.items() if name == model}
    return replace(single, agents=(replace(single.last, model=model),), models=models)


def load_topology(
    name_or_path: str,
    handover: str | None = None,
    handover_sink: int | str | None = None,
    adapters: str | None = None,
    bridge_states: str | None = None,
) -> Topology:
    """A built-in topology by name, or one from a YAML file; what else is given is instead of its own.

    `handover_sink`: a number may be written out, as in a flag.

    Raises:
        TopologyError: an unknown name, or a file that describes no valid topology.
        FileNotFoundError: a path that does not exist. ValueError: a file that is no YAML.
    """
    if isinstance(handover_sink, str) and handover_sink.isdecimal():
        handover_sink = int(handover_sink)
    if (built_in := TOPOLOGIES.get(name_or_path)) is not None:
        sink = built_in.handover_sink if handover_sink is None else handover_sink
        return replace(
            built_in,
            handover=handover or built_in.handover,
            handover_sink=sink,
            adapters=adapters or built_in.adapters,
            bridge_states=bridge_states or built_in.bridge_states,
        )
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        allowed = ", ".join(TOPOLOGIES)
        raise TopologyError(f"topology is {name_or_path!r}; allowed: {allowed}, or the path of a .yaml file")
    if handover not in (None, *HANDOVERS):
        raise TopologyError(f"handover is {handover!r}; allowed: {', '.join(HANDOVERS)}")
    data = read_yaml(path, "topology")
    try:
        return Topology.from_dict(data, handover, handover_sink, adapters, bridge_states)
    except TopologyError as error:
        raise TopologyError(f"topology {path}: {error}") from None
