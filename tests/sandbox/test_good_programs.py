"""Right programs, whatever they import, return or change: each has to pass; and where it is damaged, to fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffmas import sandbox
from diffmas.answers import code
from diffmas.sandbox import Limits

# (name, program, tests); each program ends on a value that `DAMAGE` changes.
RETURNS = [
    ("None", "None"), ("True", "True"), ("2**200", "2**200"), ("10**5000", "10**5000"), ("-(2**63)", "-(2**63)"),
    ("float('inf')", "float('inf')"), ("1e-320", "1e-320"), ("-0.0", "0.0"), ("1j", "1j"), ("'é\\ud800'", "'é\\ud800'"),
    ("b'\\0x'", "b'\\0x'"), ("bytearray(b'x')", "bytearray(b'x')"), ("(1, [2, {3: (4,)}])", "(1, [2, {3: (4,)}])"),
    ("{1, 2}", "{1, 2}"), ("frozenset({1})", "frozenset({1})"), ("{(1, 2): None}", "{(1, 2): None}"),
    ("range(3)", "range(3)"), ("slice(1, 2)", "slice(1, 2)"), ("int", "int"), ("...", "..."), ("{}", "{}"),
    ("collections.Counter('aab')", "{'a': 2, 'b': 1}"), ("collections.Counter('aa')", "collections.Counter(a=2)"),
    ("collections.defaultdict(list, {1: [2]})", "{1: [2]}"), ("collections.OrderedDict(a=1)", "{'a': 1}"),
    ("collections.deque([1], 3)", "collections.deque([1])"), ("collections.namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
    ("enum.IntEnum('E', 'A B').B", "2"), ("type('S', (str,), {})('x')", "'x'"), ("type('L', (list,), {})([1])", "[1]"),
    ("decimal.Decimal('0.1')", "decimal.Decimal('0.1')"), ("fractions.Fraction(1, 3)", "fractions.Fraction(1, 3)"),
    ("datetime.date(2024, 2, 29)", "datetime.date(2024, 2, 29)"),
    ("datetime.datetime(2024, 2, 29, 1, 2, 3, 4)", "datetime.datetime(2024, 2, 29, 1, 2, 3, 4)"),
    ("datetime.timedelta(1, 2)", "datetime.timedelta(1, 2)"), ("{1: 2}.keys()", "{1}"), ("{1: 2}.items()", "{(1, 2)}"),
    ("numpy.int64(3)", "3"), ("numpy.float64(0.5)", "0.5"), ("numpy.bool_(True)", "True"),
    ("numpy.arange(3).tolist()", "[0, 1, 2]"), ("{'a': numpy.int32(1)}", "{'a': 1}"),
]  # fmt: skip
LIBRARIES = "import collections, datetime, decimal, enum, fractions, numpy\n"


def test_values_come_back_as_they_are(confinement):
    program = f"{LIBRARIES}def f(i): return [{', '.join(f'lambda: {value}' for value, _ in RETURNS)}][i]()"
    tests = f"{LIBRARIES}expected = [{', '.join(expected for _, expected in RETURNS)}]\n"
    tests += "for i, value in enumerate(expected):\n    assert f(i) == value, value\n    assert not f(i) == 'other'\n"
    result = sandbox.run(program, tests=tests + "    assert f(i) != expected[i - 1], value", packages=["numpy"])
    assert result.passed, result


def test_arguments_arrive_as_they_are(confinement):
    values = "[None, True, 2**200, -0.0, float('inf'), 1j, '\\ud800', b'x', (1, [2]), {1}, frozenset({1}), "
    values += (
        "{1: {2: 3}}, range(3), int, collections.Counter('aab'), collections.deque([1], 3), fractions.Fraction(1, 3)]"
    )
    program = f"{LIBRARIES}import math\nvalues = {values}\n"
    program += "def f(i, x): return type(x) is type(values[i]) and x == values[i] and repr(x) == repr(values[i])"
    tests = f"{LIBRARIES}for i, value in enumerate({values}): assert f(i, value) is True, i\nassert f(0, 1) is False"
    result = sandbox.run(program, tests=tests, packages=["numpy"])
    assert result.passed, result


IMPORTS = [
    "import math, numpy as np\ndef f(x): return float(np.sqrt(x)) + math.floor(0.5)",
    "import numpy.linalg as la\ndef f(x): return float(la.norm([x ** 0.5]))",
    "from numpy import sqrt\ndef f(x): return sqrt(x)",
    "def f(x):\n    import numpy\n    return numpy.sqrt(x)",
    "def f(x): return __import__('numpy').sqrt(x)",
    "import importlib\ndef f(x): return importlib.import_module('num' + 'py').sqrt(x)",
    "try:\n    import numpy as np\nexcept ImportError:\n    np = None\ndef f(x): return np.sqrt(x)",
    "exec('import numpy')\ndef f(x): return numpy.sqrt(numpy.array([x]))[0]",
    "x = 1; import numpy as n\ndef f(x): return n.asarray(x) ** 0.5",
    "import re, json, itertools, functools, heapq, bisect, random, statistics, typing, dataclasses, string\n"
    "def f(x): return statistics.mean([x ** 0.5])",
    "from typing import *\ndef f(x: List[int]) -> Optional[int]: return x ** 0.5",
    "from __future__ import annotations\ndef f(x: Nowhere): return x ** 0.5",
]


@pytest.mark.parametrize("program", IMPORTS)
def test_imports(program, confinement):
    item = {"entry_point": "f", "test": "assert f(9.0) == 3.0\nassert abs(f(2.0) - 1.41421356) < 1e-6"}
    assert code.execute(f"```python\n{program}\n```", item).passed
    assert not code.check(f"```python\n{program} + 1\n```", item)


POOLS = [
    "from multiprocessing import Pool\nwith Pool(2) as pool: return pool.map(g, xs)",
    "import multiprocessing as mp\nwith mp.Pool(2) as pool: return list(pool.imap(g, xs))",
    "from concurrent.futures import ProcessPoolExecutor as E\nwith E(2) as pool: return list(pool.map(g, xs))",
    "from concurrent.futures import ThreadPoolExecutor as E\nwith E(4) as pool: return list(pool.map(g, xs))",
    "from multiprocessing import Process, Queue, Lock\nq, lock = Queue(), Lock()\n"
    "p = Process(target=lambda: q.put([g(x) for x in xs]))\np.start()\nr = q.get()\np.join()\nreturn r",
    "from multiprocessing import Manager\nwith Manager() as m:\n    r = m.list(map(g, xs))\n    return list(r)",
    "from multiprocessing import Array\na = Array('i', xs)\na[:] = list(map(g, xs))\nreturn list(a)",
    "from multiprocessing.shared_memory import SharedMemory\ns = SharedMemory(create=True, size=9)\n"
    "s.buf[0] = 1\nt = SharedMemory(s.name)\nassert t.buf[0] == 1\nt.close()\ns.close()\ns.unlink()\n"
    "return [g(x) for x in xs]",
    "import asyncio\nasync def h(x): return g(x)\nasync def all(): return await asyncio.gather(*map(h, xs))\n"
    "return asyncio.run(all())",
    "import subprocess, sys\n"
    "return eval(subprocess.run([sys.executable, '-c', f'print([x * 2 for x in {xs}])'], **kw).stdout)",
    "import tempfile, pathlib\nwith tempfile.TemporaryDirectory() as d:\n    p = pathlib.Path(d, 'x')\n"
    "    p.write_text(repr(xs))\n    return [g(x) for x in eval(p.read_text())]",
    "import socket\na, b = socket.socketpair()\na.sendall(bytes(xs))\nreturn [g(x) for x in b.recv(9)]",
]  # fmt: skip


def test_processes_threads_and_files(confinement):
    for body in POOLS:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        program = "def g(x): return x * 2\ndef f(xs):\n    kw = dict(capture_output=True, text=True)\n" + lines
        result = sandbox.run(program, tests="assert f([1, 2, 3]) == [2, 4, 6]")
        assert result.passed, (body, result)


@pytest.mark.parametrize("mode", ["root", "user", "uid"])
def test_a_pool_in_every_mode(mode):
    program = "from multiprocessing import Pool\ndef g(x): return x * 2\ndef f(xs):\n"
    try:
        result = sandbox.run(program + "    with Pool(2) as pool: return pool.map(g, xs)", tests="assert f([1]) == [2]",
                             mode=mode)  # fmt: skip
    except sandbox.SandboxError as error:
        pytest.skip(str(error))
    assert result.passed, result


# (program, tests that pass, tests that fail)
CALLS = [
    ("def f(x): x.sort()", "x = [2, 1]\nassert f(x) is None and x == [1, 2]", "x = [2, 1]\nf(x)\nassert x == [2, 1]"),
    ("def f(x): x[0].append(x.pop())", "y = [1]\nx = [y, 3]\nf(x)\nassert x == [[1, 3]] and x[0] is y",
     "assert f([[]])"),
    ("def f(x): x.update(a=1); del x['b']", "x = {'b': 0}\nf(x)\nassert x == {'a': 1}", "x = {'b': 0}\nassert f(x)"),
    ("def f(*xs, k=()): xs[0].add(k)", "x = {1}\nf(x, k=5)\nassert x == {1, 5}", "x = {1}\nf(x)\nassert x == {1}"),
    ("def f(n):\n    for i in range(n): yield i * i", "assert list(f(4)) == [0, 1, 4, 9]", "assert list(f(2)) == [0]"),
    ("def f(xs): return map(lambda x: x + 1, xs)", "assert [*f([1, 2])] == [2, 3]", "assert [*f([1])] == [1]"),
    ("def f():\n    i = 0\n    while True:\n        yield i\n        i += 1",
     "import itertools\ng = f()\nassert next(g) == 0 and list(itertools.islice(g, 3)) == [1, 2, 3]",
     "assert next(f()) == 1"),
    ("def f(xs): return sum(xs)", "assert f(iter([1, 2])) == 3 == f(x for x in (1, 2))", "assert f(iter([1])) == 2"),
    ("def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: x * 2, [1, 2]) == [2, 4] and f(str, [1]) == ['1']",
     "assert f(abs, [-1]) == [-1]"),
    ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5", "assert f(2)(3) == 6"),
    ("def f(g): return g", "def g(): pass\nassert f(g) is g", "def g(): pass\nassert f(g) is f"),
    ("def f(x): return 1 / x",
     "try:\n    f(0)\n    assert False\nexcept ZeroDivisionError as e:\n    assert 'zero' in str(e)",
     "f(0)"),
    ("class E(ValueError): pass\ndef f(x): raise E(x, 2)",
     "try: f(1)\nexcept ValueError as e: assert e.args == (1, 2) and type(e).__name__ == 'E'\nelse: assert False",
     "try: f(1)\nexcept KeyError: pass"),
    ("def f(d, k): return d[k]", "try: f({}, 'a')\nexcept KeyError as e: assert e.args == ('a',)", "f({}, 'a')"),
    ("def f(b): return b.decode()", "try: f(b'\\xff')\nexcept UnicodeDecodeError as e: assert e.start == 0",
     "assert f(b'a') == 'b'"),
    ("def f(g):\n    try: return g()\n    except ValueError: return 'caught'",
     "def g(): raise ValueError\nassert f(g) == 'caught'", "def g(): raise KeyError\nassert f(g) == 'caught'"),
    ("class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(ps): return max(p.b - p.a for p in ps)",
     "assert f([Pair(1, 5), Pair(2, 3)]) == 4", "assert f([Pair(1, 5)]) == 5"),
    ("class Node:\n    def __init__(self, v): self.v, self.left, self.right = v, None, None\n"
     "def f(n): return 0 if n is None else 1 + max(f(n.left), f(n.right))",
     "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)\nassert f(root) == 3 and root.left.right.v == 3",
     "root = Node(1)\nassert f(root) == 2"),
    ("def f(n): return n.v + (f(n.next) if n.next else 0)",
     "class Node:\n    def __init__(self, v, next=None): self.v, self.next = v, next\nassert f(Node(1, Node(2))) == 3",
     "class Node: v, next = 1, None\nassert f(Node()) == 2"),
    ("class f:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
     "    def __len__(self): return len(self.items)\n    def __getitem__(self, i): return self.items[i]\n"
     "    def __str__(self): return 'stack'",
     "s = f()\ns.push(4)\nassert len(s) == 1 and s[0] == 4 and s.items == [4] and str(s) == 'stack' and list(s) == [4]",
     "s = f()\nassert s.items == [4]"),
    ("import functools\n@functools.lru_cache\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
     "assert f(80) == 23416728348467685 and f(80) == f(80)", "assert f(80) == 2"),
    ("def f(x): return __import__('re').match('a', x)", "assert f('ab')\nassert not f('b') and f('b') is None",
     "assert f('b')"),
    ("import math\ndef f(x): return x", "assert math.isclose(f(0.1 + 0.2), 0.3)", "assert math.isclose(f(1), 2)"),
    ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aa') == Counter('aa')",
     "assert f('a') == Counter('b')"),
    ("from concurrent.futures import ThreadPoolExecutor as E\ndef f(g):\n"
     "    with E(8) as e: return list(e.map(g, range(100)))",
     "assert f(lambda x: x * 2) == [2 * x for x in range(100)]", "assert f(lambda x: x) == [0]"),
    ("def f(n):\n    x = []\n    for _ in range(n): x = [x]\n    return x",
     "x, n = f(300), 0\nwhile x: x, n = x[0], n + 1\nassert n == 300", "assert f(3) == [[[]]]"),
    ("class E(Exception): pass\nclass F(E, KeyError): pass\ndef f(x): raise (F if x else E)('x', x)",
     "for x, kind in ((0, E), (1, F), (1, E), (1, KeyError)):\n"
     "    try: f(x)\n    except kind as e: assert e.args == ('x', x) and isinstance(e, E)\n    else: assert False",
     "try: f(0)\nexcept F: pass"),
    ("class E(ValueError):\n    def __init__(self, code, more):\n        super().__init__(f'bad {code}')\n"
     "        self.code, self.more = code, more\ndef f(x): raise E(x, [x])",
     "try: f(3)\nexcept E as e: assert e.code == 3 and e.more == [3] and str(e) == 'bad 3'\nelse: assert False\n"
     "assert E(4, 5).more == 5 and E.__name__ == 'E' and issubclass(E, ValueError)",
     "try: f(3)\nexcept E as e: assert e.code == 4"),
    ("class E(Exception): code = 7\ndef f(g):\n    try: g()\n    except E as e: return type(e) is E and e.args",
     "def g(): raise E(1)\nassert f(g) == (1,) and E.code == 7", "def g(): raise KeyError(1)\nf(g)"),
    ("import json\ndef f(x): return json.loads(x)",
     "import json\ntry: f('[')\nexcept json.JSONDecodeError as e: assert e.pos == 1 == len(e.doc)\nelse: assert False",
     "import json\nf('[')"),
    ("import subprocess\ndef f(): raise subprocess.CalledProcessError(3, 'ls', output='no')",
     "import subprocess\ntry: f()\nexcept subprocess.SubprocessError as e: assert (e.returncode, e.cmd, e.output) == "
     "(3, 'ls', 'no') and 'status 3' in str(e)\nelse: assert False",
     "import subprocess\ntry: f()\nexcept subprocess.TimeoutExpired: pass"),
    ("import numpy as np\ndef f(x): return np.linalg.inv(x)",
     "import numpy as np\ntry: f(np.zeros((2, 2)))\nexcept np.linalg.LinAlgError as e: assert 'ingular' in str(e)\n"
     "else: assert False", "import numpy as np\nf(np.zeros((2, 2)))"),
    ("def f(): return [ValueError(1), OSError(2, 'no')]",
     "a, b = f()\nassert type(a) is ValueError and a.args == (1,) and type(b) is FileNotFoundError and b.errno == 2",
     "assert isinstance(f()[0], KeyError)"),
    ("import unittest\ndef f(): raise unittest.SkipTest",
     "import unittest\ntry: f()\nexcept Exception as e: assert type(e) != unittest.SkipTest\nelse: assert False",
     "import unittest\ntry: f()\nexcept unittest.SkipTest: pass"),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, [P(2, 3)])",
     "p = f()\nassert p.x == 1 and p.y[0].y == 3 and p == (1, [(2, 3)]) and p._asdict()['x'] == 1 and P(1, 2).y == 2\n"
     "assert p._replace(x=5).x == 5 and type(p) is type(p.y[0]) and repr(p.y[0]) == 'P(x=2, y=3)'",
     "assert f().x == 2"),
    ("def f(p): return p.x + p.y", "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n    y: int = 2\n"
     "assert f(P(1)) == 3", "from collections import namedtuple\nassert f(namedtuple('Q', 'x y')(1, 1)) == 3"),
    ("import functools\n@functools.lru_cache\ndef f(x): return x",
     "f(1), f(1)\nassert f.cache_info().hits == 1 and f.cache_info().misses == 1", "assert f.cache_info().hits == 1"),
    ("import time\ndef f(): return time.gmtime(0)", "assert f().tm_year == 1970 and f()[0] == 1970",
     "assert f().tm_year == 1971"),
    ("def f(d): d['x'].append(1)",
     "from collections import defaultdict\nd = defaultdict(list)\nf(d), f(d)\nassert d == {'x': [1, 1]} and not d['y']",
     "f({})"),
    ("from collections import defaultdict\ndef f():\n    d = defaultdict(lambda: 5)\n    d[1] += 1\n    return d",
     "d = f()\nassert d == {1: 6} and d[9] == 5 and d == {1: 6, 9: 5} and isinstance(d, dict)", "f()[9] == 5 and f(1)"),
    ("from collections import defaultdict\ndef f(k): return defaultdict(k, {1: 2})",
     "d = f(int)\nassert d[5] == 0 and d.default_factory is int and f(None) == {1: 2}", "f(None)[3]"),
    ("def string(x): return x + 1\nf = string", "assert f(1) == 2", "assert f(1) == 1"),
    ("LIMIT = 3\ndef f(): return LIMIT", "assert f() == LIMIT == 3", "assert LIMIT == 4"),
    ("def f(x):\n    print('said', x)\n    return input", "import numpy as np\nassert callable(f(1))",
     "assert f(1) == 1"),
    ("import numpy as np\ndef f(x):\n    x *= 2\n    return x.T",
     "import numpy as np\nx = np.eye(2)\nassert np.array_equal(f(x), 2 * np.eye(2)) and x[0, 0] == 2",
     "import numpy as np\nassert np.allclose(f(np.ones(2)), 1)"),
    ("import numpy as np\n"
     "def f(): return np.array(['a', None, 2**70], dtype=object), np.array(['x']), np.zeros((0, 2))",
     "a, b, c = f()\nassert a.tolist() == ['a', None, 2**70] and b[0] == 'x' and c.shape == (0, 2)",
     "assert f()[0].tolist() == []"),
]  # fmt: skip


def test_calls(confinement):
    for program, right, wrong in CALLS:
        results = [sandbox.run(program, tests=t, entry_point="f", packages=["numpy"]) for t in (right, wrong)]
        assert results[0].passed, (program, results[0])
        assert results[1].reason == "exception", (program, results[1])


def test_helpers_of_the_context_are_those_of_the_tests(confinement):
    context = "import math\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n"
    context += "def f(xs):\n    '''Doc.'''\n"
    tests = "assert math.fabs(poly([1, 2], f([1, 2]))) < 1e-4"
    right = "def f(xs): return -xs[0] / xs[1] + 0 * poly(xs, 1)"
    assert sandbox.run(right, tests=tests, context=context, entry_point="f").passed
    mine = "def poly(xs, x): return 0\ndef f(xs): return 7"
    assert not sandbox.run(mine, tests=tests, context=context, entry_point="f").passed


def test_what_a_result_tells_of_a_call(confinement):
    program = "def f(x):\n    print('said')\n    return g(x)\ndef g(x): raise LookupError('not here')"
    result = sandbox.run(program, tests="assert f(1) == 2")
    assert result.detail == "LookupError" and result.output.startswith("said\n")
    assert "in g" in result.output and "not here" in result.output and "assert f(1)" not in result.output
    result = sandbox.run("def f(x): return 3", tests="assert f(1) == 2, f'differs: {f(1)}'")
    assert result.output.count("differs: 3") == 1


@pytest.mark.parametrize("mode", ["root", "user", "uid"])
def test_a_python_in_a_private_folder(mode, tmp_path, monkeypatch):
    """Such as root's home: other users cannot reach it by name."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("only root can run programs as another user")
    base = Path(os.path.realpath(sys.base_prefix))
    library = Path(os.__file__).parent
    private = tmp_path / "private"
    (private / "python/bin").mkdir(parents=True)
    (private / "python" / library.relative_to(base).parent).mkdir(parents=True, exist_ok=True)
    python = shutil.copy(os.path.realpath(sys.executable), private / "python/bin")
    shutil.copytree(library, private / "python" / library.relative_to(base),
                    ignore=shutil.ignore_patterns("site-packages", "dist-packages", "test", "__pycache__", "config-*",
                                                  "idlelib", "lib2to3", "ensurepip", "tkinter"))  # fmt: skip
    (private / "packages/pack").mkdir(parents=True)
    (private / "packages/pack/__init__.py").write_text("value = 5\n")
    private.chmod(0o700)
    if subprocess.run([python, "-I", "-c", "import json, ctypes"], check=False).returncode:
        pytest.skip("this Python cannot be copied")
    monkeypatch.setattr(sandbox.sys, "executable", python)
    monkeypatch.setattr(sandbox.sys, "base_prefix", str(private / "python"))
    monkeypatch.setattr(sandbox, "_package", lambda name: [str(private / "packages" / name)])
    program = "import random, json, decimal, pack, os, sys\nfrom multiprocessing import Pool\ndef g(x): return x + 1\n"
    program += "def f(x):\n    with Pool(2) as pool: return pool.map(g, [x, pack.value])\n"
    program += f"def reads():\n    try: return os.listdir({str(private)!r}) and {mode == 'uid'}\n"
    program += "    except PermissionError: return False\n"
    try:
        sandbox.run("pass", mode=mode)
    except sandbox.SandboxError as error:
        if "Permission denied" in str(error) or "No such file" in str(error):
            raise
        pytest.skip(str(error))
    tests = "import string, heapq, calendar, pack\nassert f(1) == [2, pack.value + 1]\nassert not reads()"
    result = sandbox.run(program, tests=tests, packages=["pack"], mode=mode)
    assert result.passed, result


def test_many_calls_are_quick(confinement):
    result = sandbox.run("def f(x): return x + 1", tests="for i in range(5000): assert f(i) == i + 1")
    assert result.passed and result.seconds < 5
    result = sandbox.run("def f(x): return sorted(x)", Limits(seconds=5),
                         tests="x = list(range(100_000))\nassert f(x[::-1]) == x")  # fmt: skip
    assert result.passed
