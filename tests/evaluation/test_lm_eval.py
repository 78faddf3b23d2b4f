"""The harness's model class: likelihoods, greedy flags and answers of the system behind it."""

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

        package, api, model = (types.ModuleType(n) for n in ("lm_eval", "lm_eval.api", "lm_eval.api.model"))
        model.LM = LM
        for module in (package, api, model):
            monkeypatch.setitem(sys.modules, module.__name__, module)
    from diffmas.lm_eval import HarnessModel

    yield HarnessModel
    sys.modules.pop("diffmas.lm_eval")


@pytest.fixture
def model(model_class, team_flags, tmp_path):
    (tmp_path / "prompts.yaml").write_text('roles: {default: {user: "Facts: {question}"}}\n')
    given = [
        *team_flags(model=None, max_steps=4, learning_rate=1e-3),
        f"--output_dir={tmp_path / 'run'}",
        "--disable_final_eval=true",
    ]
    assert train.main([*given, "--disable_tqdm=true"]) == 0
    return model_class(tmp_path / "run", prompts=str(tmp_path / "prompts.yaml"), batch_size=2, device="cpu")


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


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    sys.modules.pop("diffmas.lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"install diffmas\[lm-eval\]"):
        import diffmas.lm_eval  # noqa: F401
