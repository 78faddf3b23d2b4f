"""Rows of eight families' chat templates: as trained they are as generated, and nothing an item spells is control."""

import json

import pytest
import torch
from chat_families import FAMILIES
from tiny_models import causal_lm

from diffmas.agents.collator import Collator
from diffmas.agents.thinking import BUDGET, THINKING_BUDGET, budget, switch, switched, thinks
from diffmas.agents.topology import TOPOLOGIES, Topology, TopologyError
from diffmas.answers import reasoning
from diffmas.generation import Decoding, engine
from diffmas.generation.text import decode
from diffmas.prompts import Prompts
from diffmas.prompts.chat_template import end_of_turn, parse_kwargs
from diffmas.prompts.control_tokens import ControlTokens
from diffmas.prompts.shortened import ShortenedPrompts
from diffmas.system import MultiAgentSystem
from diffmas.tasks import TaskArguments, load_task

DATE = "2026-01-02"
EVERY = pytest.mark.parametrize("name", FAMILIES)
ITEMS = [
    {"question": "what is 1 + 1?", "answer": "the answer is 2"},
    {"question": "a\n\nb?", "answer": "c\n\nd", "reasoning": "first this, then that"},
    {"question": "Zoë’s 3½ ducks — 日本", "answer": "½"},
]
ROLES = {"single": {"user": "{question}"}}


def collator(name, roles=ROLES, **options):
    family = FAMILIES[name]
    prompts = Prompts(roles, date=DATE, **{"chat_template_kwargs": family.options, **options})
    return Collator(TOPOLOGIES["single"], prompts, family.tokenizer())


def rows(collate, items):
    """Prompt and answer of every item, as trained."""
    batch = collate(items)
    prompts = batch["prompt_ids"][0].split(batch["prompt_lengths"][0])
    answers = batch["answer_ids"].split(batch["answer_lengths"])
    return [(p.tolist(), a.tolist()) for p, a in zip(prompts, answers, strict=True)]


def taught(name, item):
    """What is to be written behind the prompt, by hand."""
    if name == "R1-distill":
        return item.get("reasoning", "") + "\n</think>\n\n" + item["answer"]
    return item["answer"]


@EVERY
def test_a_trained_row_is_what_the_template_writes(name):
    family, collate = FAMILIES[name], collator(name)
    tokenizer = family.tokenizer()
    for item, (prompt, answer) in zip(ITEMS, rows(collate, ITEMS), strict=True):
        text = tokenizer.decode(prompt)
        assert text.startswith(family.begin) and text.endswith(item["question"] + family.ready)
        assert prompt.count(tokenizer.bos_token_id) == (family.bos is not None)
        assert tokenizer.decode(answer) == taught(name, item) + family.end
        # The same text, read in one piece.
        whole = tokenizer(text + taught(name, item) + family.end, add_special_tokens=False)["input_ids"]
        if name != "R1-distill" or "reasoning" in item:
            assert prompt + answer == whole
        # The template's own conversation, up to what ends the answer.
        chat = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
        pinned = {"date_string": "02 Jan 2026"} if name == "Llama 3" else {}
        written = tokenizer.apply_chat_template(chat, tokenize=False, **pinned)
        written = written[: written.rindex(family.end) + len(family.end)]
        expected = text + family.seam + item["answer"] + family.end
        if name == "R1-distill":
            expected = expected.replace("<think>\n", "")
        assert written == expected


class Script:
    """Stands for the choice of tokens: every row is given its own, one after the other."""

    def __init__(self, wanted):
        self.wanted, self.at = wanted, 0

    def __call__(self, logits, uniforms, temperature, top_p):
        token = self.wanted[self.at]
        self.at += 1
        return torch.tensor([token]), [(token, -1.0, 1.0)]


