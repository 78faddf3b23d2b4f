"""What transformers' own `generate` makes of the same prompts."""

import torch


def prompts(count, vocab, *, seed=0, longest=23):
    """`count` rows of random tokens, of very different lengths, the first of one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, longest, *torch.randint(1, longest, (count,), generator=generator).tolist()][:count]
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def left_padded(rows, pad):
    """`input_ids` and `attention_mask`, as transformers' batched generation wants them."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.full((longest - len(row),), pad), row)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, rows, tokenizer, max_new_tokens, stops=()):
    """Tokens of every row without the stop token, and the logits `[rows, steps, vocab]` they were chosen from."""
    inputs = left_padded(rows, tokenizer.pad_token_id)
    stops = [tokenizer.eos_token_id, *stops]
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    answers = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(a) if token in stops), len(a)) for a in answers]
    return [a[:end] for a, end in zip(answers, ends, strict=True)], torch.stack(output.logits, 1)
