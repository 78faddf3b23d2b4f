"""The product against the oracle on one model: training whole and with LoRA, by topology, and greedy decoding."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.models import oracle
from benchmarks.models.configurations import Unbuilt, causal_lm
from benchmarks.models.precision import widened
from diffmas.agents.topology import Agent, Topology
from diffmas.generation import Decoding
from diffmas.models.attention import UnsupportedModelError
from diffmas.models.lora import more_than_linear
from diffmas.system import MultiAgentSystem

TOLERANCE = 1e-10
EXACT, REFUSED, WRONG, CRASH = "exact", "refused", "WRONG", "crash"
#: What is no verdict on the product.
UNBUILT, NO_ORACLE, UNFINISHED = "unbuilt", "no oracle", "not done"
#: What several are called after, from the worst.
ORDER = (WRONG, CRASH, UNFINISHED, NO_ORACLE, UNBUILT, REFUSED, EXACT)
DAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "sequential": {"planner": (), "critic": ("planner",), "solver": ("critic",)},
    "hierarchical": {"math": (), "science": (), "summarizer": ("math", "science")},
    # Parts of a segment that was put together once already move again.
    "stitch": {"other": (), "a": (), "b": (), "joined": ("a", "b"), "solver": ("other", "joined")},
    "relay": {"sender": (), "solver": ("sender",)},
}
LATENT_STEPS, NEW_TOKENS = 2, 4


@dataclass(frozen=True)
class Case:
    """One comparison: `training` is "full", "lora" or "" (decoding)."""

    topology: str
    handover: str
    training: str = ""
    detach: bool = False

    def __str__(self) -> str:
        how = f"{self.training} training" if self.training else "generate"
        return f"{how}, {self.topology} ({self.handover}{', detached' if self.detach else ''})"


_HANDED = (("sequential", "full"), ("hierarchical", "full"), ("stitch", "full"), ("relay", "latent"))
CASES = (
    *(Case(*handed, training) for training in ("full", "lora") for handed in _HANDED),
    *(Case("hierarchical", "full", training, True) for training in ("full", "lora")),
    *(Case(*handed) for handed in (_HANDED[0], _HANDED[2], _HANDED[3])),
)
#: One of each kind.
QUICK = (
    Case("sequential", "full", "lora"),
    Case("stitch", "full", "full"),
    Case("relay", "latent", "full"),
    Case("hierarchical", "full", "lora", True),
    Case("stitch", "full"),
)


@dataclass
class Result:
    """`error`: the worst relative one, at `where`; `why`: of whatever is neither exact nor wrong."""

    case: str
    verdict: str
    error: float | None = None
    where: str = ""
    why: str = ""


def check(family: str, layout: str, cases: tuple[Case, ...] = CASES) -> Iterator[Result]:
    """Every case of one family's layout, as it is done. Nothing is raised."""
    try:
        model = causal_lm(family, layout)
    except Unbuilt as error:
        yield Result("", UNBUILT, why=str(error))
        return
    except UnsupportedModelError as error:
        yield Result("", REFUSED, where="model", why=str(error))
        return
    failing = oracle_failures(model)
    if failing:
        yield Result("oracle", NO_ORACLE, why=next(iter(failing.values())))
    refusal = ""
    for case in cases:
        # A model that is refused as such is refused in every case.
        result = Result(str(case), REFUSED, why=refusal) if refusal else _judge(model, case)
        if result.verdict == REFUSED and result.where == "model":
            refusal = result.why
        if result.verdict == WRONG and case.detach in failing:
            # What differs from an oracle that differs from itself says nothing.
            result = Result(str(case), NO_ORACLE, why=failing[case.detach])
        yield result


@torch.no_grad()
def oracle_failures(model: PreTrainedModel) -> dict[bool, str]:
    """Why the oracle cannot serve `model`, without and with detached prefixes, where it cannot.

    A prefix set to what it was in its own place changes nothing.
    """
    twin, failing = copy.deepcopy(model), {}
    try:
        with widened():
            twin.set_attn_implementation("eager")
            recomputed = oracle.RecomputedModel(twin)
            embeds = recomputed.embedding(torch.arange(12))
            expected = recomputed.read([], embeds)[1][7:]
            _, _, inputs, axis = recomputed.read([], embeds[:7])
            segment = oracle.Segment(embeds[:7], inputs, 3, axis)
            for detach in (False, True):
                logits = recomputed.read([segment], embeds[7:], detach=detach)[1]
                if (error := _relative(logits, expected, 0.0)) > TOLERANCE:
                    how = "in the cache" if detach else "set in place"
                    failing[detach] = f"a prefix {how} changes the logits by {error:.0e}"
    except Exception as error:
        return dict.fromkeys((False, True), _named(error)) | failing
    return failing


def _judge(model: PreTrainedModel, case: Case) -> Result:
    try:
        trained = copy.deepcopy(model) if case.training != "lora" else with_lora(copy.deepcopy(model))
        if not case.training:
            trained.requires_grad_(False)
        twin = copy.deepcopy(trained)
        _base(twin).set_attn_implementation("eager")
    except Exception as error:
        return Result(str(case), UNBUILT, why=_named(error))
    run = _train if case.training else _generate
    with widened():
        try:
            system = MultiAgentSystem(
                trained,
                Topology(case.topology, tuple(Agent(*item) for item in DAGS[case.topology].items()), case.handover),
                latent_steps=LATENT_STEPS,
                alignment="learned",
                detach_trace=case.detach,
            )
        except UnsupportedModelError as error:
            return Result(str(case), REFUSED, where="model", why=str(error))
        except Exception as error:
            return Result(str(case), CRASH, where="construction", why=_named(error))
        weight = _alignment_weight(system.agent_model.alignment.weight)
        system.agent_model.alignment.weight.data.copy_(weight)
        actual, failure = None, None
        try:
            actual = run(system, case)
        except UnsupportedModelError as error:
            return Result(str(case), REFUSED, where="run", why=str(error))
        except Exception as error:
            failure = _named(error)
        try:
            expected = run(_Oracle(twin, weight), case)
        except Exception as error:
            # What the model and its adapter cannot do by themselves is no fault of the product.
            if failure in (None, _named(error)):
                return Result(str(case), NO_ORACLE if failure is None else UNBUILT, why=_named(error))
    if actual is None:
        return Result(str(case), CRASH, where="run", why=failure)
    where, error = _worst(actual, expected)
    return Result(str(case), EXACT if error <= TOLERANCE else WRONG, error, where)


