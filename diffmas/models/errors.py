"""What is said of models that cannot be used."""


class UnsupportedModelError(ValueError):
    """A model with something the trace cannot express; the message names it."""
