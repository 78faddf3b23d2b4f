"""The flags of a run that ends in seconds."""

import pytest


@pytest.fixture
def flags(base, tmp_path):
    """`flags(**changes)`: the command line of a 6-step relay run into `tmp_path / "run"`."""

    def build(**changes):
        values = dict(
            model=base, task="relay", topology="relay", latent_steps=2, max_steps=6, learning_rate=1e-2,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, per_device_eval_batch_size=4, eval_size=9,
            max_new_tokens=3, temperature=0, save_steps=2, disable_tqdm=True, use_cpu=True,
            output_dir=tmp_path / "run",
        )  # fmt: skip
        return [f"--{k}={v}" for k, v in (values | changes).items() if v is not None]

    return build
