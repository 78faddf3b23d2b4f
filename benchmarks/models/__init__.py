"""Every decoder of transformers, small and random, against itself recomputing what moved."""
