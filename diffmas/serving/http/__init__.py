"""An OpenAI-compatible endpoint: one answer of a whole team behind every request."""
