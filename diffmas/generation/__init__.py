"""Decoding from traces: ragged and continuous, without padding; the samples of a row share its trace."""

from diffmas.generation.decoding import Completion, Decoding, Event
from diffmas.generation.engine import Engine, generate, stream

__all__ = ["Completion", "Decoding", "Engine", "Event", "generate", "stream"]
