"""The command line of a comparison that ends in seconds: two senders and a solver on a tiny random base."""

import pytest

TEAM = """name: team
handover: latent
agents:
  - {name: first, role: sender}
  - {name: second, role: sender, receives: [first]}
  - {name: solver, receives: [second]}
"""


@pytest.fixture
def flags(base, tmp_path):
    """`flags(**changes)`: what `diffmas.train` takes; 3 agents, 2 latent steps, 4 training steps, 5 items."""

    def build(**changes):
        (tmp_path / "team.yaml").write_text(TEAM)
        values = dict(
            model=base, task="relay", topology=tmp_path / "team.yaml", latent_steps=2, max_steps=4, learning_rate=1e-2,
            per_device_train_batch_size=4, gradient_accumulation_steps=1, per_device_eval_batch_size=4, eval_size=5,
            max_new_tokens=3, temperature=0.8, top_p=0.9, save_steps=2, use_cpu=True,
        )  # fmt: skip
        return [f"--{k}={v}" for k, v in (values | changes).items() if v is not None]

    return build