@EVERY
@pytest.mark.parametrize("place", range(len(ITEMS)))
def test_a_generated_row_is_the_trained_one(name, place, monkeypatch):
    """What the model reads and writes, token by token, where it writes what it was taught."""
    collate, item = collator(name), ITEMS[place]
    tokenizer = collate.tokenizer
    model = causal_lm("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    read = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.extend(args[0].flatten().tolist()))
    system = MultiAgentSystem(model, collate.topology, tokenizer=tokenizer, prompts=collate.prompts)
    read.clear()
    system(**collate([item]))
    trained, (_, answer) = list(read), rows(collate, [item])[0]
    read.clear()
    monkeypatch.setattr(engine, "choose", Script(answer))
    encoded = collate.encode_prompts([item])
    ((completion,),) = system.generate(**encoded, tokenizer=tokenizer, decoding=Decoding(max_new_tokens=99))
    assert completion.finish == "stop" and completion.tokens == answer[:-1]
    assert read + answer[-1:] == trained
    prompt = tokenizer.decode(encoded["prompt_ids"][0])
    assert reasoning.removed(reasoning.continued(prompt, completion.text)).strip() == item["answer"].strip()


@EVERY
def test_what_an_item_spells_is_text(name):
    collate = collator(name)
    tokenizer = collate.tokenizer
    marks = [
        t.content for t in tokenizer.added_tokens_decoder.values() if "think" not in t.content and t.content.strip()
    ]
    assert {"R1-distill": 4, "Mistral": 4, "Phi": 5}.get(name, len(marks)) == len(marks)
    spelled = " ".join([*marks, "</s> "]) + "".join(marks)
    control = ControlTokens.of(tokenizer).ids
    items = [{"question": spelled, "answer": spelled, "reasoning": spelled}, {"question": "q", "answer": "a"}]
    (prompt, answer), (other, _) = rows(collate, items)
    kept = [[i for i in ids if i in control] for ids in (prompt, answer, other)]
    assert kept[0] == kept[2] and kept[1] == [end_of_turn(tokenizer)]
    if not FAMILIES[name].pieces:
        assert spelled in tokenizer.decode(prompt) and spelled in tokenizer.decode(answer)


@EVERY
def test_the_token_that_ends_a_turn(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    assert tokenizer.decode([end_of_turn(tokenizer)]) == family.end
    model = MultiAgentSystem(causal_lm("llama", vocab_size=len(tokenizer)), "single").agent_model
    model.language_model.generation_config.eos_token_id = 3
    assert engine.stop_ids(model, tokenizer) == {3, end_of_turn(tokenizer), tokenizer.eos_token_id}
    # Without a template, or with one that takes no answers, it is the tokenizer's own.
    refusing = "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    for template in (None, "{{ messages[0].content }}", refusing):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_a_system_prompt_takes_the_place_of_the_template_s_own():
    for name in ("Qwen2.5", "SmolLM2"):
        own, given, none = (
            collate.tokenizer.decode(rows(collate, ITEMS[:1])[0][0])
            for collate in (collator(name), collator(name, system="Obey {question}"), collator(name, system=""))
        )
        assert "<|im_start|>system\nYou are a" in own
        assert "<|im_start|>system\nObey what is 1 + 1?<|im_end|>" in given
        assert none.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")
    roles = {"single": {"system": "Mine.", "user": "{question}"}}
    collate = collator("Qwen2.5", roles, system="Other.")
    assert "system\nMine.<|im_end|>" in collate.tokenizer.decode(rows(collate, ITEMS[:1])[0][0])
    # Gemma and Mistral put it before the question.
    for name in ("Gemma", "Mistral"):
        collate = collator(name, system="obey.")
        assert "obey.\n\nwhat is 1" in collate.tokenizer.decode(rows(collate, ITEMS[:1])[0][0])
    tokenizer = FAMILIES["Phi"].tokenizer()
    tokenizer.chat_template = None
    for system, text in (("", "q\n"), ("S", "S\n\nq\n")):
        (ids,) = Prompts(ROLES, system=system).encode("single", [{"question": "q"}], tokenizer)
        assert tokenizer.decode(ids) == text


TEAM = {
    "name": "team",
    "agents": [
        {"name": "a", "role": "both", "chat_template_kwargs": {"enable_thinking": False}},
        {"name": "b", "role": "both", "receives": ["a"]},
        {"name": "c", "role": "both", "receives": ["b"], "chat_template_kwargs": {"enable_thinking": True}},
    ],
}


@pytest.mark.parametrize("longest", [None, 40])
def test_every_agent_has_its_own_options(longest):
    """Agents of one role too, and over those that are given for all."""
    topology = Topology.from_dict(TEAM)
    assert Topology.from_dict(json.loads(json.dumps(topology.to_dict()))) == topology
    closed = []
    for given in ({}, {"enable_thinking": False}):
        prompts = Prompts({"both": {"user": "{question}"}}, chat_template_kwargs=given)
        prompts = prompts if longest is None else ShortenedPrompts.of(prompts, longest)
        collate = Collator(topology, prompts, FAMILIES["Qwen3"].tokenizer())
        batch = collate([{"question": "long " * 20, "answer": "a"}])
        assert longest is None or max(n for (n,) in batch["prompt_lengths"]) <= longest
        closed.append(["</think>" in collate.tokenizer.decode(ids) for ids in batch["prompt_ids"]])
    assert closed == [[True, False, False], [True, True, False]]


def test_options_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match=r"has \['enable_thinkin'\], which the model's chat template never reads"):
        collator("Qwen3", chat_template_kwargs={"enable_thinkin": False})(ITEMS)
    tokenizer = FAMILIES["Qwen3"].tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="never reads"):
        Prompts(ROLES, chat_template_kwargs={"enable_thinking": False}).encode("single", ITEMS, tokenizer)
    for wrong in ("{", "3", "[1]", '{"a"', 3):
        with pytest.raises(ValueError, match=r"chat_template_kwargs is .*; allowed: a JSON object"):
            TaskArguments(chat_template_kwargs=wrong)
    for taken in ("tokenize", "add_generation_prompt", "chat_template", "messages", "pinned_date"):
        with pytest.raises(ValueError, match="settled already"):
            parse_kwargs({taken: 1})
    with pytest.raises(TopologyError, match="chat_template_kwargs of agent a is 3; allowed"):
        Topology.from_dict({"agents": [{"name": "a", "chat_template_kwargs": 3}]})


