"""Text as it comes: characters and stop strings that span tokens."""

import pytest
from stock import prompts
from tiny_models import causal_lm, packed

from diffmas.agents.topology import TOPOLOGIES
from diffmas.generation import Decoding
from diffmas.generation.text import TextStream, cut, decode
from diffmas.system import MultiAgentSystem

TEXT = "héllo 🎉 Recall B, 中文字\u0301 A12 B3\n\n  end 🧑‍🚀"


@pytest.mark.parametrize("stop", [(), ("never",), ("🧑‍🚀!",)])
def test_pieces_join(tokenizer, stop):
    tokens = tokenizer(TEXT)["input_ids"]
    assert len(tokens) > len(TEXT)
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish(TEXT) == TEXT
    # What cannot be a stop string is never held back for longer than a character takes.
    assert pieces[0] == "h" and max(map(len, pieces)) <= len(" Recall")


@pytest.mark.parametrize(
    "stop, expected",
    [
        (("中文",), "héllo 🎉 Recall B, "),
        (("B, 中", "文字"), "héllo 🎉 Recall "),
        (("文字", "B, 中"), "héllo 🎉 Recall "),
        (("all B,",), "héllo 🎉 Rec"),
        (("hx", "hé"), ""),
        (("\n\n ",), TEXT[: TEXT.index("\n\n")]),
    ],
)
def test_stop_strings(tokenizer, stop, expected):
    tokens = tokenizer(TEXT)["input_ids"]
    stream = TextStream(tokenizer, stop)
    text = ""
    for count, token in enumerate(tokens, 1):  # noqa: B007
        text += stream.push(token)
        assert expected.startswith(text)
        if stream.stopped:
            break
    assert stream.stopped and text == expected == cut(decode(tokenizer, tokens[:count]), stop)
    # Not before it was complete.
    assert not any(s in decode(tokenizer, tokens[: count - 1]) for s in stop)


def test_invalid_bytes_do_not_get_lost(tokenizer):
    tokens = [i for i in range(256) if not decode(tokenizer, [i]).isprintable() or decode(tokenizer, [i]) == "\ufffd"]
    stream = TextStream(tokenizer, ())
    text = "".join(stream.push(token) for token in tokens)
    whole = decode(tokenizer, tokens)
    assert "\ufffd" in whole and text + stream.finish(whole) == whole


@pytest.mark.parametrize("samples", [1, 2])
def test_stream(tokenizer, samples):
    system = MultiAgentSystem(causal_lm("qwen3", vocab_size=len(tokenizer)), TOPOLOGIES["single"])
    ids, lengths = packed(prompts(6, len(tokenizer)))
    first = system.generate([ids], [lengths], tokenizer, Decoding(max_new_tokens=30, seed=3))
    # Stop strings that are sure to appear, in the middle of some rows' answers.
    stop = tuple(row[0].text[10:13] for row in first[::2])
    decoding = Decoding(max_new_tokens=30, seed=3, stop=stop, samples=samples, max_rows=4)
    answers = system.generate([ids], [lengths], tokenizer, decoding)
    events = list(system.stream_tokens([ids], [lengths], tokenizer, decoding))
    finishes = set()
    for row, found in enumerate(answers):
        for sample, answer in enumerate(found):
            own = [e for e in events if (e.row, e.sample) == (row, sample)]
            *earlier, last = own
            assert [e.completion for e in earlier] == [None] * len(earlier)
            assert "".join(e.text for e in own) == answer.text == last.completion.text
            assert last.completion.tokens == answer.tokens
            assert [e.token for e in own][: len(answer.tokens)] == answer.tokens
            assert len(own) == len(answer.logprobs) == len(answer.entropies)
            assert not any(s in answer.text for s in stop)
            assert answer.finish == "length" or len(answer.tokens) < 30
            finishes.add(answer.finish)
    assert "stop" in finishes
    assert system.training
