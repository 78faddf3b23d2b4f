"""The harness's model class: likelihoods, greedy flags and answers of the system behind it."""

import json
import os
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from diffmas import train


@pytest.fixture
def model_class(monkeypatch):
    """HarnessModel on the harness's base class, or on one with the same abstract methods where it is not installed."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError:
        monkeypatch.delitem(sys.modules, "diffmas.lm_eval", raising=False)
        import abc

        class LM(abc.ABC):
            def __init__(self):
                self._rank, self._world_size = 0, 1

            @abc.abstractmethod
            def loglikelihood(self, requests): ...

            @abc.abstractmethod
            def loglikelihood_rolling(self, requests): ...

            @abc.abstractmethod
            def generate_until(self, requests): ...

        parts = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
        package, api, model, registry = (types.ModuleType(name) for name in parts)
        model.LM, registry.register_model = LM, lambda name: lambda kind: kind
        for module in (package, api, model, registry):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        from diffmas.lm_eval import HarnessModel

        yield HarnessModel
        sys.modules.pop("diffmas.lm_eval")
    else:
        from diffmas.lm_eval import HarnessModel

        yield HarnessModel


@pytest.fixture
def build(model_class, team_flags, tmp_path):
    """`build(**options)`: a run of three agents, or of another `topology`, as the harness's model."""
    (tmp_path / "prompts.yaml").write_text('roles: {default: {user: "Facts: {question}"}}\n')
    options = dict(prompts=str(tmp_path / "prompts.yaml"), batch_size=2, device="cpu")

    def built(topology=None, **changes):
        given = team_flags(model=None, max_steps=4, learning_rate=1e-3, **({"topology": topology} if topology else {}))
        run = tmp_path / (topology or "run")
        if not run.exists():
            assert train.main([*given, f"--output_dir={run}", "--disable_final_eval=true", "--disable_tqdm=true"]) == 0
        return model_class(run, **{**options, **changes})

    return built


@pytest.fixture
def model(build):
    return build()


def requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


def test_harness_model(model):
    pairs = [("Recall B", " 12"), ("What is the answer ", "7 of 8"), ("", "A"), ("Facts: A7", " B12 C3")]
    together = model.loglikelihood(requests(*pairs))
    assert [model.loglikelihood(requests(pair))[0] for pair in pairs] == [
        (pytest.approx(score, rel=1e-4), greedy) for score, greedy in together
    ]
    tokenizer, system = model.tokenizer, model.system
    # One pair by hand: two senders read the context as a question, the solver reads the context itself.
    context, continuation = (tokenizer(text).input_ids for text in ("Recall B", " 12"))
    chat = model.prompts.messages("sender", {"question": "Recall B"})
    sender = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    prompts = [sender, sender, context]
    with torch.no_grad():
        logits = system.eval()(
            [torch.tensor(p) for p in prompts], [[len(p)] for p in prompts], torch.tensor(continuation),
            [len(continuation)],
        ).logits  # fmt: skip
    expected = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
    assert together[0][0] == pytest.approx(float(expected), rel=1e-4)
    # A space at the seam belongs to the continuation, and an empty context is the end-of-sequence token.
    assert model._encode_pair("a ", "b") == (tokenizer("a").input_ids, tokenizer(" b").input_ids)
    assert model._encode_pair("", "A")[0] == [tokenizer.eos_token_id]


