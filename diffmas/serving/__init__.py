"""Decoding elsewhere than where the agents ran: traces in files, vLLM behind them, and an HTTP endpoint in front."""
