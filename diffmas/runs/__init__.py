"""A run's folder: its settings, its weights, and the system built from them."""