def test_agents_on_several_models(build):
    """The sender reads the document with its model's own tokenizer, the solver the context with its own."""
    model = build(topology="two_models")
    solver, sender = (model.system.tokenizer_of(agent) for agent in reversed(model.system.topology.agents))
    pairs = [("Recall B", " 12"), ("Facts: A7", " B12 C3")]
    together = model.loglikelihood(requests(*pairs))
    assert [model.loglikelihood(requests(pair))[0][0] for pair in pairs] == [
        pytest.approx(score, rel=1e-4) for score, _ in together
    ]
    chat = model.prompts.messages("sender", {"question": "Recall B"})
    prompt = sender.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert sender.decode(prompt).startswith("[question]")
    context, continuation = (solver(text).input_ids for text in pairs[0])
    with torch.no_grad():
        ids = [torch.tensor(prompt), torch.tensor(context)]
        scored = torch.tensor(continuation), [len(continuation)]
        logits = model.system.eval()(ids, [[len(prompt)], [len(context)]], *scored).logits
    expected = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
    assert together[0][0] == pytest.approx(float(expected), rel=1e-4)
    settings = {"until": [], "max_gen_toks": 3, "do_sample": False}
    contexts = ["Recall B", "Recall C"]
    answers = model.generate_until(requests(*((c, settings) for c in contexts)))
    assert answers == [model.generate_until(requests((c, settings)))[0] for c in contexts]


def test_answers_are_what_greedy_likelihoods_say(model):
    settings = {"until": [], "max_gen_toks": 3, "do_sample": False}
    contexts = [f"<|user|>{text}<|assistant|>" for text in ("Facts: A7 B12.\nRecall B", "Recall C", "Facts: B4 C11")]
    answers = model.generate_until(requests(*((c, settings) for c in contexts)))
    assert answers == [model.generate_until(requests((c, settings)))[0] for c in contexts]
    written = [(c, a) for c, a in zip(contexts, answers, strict=True) if a.strip() and "�" not in a]
    assert written, "nothing was written that could be scored"
    for context, answer in written:
        assert model.loglikelihood(requests((context, answer)))[0][1], (context, answer)
        wrong = model.loglikelihood(requests((context, " value" + answer)))[0]
        assert not wrong[1] and wrong[0] < 0
        stop = answer.strip()[0]
        cut = model.generate_until(requests((context, settings | {"until": [stop]})))[0]
        assert cut == answer[: answer.index(stop)]
    rolling = model.loglikelihood_rolling(requests(("Facts: A7",), ("Recall",)))
    assert all(score < 0 for score in rolling) and rolling[0] != rolling[1]


class Told:
    """Stands for a system: notes the prompts it is given, and writes what it is told to."""

    def __init__(self, system, texts):
        self.topology, self.agent_model, self.texts, self.seen, self.stops = (
            system.topology,
            system.agent_model,
            texts,
            [],
            [],
        )
        self.tokenizer_of = system.tokenizer_of
        self.training, self.eval, self.train = False, lambda: None, lambda mode=True: None

    def generate(self, ids, lengths, tokenizer, decoding, seeds):
        split = [i.split(n) for i, n in zip(ids, lengths, strict=True)]
        self.seen += [[tokenizer.decode(part) for part in row] for row in zip(*split, strict=True)]
        self.stops.append(decoding.stop)
        return [[SimpleNamespace(text=self.texts.pop(0))] for _ in lengths[0]]


def asked(model, *arguments, docs=None, texts=("a", "b")):
    """What the system reads and is stopped by, and what the model makes of what it writes."""
    told = model.system = Told(model.system, list(texts))
    rows = requests(*arguments)
    for request, doc in zip(rows, docs or [{}] * len(rows), strict=True):
        request.doc = doc
    return told, model.generate_until(rows)


UNTIL = {"until": ["\n\n"], "max_gen_toks": 9}


def test_agents_before_the_last_read_a_field_of_the_document(build, tmp_path):
    (tmp_path / "two.yaml").write_text('roles: {sender: {user: "{question}/{body}"}}\n')
    docs = [{"ask": "Recall A", "body": "A7"}, {"ask": "Recall B", "body": "B4"}]
    told, _ = asked(build(field="ask", prompts=str(tmp_path / "two.yaml")), ("x", UNTIL), ("y", UNTIL), docs=docs)
    assert told.seen == [
        [f"<|user|>{d['ask']}/{d['body']}<|assistant|>"] * 2 + [c] for d, c in zip(docs, "xy", strict=True)
    ]
    with pytest.raises(ValueError, match="field is 'no'; allowed: a document's own, ask, body"):
        asked(build(field="no"), ("x", UNTIL), docs=docs[:1])


