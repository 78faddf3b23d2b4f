"""`VllmDecoder` takes and gives what a system's own `generate` does, and leaves nothing behind."""

import dataclasses

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm makes one")

from vllm_bench import equal

from diffmas import Decoding, MultiAgentSystem
from diffmas.agents.controls import CONTROLS
from diffmas.models.adapters import without_adapters
from diffmas.serving.decoder import VllmDecoder

ITEMS = [{"evidence": f"A{i} B1{i} C{i + 1} D6", "question": "Recall " + "ABCD"[i % 4]} for i in range(6)]


def test_generate(relay_run, tmp_path):
    system = MultiAgentSystem.from_pretrained(relay_run)
    encoded, decoding = system.collator.encode_prompts(ITEMS), Decoding(max_new_tokens=4, temperature=0, max_rows=4)
    asked = dict(**encoded, tokenizer=system.tokenizer, decoding=decoding)
    with pytest.raises(ValueError, match=r"engine options are .*nonsense"):
        VllmDecoder(system, folder=tmp_path, nonsense=1)
    with pytest.raises(ValueError, match="engine options have"):
        VllmDecoder(system, folder=tmp_path, kv_transfer_config={})
    assert not list(tmp_path.iterdir())
    with VllmDecoder(system, folder=tmp_path, enforce_eager=True, max_model_len=512) as decoder:
        for control in (None, CONTROLS["mismatched"]):
            equal(system.generate(**asked, control=control), decoder.generate(**asked, control=control))
        with without_adapters(system.agent_model.model):
            equal(system.generate(**asked), decoder.generate(**asked))
        with pytest.raises(ValueError, match="seeds is "):
            decoder.generate(**asked, seeds=[1])
        assert not list(tmp_path.rglob("traces/*"))
    assert not list(tmp_path.iterdir())


def test_prompt_embeddings(relay_run, tmp_path):
    """Of a chain with full hand-over, on the relay's trained weights; without traces, and with nothing left behind."""
    trained = MultiAgentSystem.from_pretrained(relay_run)
    with pytest.raises(ValueError, match="handover 'latent'.*allowed with prompt embeddings"):
        VllmDecoder(trained, folder=tmp_path, prompt_embeds=True)
    system = trained.of_models(dataclasses.replace(trained.topology, handover="full")).eval()
    encoded, decoding = trained.collator.encode_prompts(ITEMS), Decoding(max_new_tokens=4, temperature=0, max_rows=4)
    asked = dict(**encoded, tokenizer=trained.tokenizer, decoding=decoding)
    with pytest.raises(ValueError, match="max_trace_bytes is 9; allowed with prompt_embeds: None"):
        VllmDecoder(system, trained.tokenizer, folder=tmp_path, prompt_embeds=True, max_trace_bytes=9)
    options = dict(prompt_embeds=True, enforce_eager=True, max_model_len=512)
    with VllmDecoder(system, trained.tokenizer, folder=tmp_path, **options) as decoder:
        equal(system.generate(**asked), decoder.generate(**asked))
        with pytest.raises(ValueError, match="control is .*; allowed with prompt_embeds: None"):
            decoder.generate(**asked, control=CONTROLS["mismatched"])
        assert not list(tmp_path.rglob("traces/*"))
    assert not list(tmp_path.iterdir())
