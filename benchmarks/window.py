"""`python -m benchmarks.window`: what a layer with a window costs as the prefix grows, beside one that sees everything.

Times a single token and a call of 64 tokens, forward and backward, on one CPU thread, in processor seconds (what else
runs on the machine counts little), and counts by hand the bytes of the trace and of its accumulators that they move.
Every result is first compared with the reference's. Leaves `results.json` and `window.svg` under
`benchmarks/results/window/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.experiment import WrongResult, relative_error
from diffmas.support.machine import machine
from diffmas_ops import backends
from diffmas_ops.cached_attention import reference
from diffmas_ops.rows import ColumnRanges, Pending, RowRanges
from diffmas_ops.scores import Scores

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "window"
RESULTS_FILE, PLOT_FILE = "results.json", "window.svg"
HEADS, KV_HEADS, DIM = 8, 2, 64
WINDOW, PREFIXES, TOKENS = 256, (1024, 2048, 4096, 8192, 16384, 32768), (1, 64)
TOLERANCE = 1e-5

Record = dict[str, Any]


class Problem:
    """A call of `tokens` new tokens over `prefix` columns of one row, in float32."""

    def __init__(self, tokens: int, prefix: int, window: int | None):
        torch.manual_seed(0)
        columns = prefix + tokens
        self.q, self.grad = torch.randn(2, tokens, HEADS, DIM)
        self.trace = torch.randn(2, 1, KV_HEADS, columns, DIM).unbind()
        self.accumulators = torch.zeros(2, 1, KV_HEADS, columns, DIM).unbind()
        first, self.start = torch.zeros(1, dtype=torch.int32), torch.tensor([prefix], dtype=torch.int32)
        self.rows = RowRanges(first, first + tokens, self.start, tokens, columns)
        self.columns = ColumnRanges(first, self.start + tokens)
        self.scores = Scores(DIM**-0.5, window)

    def forward(self, ops) -> tuple[torch.Tensor, ...]:
        """Attention of tokens whose keys and values are there."""
        return ops.cached_attention(self.q, None, None, *self.trace, self.rows, self.scores)

    def backward(self, ops) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Of one token, what is not deferred; of more, everything. Returns what to time."""
        inputs = self.grad, self.q, *self.forward(ops), *self.trace, *self.accumulators
        if self.rows.max_seqlen_q > 1:
            return lambda: (ops.cached_attention_backward(*inputs, self.rows, self.columns, self.scores),)
        pending = [torch.zeros(1, 1, HEADS, DIM) for _ in range(2)] + [torch.zeros(1, 1, HEADS) for _ in range(2)]
        deferred = Pending(*pending, self.start)
        return lambda: ops.cached_attention_backward_token(*inputs, deferred, self.rows, self.scores)

    def bytes(self, direction: str) -> int:
        """Of keys and values read, and in a backward of more than one token of accumulators read and written."""
        tokens, columns = self.rows.max_seqlen_q, self.rows.max_seqlen_k
        column = 2 * KV_HEADS * DIM * 4
        passes = 3 if direction == "backward" and tokens > 1 else 1
        return passes * column * self.scores.reach(tokens, columns)


def measure(tokens: int, prefix: int, window: int | None, *, seconds: float) -> list[Record]:
    """Forward and backward; raises `WrongResult` where one is not the reference's."""
    problem, ops = Problem(tokens, prefix, window), backends.functions("cached_attention", torch.empty(0), "cpu")
    records = []
    for direction in ("forward", "backward"):
        made = [
            (lambda f=f: problem.forward(f)) if direction == "forward" else problem.backward(f)
            for f in (ops, reference)
        ]
        errors = [relative_error(a, b) for a, b in zip(*(run() for run in made), strict=True)]
        if max(errors) > TOLERANCE:
            raise WrongResult(f"{direction}, {tokens} tokens, {prefix} columns: error {max(errors):.1e}")
        samples, until = [], time.monotonic() + seconds
        while len(samples) < 5 or time.monotonic() < until:
            begin = time.process_time()
            made[0]()
            samples.append(time.process_time() - begin)
        records.append(
            {
                "direction": direction, "tokens": tokens, "prefix": prefix, "window": window,
                "median_s": statistics.median(samples), "fastest_s": min(samples), "rounds": len(samples),
                "bytes": problem.bytes(direction), "error": max(errors),
            }
        )  # fmt: skip
    return records


def plot(records: list[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "svg.hashsalt": ""})
    figure, axes = plt.subplots(1, len(TOKENS), figsize=(10, 3.4), layout="constrained")
    for axis, tokens in zip(axes, TOKENS, strict=True):
        for window, color in ((None, "tab:gray"), (WINDOW, "tab:blue")):
            for direction, style in (("forward", "o-"), ("backward", "s--")):
                points = [
                    (r["prefix"], 1e3 * r["median_s"])
                    for r in records
                    if (r["tokens"], r["window"], r["direction"]) == (tokens, window, direction)
                ]
                label = f"{direction}, {'all columns' if window is None else f'window of {window}'}"
                axis.loglog(*zip(*points, strict=True), style, color=color, markersize=4, label=label)
        name = "a single token" if tokens == 1 else f"{tokens} tokens"
        axis.set(xlabel="columns of the prefix", ylabel=f"{name}: ms on one thread")
        axis.set_xticks(PREFIXES, [f"{n // 1024}k" for n in PREFIXES], minor=False)
        axis.minorticks_off()
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.window", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--render-only", action="store_true", help="only draw from kept results")
    parser.add_argument("--seconds", type=float, default=0.8, help="time for each point")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not args.render_only:
        torch.set_num_threads(1)
        grid = [(t, prefix, window) for t in TOKENS for prefix in PREFIXES for window in (WINDOW, None)]
        records = [r for point in track(grid, "measuring") for r in measure(*point, seconds=args.seconds)]
        found = {"machine": machine(), "heads": [HEADS, KV_HEADS, DIM], "records": records}
        (RESULTS / RESULTS_FILE).write_text(json.dumps(found, indent=1) + "\n")
    records = json.loads((RESULTS / RESULTS_FILE).read_text())["records"]
    plot(records, RESULTS / PLOT_FILE)
    for r in records:
        window = "all" if r["window"] is None else r["window"]
        print(
            f"{r['direction']:8} {r['tokens']:3} tokens, prefix {r['prefix']:6}, window {window!s:>4}: "
            f"{1e3 * r['median_s']:8.3f} ms, {r['bytes'] / 1e6:7.2f} MB"
        )


if __name__ == "__main__":
    main()
