"""The Trainer's own trackers see a system's training."""

import pytest

from diffmas import train


def test_tensorboard(flags, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    given = flags(report_to="tensorboard", logging_steps=2, eval_strategy="steps", eval_steps=3)
    assert train.main([*given, "--disable_final_eval=true"]) == 0
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.*")).parent)).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
    assert [e.step for e in events.Scalars("eval/accuracy")] == [3, 6]
    assert all(e.value > 0 for e in events.Scalars("train/loss"))
