"""The trained relay that vLLM decodes, and a look into its connector."""

import os

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from diffmas.embedded import EMBEDDED_PATH

    return AutoTokenizer.from_pretrained(EMBEDDED_PATH)


@pytest.fixture(scope="session")
def relay_run(tmp_path_factory):
    """A trained relay."""
    if folder := os.environ.get("DIFFMAS_RELAY"):
        return folder
    from diffmas.train import main

    folder = tmp_path_factory.mktemp("relay")
    assert main([f"--output_dir={folder}", "--disable_tqdm=true", "--disable_final_eval=true", "--use_cpu=true"]) == 0
    return str(folder)


@pytest.fixture
def loads(monkeypatch):
    """What the connector planned, as it plans it."""
    from diffmas.serving.connector import TraceConnector

    planned, build = [], TraceConnector.build_connector_meta

    def watched(self, output):
        meta = build(self, output)
        planned.extend(meta.loads)
        return meta

    monkeypatch.setattr(TraceConnector, "build_connector_meta", watched)
    return planned