def test_a_chat_is_written_as_the_run_writes_it(build):
    model = build(chat_template_args={"mood": "dry"})
    model.tokenizer.chat_template += "{% if mood is defined %}{{ mood }}{% endif %}"
    chat = [{"role": "user", "content": "Recall A"}, {"role": "assistant", "content": "7"}]
    assert model.chat_template() == "" and "mood" in model.chat_template(True)
    whole = model.apply_chat_template(chat, add_generation_prompt=False)
    assert whole.startswith("<|user|>Recall A") and "7" in whole
    context = model.apply_chat_template([*chat, {"role": "user", "content": "Recall B"}])
    assert context.endswith("<|assistant|>dry")
    told, _ = asked(model, (context, UNTIL), texts=["a"])
    # The others read the question, not how it is wrapped.
    assert told.seen == [["<|user|>Facts: Recall B<|assistant|>dry"] * 2 + [context]]
    other = build(chat_template_args='{"mood": "wry"}')
    other.tokenizer.chat_template = model.tokenizer.chat_template
    assert model.tokenizer_name != other.tokenizer_name == other.tokenizer_name and "/" not in other.tokenizer_name
    other.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the model has no chat template"):
        other.apply_chat_template(chat)


@pytest.mark.parametrize(
    ("options", "context", "text", "stops", "answer"),
    [
        ({}, "q", "4\n\nQ", ("\n\n",), "4"),
        # Nothing stops within reasoning, and what follows it is the answer.
        ({"think_end_token": "</think>"}, "q", "<think>a\n\nb</think>\n\n4\n\nQ", (), "4"),
        ({"think_end_token": "|DONE|"}, "q", "a\n\nb|DONE|c|DONE| 4", (), "4"),
        ({"think_end_token": "</think>"}, "q", "4\n\nQ", (), "4"),
        ({}, "q<think>\n", "a\n\nb</think>4\n\nQ", (), "4"),
        ({}, "q<think>\n", "a\n\nb", (), ""),
    ],
)  # fmt: skip
def test_reasoning_is_no_answer(build, options, context, text, stops, answer):
    told, found = asked(build(**options), (context, UNTIL), texts=[text])
    assert told.stops == [stops] and found == [answer]


@pytest.mark.parametrize("size", ["auto", 0, "-1", 1.5])
def test_a_batch_size_is_a_number(build, size):
    with pytest.raises(ValueError, match="batch_size is .*; allowed: integers ≥ 1"):
        build(batch_size=size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_the_harness_s_default_device_is_the_cpu_where_there_is_no_gpu(build):
    assert build(device="cuda:0").system.agent_model.device.type == "cpu"


def test_the_harness_s_own_command_line(team_flags, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    given = [*team_flags(model=None, max_steps=2), f"--output_dir={tmp_path / 'run'}", "--disable_final_eval=true"]
    assert train.main([*given, "--disable_tqdm=true"]) == 0
    items = [{"question": f"Recall {c}", "evidence": f"{c}7 D2", "answer": "7"} for c in "ABC"]
    (tmp_path / "items.json").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'items.json'}}}}}\n"
        'test_split: test\noutput_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {until: [x], max_gen_toks: 3, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    )
    command = [
        sys.executable, "-m", "diffmas.lm_eval", "--model", "diffmas", "--model_args",
        f"run={tmp_path / 'run'},field=question", "--tasks", "own", "--include_path", str(tmp_path), "--device", "cpu",
        "--apply_chat_template", "--output_path", str(tmp_path / "out"), "--batch_size", "2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert 0 <= json.loads(results.read_text())["results"]["own"]["exact_match,none"] <= 1


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    for name in ("lm_eval", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "diffmas.lm_eval", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"install diffmas\[lm-eval\]"):
        import diffmas.lm_eval  # noqa: F401
