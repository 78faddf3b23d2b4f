"""The endpoint in front of vLLM's own server: what our engine answers, many at once, clients that leave, a kill."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm makes one")

import httpx
import psutil

from diffmas import MultiAgentSystem
from diffmas.evaluation.inspection import contributions
from diffmas.generation import Decoding
from diffmas.runs.description import known
from diffmas.serving.http.protocol import ChatBody, Limits, Reader
from diffmas.serving.http.vllm_backend import VllmBackend
from diffmas.serving.traces import TraceStore
from diffmas.tasks import TaskArguments, load_task

CHAT = "/v1/chat/completions"
GREEDY = Decoding(max_new_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def relay(relay_run):
    return MultiAgentSystem.from_pretrained(relay_run)


@pytest.fixture(scope="module")
def items(relay):
    found = load_task(known(TaskArguments, relay.description["task"])).eval
    return [{name: found[i][name] for name in ("evidence", "question")} for i in range(64)]


@pytest.fixture(scope="module")
def served(relay_run, tmp_path_factory):
    """The process, its address, and the folder of its traces."""
    folder = tmp_path_factory.mktemp("traces")
    command = [
        sys.executable, "-m", "diffmas.serve", f"--run={relay_run}", "--port=0", "--served_name=relay", "--engine=vllm",
        '--engine_args={"enforce_eager": true, "max_model_len": 1024}', f"--trace_dir={folder}", "--max_new_tokens=900",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    children = []
    try:
        for line in process.stdout:
            if found := re.fullmatch(r"relay: (http://127\.0\.0\.1:\d+)/v1\n", line):
                break
        else:
            pytest.fail("it did not start")
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3
        yield process, found[1], folder
    finally:
        process.kill()
        # Only what it started itself, in case that is what is wrong with it.
        for child in children:
            if child.is_running():
                child.kill()


def body(item, **more):
    return {"item": item, "temperature": 0, "max_tokens": 4, **more}


def traces(folder):
    return list(folder.rglob("traces/*.safetensors"))


def gone(what, seconds=30):
    deadline = time.monotonic() + seconds
    while (left := what()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left


def own(relay, items):
    encoded = relay.collator.encode_prompts(items)
    return relay.generate(**encoded, tokenizer=relay.tokenizer, decoding=GREEDY)


def test_many_at_once(served, relay, items):
    _, address, folder = served

    async def ask():
        async with httpx.AsyncClient(base_url=address, timeout=200) as client:
            return await asyncio.gather(*(client.post(CHAT, json=body(item, logprobs=True)) for item in items))

    for response, (expected,) in zip(asyncio.run(ask()), own(relay, items), strict=True):
        (choice,) = response.raise_for_status().json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected.text, expected.finish)
        found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        assert found == pytest.approx(expected.logprobs[: len(expected.tokens)], abs=1e-4)
    assert gone(lambda: traces(folder))


def test_streams_of_two(served, relay, items):
    _, address, _ = served
    asked = body(items[0], n=2, stream=True, temperature=1.5, seed=4, stream_options={"include_usage": True})
    texts = []
    for _ in range(2):
        response = httpx.post(address + CHAT, json=asked, timeout=100).raise_for_status()
        lines = [line[6:] for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        found = {0: "", 1: ""}
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            found[choice["index"]] += choice["delta"].get("content", "")
        finishes = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
        assert sorted(finishes) == [0, 1] and chunks[-1]["usage"]["completion_tokens"] > 2
        texts.append(found)
    assert texts[0] == texts[1]
    greedy = httpx.post(address + CHAT, json=body(items[0], n=2), timeout=100).json()["choices"]
    assert {choice["message"]["content"] for choice in greedy} == {own(relay, items[:1])[0][0].text}


def test_what_an_answer_was_made_from(served, relay, items):
    """Agents are looked at here, whoever decoded the answer."""
    found = httpx.post(served[1] + "/inspect", json=body(items[0]), timeout=100).raise_for_status().json()
    ((expected,),) = own(relay, items[:1])
    assert found["choices"][0]["message"]["content"] == expected.text
    encoded = relay.collator.encode_prompts(items[:1])
    looked = contributions(relay, encoded["prompt_ids"], expected.tokens)
    assert [p["mass"] for p in found["parts"]] == pytest.approx([p["mass"] for p in looked["parts"]], abs=1e-5)
    assert [s["said"][0][0] for s in found["steps"]] == [s["said"][0][0] for s in looked["steps"]]
    assert gone(lambda: traces(served[2]))


def test_a_client_that_leaves(served, relay, items):
    _, address, folder = served
    long = body(items[0], max_tokens=900, n=4, stream=True, temperature=2, stop=["never this"])
    with httpx.stream("POST", address + CHAT, json=long, timeout=100) as response:
        next(response.iter_lines())
        assert traces(folder)
    assert gone(lambda: traces(folder))
    (choice,) = httpx.post(address + CHAT, json=body(items[1]), timeout=100).json()["choices"]
    assert choice["message"]["content"] == own(relay, items[1:2])[0][0].text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kv_transfer_params": {"trace": "0" * 64, "columns": 3}}, "kv_transfer_params"),
        ({"cache_salt": "mine"}, "cache_salt"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"max_tokens": 901}, "max_tokens is 901"),
        ({"temperature": 0.001}, "temperature is 0.001; allowed with vLLM"),
    ],
)
def test_refused(served, items, more, message):
    response = httpx.post(served[1] + CHAT, json=body(items[0], **more))
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_too_long_for_vllm(served, items):
    """What our engine would take, and vLLM would cut short, is refused, and the next one is fine."""
    item = {**items[0], "question": "Recall " * 450}
    response = httpx.post(served[1] + CHAT, json=body(item, max_tokens=700), timeout=100)
    assert response.status_code == 400 and "max_model_len is 1024" in response.json()["error"]["message"]
    assert httpx.post(served[1] + CHAT, json=body(items[0]), timeout=100).status_code == 200
    assert gone(lambda: traces(served[2]))


@pytest.mark.parametrize("breaks_off", [False, True])
def test_a_decoder_that_is_gone(relay, items, tmp_path, breaks_off):
    """Before it answers, or in the middle of a stream: the request fails, and its trace goes."""
    store = TraceStore(tmp_path)
    question = Reader(relay, "relay", Limits()).question(ChatBody(**body(items[0])))

    async def speak(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.I)[1]))
        chunk = {"choices": [{"text": "1", "token_ids": [], "logprobs": None, "finish_reason": None}]}
        writer.write(f"HTTP/1.1 200 OK\r\n\r\ndata: {json.dumps(chunk)}\n\n".encode())
        await writer.drain()
        writer.close()

    async def ask():
        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        if not breaks_off:
            server.close()
        backend = VllmBackend(relay, store, "model", None, f"http://127.0.0.1:{port}", 1024)
        pieces = []
        try:
            with pytest.raises(RuntimeError, match="vLLM's server"):
                async for piece in backend.answer(question):
                    pieces.append(piece.text)
            if not breaks_off:
                assert not await asyncio.to_thread(backend.healthy)
        finally:
            server.close()
            await backend.close()
        assert pieces == ["1"] * breaks_off

    asyncio.run(ask())
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_nothing(served):
    process, address, folder = served
    assert httpx.get(f"{address}/health").status_code == 200
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert gone(lambda: [child for child in children if child.is_running() and child.status() != "zombie"])
    assert gone(lambda: list(folder.iterdir()))
