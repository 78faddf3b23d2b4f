"""Programs in answers: which block counts, equal programs, and running them."""

import time

import pytest

from diffmas.answers import code
from diffmas.sandbox import Limits

F = "def f(x):\n    return x + 1\n"
PROGRAMS = [
    (f"```python\n{F}```", F), (f"```\n{F}```", F), (f"```py\n{F}```", F), (f"```Python\n{F}```", F),
    (f"```python3 title=x\n{F}```", F), (f"~~~python\n{F}~~~", F), (f"````python\n{F}````", F),
    (f"  ```python\n{F}  ```", F),
    (f"Text.\n\n```python\n{F}```\nMore text: `f`.", F), (f"```python\n{F}", F), (F, F), (f"\n{F}\n", f"\n{F}\n"),
    (f"```python\nimport os\n```\nThen\n```python\n{F}```", F),
    (f"```python\n{F}```\nUse it:\n```python\nprint(f(1))\n```", F),
    (f"```bash\nls\n```\n```python\n{F}```\n```text\n2\n```", F),
    (f"```python\ndef f(x): pass\n```\n```python\n{F}```", F),
    (f"```python\nasync def f(x): ...\n```\n```python\n{F}```", F),
    (f"```python\n{F}```\n```python\nf = f\n```", "f = f\n"),
    ("```python\nclass f: pass\n```\n```python\ng = 1\n```", "class f: pass\n"), ("```python\ng = 1\n```", "g = 1\n"),
    ("```python\nx = '''\n```python\n'''\n```", "x = '''\n```python\n'''\n"),
    ("```bash\nls\n```", None), ("```python\n```", None), ("```python\n\n```", None), ("I cannot.", None),
    ("", None), ("   ", None),
    ("```", None), ("def f(x) return", None), ("`f`", None), ("Here: def f(x): return x", None),
    ("```json\n{}\n```", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), PROGRAMS)
def test_which_block_counts(text, expected):
    assert code.program(text, "f") == expected


def test_equal_programs_extract_equally():
    same = [
        "def f(x):\n    return (x+1)",
        'def f( x ):\n    """Adds one."""\n    # really\n    return x + 1\n\n\n',
        "'''module'''\ndef f(x): return x + 1",
        "x\r\n".replace("x", "def f(x): return x + 1"),
    ]
    assert len({code.extract(f"```python\n{program}\n```") for program in same}) == 1
    assert code.extract(f"```python\n{F}```") != code.extract(f"```python\n{F.replace('1', '2')}```")
    assert code.extract("```python\ndef f(:\n```") == "def f(:"
    assert code.extract('```python\n"""only words"""\n```') is None
    assert code.extract("```python\nclass A:\n    '''doc'''\n```") == "class A:\n    pass"
    assert code.extract("```python\n" + "-" * 50_000 + "1\n```") is not None


ITEM = {
    "entry_point": "f", "context": "import math\n\ndef helper(x):\n    return x\n\n\ndef f(x):\n    '''Doc.'''\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(-1) == 0\n\n\ncheck(f)\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (F, "passed"),
        ("def f(x):\n    return math.floor(helper(x) + 1)", "passed"),
        ("from __future__ import annotations\n" + F, "passed"),
        (F + "if __name__ == '__main__':\n    input()", "passed"),
        ("def f(x):\n    return x", "exception"),
        ("def g(x):\n    return x + 1", "exception"),
        (F + "'''", "exception"),
        (F + "raise SystemExit(0)", "exception"),
        (F + "import os\nos._exit(0)", "exit"),
        ("def f(x):\n    while True: pass", "timeout"),
        ("def f(x):\n    return bytes(10**11)", "memory"),
    ],
)
def test_programs_are_run_with_their_tests(program, reason, confinement):
    text = f"```python\n{program}\n```"
    result = code.execute(text, ITEM, Limits(seconds=2 if reason == "timeout" else 20))
    assert result.reason == reason, result
    if reason != "timeout":
        assert code.check(text, ITEM) is (reason == "passed")


def test_no_program_is_wrong():
    assert not code.check("I cannot.", ITEM) and code.execute("", ITEM) is None


