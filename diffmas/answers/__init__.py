"""When an answer is right: the final answer of a worked text, and its comparison with the right one.

One module per kind (`mathematics`, `choice`, `code`, `text`, `exact`), each with `extract(text)`, the final answer in a
normal form or None, and `check(text, item)`; `own` makes the latter of a function somewhere else. Reasoning blocks are
left out first (`reasoning`). None raises for what a model wrote, other than such a function; all may be called from
several threads.
"""
