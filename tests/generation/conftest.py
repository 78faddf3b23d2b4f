"""The embedded base and its tokenizer, as every test of decoding uses them."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffmas.embedded import EMBEDDED_PATH


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_PATH)


@pytest.fixture(scope="session")
def embedded_base():
    """transformers' own; tests take copies."""
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_PATH).eval()
