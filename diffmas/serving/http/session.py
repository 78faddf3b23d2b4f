"""One server from its settings to its end: what `python -m diffmas.serve` does."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffmas.loading import load_run
from diffmas.serving.options import ENGINES, OWN, VLLM, check_engine, engine_options, trace_bytes
from diffmas.support.launch import check_alone
from diffmas.support.leftovers import vanishing_folder
from diffmas.support.progress import announced

if TYPE_CHECKING:
    from diffmas.serving.http.app import Inspect

#: What serving over HTTP needs besides.
_NEEDED = ("fastapi", "uvicorn", "httpx")


@dataclass
class ServeArguments:
    """What to serve, where, and how much of it."""

    run: str = field(metadata={"help": "Folder written by diffmas.train."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; there is no authentication."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "The run's base model, where its folder has moved."},
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "The model's file in that folder or repository, where it is in GGUF."}
    )
    served_name: str | None = field(default=None, metadata={"help": "What requests call it; default: RUN's own name."})
    engine: str = field(default=OWN, metadata={"help": f"What decodes: {', '.join(ENGINES)}; senders run here."})
    engine_args: str | None = field(
        default=None, metadata={"help": "With vllm: further arguments of its engine, a JSON object."}
    )
    trace_dir: str | None = field(
        default=None, metadata={"help": "With vllm: where traces wait for it; default: where temporary files are."}
    )
    max_trace_gb: float | None = field(
        default=None, metadata={"help": "With vllm: the most that traces may take; default: what there is."}
    )
    max_waiting: int = field(default=128, metadata={"help": "Requests that may wait or be answered at once."})
    batch_size: int = field(default=64, metadata={"help": "Rows that are read, and answers decoded, together."})
    max_prompt_tokens: int = field(
        default=32_768, metadata={"help": "Most tokens of a request's prompts, all agents'."}
    )
    max_new_tokens: int = field(default=32_768, metadata={"help": "Most tokens of an answer."})
    max_answers: int = field(default=16, metadata={"help": "Most answers of a request (n)."})
    max_body_bytes: int = field(default=1 << 20, metadata={"help": "Most bytes of a request's body."})

    def check(self) -> None:
        """Raise `ValueError` for an argument outside its range, or one that would be ignored."""
        for name in ("max_waiting", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; allowed: integers ≥ 1")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port is {self.port}; allowed: 0 to 65535 (0: any that is free)")
        check_engine(self.engine, self.engine_args, self.trace_dir, self.max_trace_gb)


def serve(args: ServeArguments, inspect: Inspect | None = None) -> int:
    """Serve until the process is told to end. Returns its exit status.

    Args:
        inspect: looks at answers, as :func:`~diffmas.serving.http.app.create_app` takes it.

    Raises:
        ValueError, OSError: a run that cannot be loaded, or an argument outside its range.
        ModuleNotFoundError: no FastAPI, uvicorn or httpx; no vLLM where it is asked for.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ModuleNotFoundError(f"serving needs {', '.join(missing)}: pip install 'diffmas[serve]'")
    args.check()
    check_alone("serving")
    from diffmas.serving.http.app import create_app
    from diffmas.serving.http.backends import Backend, OwnBackend
    from diffmas.serving.http.protocol import Limits, Reader
    from diffmas.serving.http.server import listen

    limits = Limits(args.max_body_bytes, args.max_prompt_tokens, args.max_new_tokens, args.max_answers)
    run = load_run(args.run, args.model_name_or_path, args.gguf_file)
    system = run.system
    if torch.cuda.is_available():
        system.cuda()
    reader = Reader(system, args.served_name or Path(args.run).resolve().name, limits)
    with contextlib.ExitStack() as opened:
        backend: Backend
        if args.engine == VLLM:
            from diffmas.serving.http.vllm_backend import on_vllm

            folder = opened.enter_context(vanishing_folder(args.trace_dir))
            options, most = engine_options(args.engine_args), trace_bytes(args.max_trace_gb)
            with announced("starting vLLM's server"):
                backend = opened.enter_context(
                    on_vllm(system, folder, options, most, most=args.max_waiting, together=args.batch_size)
                )
        else:
            backend = OwnBackend(system, most=args.max_waiting, together=args.batch_size)
        listen(create_app(backend, reader, inspect), args.host, args.port, reader.name, args.max_waiting)
    return 0
