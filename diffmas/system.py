"""Agents that talk through their traces: one differentiable trajectory over a batch of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from diffmas.agents.bridges import BridgeOptions, make_bridges
from diffmas.agents.captured_rollouts import CapturedRollouts, asks_for_graphs
from diffmas.agents.collator import Collator
from diffmas.agents.controls import Control
from diffmas.agents.scoring import check_texts, predicting_states, restating_loss
from diffmas.agents.sink import find_sinks
from diffmas.agents.sweeps import latent_rollout
from diffmas.agents.thinking import budget
from diffmas.agents.topology import AUTO, Agent, Topology, load_topology
from diffmas.agents.trajectory import Trajectory
from diffmas.generation import Completion, Decoding, Event, engine
from diffmas.models.adapters import DEFAULT, choose_trained, put_on
from diffmas.models.agent_model import AgentModel, Lengths
from diffmas.models.alignment import AlignmentOptions
from diffmas.models.loss import plain_loss
from diffmas.prompts import Prompts
from diffmas.runs.description import describe, fetched, known, read_description, settings_of, write_description
from diffmas.runs.files import ADAPTER_FILE, PROMPTS_FILE
from diffmas.runs.models import load_bases, load_models
from diffmas.runs.settings import SystemArguments
from diffmas.runs.weights import load_adapted, load_others, save_weights
from diffmas.support.progress import announced
from diffmas.support.quiet import quiet_loading
from diffmas.tasks import TaskArguments, as_asked, as_kept, load_task
from diffmas.tasks.base import IN_PYTHON
from diffmas_ops import KVTrace


@dataclass
class TrajectoryOutput(ModelOutput):
    """Loss and logits of the answer.

    Attributes:
        loss: cross-entropy summed over all answer tokens, divided by their number (or by `num_items_in_batch`).
        logits: `[answer tokens, vocab]`, packed; row i predicts answer token i. None where they were not asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class MultiAgentSystem(nn.Module):
    """Agents on one shared language model, or on several, connected by a topology (DiffMAS, arXiv 2604.21794).

    Every agent reads its prompt, then takes latent steps: its last hidden state, aligned and rescaled, is its next
    input. Receivers attend to the keys and values their senders wrote, and the loss on the last agent's answer
    flows back through all of them.

    Args:
        model: a transformers causal language model, possibly inside PEFT, that all agents share; or its name or folder.
            Where agents run on several, a mapping of these by the topology's names for them ("default": of agents that
            name none); those that are left out are loaded as the topology describes them.
        topology: who hands over to whom, and what; or the name of a built-in one, or the path of a YAML file.
        tokenizer: default: the one beside `model`, where that is a name. Only text needs it. Of several models, a
            mapping.
        prompts: of the agents' roles; or the name of a built-in family, or the path of a YAML file. Agents whose prompt
            is in the topology need none here.
        peft_config: of an adapter to put on every model.
        decoding: how text is answered, where nothing else is asked for; default: :class:`Decoding`'s own, and
            up to 32,768 tokens where the chat template says that the model thinks.
        latent_steps: m ≥ 0, for every agent but the last.
        alignment: "identity", "ridge", "learned" or "soft"; `alignment_initial`, `alignment_temperature`,
            `alignment_temperature_learned`, `alignment_top_k` and `latent_grad_clip`: as in
            :class:`~diffmas.models.alignment.AlignmentOptions`.
        detach_trace: cut the gradient at every hand-over; only the last agent's own forward is differentiated.
        latent_backward: "exact", or "sweeps:k": the gradient of each latent rollout by k parallel backward passes
            (:class:`diffmas.agents.sweeps.Sweeps`).
        cuda_graphs: "off", or "auto": latent rollouts and their backward replay as CUDA graphs on a GPU
            (:class:`diffmas.agents.captured_rollouts.CapturedRollouts`; experimental, not yet run on one).
        checkpointing: which calls recompute their activations in the backward: "none", "prefill" or "all".
        backend: "auto", or the operators' backend to insist on.
        loss: how the loss is taken where no logits are asked for: "auto", "chunked", "liger", "cce" or "plain", as in
            :class:`~diffmas.models.loss.AnswerLoss`.
        bridge: what hidden states that are handed over go through, "linear" or "mlp"; `bridge_initial`: what it starts
            at, "tokens" or "random"; as in :class:`~diffmas.agents.bridges.BridgeOptions`.

    Raises:
        ValueError: an argument outside its range, named.
        FileNotFoundError: a model, topology or prompts that are not there.
        UnsupportedModelError: a model whose attention or recurrent layers a trace cannot express, or the latter in a
            topology that does more than continue their states.
    """

    def __init__(
        self,
        model: nn.Module | str | Mapping[str, nn.Module | str],
        topology: Topology | str,
        *,
        tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None = None,
        prompts: Prompts | str | Path | None = None,
        peft_config: PeftConfig | None = None,
        decoding: Decoding | None = None,
        latent_steps: int = 10,
        alignment: str = "identity",
        alignment_initial: str = "identity",
        alignment_temperature: float = 0.7,
        alignment_temperature_learned: bool = False,
        alignment_top_k: int = 0,
        latent_grad_clip: float | None = None,
        detach_trace: bool = False,
        latent_backward: str = "exact",
        cuda_graphs: str = "off",
        checkpointing: str = "none",
        backend: str = "auto",
        loss: str = "auto",
        bridge: str = "linear",
        bridge_initial: str = "tokens",
    ):
        super().__init__()
        self.bridge_options = BridgeOptions(bridge, bridge_initial)
        topology = load_topology(topology) if isinstance(topology, str) else topology
        prompts = Prompts.load(prompts) if isinstance(prompts, (str, Path)) else prompts
        self.prompts = (prompts or Prompts({})).with_roles(topology.prompts)
        models, tokenizers = load_models(topology, model, tokenizer)
        last, *others = topology.model_names
        self.tokenizer = tokenizers.pop(last, None)
        #: Of the models that the last agent does not run on, by name.
        self.other_tokenizers = tokenizers
        self.decoding = decoding or Decoding(max_new_tokens=budget(self.prompts, topology, self.tokenizer))
        if peft_config is not None:
            for name, base in models.items():
                if hasattr(base, "peft_config"):
                    raise ValueError("peft_config is given, and the model is in PEFT already; allowed: one of the two")
                with quiet_loading():
                    models[name] = put_on(base, peft_config, topology.adapters_on(name), topology.adapter_paths)
        self.alignment_options = AlignmentOptions(
            alignment,
            alignment_initial,
            alignment_temperature,
            alignment_temperature_learned,
            alignment_top_k,
            latent_grad_clip,
        )
        build = partial(AgentModel, checkpointing=checkpointing, backend=backend, loss=loss)
        # On a model that nobody thinks on, nothing would train the alignment.
        aligned = dict.fromkeys(topology.model_names, self.alignment_options.untrained)
        aligned |= dict.fromkeys(topology.thinking_models, self.alignment_options)
        #: What the last agent runs on, and the other models there are.
        self.agent_model = build(models[last], alignment=aligned[last])
        self.other_models = nn.ModuleList(build(models[name], alignment=aligned[name]) for name in others)
        recurrent = next((m.recurrent for m in (self.agent_model, *self.other_models) if m.recurrent), "")
        if recurrent and latent_backward != "exact":
            raise ValueError(
                f"latent_backward is {latent_backward!r}, and the model has recurrent layers ({recurrent}), which "
                "cannot go back over latent steps; allowed: exact"
            )
        agent_models = dict(zip(topology.model_names, (self.agent_model, *self.other_models), strict=True))
        all_tokenizers = {last: self.tokenizer, **tokenizers}
        if topology.handover_sink == AUTO:
            topology = replace(topology, handover_sink=find_sinks(topology, agent_models, all_tokenizers))
        captured = CapturedRollouts() if asks_for_graphs(cuda_graphs, latent_backward) else None
        if captured is not None and topology.bridge_edges:
            raise ValueError(
                f"cuda_graphs is {cuda_graphs!r}, and agents hand over hidden states (handover 'bridge'), which "
                "replayed rollouts keep to themselves; allowed: off"
            )
        self.bridges = make_bridges(topology, agent_models, all_tokenizers, self.bridge_options)
        self.trajectory = Trajectory(
            self.agent_model,
            topology,
            latent_steps,
            detach_trace,
            latent_rollout=captured or latent_rollout(latent_backward),
            allocate=captured.allocate if captured else KVTrace.allocate,
            bridges=self.bridges,
            others={name: agent_models[name] for name in others},
        )
        self.choose_trained()
        self.options: dict[str, Any] = {"latent_backward": latent_backward, "cuda_graphs": cuda_graphs, "loss": loss}
        #: Of the run it was read from (`system.json`).
        self.description: dict[str, Any] = {}

    @classmethod
    def of(
        cls, model: nn.Module | Mapping[str, nn.Module], topology: Topology, settings: SystemArguments, **options
    ) -> MultiAgentSystem:
        """A system on `model` with the settings of a run; `options` as for the class."""
        return cls(
            model,
            topology,
            latent_steps=settings.latent_steps,
            **asdict(AlignmentOptions.of(settings)),
            **asdict(BridgeOptions.of(settings)),
            detach_trace=settings.detach_trace,
            latent_backward=settings.latent_backward,
            # What auto finds is set before training starts.
            checkpointing="all" if settings.checkpointing == "auto" else settings.checkpointing,
            cuda_graphs=settings.cuda_graphs,
            backend=settings.backend,
            loss=settings.loss,
            **options,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        model_name_or_path: str | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
    ) -> MultiAgentSystem:
        """The trained system of a run's folder, or of a repository on the hub that holds one; in evaluation mode.

        Args:
            model_name_or_path, gguf_file: where its base model is now; default: where it was.
            revision: of the repository.

        Raises:
            FileNotFoundError: no such folder or repository, or one without `system.json` or without an adapter.
            ValueError: one that cannot be read.
        """
        folder = fetched(name_or_path, revision)
        description = read_description(folder)
        settings, task = known(SystemArguments, description["system"]), known(TaskArguments, description["task"])
        if not (folder / ADAPTER_FILE).is_file():
            raise FileNotFoundError(f"run {folder} has no {ADAPTER_FILE}; allowed: a run whose training has finished")
        topology = Topology.from_dict(description["topology"])
        if model_name_or_path is not None:
            settings = replace(settings, model_name_or_path=model_name_or_path, gguf_file=gguf_file)
        bases, tokenizers = load_bases(settings, topology)
        adapted = load_adapted(bases, folder, topology)
        if (folder / PROMPTS_FILE).is_file():
            prompts = Prompts.load(folder / PROMPTS_FILE)
        else:
            prompts = Prompts({}) if task.task == IN_PYTHON else load_task(task).prompts
        with announced("setting up the system"):
            system = cls.of(
                adapted, topology, settings, tokenizer=tokenizers, prompts=as_asked(prompts, task),
                decoding=Decoding(**description["decoding"]),
            )  # fmt: skip
        load_others(system, folder)
        system.description = description
        return system.eval()

    def choose_trained(self) -> None:
        """Of the adapters that agents name, let those train that the topology says, and no other.

        PEFT's `set_adapter`, and leaving its `disable_adapter`, let only those train that are active: after them, this.
        """
        if self.topology.names_adapters:
            for name, model in self.models.items():
                choose_trained(model.model, self.topology.adapters_on(name), self.topology.trained_on(name))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what :meth:`from_pretrained` reads: adapter, learned alignment, prompts, topology, a model card.

        Raises:
            ValueError: a model with other adapters than those that agents name: one, called "default", in most teams.
        """
        self.check_adapter()
        task = known(TaskArguments, self.description["task"]) if self.description else TaskArguments(task=IN_PYTHON)
        now = describe(self, settings_of(self), as_kept(task, self.prompts), asdict(self.decoding))
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_description(folder, {**self.description, **now}, self.prompts)
        save_weights(self, folder)

    def check_adapter(self) -> None:
        """Raise `ValueError` where training would leave nothing that can be saved: no adapter, or others."""
        for name, model in self.models.items():
            found, names = list(getattr(model.model, "peft_config", ())), list(self.topology.adapters_on(name))
            if sorted(found) != sorted(names):
                what = f"adapters {found}" if found else "no adapter"
                where = f" on model {name}" if self.other_models else ""
                allowed = "one, called 'default'" if names == [DEFAULT] else f"{names}, which its agents run with"
                raise ValueError(f"the system has {what}{where}; allowed: {allowed} (peft_config=…)")

    def check_trains(self) -> None:
        """Raise `ValueError` where a training would leave all weights as they are."""
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError("no weight trains; allowed: an adapter that does")
        topology = self.topology
        cut = self.trajectory.detach_trace and len(topology.agents) > 1 and topology.names_adapters
        trained = topology.trained_on(topology.model_of(topology.last))
        if cut and not topology.bridged(topology.last) and topology.adapter_of(topology.last) not in trained:
            raise ValueError(
                f"detach_trace is True, and agent {topology.last.name}, the only one that the gradient reaches, has no "
                "adapter that trains; allowed: False, or one that does"
            )

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what :meth:`save_pretrained` writes, with its model card; returns the address.

        Args:
            repo_id: made where there is none. private: only then.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)
            return str(HfApi(token=token).upload_folder(repo_id=repo_id, folder_path=folder))

    @property
    def topology(self) -> Topology:
        return self.trajectory.topology

    @property
    def models(self) -> dict[str, AgentModel]:
        """All models that agents run on, by the topology's names for them, the last agent's first."""
        return self.trajectory.models

    def tokenizer_of(self, agent: Agent) -> PreTrainedTokenizerBase | None:
        """That of the agent's model."""
        return self.other_tokenizers.get(self.topology.model_of(agent), self.tokenizer)

    def of_models(self, topology: Topology, **options) -> MultiAgentSystem:
        """Another system on the same models, of those agents; `options` as for the class."""
        models = {name: self.models[name].model for name in topology.model_names}
        tokenizers = {name: self.other_tokenizers.get(name, self.tokenizer) for name in models}
        return MultiAgentSystem(
            models, topology, tokenizer=tokenizers, latent_steps=self.latent_steps, backend=self.agent_model.backend,
            **asdict(self.bridge_options) | options,
        )  # fmt: skip

    @property
    def latent_steps(self) -> int:
        return self.trajectory.latent_steps

    @property
    def checkpointing(self) -> str:
        """Which calls recompute their activations in the backward, on all models."""
        return self.agent_model.checkpointing.mode

    @checkpointing.setter
    def checkpointing(self, mode: str) -> None:
        for model in self.models.values():
            model.checkpointing.mode = mode

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate shards one by one: transformers' layers."""
        return sorted({name for model in self.models.values() for name in model.language_model._no_split_modules})

    @property
    def has_unreached_parameters(self) -> bool:
        """Whether something before the last agent that is trained, an alignment, adapter or bridge, gets no gradient.

        Without latent steps, of an agent's last layer only the keys and values go on.
        """
        topology, cut = self.topology, self.trajectory.detach_trace
        if cut and any(receiver != topology.last.name for _, receiver in topology.bridge_edges):
            return True
        reached = len(topology.agents) > 1 and self.latent_steps > 0 and not cut
        kept = {(model, name) for model in topology.model_names for name in topology.trained_on(model)}
        *before, last = ((topology.model_of(agent), topology.adapter_of(agent)) for agent in topology.agents)
        apart = set(before) & kept - {last}
        return (self.alignment_options.trains or bool(apart)) and not reached

    def forward(
        self,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        answer_ids: Tensor,
        answer_lengths: Lengths,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
        said_ids: Sequence[Tensor] | None = None,
        said_lengths: Sequence[Lengths] | None = None,
    ) -> TrajectoryOutput:
        """One whole trajectory: all agents read and think, the last one is scored on the gold answer.

        With `said_ids`, instead: every agent before the last, alone, is scored on what it says behind its prompt.

        Args:
            prompt_ids: per agent in the order of `topology.agents`, int64 `[tokens]`, the rows' prompts packed.
            prompt_lengths: per agent, the rows' prompt lengths, each ≥ 1.
            answer_ids: int64 `[answer tokens]`, packed.
            answer_lengths: the rows' answer lengths, each ≥ 1.
            num_items_in_batch: what to divide the summed loss by; default the number of answer tokens.
            return_logits: without, the loss does not need the logits of all answer tokens at once.
            said_ids, said_lengths: per agent before the last whose adapter trains, as for answers
                (:func:`~diffmas.agents.scoring.restating_loss`). There are no logits then, and the loss is divided by
                the number of these tokens.
        """
        self.trajectory.check(prompt_ids, prompt_lengths)
        if said_ids is not None:
            loss = restating_loss(self.trajectory, prompt_ids, prompt_lengths, said_ids, said_lengths or ())
            count = sum(ids.numel() for ids in said_ids) if num_items_in_batch is None else num_items_in_batch
            return TrajectoryOutput(loss=loss / count)
        check_texts("answer_lengths", answer_ids, answer_lengths, len(prompt_lengths[0]))
        model, last = self.agent_model, self.trajectory.model_of(self.topology.last)
        trace = self.trajectory.communicate(prompt_ids, prompt_lengths, answer_lengths).trace
        states = predicting_states(last, trace, prompt_ids[-1], prompt_lengths[-1], answer_ids, answer_lengths)
        logits = model.head(states) if return_logits else None
        loss = plain_loss(logits, answer_ids) if return_logits else model.answer_loss(model.head, states, answer_ids)
        count = answer_ids.numel() if num_items_in_batch is None else num_items_in_batch
        return TrajectoryOutput(loss=loss / count, logits=logits)

    @property
    def collator(self) -> Collator:
        """Makes of items (mappings with the fields that prompts name, and `answer`) what :meth:`forward` takes.

        Raises:
            ValueError: a system without tokenizer, or without a prompt for one of its agents.
        """
        if self.tokenizer is None:
            raise ValueError("the system has no tokenizer; allowed: tokenizer=…, which text needs")
        return Collator(self.topology, self.prompts, self.tokenizer, self.other_tokenizers)

    def answer(
        self,
        items: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """The last agent's answer to every item, in text.

        Args:
            items: mappings with the fields that the agents' prompts name.
            max_new_tokens, temperature: instead of those of `decoding`.
            seeds: one an item, of its sampling.

        Raises:
            ValueError: an item that a prompt cannot be filled with.
        """
        _check_items(items)
        if not items:
            return []
        encoded = self.collator.encode_prompts(items)
        decoding = self._decoding(max_new_tokens, temperature)
        found = self.generate(**encoded, tokenizer=self.tokenizer, decoding=decoding, seeds=seeds)
        return [completions[0].text for completions in found]

    def stream(
        self,
        item: Mapping[str, Any],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer to one item in pieces, as they become certain; arguments as for :meth:`answer`."""
        _check_items([item])
        encoded = self.collator.encode_prompts([item])
        decoding = self._decoding(max_new_tokens, temperature)
        seeds = None if seed is None else [seed]
        for event in self.stream_tokens(**encoded, tokenizer=self.tokenizer, decoding=decoding, seeds=seeds):
            if event.text:
                yield event.text

    def _decoding(self, max_new_tokens: int | None, temperature: float | None) -> Decoding:
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return replace(self.decoding, samples=1, **{k: v for k, v in given.items() if v is not None})

    def generate(
        self,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        *,
        seeds: Sequence[int] | None = None,
        control: Control | None = None,
    ) -> list[list[Completion]]:
        """The last agent's answers, `[row][sample]`; see :class:`diffmas.generation.Engine` for the arguments."""
        return engine.generate(
            self.trajectory, prompt_ids, prompt_lengths, tokenizer, decoding, seeds=seeds, control=control
        )

    def stream_tokens(
        self,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        *,
        seeds: Sequence[int] | None = None,
        control: Control | None = None,
    ) -> Iterator[Event]:
        """The same token by token, as they come; every answer's last event carries its completion."""
        return engine.stream(
            self.trajectory, prompt_ids, prompt_lengths, tokenizer, decoding, seeds=seeds, control=control
        )


def _check_items(items: Any) -> None:
    is_sequence = isinstance(items, Sequence) and not isinstance(items, str)
    if not is_sequence or not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f"items is {items!r}; allowed: a sequence of mappings, e.g. [{{'question': '…'}}]")
