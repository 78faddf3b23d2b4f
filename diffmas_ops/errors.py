"""The package's own errors; every one is a `ValueError`, so that a caller need not know them."""


class CapacityError(ValueError):
    """A call needs more columns than its trace has."""


class UnsupportedError(ValueError):
    """An explicitly requested backend cannot serve the call; the message says why."""
