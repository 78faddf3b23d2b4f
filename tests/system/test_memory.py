"""What lives until the backward, against a DynamicCache at the same loss and gradient; and how it grows with m.

The size has an eighth of the columns and a quarter of the layers of `benchmarks.memory`'s full configuration. A
concatenating cache pays for the number of calls, so the ratio grows with m. With checkpointing, what autograd saves
is below 1/50 at m = 40; with the trace counted too, 1/50 is passed a little above m = 40.
"""

from functools import cache

import pytest
from compare import error

from benchmarks.memory import Size, line, measure, power_law

SMALL = dict(layers=2, hidden=32, heads=4, kv_heads=2, head_dim=32, intermediate=64, vocab=64, prompt=64, answer=8)


@cache
def measured(way, latent_steps, **options):
    return measure(way, Size(latent_steps=latent_steps, **SMALL | options))


@pytest.mark.parametrize(
    "way, latent_steps, kind, most",
    [
        ("diffmas", 40, "total", 0.3),
        ("diffmas+checkpointing", 40, "saved", 1 / 50),
        ("diffmas+checkpointing", 64, "total", 1 / 50),
    ],
)
def test_a_fraction_of_the_dynamic_cache(way, latent_steps, kind, most):
    ours, peer = measured(way, latent_steps), measured("dynamic_cache", latent_steps)
    print(f"\n{way}, m = {latent_steps}: saved 1/{peer.saved / ours.saved:.1f}, total 1/{peer.total / ours.total:.1f}")
    assert ours.loss == pytest.approx(peer.loss, rel=1e-5)
    assert error(ours.gradient, peer.gradient) < 1e-5
    assert getattr(ours, kind) <= most * getattr(peer, kind)


def _growth(way):
    # Beyond the first latent step: without any, a prompt's last hidden states, and what they keep, are dropped.
    steps = (8, 16, 32)
    saved = [measured(way, 1 + m, prompt=16).total for m in (0, *steps)]
    added = [s - saved[0] for s in saved[1:]]
    exponent, r2 = power_law(steps, added)
    _, slope, linear_r2 = line((0, *steps), saved)
    print(f"\n{way}: {slope:.0f} bytes a latent step, linear R² {linear_r2:.6f}, exponent {exponent:.3f} (R² {r2:.6f})")
    return exponent, linear_r2


@pytest.mark.parametrize("way", ["diffmas", "diffmas+checkpointing"])
def test_memory_is_linear_in_the_latent_steps(way):
    exponent, r2 = _growth(way)
    assert 0.98 < exponent < 1.02 and r2 > 0.9999


def test_a_dynamic_cache_is_not():
    exponent, _ = _growth("dynamic_cache")
    assert exponent > 1.2