@dataclass
class _Oracle:
    model: nn.Module
    weight: Tensor


def _train(system: MultiAgentSystem | _Oracle, case: Case) -> dict[str, Tensor]:
    """Loss, logits and every gradient."""
    prompts, answers = ragged(list(DAGS[case.topology]))
    if isinstance(system, _Oracle):
        model, weight = system.model.train(), system.weight.clone().requires_grad_()
        options = dict(handover=case.handover, latent_steps=LATENT_STEPS, detach=case.detach, weight=weight)
        loss, logits = oracle.batch(model, DAGS[case.topology], prompts, answers, **options)
    else:
        model, weight = system.agent_model.model.train(), system.agent_model.alignment.weight
        packed = [_packed(rows) for rows in prompts.values()]
        output = system([ids for ids, _ in packed], [lengths for _, lengths in packed], *_packed(answers))
        loss, logits = output.loss, output.logits
    loss.backward()
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    if weight.grad is not None:
        gradients["gradient of the alignment"] = weight.grad
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients}


def _generate(system: MultiAgentSystem | _Oracle, case: Case) -> dict[str, Tensor]:
    """Tokens and log-probabilities."""
    prompts, _ = ragged(list(DAGS[case.topology]))
    if isinstance(system, _Oracle):
        options = dict(handover=case.handover, latent_steps=LATENT_STEPS, weight=system.weight)
        found = oracle.greedy(system.model.eval(), DAGS[case.topology], prompts, NEW_TOKENS, **options)
    else:
        packed = [_packed(rows) for rows in prompts.values()]
        answers = system.generate(
            [ids for ids, _ in packed], [lengths for _, lengths in packed], _NoText(),
            Decoding(max_new_tokens=NEW_TOKENS, temperature=0),
        )  # fmt: skip
        found = [(answer.tokens, answer.logprobs) for (answer,) in answers]
    return {
        "tokens": torch.tensor([tokens for tokens, _ in found], dtype=torch.float64),
        "log-probabilities": torch.tensor([logprobs for _, logprobs in found], dtype=torch.float64),
    }


class _NoText:
    """A tokenizer for answers that nobody reads."""

    eos_token_id = chat_template = None

    def decode(self, tokens, **options) -> str:
        return ""


def with_lora(model: PreTrainedModel) -> nn.Module:
    """LoRA on every linear layer, its B matrices not zero; input embeddings train too."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    others = [name for name, module in model.named_modules() if more_than_linear(module)]
    config.exclude_modules = others or None
    if any(name.endswith("A_log") for name, _ in model.named_parameters()):
        # PEFT allows no adapter on these of a Mamba layer.
        config.exclude_modules = ["out_proj", "conv1d", *others]
    adapted = get_peft_model(model, config).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    model.get_input_embeddings().weight.requires_grad_()
    return adapted


def ragged(names: list[str], rows: int = 3, *, vocab: int = 37, longest: int = 9):
    """Prompts by agent and answers, one int64 tensor a row: one token beside the longest, the rest drawn."""
    generator = torch.Generator().manual_seed(0)

    def tokens(least: int, most: int) -> Tensor:
        n = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(0, vocab, (n,), generator=generator)

    prompts = {name: [tokens(2, longest) for _ in range(rows)] for name in names}
    prompts[names[0]][:2] = [tokens(1, 1), tokens(longest, longest)]
    return prompts, [tokens(1, 5) for _ in range(rows)]


def _alignment_weight(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return torch.eye(len(like), dtype=torch.float64) + 0.2 * noise


def _base(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _packed(rows: list[Tensor]) -> tuple[Tensor, list[int]]:
    return torch.cat(rows), [len(row) for row in rows]


def _worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """The largest relative error and what has it; a gradient that one side lacks is zero there.

    A gradient that vanishes (a softmax over one key has none) is rounding on both sides: it is measured on a scale of
    1e-5 of the whole gradient.
    """
    whole = math.sqrt(sum(float(g.norm()) ** 2 for n, g in expected.items() if n.startswith("gradient")))
    worst = ("", 0.0)
    for name in (*expected, *(actual.keys() - expected.keys())):
        left, right = (side.get(name) for side in (actual, expected))
        left = torch.zeros_like(right) if left is None else left
        right = torch.zeros_like(left) if right is None else right
        floor = 1e-5 * whole if name.startswith("gradient") else 0.0
        error = _relative(left, right, floor)
        worst = max(worst, (name, error), key=lambda pair: pair[1])
    return worst


def _relative(actual: Tensor, expected: Tensor, floor: float) -> float:
    if actual.shape != expected.shape or not (actual.isfinite().all() and expected.isfinite().all()):
        return math.inf
    difference = float((actual - expected).norm())
    return difference / max(float(expected.norm()), floor) if difference else 0.0


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
