"""The embedded base's tokenizer: byte-level BPE, lossless on any text, short on the relay task.

Nothing is learned from data: the merges spell out the words below, so the same tokenizer comes out everywhere.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffmas.tasks.relay import SLOTS

USER, ASSISTANT, END, PAD = SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
NUMBERS = tuple(str(number) for number in range(16))
WORDS = ("Facts", "Recall", "What", " is", " the", " of", " and", " to", " in", " answer", " question", " value")

# A slot with its value is one token: what it holds is then found by attending to it, in one layer.
PIECES = r" ?[A-P](?:1[0-5]|\d)(?![\p{L}\p{N}])| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# A system message shares the user's turn: the base knows two speakers.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] + '\\n' -%}"
    "{%- elif message['role'] == 'user' -%}{{ '<|user|>' + ns.system + message['content'] }}"
    "{%- set ns.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{%- else -%}{{ raise_exception('role must be system, user or assistant, got ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: 256 bytes, the merges that make every word one token, four special tokens."""
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [space + text for text in (*NUMBERS, *SLOTS) for space in ("", " ")] + list(WORDS)
    merges: dict[tuple[str, str], str] = {}
    for word in words:
        prefix, *rest = word.replace(" ", "Ġ")
        for character in rest:
            merges.setdefault((prefix, character), prefix + character)
            prefix += character
    # Behind the numbers' own merges, so that " A12" joins " A" and "12", never " A1" and "2".
    merges |= {(f"Ġ{slot}", number): f"Ġ{slot}{number}" for slot in SLOTS for number in NUMBERS}
    vocabulary = {token: index for index, token in enumerate([*byte_tokens, *merges.values(), *SPECIAL_TOKENS])}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
