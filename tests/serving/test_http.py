"""The endpoint on our own engine, over a real socket: OpenAI's formats, limits, clients that leave, an orderly end."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
pytest.importorskip("httpx", reason="needs the extra 'serve'")

import httpx
import uvicorn

from diffmas import MultiAgentSystem, train
from diffmas.evaluation.inspection import contributions, inspect
from diffmas.generation import Decoding
from diffmas.models.pretrained import load_base
from diffmas.serving.http.app import create_app
from diffmas.serving.http.backends import OwnBackend
from diffmas.serving.http.protocol import Limits, Reader

LIMITS = Limits(body_bytes=4000, prompt_tokens=900, new_tokens=2000, answers=8)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def system():
    model, tokenizer = load_base()
    decoding = Decoding(max_new_tokens=12, temperature=0)
    return MultiAgentSystem(
        model, "sequential", tokenizer=tokenizer, prompts="reasoning", latent_steps=2, decoding=decoding
    ).eval()


@contextlib.contextmanager
def served(system, **options):
    """An HTTP client of a server in a thread, and its backend."""
    backend = OwnBackend(system, **options)
    app = create_app(backend, Reader(system, "team", LIMITS), contributions)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
            yield client, backend
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive() and not backend._worker._thread.is_alive()


@pytest.fixture(scope="module")
def client(system):
    with served(system) as (client, _):
        yield client


def chat(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


def answers(system, texts, **changes):
    decoding = Decoding(**{"max_new_tokens": 12, "temperature": 0, **changes})
    encoded = system.collator.encode_prompts([{"question": text} for text in texts])
    return system.generate(**encoded, tokenizer=system.tokenizer, decoding=decoding, seeds=[decoding.seed] * len(texts))


def test_chat_and_completions_are_the_systems(client, system):
    (own,) = answers(system, ["3 + 4"])[0]
    for path, body in (
        (CHAT, chat("3 + 4")),
        (CHAT, {"item": {"question": "3 + 4"}, "model": "team", "user": "me", "frequency_penalty": 0}),
        (CHAT, chat([{"type": "text", "text": "3 +"}, {"type": "text", "text": " 4"}])),
        (COMPLETIONS, {"prompt": "3 + 4"}),
    ):
        found = client.post(path, json=body).raise_for_status().json()
        (choice,) = found["choices"]
        assert (choice["message"]["content"] if path == CHAT else choice["text"]) == own.text
        assert choice["finish_reason"] == own.finish and choice["logprobs"] is None
        assert found["object"] == ("chat.completion" if path == CHAT else "text_completion")
        lengths = system.collator.encode_prompts([{"question": "3 + 4"}])["prompt_lengths"]
        prompt, spent = sum(n for (n,) in lengths), len(own.logprobs)
        assert found["usage"] == {
            "prompt_tokens": prompt, "completion_tokens": spent, "total_tokens": prompt + spent,
        }  # fmt: skip


def test_logprobs(client, system):
    (own,) = answers(system, ["1 2"])[0]
    (choice,) = client.post(CHAT, json=chat("1 2", logprobs=True)).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert [e["logprob"] for e in entries] == pytest.approx(own.logprobs[: len(own.tokens)])
    assert [e["token"] for e in entries] == [system.tokenizer.decode([t]) for t in own.tokens]
    assert bytes(b for e in entries for b in e["bytes"]).decode() == "".join(e["token"] for e in entries)
    (choice,) = client.post(COMPLETIONS, json={"prompt": "1 2", "logprobs": 0}).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [e["logprob"] for e in entries]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_streaming(client, system, path):
    expected = answers(system, ["Any"], temperature=1.2, samples=2, seed=7)[0]
    asked = {"temperature": 1.2, "n": 2, "seed": 7, "stream": True, "stream_options": {"include_usage": True}}
    body = chat("Any", **asked) if path == CHAT else {"prompt": "Any", **asked}
    response = client.post(path, json=body).raise_for_status()
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == sum(len(a.logprobs) for a in expected)
    texts, finishes = ["", ""], [None, None]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert finishes[choice["index"]] is None
        texts[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
        finishes[choice["index"]] = choice["finish_reason"]
    assert texts == [a.text for a in expected] and texts[0] != texts[1]
    assert finishes == [a.finish for a in expected]


def test_stop(client, system):
    (own,) = answers(system, ["3 + 4"])[0]
    stop = own.text[len(own.text) // 2 :][:2]
    assert stop
    (choice,) = client.post(CHAT, json=chat("3 + 4", stop=stop)).json()["choices"]
    assert choice["message"]["content"] == own.text[: own.text.index(stop)] and choice["finish_reason"] == "stop"


def test_many_at_once(system):
    """Each gets its own answer, however they were put together."""
    texts = [f"{i} + {i % 7}" for i in range(64)]
    own = [row[0].text for row in answers(system, texts)]

    async def ask(address):
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            found = await asyncio.gather(*(client.post(CHAT, json=chat(t, max_tokens=12)) for t in texts))
        return [r.raise_for_status().json()["choices"][0]["message"]["content"] for r in found]

    with served(system, most=64) as (client, _):
        assert asyncio.run(ask(str(client.base_url))) == own


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "item and messages are both given or both missing"),
        (chat("x", item={"question": "x"}), 400, "item and messages are both given"),
        (chat("x", model="gpt"), 400, "model is 'gpt'; allowed: team"),
        (chat("x", temprature=1), 400, "temprature"),
        (chat("x", frequency_penalty=0.5), 400, "frequency_penalty"),
        (chat("x", top_logprobs=3, logprobs=True), 400, "top_logprobs"),
        (chat("x", n=9), 400, "n is 9; allowed: 1 to 8"),
        (chat("x", max_tokens=2001), 400, "max_tokens is 2001; allowed: up to 2000"),
        (chat("x", stop=["a"] * 5), 400, "stop has 5 strings"),
        (chat("x", stop=[""]), 400, "stop is "),
        (chat("word " * 700), 400, "the agents' prompts have .* tokens; allowed: up to 900"),
        (chat("\ud800"), 400, ""),
        ({"item": {"frage": "x"}}, 400, r"item lacks \['question'\]"),
        ({"item": {"question": "x", "answer": "y"}}, 400, r"item has \['answer'\], which no prompt names"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": chat("a")["messages"] * 2}, 400, "messages"),
        ({"kv_transfer_params": {}, **chat("x")}, 400, "kv_transfer_params"),
        ({"cache_salt": "", **chat("x")}, 400, "cache_salt"),
        (chat("x" * 5000), 413, "more than 4000 bytes"),
    ],
)  # fmt: skip
def test_refused(client, body, status, message):
    response = client.post(CHAT, content=json.dumps(body))
    assert response.status_code == status
    assert re.search(message, response.json()["error"]["message"])


def test_no_json(client):
    response = client.post(CHAT, content=b"{")
    assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]


def test_health_and_models(client):
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "team" and model["fields"] == ["question"]


def test_what_an_answer_was_made_from(client, system):
    """The same as an inspection of the tokens that our engine gives."""
    (own,) = answers(system, ["3 + 4"])[0]
    encoded = system.collator.encode_prompts([{"question": "3 + 4"}])
    expected = inspect(system, **encoded, tokens=own.tokens)
    found = client.post("/inspect", json=chat("3 + 4")).raise_for_status().json()
    (choice,) = found["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (own.text, own.finish)
    assert [(p["agent"], p["kind"], p["columns"]) for p in found["parts"]] == [
        (p.agent, p.kind, p.columns) for p in expected.parts
    ]
    assert [p["layers"] for p in found["parts"]] == [pytest.approx(p.layers, abs=1e-6) for p in expected.parts]
    assert [(s["agent"], s["step"]) for s in found["steps"]] == [(s.agent, s.step) for s in expected.steps]
    for step, own_step in zip(found["steps"], expected.steps, strict=True):
        for kind in ("said", "nearest"):
            pairs = [
                (system.tokenizer.decode([token]), pytest.approx(v, abs=1e-5)) for token, v in getattr(own_step, kind)
            ]
            assert [tuple(pair) for pair in step[kind]] == pairs
    for more in ({"n": 2}, {"stream": True}):
        refused = client.post("/inspect", json=chat("3 + 4", **more))
        assert refused.status_code == 400 and "allowed to inspect" in refused.json()["error"]["message"]


def test_the_page(client):
    """Of this server alone: it asks nobody else for anything."""
    response = client.get("/").raise_for_status()
    assert response.headers["content-type"].startswith("text/html")
    assert not re.search(r"https?:|//[\w.]+/|src=|url\(", response.text)


def test_no_page_without_a_look(system):
    backend = OwnBackend(system)
    app = create_app(backend, Reader(system, "team", LIMITS))
    assert not {"/", "/inspect"} & {route.path for route in app.routes}
    asyncio.run(backend.close())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(system, stream):
    """Its work stops, and the next one's is as it would have been."""
    body = chat("Tell", temperature=2, max_tokens=2000, n=8, stream=stream, seed=3, stop=["\x00never"])
    with served(system) as (client, backend):
        if stream:
            with client.stream("POST", CHAT, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body, timeout=0.5)
        deadline = time.monotonic() + 20
        while backend._worker._jobs and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not backend._worker._jobs
        (own,) = answers(system, ["3 + 4"])[0]
        assert client.post(CHAT, json=chat("3 + 4")).json()["choices"][0]["message"]["content"] == own.text


