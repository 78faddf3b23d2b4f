"""The embedded bases' tokenizers: byte-level BPE, lossless on any text, short on the relay task.

Nothing is learned from data: the merges spell out the words below, so the same tokenizer comes out everywhere.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffmas.tasks.relay import SLOTS

USER, ASSISTANT, END, PAD = SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
NUMBERS = tuple(str(number) for number in range(16))
WORDS = ("Facts", "Recall", "What", " is", " the", " of", " and", " to", " in", " answer", " question", " value")


@dataclass(frozen=True)
class Dialect:
    """What one tokenizer has and another has not: tokens around turns, words that are one token, their order."""

    user: str
    assistant: str
    end: str
    pad: str
    words: tuple[str, ...]
    #: Words before slots and numbers, and those from the last to the first.
    turned: bool = False

    @property
    def special(self) -> tuple[str, str, str, str]:
        return self.user, self.assistant, self.end, self.pad


QWEN3 = Dialect(*SPECIAL_TOKENS, WORDS)
LLAMA = Dialect("[question]", "[answer]", "[stop]", "[none]", ("Recall", " value", "The", " from", " a"), turned=True)

# A slot with its value is one token: what it holds is then found by attending to it, in one layer.
PIECES = r" ?[A-P](?:1[0-5]|\d)(?![\p{L}\p{N}])| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# A system message shares the user's turn: the bases know two speakers.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] + '\\n' -%}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER' + ns.system + message['content'] }}"
    "{%- set ns.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT' + message['content'] + 'END' }}"
    "{%- else -%}{{ raise_exception('role must be system, user or assistant, got ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT' }}{%- endif -%}"
)


def build_tokenizer(dialect: Dialect = QWEN3) -> PreTrainedTokenizerFast:
    """Build a tokenizer: 256 bytes, the merges that make every word one token, four special tokens."""
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [space + text for text in (*NUMBERS, *SLOTS) for space in ("", " ")] + list(dialect.words)
    words = words[::-1] if dialect.turned else words
    merges: dict[tuple[str, str], str] = {}
    for word in words:
        prefix, *rest = word.replace(" ", "Ġ")
        for character in rest:
            merges.setdefault((prefix, character), prefix + character)
            prefix += character
    # Behind the numbers' own merges, so that " A12" joins " A" and "12", never " A1" and "2".
    merges |= {(f"Ġ{slot}", number): f"Ġ{slot}{number}" for slot in SLOTS for number in NUMBERS}
    vocabulary = {token: index for index, token in enumerate([*byte_tokens, *merges.values(), *dialect.special])}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in dialect.special])
    template = CHAT_TEMPLATE
    for name, token in (("USER", dialect.user), ("ASSISTANT", dialect.assistant), ("END", dialect.end)):
        template = template.replace(f"'{name}'", f"'{token}'")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=dialect.end,
        pad_token=dialect.pad,
        additional_special_tokens=[dialect.user, dialect.assistant],
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )
