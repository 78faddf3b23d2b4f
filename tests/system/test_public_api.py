"""Text in, text out: systems from names and folders, what they keep, and what they refuse."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

import diffmas
from diffmas import Decoding, MultiAgentSystem, Prompts, SystemTrainer, TrainArguments, chat, load_topology, train
from diffmas import eval as evaluate
from diffmas.agents.sweeps import Sweeps
from diffmas.agents.topology import TopologyError
from diffmas.models.pretrained import load_base

ITEMS = [
    {"evidence": "A3 B14", "question": "Recall A", "answer": "3"},
    {"evidence": "A1 B9", "question": "Recall B", "answer": "9"},
    {"evidence": "A7 B2", "question": "Recall B", "answer": "2"},
]
PROMPTS = Prompts({"sender": {"user": "{evidence}"}, "solver": {"user": "{question}"}})
LORA = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
GREEDY = Decoding(max_new_tokens=4, temperature=0.0)


def build(base, **options):
    torch.manual_seed(0)
    options = dict(prompts=PROMPTS, peft_config=LoraConfig(**LORA), latent_steps=2, decoding=GREEDY) | options
    return MultiAgentSystem(str(base), "relay", **options)


def shaken(system):
    """With an adapter that does something."""
    for name, parameter in system.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return system


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = [
        f"--model={base}", "--task=relay:slots=4", "--topology=relay", "--latent_steps=2", "--max_steps=3",
        "--learning_rate=5e-2", "--eval_size=8", "--per_device_train_batch_size=8", "--max_new_tokens=3",
        "--temperature=0", "--disable_final_eval", f"--output_dir={folder}",
    ]  # fmt: skip
    assert train.main(flags) == 0
    return folder


class TestFromPretrained:
    def test_a_run_that_has_moved_answers_from_anywhere(self, run, tmp_path, monkeypatch):
        before = MultiAgentSystem.from_pretrained(run).answer(ITEMS)
        shutil.copytree(run, tmp_path / "elsewhere")
        monkeypatch.chdir(tmp_path)
        system = MultiAgentSystem.from_pretrained("elsewhere")
        assert system.answer(ITEMS) == before and not system.training
        assert [system.answer([item])[0] for item in ITEMS] == before, "a batch is its rows"
        assert "".join(system.stream(ITEMS[1])) == before[1]

    def test_saved_again_it_is_the_same(self, run, tmp_path):
        system = MultiAgentSystem.from_pretrained(run)
        system.save_pretrained(tmp_path / "again")
        again = MultiAgentSystem.from_pretrained(tmp_path / "again")
        assert (
            again.answer(ITEMS) == system.answer(ITEMS) and again.description["system"] == system.description["system"]
        )

    @pytest.mark.parametrize(
        ("hurt", "error", "message"),
        [
            (lambda f: shutil.rmtree(f), FileNotFoundError, "no such"),
            (lambda f: (f / "system.json").unlink(), FileNotFoundError, "has no system.json"),
            (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "has no adapter_model"),
            (lambda f: (f / "system.json").write_text("{}"), ValueError, "has no system, topology"),
        ],
    )
    def test_what_is_no_run_is_named(self, run, tmp_path, hurt, error, message):
        shutil.copytree(run, tmp_path / "hurt")
        hurt(tmp_path / "hurt")
        with pytest.raises(error, match=message):
            MultiAgentSystem.from_pretrained(tmp_path / "hurt")

    def test_a_repository_is_fetched(self, run, monkeypatch):
        asked = []
        monkeypatch.setattr("diffmas.runs.description.check_source", lambda name: asked.append(name))
        monkeypatch.setattr("diffmas.runs.description.snapshot_download", lambda name, revision: str(run))
        assert MultiAgentSystem.from_pretrained("someone/relay").answer(ITEMS) and asked == ["someone/relay"]


class TestBuilt:
    @pytest.mark.parametrize(
        "options",
        [
            dict(alignment="identity"),
            dict(alignment="learned"),
            dict(alignment="soft", alignment_temperature=0.4, alignment_top_k=9, latent_grad_clip=2.0),
            dict(alignment="soft", alignment_temperature_learned=True),
        ],
        ids=str,
    )
    def test_it_is_kept_with_all_it_needs(self, base, tmp_path, options):
        system = shaken(build(base, **options))
        system.save_pretrained(tmp_path / "kept")
        kept = MultiAgentSystem.from_pretrained(tmp_path / "kept")
        assert kept.answer(ITEMS) == system.answer(ITEMS)
        assert kept.trajectory.latent_steps == 2
        assert kept.agent_model.alignment.options == system.agent_model.alignment.options
        for own, read in zip(*(s.agent_model.alignment.parameters() for s in (system, kept)), strict=True):
            assert torch.equal(own, read)
        assert (tmp_path / "kept" / "README.md").is_file()

    def test_uploading_uploads_that(self, base, monkeypatch):
        made, uploaded = [], []

        class Hub:
            def __init__(self, token=None): ...

            def create_repo(self, name, private, exist_ok):
                made.append((name, private, exist_ok))

            def upload_folder(self, repo_id, folder_path):
                uploaded.extend(sorted(p.name for p in diffmas.system.Path(folder_path).iterdir()))
                return f"https://hub/{repo_id}"

        monkeypatch.setattr("diffmas.system.HfApi", Hub)
        assert build(base).push_to_hub("me/relay", private=True) == "https://hub/me/relay"
        assert made == [("me/relay", True, True)]
        assert {"README.md", "adapter_model.safetensors", "system.json", "prompts.yaml"} <= set(uploaded)

    def test_without_an_adapter_nothing_is_kept(self, base, tmp_path):
        with pytest.raises(ValueError, match="the system has no adapter; allowed: one, called 'default'"):
            build(base, peft_config=None).save_pretrained(tmp_path / "kept")
        assert not (tmp_path / "kept").exists()

    def test_settings_are_kept(self, base, tmp_path):
        system = build(base, latent_backward="sweeps:2", loss="plain", detach_trace=True, checkpointing="prefill")
        system.save_pretrained(tmp_path / "kept")
        kept = MultiAgentSystem.from_pretrained(tmp_path / "kept")
        assert kept.trajectory.latent_rollout == system.trajectory.latent_rollout == Sweeps(2)
        assert kept.agent_model.answer_loss.kind == "plain" and kept.trajectory.detach_trace
        assert kept.agent_model.checkpointing.mode == "prefill"

    def test_what_is_changed_later_is_kept(self, base, tmp_path):
        system = build(base)
        for folder in ("first", "second"):
            system.save_pretrained(tmp_path / folder)
            system = MultiAgentSystem.from_pretrained(tmp_path / folder)
            system.decoding = Decoding(max_new_tokens=7)
            system.trajectory.latent_steps += 1
            system.save_pretrained(tmp_path / folder)
        kept = MultiAgentSystem.from_pretrained(tmp_path / "second")
        assert kept.decoding.max_new_tokens == 7 and kept.latent_steps == 4

    def test_the_dtype_is_kept(self, base, tmp_path):
        model, tokenizer = load_base(str(base), dtype="bfloat16")
        system = MultiAgentSystem(model, "relay", tokenizer=tokenizer, prompts=PROMPTS, peft_config=LoraConfig(**LORA))
        system.save_pretrained(tmp_path / "kept")
        kept = MultiAgentSystem.from_pretrained(tmp_path / "kept")
        assert kept.agent_model.language_model.dtype == torch.bfloat16

    def test_modules_by_expression(self, base, tmp_path):
        lora = LoraConfig(r=2, target_modules=r".*\.q_proj", task_type="CAUSAL_LM")
        build(base, peft_config=lora).save_pretrained(tmp_path / "kept")
        assert MultiAgentSystem.from_pretrained(tmp_path / "kept").description["system"]["lora_target_modules"] == (
            r".*\.q_proj"
        )

    def test_without_prompts_it_is_kept_without(self, base, tmp_path, capsys):
        build(base).save_pretrained(tmp_path / "kept")
        system = build(base, prompts=None)
        system.save_pretrained(tmp_path / "kept")
        kept = MultiAgentSystem.from_pretrained(tmp_path / "kept")
        assert not kept.prompts.roles and not (tmp_path / "kept" / "prompts.yaml").exists()
        with pytest.raises(ValueError, match="role is 'sender', which has none; allowed: none, no prompts are given"):
            kept.answer(ITEMS)
        kept.prompts = PROMPTS
        system.prompts = PROMPTS
        assert kept.answer(ITEMS) == system.answer(ITEMS)
        assert chat.main([f"--run={tmp_path / 'kept'}", "--once=Recall A"]) == 2
        assert "role is 'sender', which has none" in capsys.readouterr().err

    def test_adapters_of_other_names_are_refused(self, base, tmp_path):
        model = get_peft_model(load_base(str(base))[0], LoraConfig(**LORA), adapter_name="mine")
        with pytest.raises(ValueError, match="adapters \\['mine'\\]; allowed: one, called 'default'"):
            MultiAgentSystem(model, "relay").save_pretrained(tmp_path / "kept")
        with pytest.raises(ValueError, match="in PEFT already"):
            MultiAgentSystem(model, "relay", peft_config=LoraConfig(**LORA))

    def test_it_is_evaluated_on_what_is_given(self, base, tmp_path, capsys):
        build(base).save_pretrained(tmp_path / "kept")
        assert evaluate.main([f"--run={tmp_path / 'kept'}"]) == 2
        assert "was made in Python and keeps no task; allowed: --task" in capsys.readouterr().err
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS * 2))
        argv = [f"--run={tmp_path / 'kept'}", f"--task={tmp_path / 'items.jsonl'}", "--eval_size=3", "--disable_tqdm"]
        assert evaluate.main(argv) == 0
        assert "3 held-out items" in capsys.readouterr().out

    @pytest.mark.parametrize("items", ["what?", {"question": "what?"}, ["what?"], [None], iter(ITEMS)])
    def test_items_that_are_none(self, base, items):
        with pytest.raises(ValueError, match="items is .*; allowed: a sequence of mappings"):
            build(base).answer(items)
        with pytest.raises(ValueError, match="items is .*; allowed: a sequence of mappings"):
            next(build(base).stream([items]))

    def test_nothing_to_answer(self, base):
        assert build(base).answer([]) == []

    def test_a_missing_field_is_named(self, base):
        with pytest.raises(ValueError, match="names the field 'question'"):
            build(base).answer([{"evidence": "A1"}])

    def test_what_text_needs_is_named(self, base):
        model = build(base).agent_model.model
        with pytest.raises(ValueError, match="no tokenizer"):
            MultiAgentSystem(model, "relay", prompts=PROMPTS).answer(ITEMS)
        with pytest.raises(ValueError, match="role is 'sender', which has none"):
            build(base, prompts=None).answer(ITEMS)

    def test_sampling_repeats_by_seed(self, base):
        system = shaken(build(base))
        draws = [
            system.answer(ITEMS, temperature=5.0, max_new_tokens=8, seeds=s) for s in ([1, 2, 3], [1, 2, 3], [4, 5, 6])
        ]
        assert draws[0] == draws[1] != draws[2]


class TestTrainer:
    def test_dictionaries_are_enough(self, base, tmp_path):
        system = build(base)
        args = TrainArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2
        )
        trainer = SystemTrainer(system, args, train_dataset=ITEMS, eval_dataset=ITEMS)
        trainer.train()
        assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
        trainer.save_model()
        kept = MultiAgentSystem.from_pretrained(tmp_path / "run")
        assert kept.answer(ITEMS) == system.eval().answer(ITEMS)
        assert json.loads((tmp_path / "run" / "system.json").read_text())["task"]["task"] == "in Python"

    def test_groups_by_length(self, base, tmp_path):
        args = TrainArguments(
            output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2,
            train_sampling_strategy="group_by_length",
        )  # fmt: skip
        SystemTrainer(build(base), args, train_dataset=ITEMS).train()

    def test_items_are_trained_on_as_they_are_evaluated(self, base, tmp_path):
        items = [{"evidence": "e", "question": "Which is a city?", "options": ["red", "Paris"], "answer": "B"}] * 4
        args = TrainArguments(output_dir=str(tmp_path / "run"))
        trainer = SystemTrainer(build(base), args, train_dataset=items, eval_dataset=items)
        assert dict(trainer.train_dataset[0]) == dict(trainer.eval_dataset[0])
        assert "B) Paris" in trainer.train_dataset[0]["question"]

    def test_answers_that_are_numbers(self, base, tmp_path):
        items = [item | {"answer": 0} for item in ITEMS]
        args = TrainArguments(output_dir=str(tmp_path / "run"), max_steps=1)
        trainer = SystemTrainer(build(base), args, train_dataset=items, eval_dataset=items)
        trainer.train()
        assert "eval_accuracy" in trainer.evaluate() and "eval_accuracy" in trainer.evaluate(items[:2])

    @pytest.mark.parametrize(
        ("items", "message"),
        [
            ([], "train_dataset is empty"),
            ([ITEMS[0] | {"evidence": None}], "names the field 'evidence', which is null"),
            ([ITEMS[0] | {"answer": ""}], "train_dataset item 1: the gold answer is missing"),
            ([ITEMS[0], {"evidence": "A1", "question": "?"}], "train_dataset item 2: the gold answer is missing"),
            ([{"question": "?", "answer": "1"}], "names the field 'evidence'"),
        ],
    )
    def test_items_that_cannot_be_used_are_named(self, base, tmp_path, items, message):
        with pytest.raises(ValueError, match=message):
            SystemTrainer(build(base), TrainArguments(output_dir=str(tmp_path / "run")), train_dataset=items)

    def test_without_an_adapter_nothing_is_trained(self, base, tmp_path):
        args = TrainArguments(output_dir=str(tmp_path / "run"))
        with pytest.raises(ValueError, match="the system has no adapter"):
            SystemTrainer(build(base, peft_config=None), args, train_dataset=ITEMS)

    def test_evaluating_without_items_is_refused(self, base, tmp_path):
        trainer = SystemTrainer(build(base), TrainArguments(output_dir=str(tmp_path / "run")), train_dataset=ITEMS)
        for items in (None, []):
            with pytest.raises(ValueError, match="eval_dataset is empty"):
                trainer.evaluate(items)
        assert "eval_accuracy" in trainer.evaluate(ITEMS)

    def test_other_arguments_are_refused(self, base, tmp_path):
        with pytest.raises(TypeError, match="args is TrainingArguments; allowed: diffmas.TrainArguments"):
            SystemTrainer(build(base), TrainingArguments(output_dir=str(tmp_path)), train_dataset=ITEMS)

    def test_a_right_answer_that_is_none_is_named(self, base, tmp_path):
        args = TrainArguments(output_dir=str(tmp_path / "run"))
        with pytest.raises(ValueError, match="eval_dataset item 1: the gold answer is missing"):
            SystemTrainer(build(base), args, train_dataset=ITEMS, eval_dataset=[{"evidence": "A1", "question": "?"}])


def team(tmp_path, *agents):
    path = tmp_path / "team.yaml"
    path.write_text("name: team\nhandover: latent\nagents:\n" + "".join(f"  - {agent}\n" for agent in agents))
    return str(path)


READER, WRITER = "{name: reader, fields: [evidence]}", '{name: writer, prompt: "{question}", receives: [reader]}'


class TestPromptsInTopology:
    def test_one_file_describes_a_team(self, base, tmp_path):
        topology = load_topology(team(tmp_path, READER, WRITER))
        assert topology.prompts == {"reader": {"user": "{evidence}"}, "writer": {"user": "{question}"}}
        assert topology == type(topology).from_dict(topology.to_dict())
        system = MultiAgentSystem(str(base), topology, peft_config=LoraConfig(**LORA), latent_steps=1, decoding=GREEDY)
        system.save_pretrained(tmp_path / "kept")
        assert MultiAgentSystem.from_pretrained(tmp_path / "kept").answer(ITEMS) == system.answer(ITEMS)

    def test_on_the_command_line(self, base, tmp_path):
        path = team(tmp_path, READER, WRITER)
        data = tmp_path / "items.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS * 3))
        run = tmp_path / "run"
        flags = [f"--model={base}", f"--task={data}", f"--topology={path}", "--latent_steps=1", "--max_steps=1"]
        flags += ["--max_new_tokens=2", "--per_device_train_batch_size=2", f"--output_dir={run}", "--eval_size=3"]
        assert train.main(flags) == 0
        assert MultiAgentSystem.from_pretrained(run).prompts.roles["reader"] == {"user": "{evidence}"}

    @pytest.mark.parametrize(
        ("agent", "message"),
        [
            ('{name: a, prompt: "{x} {y}", fields: [x]}', r"prompt of agent a names \['y'\], which it does not see"),
            ("{name: a, prompt: {system: s}}", "prompt of agent a is .*allowed: user"),
            ("{name: a, prompt: 3}", "prompt of agent a is 3"),
            ('{name: a, prompt: "{x"}', "user of prompt of agent a"),
            ("{name: a, fields: x}", "fields of agent a is 'x'; allowed: a list"),
            ("{name: a, fields: []}", "fields of agent a is"),
            ("{name: a, sees: [x]}", r"agent a has unknown keys \['sees'\]"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, agent, message):
        with pytest.raises(TopologyError, match=message):
            load_topology(team(tmp_path, agent))


def test_what_is_exported_is_there():
    for name in diffmas.__all__:
        assert getattr(diffmas, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffmas.nothing