def test_as_many_as_may_wait(system):
    with served(system, most=1) as (client, backend):
        held = threading.Event()
        work = backend._worker._work
        backend._worker._work = lambda jobs: (held.wait(30), work(jobs))
        found = []
        asking = threading.Thread(target=lambda: found.append(client.post(CHAT, json=chat("first"))))
        asking.start()
        while not backend._worker._jobs:
            time.sleep(0.01)
        refused = httpx.post(f"{client.base_url}{CHAT}", json=chat("second"))
        assert refused.status_code == 429 and "allowed: 1" in refused.json()["error"]["message"]
        looked = httpx.post(f"{client.base_url}/inspect", json=chat("second"))
        assert looked.status_code == 429
        held.set()
        asking.join()
        assert found[0].status_code == 200


def test_what_fails_is_told(system):
    with served(system) as (client, backend):

        def broken(jobs):
            raise RuntimeError("it broke")

        work, backend._worker._work = backend._worker._work, broken
        for body in (chat("x"), chat("x", stream=True)):
            response = client.post(CHAT, json=body)
            assert response.status_code == 500 and response.json()["error"]["message"] == "it broke"
        backend._worker._work = work
        assert client.post(CHAT, json=chat("x")).status_code == 200


def test_the_command(tmp_path):
    """It says where it listens, takes items of several fields, and SIGTERM ends it in order."""
    # The base alone can answer this.
    flags = ["--topology=single", "--max_steps=1", "--disable_final_eval=true", "--disable_tqdm=true", "--use_cpu=true"]
    assert train.main([*flags, f"--output_dir={tmp_path}"]) == 0
    command = [sys.executable, "-m", "diffmas.serve", f"--run={tmp_path}", "--port=0", "--served_name=relay"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        address = re.fullmatch(r"relay: (http://127\.0\.0\.1:\d+)/v1\n", line)[1]
        item = {"evidence": "A3 B14 C4 D6", "question": "Recall B"}
        for body in ({"item": item}, chat(json.dumps(item))):
            found = httpx.post(f"{address}{CHAT}", json=body, timeout=60).json()
            assert found["choices"][0]["message"]["content"] == "14"
        refused = httpx.post(f"{address}{CHAT}", json=chat("Recall B"))
        assert refused.status_code == 400 and "no JSON object" in refused.json()["error"]["message"]
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
