"""Small tokenizers with the special tokens and the chat templates' ways of eight families of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML_TURNS = (
    "{%- for m in messages %}{%- if not (loop.first and m.role == 'system') %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
)
#: A system prompt of the template's own, where the chat has none.
CHATML_SYSTEM = (
    "{%%- if messages[0].role == 'system' %%}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%%- else %%}{{- '<|im_start|>system\n%s<|im_end|>\n' }}{%%- endif %%}"
)
CHATML_READY = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"

QWEN25 = CHATML_SYSTEM % "You are a model of one family." + CHATML_TURNS + CHATML_READY
SMOLLM2 = CHATML_SYSTEM % "You are a small model." + CHATML_TURNS + CHATML_READY
#: Only what stands behind the last question keeps its reasoning; switched off, the prompt holds a closed block.
QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}{%- set last = namespace(user=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > last.user %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
#: A system turn with the date is always there.
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
#: The system prompt is put before the question; the space behind it belongs to the answer.
MISTRAL = (
    "{%- set system = '' %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\n\n' %}"
    "{%- set messages = messages[1:] %}{%- endif %}{{- bos_token }}{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + (system if loop.first else '') + m.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{- bos_token }}{%- set system = '' %}{%- if messages[0].role == 'system' %}"
    "{%- set system = messages[0].content + '\n\n' %}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for m in messages %}{%- set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{- '<start_of_turn>' + role + '\n' + (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
PHI = (
    "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"
)
#: Reasoning is left out of turns that are over, and the prompt opens a block.
R1 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}"
    "{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}{%- else %}"
    "{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Family:
    """A family's tokenizer, and what is to be true of it.

    Args:
        begin: how every prompt begins. `ready`: what stands behind a question. `end`: what ends an answer.
        extra: special tokens beside those named; `plain`: added tokens that are not special.
        seam: what the template writes before an answer and a model has to write itself.
        pieces: as SentencePiece does, without a space of its own before the first word.
    """

    template: str
    begin: str
    ready: str
    end: str
    bos: str | None = None
    eos: str = "<|im_end|>"
    extra: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    pieces: bool = False
    seam: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        backend = _pieces() if self.pieces else _byte_level()
        special = [t for t in dict.fromkeys((self.bos, self.eos, self.end, *self.extra)) if t]
        backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
        backend.add_tokens([AddedToken(t, normalized=False) for t in self.plain])
        if self.bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, backend.token_to_id(self.bos))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=self.bos, eos_token=self.eos, chat_template=self.template
        )


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = {"Ċ" + "Ċ": ("Ċ", "Ċ"), "th": ("t", "h"), "the": ("th", "e"), "Ġthe": ("Ġ", "the")}
    vocabulary = {token: i for i, token in enumerate([*alphabet, *merged])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merged.values())))
    # Line breaks stay together, whatever follows them.
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces() -> Tokenizer:
    words = [
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "<unk>",
        *"▁abcdefghijklmnopqrstuvwxyz0123456789?:.",
        "th",
        "▁th",
    ]
    vocabulary = {token: i for i, token in enumerate(words)}
    merges = [("t", "h"), ("▁", "th")]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
FAMILIES = {
    "Qwen2.5": Family(QWEN25, "<|im_start|>system\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
                      eos="<|endoftext|>", extra=_IM),
    "Qwen3": Family(QWEN3, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", extra=_IM,
                    plain=("<think>", "</think>"), seam="<think>\n\n</think>\n\n"),
    "Qwen3 without thinking": Family(
        QWEN3, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>",
        extra=_IM, plain=("<think>", "</think>"), options={"enable_thinking": False},
    ),
    "Llama 3": Family(LLAMA3, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 02 Jan 2026",
                      "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
                      bos="<|begin_of_text|>", eos="<|end_of_text|>",
                      extra=("<|start_header_id|>", "<|end_header_id|>")),
    "Mistral": Family(MISTRAL, "<s>[INST] ", "[/INST]", "</s>", bos="<s>", eos="</s>", extra=("[INST]", "[/INST]"),
                      pieces=True, seam=" "),
    "Gemma": Family(GEMMA, "<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>",
                    bos="<bos>", eos="<eos>", extra=("<start_of_turn>",), plain=("\n\n",), pieces=True),
    "Phi": Family(PHI, "<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>", eos="<|endoftext|>",
                  extra=("<|system|>", "<|user|>", "<|assistant|>")),
    "SmolLM2": Family(SMOLLM2, "<|im_start|>system\nYou are a small model.", "<|im_end|>\n<|im_start|>assistant\n",
                      "<|im_end|>", extra=_IM),
    "R1-distill": Family(R1, "<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜><think>\n", "<｜end▁of▁sentence｜>",
                         bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>",
                         plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")),
}  # fmt: skip
