"""What a system is made of, as flags and as a run keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffmas.agents.bridges import BRIDGES
from diffmas.agents.topology import BRIDGE_STATES, TOPOLOGIES, Topology, load_topology
from diffmas.models.loss import LOSSES
from diffmas.models.pretrained import DTYPES, QUANTIZATIONS


@dataclass
class SystemArguments:
    """The model and the agents on it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Hub id, folder or .gguf file of a causal language model, or smollm2; default: the embedded base.",
        },
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "The model's file in that folder or repository, where it is in GGUF."}
    )
    dtype: str = field(default="auto", metadata={"help": f"Of the base model's weights: {', '.join(DTYPES)}."})
    quantization: str = field(
        default="none", metadata={"help": f"Of the base model's weights: {', '.join(QUANTIZATIONS)} (bitsandbytes)."}
    )
    random_weights: bool = field(
        default=False, metadata={"help": "Take only the model's configuration and tokenizer (for tests and timing)."}
    )
    topology: str = field(
        default="sequential",
        metadata={"help": f"{', '.join(TOPOLOGIES)}, or the path of a .yaml file."},
    )
    handover: str | None = field(
        default=None,
        metadata={
            "help": "What receivers attend to: full or latent; or bridge: they read their senders' hidden states; "
            "default: the topology's own."
        },
    )
    handover_sink: str | None = field(
        default=None,
        metadata={
            "help": "How many of the first sender's first columns go in front of latent steps handed over: a number, "
            "or auto (as many as the model's attention rests on); default: the topology's own."
        },
    )
    adapters: str | None = field(
        default=None,
        metadata={
            "help": "Of agents that name none: shared (one of all), or per_role (one each); default: the topology's."
        },
    )
    latent_steps: int = field(default=10, metadata={"help": "Latent steps m of every agent but the last."})
    alignment: str = field(default="identity", metadata={"help": "identity, ridge, learned or soft."})
    alignment_initial: str = field(
        default="identity", metadata={"help": "What a learned alignment starts at: identity or ridge."}
    )
    alignment_temperature: float = field(
        default=0.7, metadata={"help": "Of a soft alignment: what logits are divided by before the softmax."}
    )
    alignment_temperature_learned: bool = field(
        default=False, metadata={"help": "Train the temperature of a soft alignment, from that one on."}
    )
    alignment_top_k: int = field(
        default=0, metadata={"help": "The likeliest tokens that a soft alignment takes; 0: the whole vocabulary."}
    )
    latent_grad_clip: float | None = field(
        default=None,
        metadata={
            "help": "Most that a row's gradient may grow, relative to what it is of, on its way back from a latent "
            "step's input to the hidden state before; 0: any growth; default: 1 for a soft alignment, 0 for others."
        },
    )
    bridge: str = field(
        default="linear",
        metadata={"help": f"What hidden states that are handed over go through: {', '.join(BRIDGES)}."},
    )
    bridge_initial: str = field(
        default="tokens",
        metadata={
            "help": "What a bridge starts at: tokens (least squares over tokens that both models have) or random."
        },
    )
    bridge_states: str | None = field(
        default=None,
        metadata={
            "help": f"Which hidden states go over bridges: {', '.join(BRIDGE_STATES)} (those of the sender's whole "
            "prompt too); default: the topology's own."
        },
    )
    detach_trace: bool = field(default=False, metadata={"help": "Cut the gradient at every hand-over."})
    latent_backward: str = field(
        default="exact",
        metadata={
            "help": "Gradient of a latent rollout: exact, or sweeps:k, k parallel backward passes (exact at k = m)."
        },
    )
    cuda_graphs: str = field(
        default="off",
        metadata={
            "aliases": ["--capture"],
            "help": "Latent rollouts as CUDA graphs: off, or auto (where they can be captured; not yet run on a GPU).",
        },
    )
    checkpointing: str = field(
        default="none",
        metadata={
            "help": "Calls whose activations the backward recomputes: none, prefill, all, or auto (what memory needs)."
        },
    )
    lora_r: int = field(default=8, metadata={"aliases": ["--lora_rank"], "help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the LoRA adapter."})
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the LoRA adapter by alpha / √rank instead of alpha / rank (rsLoRA)."}
    )
    lora_target_modules: str = field(
        default="all-linear",
        metadata={
            "aliases": ["--lora_targets"],
            "help": "Modules to adapt: all-linear, or names separated by commas.",
        },
    )
    backend: str = field(
        default="auto",
        metadata={"aliases": ["--implementation"], "help": "Of the operators: auto, or the one to insist on."},
    )
    loss: str = field(
        default="auto", metadata={"help": f"How training takes the loss: {', '.join(LOSSES)}; see docs/training.md."}
    )

    def load_topology(self) -> Topology:
        """The topology they name, with what they say of it.

        Raises:
            TopologyError, FileNotFoundError, ValueError: as :func:`~diffmas.agents.topology.load_topology`.
        """
        return load_topology(
            self.topology, self.handover, self.handover_sink, self.adapters, bridge_states=self.bridge_states
        )