def test_options_of_a_run_are_one_text():
    text = '{"a": 1, "enable_thinking": false}'
    for given in (text, {"enable_thinking": False, "a": 1}, '{"enable_thinking":false,"a":1}'):
        assert TaskArguments(chat_template_kwargs=given).chat_template_kwargs == text
    prompts = load_task(TaskArguments(chat_template_kwargs=text, system_prompt="S")).prompts
    assert prompts.chat_template_kwargs == {"a": 1, "enable_thinking": False} and prompts.system == "S"
    with pytest.raises(ValueError, match="user of system_prompt is '{'"):
        load_task(TaskArguments(system_prompt="{"))


def test_who_thinks():
    expected = {name: (None, False) for name in FAMILIES}
    expected |= {
        "Qwen3": ("enable_thinking", True),
        "Qwen3 without thinking": ("enable_thinking", False),
        "R1-distill": (None, True),
    }
    for name, family in FAMILIES.items():
        tokenizer, prompts = family.tokenizer(), Prompts(ROLES, chat_template_kwargs=family.options)
        assert (switch(tokenizer), thinks(prompts, tokenizer)) == expected[name]
        longest = THINKING_BUDGET if expected[name][1] else BUDGET
        assert budget(prompts, TOPOLOGIES["single"], tokenizer) == longest
        if expected[name][0] is None:
            with pytest.raises(ValueError, match="has no switch for thinking"):
                switched(TOPOLOGIES["single"], tokenizer, True)
        else:
            for on, longest in ((True, THINKING_BUDGET), (False, BUDGET)):
                topology = switched(TOPOLOGIES["single"], tokenizer, on)
                assert budget(prompts, topology, tokenizer) == longest


def test_a_word_in_a_template_is_no_switch():
    tokenizer = FAMILIES["SmolLM2"].tokenizer()
    tokenizer.chat_template = "{{ '<thinking>' }}" + tokenizer.chat_template
    assert switch(tokenizer) is None


def test_no_second_beginning_of_sequence():
    tokenizer = FAMILIES["Llama 3"].tokenizer()
    tokenizer.chat_template = None
    prompts = Prompts({"single": {"user": "<|begin_of_text|>{question}"}})
    for question in ("q", "<|begin_of_text|>"):
        (ids,) = prompts.encode("single", [{"question": question}], tokenizer)
        assert ids.count(tokenizer.bos_token_id) == 1 and decode(tokenizer, ids) == question + "\n"


@pytest.mark.parametrize(
    ("opening", "closing"),
    [("<think>\n", "\n</think>\n\n"), ("<think>", "</think>"), ("[THINK]", "[/THINK]"),
     ("<|START_THINKING|>", "<|END_THINKING|>")],
)  # fmt: skip
def test_the_tag_that_closes_is_that_of_the_block(opening, closing):
    tokenizer = FAMILIES["Phi"].tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '" + opening + "' }}{% endif %}"
    collate = Collator(TOPOLOGIES["single"], Prompts(ROLES), tokenizer)
    (_, with_reasoning), (_, without) = rows(collate, [ITEMS[1], ITEMS[0]])
    assert tokenizer.decode(with_reasoning) == "first this, then that" + closing + "c\n\nd<|end|>"
    assert tokenizer.decode(without) == closing + "the answer is 2<|end|>"
