"""Training a system: the session, transformers' Trainer, batches, memory, checkpoints."""
