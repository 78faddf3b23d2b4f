"""A transformers model as agents use it: attention through traces, fused parts, loss, loading."""
