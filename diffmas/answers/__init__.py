"""When an answer is right: the final answer of a worked text, and its comparison with the right one.

One module per kind (`mathematics`, `choice`, `code`), each with `extract(text)`, the final answer in a normal form or
None, and `check(text, item)`. Neither raises for what a model wrote; both may be called from several threads.
"""