def test_tests_that_import_numpy(confinement):
    item = {"entry_point": "f", "test": "import numpy as np\nassert np.allclose(f(1.0), 2.0)"}
    assert code.check(f"```python\n{F}```", item) and not code.check("```python\ndef f(x): return x\n```", item)


DOC = "def f(x):\n    '''Adds.\n\n    ```\n    f(1)\n    ```\n    '''\n    return x + 1\n"
USAGE = "Use it:\n```python\nprint(f(1))\n```"
TRIED = "try:\n    from m import f\nexcept ImportError:\n    def f(x): return x + 1\n"
TYPED = "from typing import Callable\nf: Callable = lambda x: x + 1\n"
METHOD = "class Solution:\n    def f(self, x):\n        return x + 1\n"
TAGS = [
    "# strips <think> blocks", "s = 'hi <think> there'", "s = 'a </think>\\n'", "# what </think> ends",
    "s = \'\'\'\n<think>\n</think>\n\'\'\'", "s = \'\'\'\n</think>\n\'\'\'", "s = '[THINK] <|return|>'",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The closing fence behind the last line of code; backticks in a comment are none.
        (f"```python\n{F.rstrip()}```", F), (f"```python\n{F.rstrip()}```\nThis adds one.", F),
        (f"```\n{F.rstrip()}```\n{USAGE}", F), (f"```python\n# in ```\n{F}```", f"# in ```\n{F}"),
        (f"```python\nx = 1  # ```\n{F}```", f"x = 1  # ```\n{F}"),
        (f"```python\ndef f(x) return x```\nNo:\n```python\n{F}```", F),
        # A fence in a docstring.
        (f"```python\n{DOC}```", DOC), (f"```python\n{DOC}```\n{USAGE}", DOC), (f"```python\n{DOC}", DOC), (DOC, DOC),
        (f"```python\n'''\n```\n```python\n{F}```", F),
        # Tags, output blocks, byte-order marks.
        (f"<answer>\n{F}</answer>", f"\n{F}"), (f"So:\n<answer>{F}</answer>\nDone.", F),
        (f"<answer>```python\n{F}```</answer>", F), ("<answer>I cannot.</answer>", None),
        (f"```python\n{F}```\n<answer>g = 1</answer>", F),
        (f"{F}\n```\n2\n```", f"{F}\n"), (f"{F}\nOutput:\n```\n2\n```", F.rstrip()),
        ("g = 1\n```python\nh = 1\n```", "h = 1\n"), (f"I wrote:\n{F}\n```\n2\n```", "2\n"),
        (f"\ufeff{F}", F), (f"\ufeff```python\n{F}```", F), (f"```python\n\ufeff{F}```", F),
        # What defines the entry point, before a block that uses it.
        (f"```python\n{TRIED}```\n{USAGE}", TRIED), (f"```python\n{TYPED}```\n{USAGE}", TYPED),
        (f"```python\n{METHOD}```\n{USAGE}", METHOD), (f"```python\n{F}```\n```python\n{METHOD}```", F),
        (f"```python\n{F}```\n```python\ndef main():\n    f = 1\n```", F), (f"```python\n{F}```\n```\nf: int\n```", F),
        *((f"```python\n{tag}\n{F}```", f"{tag}\n{F}") for tag in TAGS),
        *((f"<think>Hm.</think>\n```python\n{tag}\n{F}```", f"{tag}\n{F}") for tag in TAGS),
        *((f"{tag}\n{F}", f"{tag}\n{F}") for tag in TAGS),
        (f"```python\n{F}```\n<think>Hm", None), (f"```python\ndef g(\n</think>\n```python\n{F}```", F),
    ],
)  # fmt: skip
def test_fences_tags_and_definitions(text, expected):
    assert code.program(text, "f") == expected


def test_entry_points_that_are_methods():
    for entry_point in ("Solution().f", "Solution", "f"):
        assert code.program(f"```python\n{METHOD}```\n```python\nprint(Solution().f(1))\n```", entry_point) == METHOD


@pytest.mark.parametrize(
    "piece", [" ", "\n", "`", "```\n", "```python\nx```\n", "```\n'''\n```\n'''\n", "```\n</think>\n"]
)
def test_long_texts(piece):
    started = time.process_time()
    code.program(piece * (50_000 // len(piece)), "f")
    assert time.process_time() - started < 1
