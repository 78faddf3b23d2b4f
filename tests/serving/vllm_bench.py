"""One vLLM engine for the rows of several systems on one base model, and what equal answers are."""

from dataclasses import dataclass, field

import torch

from diffmas.embedded import EMBEDDED_PATH
from diffmas.generation.engine import stop_ids
from diffmas.serving.rows import embedded_rows, store_rows
from diffmas.serving.traces import TraceStore
from diffmas.serving.vllm_engine import EngineSource, VllmEngine
from diffmas.serving.weights import fingerprint, running_adapter, write_adapter


@dataclass
class Bench:
    """One vLLM engine, and what rows for it are made with."""

    folder: str
    systems: list = field(default_factory=list)
    options: dict = field(default_factory=dict)
    entropies: bool = False
    embedded: bool = False

    def __post_init__(self):
        self.store = TraceStore(f"{self.folder}/traces")
        self.model = fingerprint(self.systems[0])
        assert {fingerprint(system) for system in self.systems} == {self.model}
        names = [running_adapter(system) for system in self.systems]
        self.adapters = [n and write_adapter(s, n, self.folder) for s, n in zip(self.systems, names, strict=True)]
        source = EngineSource(
            EMBEDDED_PATH, self.model, "float32", None if self.embedded else self.store.folder,
            [a for a in self.adapters if a],
            {"enforce_eager": True, "max_model_len": 1024, "block_size": 32, **self.options},
        )  # fmt: skip
        system = self.systems[0]
        stops = stop_ids(system.agent_model, system.tokenizer)
        self.engine = VllmEngine(source, system.tokenizer, stops, entropies=self.entropies)

    def rows(self, system, encoded, decoding, *, adapter="own", **options):
        own = self.adapters[self.systems.index(system)] if adapter == "own" else adapter
        parts = encoded["prompt_ids"], encoded["prompt_lengths"]
        if self.embedded:
            return list(embedded_rows(system, *parts, decoding, own, **options))
        return list(store_rows(system, *parts, decoding, self.store, self.model, own, **options))

    def answers(self, system, encoded, decoding, **options):
        return self.decode(self.rows(system, encoded, decoding, **options), decoding)

    def decode(self, rows, decoding):
        found = dict(self.engine.decode(rows, decoding))
        return [found[i] for i in range(len(rows))]


def equal(own, found, atol=1e-4):
    """Greedy answers are the same, token by token, and so are what was said of them."""
    assert len(own) == len(found)
    for expected, actual in zip(own, found, strict=True):
        for a, b in zip(expected, actual, strict=True):
            assert (a.tokens, a.text, a.finish) == (b.tokens, b.text, b.finish)
            assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=atol)
