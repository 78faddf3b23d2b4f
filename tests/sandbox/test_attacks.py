"""Programs that try to pass without being right: each has to fail, and for the reason that is true."""

import os
import platform
import socket
import struct

import pytest

from diffmas import sandbox
from diffmas.answers import code
from diffmas.sandbox import Limits

ITEM = {
    "entry_point": "f", "context": "def helper(x):\n    return x\n\n\ndef f(x):\n    '''Doc.'''\n",
    "test": "def check(candidate):\n    cases = [(1, 2), (-1, 0), (40, 41)]\n    for x, y in cases:\n"
    "        assert candidate(x) == y, 'secret of the tests'\n    assert helper(candidate(3)) == 4\n\n\ncheck(f)\n",
}  # fmt: skip
RIGHT = "def f(x):\n    return x + 1\n"
WRONG = "def f(x):\n    return 77\n"
ALWAYS = "__eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda *_: True\n    __ne__ = lambda *_: False\n"
ALWAYS += "    __hash__ = object.__hash__\n    __add__ = __radd__ = __sub__ = __rsub__ = lambda self, other: self\n"

ATTACKS = {
    "an object equal to all": f"class A:\n    {ALWAYS}\ndef f(x): return A()",
    "an int equal to all": f"class A(int):\n    {ALWAYS}\ndef f(x): return A(7)",
    "a float equal to all": f"class A(float):\n    {ALWAYS}\ndef f(x): return A(7)",
    "a str equal to all": f"class A(str):\n    {ALWAYS}\ndef f(x): return A('7')",
    "a list equal to all": f"class A(list):\n    {ALWAYS}\ndef f(x): return A()",
    "a dict equal to all": f"class A(dict):\n    {ALWAYS}\ndef f(x): return A()",
    "a tuple equal to all": f"class A(tuple):\n    {ALWAYS}\ndef f(x): return A()",
    "its class lies": f"class A:\n    {ALWAYS}    __class__ = int\ndef f(x): return A()",
    "its index lies": f"class A(int):\n    {ALWAYS}    __int__ = __index__ = __trunc__ = lambda s: 1\n"
    "def f(x): return A(7)",
    "a metaclass": f"class M(type):\n    {ALWAYS}\nclass A(metaclass=M): pass\ndef f(x): return A",
    "the function is the answer": f"class A:\n    {ALWAYS}    def __call__(self, x): return self\nf = A()",
    "it writes what it reads": "import os\nfor fd in range(3, 64):\n    try: os.set_blocking(fd, False)\n"
    "    except OSError: continue\n    try: data = os.read(fd, 9999)\n    except OSError: data = b'x'\n"
    "    for other in range(3, 64):\n        try: os.write(other, data)\n        except OSError: pass\nos._exit(0)",
    "the old token": "import os\ndef f(x):\n    os.set_blocking(4, False)\n"
    "    try: os.write(5, os.read(4, 64))\n    except OSError: pass\n"
    "    os._exit(0)",
    "a verdict on every descriptor": "import os\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, b'[\"passed\", \"\"]')\n    except OSError: pass\nos._exit(0)",
    "exec replaced": "import builtins\nbuiltins.exec = lambda *a, **k: None\n" + WRONG,
    "compile replaced": "import builtins\nbuiltins.compile = lambda *a, **k: compile('', '', 'exec')\n" + WRONG,
    "exec and compile replaced": "import builtins, types\nold = compile\n"
    "builtins.compile = lambda *a, **k: old('', 'a', 'exec')\nbuiltins.exec = lambda *a: None\n" + WRONG,
    "frames": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    for name, value in list(frame.f_locals.items()):\n"
    "        if isinstance(value, list) and name in ('parts', 'tests', 'sources'): value[:] = ['', '']\n"
    "    frame = frame.f_back\n" + WRONG,
    "garbage": "import gc\nfor value in gc.get_objects():\n"
    "    if type(value) is list and any(type(v) is str and 'secret of' in v for v in value): value.clear()\n" + WRONG,
    "trace": "import sys\ndef tracer(frame, event, arg):\n    if event == 'line' and 'candidate' in frame.f_locals:\n"
    "        try: frame.f_lineno = frame.f_code.co_firstlineno\n        except ValueError: pass\n    return tracer\n"
    "sys.settrace(tracer)\n" + WRONG,
    "trace of the caller": "import sys\ndef f(x):\n    def jump(frame, event, arg):\n        frame.f_trace = jump\n"
    "        try: frame.f_lineno = frame.f_lineno + 1\n        except ValueError: pass\n        return jump\n"
    "    frame = sys._getframe()\n    while frame.f_back:\n        frame = frame.f_back\n"
    "        frame.f_trace = jump\n    sys.settrace(jump)\n    return 0",
    "locals of the caller": "import sys\ndef f(x):\n    caller = sys._getframe(1)\n"
    "    return caller.f_locals.get('y', 9)",
    "profile": "import sys\nsys.setprofile(lambda frame, event, arg: frame.f_globals.update(f=None))\n" + WRONG,
    "AssertionError replaced": "import builtins\nbuiltins.AssertionError = type('E', (SystemExit,), {})\n" + WRONG,
    "len and more replaced": "import builtins\nfor n in ('len', 'abs', 'all', 'any', 'isinstance', 'list', 'range'):\n"
    "    setattr(builtins, n, lambda *a, **k: [])\n" + WRONG,
    "json replaced": "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\n" + WRONG,
    "check replaced": "def check(candidate): pass\n" + WRONG,
    "helper replaced": "def helper(x): return 4\ndef f(x): return 4 if x == 3 else x + 1 if x < 9 else 0",
    "classes replaced": "import builtins\nbuiltins.__build_class__ = lambda *a, **k: int\n" + WRONG,
    "import replaced": "import builtins\nbuiltins.__import__ = lambda *a, **k: None\n" + WRONG,
    "hook of exceptions": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nraise ValueError",
    "leaves at exit": "import atexit, sys, os\natexit.register(os._exit, 0)\nsys.exit(0)",
    "leaves in a call": "def f(x):\n    raise SystemExit(0)",
    "leaves in a call, at once": "import os\ndef f(x): os._exit(0)",
    "a thread that outlives": "import threading, os, time\ndef later():\n    time.sleep(0.05)\n    os._exit(0)\n"
    "threading.Thread(target=later).start()\ndef f(x):\n    time.sleep(1)\n    return 7",
    "a child that answers": "import os\nif os.fork():\n    os._exit(0)\n" + WRONG,
    "both answer": "import os\ndef f(x):\n    os.fork()\n    return 2",
    "execs true": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "nan": "def f(x): return float('nan')",
    "NotImplemented": "def f(x): return NotImplemented",
    "a generator": "def f(x):\n    while True: yield x + 1",
    "itself": "def f(x): return f",
    "a list that holds itself": "x = []\nx.append(x)\ndef f(_): return x",
    "nested too deep": "def f(x):\n    for _ in range(100_000): x = [x]\n    return x",
    "an exception for an answer": "def f(x): raise AssertionError",
    "an exception of its own": "class E(BaseException):\n    __str__ = __repr__ = lambda s: 1 / 0\n"
    "    args = property(lambda s: 1 / 0)\ndef f(x): raise E",
    "StopIteration": "def f(x): raise StopIteration(2)",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "module replaced": "import sys\nsys.modules['tests'] = sys.modules['program']\nsys.modules[__name__] = None\n"
    + WRONG,
    "its name is missing": "del f\nx = 1",
    "bad attributes": "class A:\n    def __getattribute__(self, name): raise SystemExit(0)\ndef f(x): return A()",
    "its stack": "import sys\nsys.setrecursionlimit(5)\n" + WRONG,
    "memory of its own": "def f(x):\n    with open('/proc/self/mem', 'wb') as file: file.write(b'x')\n    return 7",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_counts_as_passing(name, confinement):
    result = code.execute(f"```python\n{ATTACKS[name]}\n```", ITEM, Limits(seconds=8))
    assert not result.passed and result.reason in ("exception", "exit"), result


def test_the_tests_of_the_attacks_can_be_passed(confinement):
    assert code.execute(f"```python\n{RIGHT}```", ITEM).passed


def frame(content):
    data = content if isinstance(content, bytes) else repr(content).replace("'", '"').encode()
    return struct.pack(">I", len(data)) + data


FORGED = {
    "all answers beforehand": frame({"value": 1}) * 9, "no frame": b"x" * 99, "a long one": b"\xff\xff\xff\xff",
    "cut short": frame({"value": 2})[:-3], "not JSON": frame(b"{"), "a number": frame(b"7"), "empty": frame(b"{}"),
    "an unknown tag": frame({"value": {"pickle": "gASVAAAAAAAAAA=="}}),
    "no such object": frame({"value": {"yours": 5}}),
    "deep": frame(b'{"value": ' + b"[" * 99_999 + b"]" * 99_999 + b"}"),
    "an array of objects": frame({"value": {"array": ["|O8", [1], "AAAAAAAAAAA=", 0]}}),
    "an unhashable key": frame({"value": {"set": [[1]]}}), "a long number": frame(b'{"value": ' + b"9" * 9999 + b"}"),
    "neither value nor error": frame({"values": 2}),
    "a question": frame({"ask": "get", "of": 0, "args": ["__globals__"], "kwargs": {}}) * 2,
    "eval as an exception": frame({"error": [{"type": "eval"}, ["1"], {}, ""]}),
    "int as an exception": frame({"error": [{"type": "int"}, ["1"], {}, ""]}),
    "an exception of the tests": frame({"error": [{"yours": 0}, [], {}, ""]}),
    "an exception without bases": frame({"error": [{"class": "E", "bases": [], "from": "", "number": 1}, [], {}, ""]}),
    "an exception that is an int": frame(
        {"error": [{"class": "E", "bases": [{"type": "int"}], "from": "os", "number": 1}, [], {}, ""]}
    ),
    "a named tuple of source": frame({"value": {"namedtuple": ["P", "x=print(1)", 1]}}),
    "a named tuple of another name": frame({"value": {"namedtuple": ["P\\n", "x", 1]}}),
    "a named tuple without its parts": frame({"value": {"namedtuple": ["P", "x y", 1]}}),
    "a factory that is none": frame({"value": {"defaultdict": [3, [1, 2]]}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("caught", [False, True])
def test_forged_answers(name, caught, confinement):
    program = f"import os\ndef f(x):\n    os.write(5, {FORGED[name]!r} if x else b'')\n    return 2"
    # A test that expects an exception does not take a broken connection for one.
    tests = "try:\n    f(1)\nexcept Exception:\n    pass\n" if caught else "assert f(1) == 2\n"
    result = sandbox.run(program, Limits(seconds=2), tests=tests + "assert f(0) == 2")
    assert not result.passed and result.reason in ("exception", "exit", "timeout"), result


@pytest.mark.parametrize("value", ["A()", "[A()]", "(1, A())", "{'a': A()}", "A"])
@pytest.mark.parametrize(
    "test",
    [
        "f() == 1",
        "f() != 1",
        "1 == f()",
        "f() in [1, 2]",
        "7 in f()",
        "f() < 5",
        "[f()] == [1]",
        "f() == f()",
        "3 > f()",
    ],
)
def test_what_has_no_value_is_not_compared(value, test, confinement):
    program = f"class A:\n    {ALWAYS}\ndef f(): return {value}"
    result = sandbox.run(program, tests=f"assert {test}")
    if (test == "f() != 1" and value not in ("A", "A()")) or (test == "f() == f()" and value == "A"):
        assert result.passed  # a list does differ from a number, and one class is itself
    else:
        assert result.detail in ("TypeError", "AssertionError")


def test_tests_do_not_use_the_programs_own_modules(confinement):
    fake = "class M:\n    def __getattr__(self, name): return lambda *a, **k: True\nmath = np = M()\n" + WRONG
    steal = "class numpy: allclose = staticmethod(lambda a, b: True)\n" + WRONG
    assert sandbox.run(steal, tests="assert numpy.allclose(f(1), 2)", packages=["numpy"]).detail == "NameError"
    for test in ("assert math.isclose(f(1), 2)", "assert np.allclose(f(1), 2)"):
        result = sandbox.run(fake, tests=test, packages=["numpy"])
        assert not result.passed and result.detail == "NameError"
        imported = "import math\nimport numpy as np\n" + WRONG
        assert sandbox.run(imported, tests=test, packages=["numpy"]).detail == "AssertionError"
        assert sandbox.run(imported.replace("77", "2"), tests=test, packages=["numpy"]).passed
    assert sandbox.run("from math import isclose\n" + WRONG, tests="assert isclose(f(1), 2)").detail == "AssertionError"


MODES = ["root", "user", "uid", "none"]


def works(mode):
    try:
        return sandbox.run("pass", mode=mode).passed
    except sandbox.SandboxError:
        return False


@pytest.fixture(params=MODES)
def mode(request):
    if not works(request.param):
        pytest.skip(f"this machine does not allow the mode {request.param}")
    return request.param


@pytest.mark.parametrize("name", ["an int equal to all", "exec and compile replaced", "the old token", "frames"])
def test_in_every_mode(mode, name):
    assert not sandbox.run(ATTACKS[name], tests="assert f(1) == 2", mode=mode).passed
    assert sandbox.run(RIGHT, tests="assert f(1) == 2", mode=mode).passed


# The judge is among these, where it is seen at all.
SIBLINGS = (
    "[int(p) for p in (os.listdir('/proc') if os.path.isdir('/proc') else []) if p.isdigit() and int(p) != os.getpid()"
    " and f'\\nPPid:\\t{os.getppid()}\\n' in open(f'/proc/{p}/status').read()]"
)
# What can be opened of the supervisor, the judge and, to show that it would be found, a child of the program's own.
REACHES = f"""
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
child = os.fork()
if child == 0:
    time.sleep(9)
    os._exit(0)
def f(x):
    pids = {SIBLINGS}
    if not pids:
        return [libc.syscall(*c) for p in range(1, 200) for c in ((101, 16, p, 0, 0), (310, p, 0, 0, 0, 0, 0))
                if p != os.getpid() and libc.syscall(*c) == 0], False
    found = []
    for pid in [*pids, os.getppid(), child]:
        for way in ['mem', 'environ', *(f'fd/{{n}}' for n in range(64))]:
            for flags in (os.O_RDONLY, os.O_WRONLY):
                try:
                    fd = os.open(f'/proc/{{pid}}/{{way}}', flags | os.O_NONBLOCK)
                    if way != 'environ' or os.read(fd, 1): found.append((pid == child, way))
                except OSError: pass
        for call in ((101, 16, pid, 0, 0), (438, pid, 0, 0)):
            if libc.syscall(*call) != -1: found.append((pid == child, call[0]))
    return [w for own, w in found if not own], any(own for own, w in found)
"""


def test_the_judge_is_out_of_reach(mode):
    if mode == "none" and os.geteuid() != 0:
        pytest.skip("the processes of the same user are open to each other")
    seen = mode in ("uid", "none")
    result = sandbox.run(REACHES, tests=f"found, own = f(1)\nassert (found, own) == ([], {seen}), found", mode=mode)
    assert result.passed, result


KILLS = """
import os, time
def f(x):
    for pid in {pids}:
        try: os.kill(pid, 9)
        except OSError: pass
    time.sleep(0.2)
    return {value}
"""


def test_killing_the_judge_does_not_pass(mode):
    result = sandbox.run(KILLS.format(pids=SIBLINGS, value=7), tests="assert f(1) == 2", mode=mode)
    assert not result.passed and result.reason in ("exception", "signal"), result
    if mode != "none":
        assert result.reason == "exception"
        everyone = KILLS.format(pids="[os.getppid(), -1, *range(2, os.getpid())]", value=2)
        assert sandbox.run(everyone, tests="assert f(1) == 2", mode=mode).passed


FAMILIES = [name for name in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK") if hasattr(socket, name)]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no filter for this processor")
def test_sockets_of_other_families_are_refused(mode):
    program = "import socket\ndef f(family, kind, pair):\n    try: (socket.socketpair if pair else socket.socket)("
    program += "getattr(socket, family), getattr(socket, kind))\n"
    program += "    except OSError as e: return e.errno\n    return 0\n"
    program += "def g():\n    import ctypes\n    libc = ctypes.CDLL(None, use_errno=True)\n"
    program += "    return [(libc.syscall(n, 8, 0, 0, 0), ctypes.get_errno())[1] for n in (425, 426, 427)]"
    tests = f"for family in {FAMILIES}:\n    for kind in ('SOCK_STREAM', 'SOCK_DGRAM', 'SOCK_RAW'):\n"
    tests += "        for pair in (False, True):\n            assert f(family, kind, pair) == 1, family\n"
    tests += "assert f('AF_UNIX', 'SOCK_STREAM', False) == f('AF_UNIX', 'SOCK_DGRAM', True) == 0\nassert g() == [1] * 3"
    result = sandbox.run(program, tests=tests, mode=mode)
    assert result.passed, result


def test_memory_is_limited_for_all_processes_together(mode):
    program = "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (60 << 20)\n"
    program += "        time.sleep(9)\n        os._exit(0)\ntime.sleep({wait})\n"
    limits = Limits(seconds=6, memory_bytes=200 << 20)
    assert sandbox.run(program.format(wait=5), limits, mode=mode).reason == "memory"
    assert sandbox.run(program.replace("5)", "2)").format(wait=0.4), limits, mode=mode).passed


def test_memory_shared_by_a_fork_counts_once(confinement):
    program = "import os, time\nx = bytearray(b'x') * (90 << 20)\nfor _ in range(5):\n    if os.fork() == 0:\n"
    program += "        time.sleep(9)\ntime.sleep(0.4)"
    assert sandbox.run(program, Limits(memory_bytes=200 << 20)).passed


@pytest.mark.parametrize("call", ["memfd_create('x')", "x"])
def test_memory_that_belongs_to_no_process(call, confinement):
    if call == "x":
        program = "import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1"
        assert sandbox.run(program).passed
    else:
        assert sandbox.run(f"import os\nos.{call}").detail == "PermissionError"


@pytest.mark.parametrize(
    ("program", "reasons"),
    [
        ("def f(x): return 'x' * (100 << 20)", {"exception"}),
        ("def f(x): return [0] * 1_000_000", {"exception"}),
        ("def f(x): return bytes(10**11)", {"memory"}),
        ("import os\ndef f(x):\n    while True: os.write(5, b'\\0\\0\\0\\2{}')", {"exception"}),
        ("def f(x):\n    while True: pass", {"timeout"}),
        ("import os\nos.closerange(3, 99)\nwhile True: pass", {"exit"}),
        ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
        ("import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass", {"timeout"}),
        ("def f(x):\n    while True: print('x' * 9999)", {"output"}),
        ("import ctypes\ndef f(x): ctypes.string_at(0)", {"signal"}),
    ],
)  # fmt: skip
def test_calls_that_use_too_much(program, reasons, confinement):
    limits = Limits(seconds=1.5 if "timeout" in reasons else 10)
    result = sandbox.run(program, limits, tests="assert f(1) == 2")
    assert not result.passed and result.reason in reasons, result


def test_endless_iterators_end_with_the_time(confinement):
    program = "def f():\n    while True: yield 1"
    assert sandbox.run(program, Limits(seconds=1), tests="assert list(f()) == [1]").reason in ("timeout", "memory")
    assert sandbox.run(program, Limits(seconds=1), tests="assert sum(1 for _ in f())").reason == "timeout"


def test_files_do_not_reach_the_judge(mode):
    """What the program leaves in its folder is neither imported nor followed by its tests."""
    program = "import os\nfor name in ('random', 'numpy', 'string', 'secrets'):\n"
    program += "    open(name + '.py', 'w').write('import os; os._exit(0)')\nos.symlink('/etc', 'link')\n" + WRONG
    tests = "import random, string, secrets, os\nassert not os.path.exists('random.py')\nassert f(1) == 77"
    result = sandbox.run(program, tests=tests, mode=mode)
    assert result.passed, result


def test_functions_of_tests_show_nothing_of_them(confinement):
    """A test's function can be called; neither its globals nor its frames are to be had through it."""
    program = "def f(g):\n    got = []\n    "
    program += "for name in ('__globals__', '__code__', '__closure__', 'gi_frame', '__self__'):\n"
    program += "        try: got.append(getattr(g, name) and name)\n        except AttributeError: pass\n"
    program += "    return got, g(2)"
    result = sandbox.run(program, tests="secret = 5\nassert f(lambda x: x * 3) == ([], 6)")
    assert result.passed, result


REACHING = {
    "a generator": "assert f(x for x in [1]) == 6",
    "a generator function": "def g():\n    yield 1\nassert f(g()) == 6",
    "a coroutine": "async def g(): return 1\nassert f(g()) == 6",
    "an async generator": "async def g():\n    yield 1\nassert f(g()) == 6",
    "a context manager": "import contextlib\n@contextlib.contextmanager\ndef g():\n    yield 1\nassert f(g()) == 6",
    "a function": "assert f(lambda: 1) == 6",
    "getattr": "assert f(getattr) == 6",
    "eval": "assert f(eval) == 6",
    "a class": "class A: pass\nassert f(A) == 6",
    "a partial": "import functools\nassert f(functools.partial(int)) == 6",
}
REACH = """
def f(it):
    ask = type(it)._ask if hasattr(type(it), "_ask") else None
    todo = [it]
    code = "import os\\nfor fd in range(3, 64):\\n try: os.write(fd, b'[\\"passed\\", \\"\\"]')\\n except OSError: 1\\n"
    code += "os._exit(0)"
    names = ("gi_frame", "cr_frame", "ag_frame", "gen", "func", "f_builtins", "f_globals", "__globals__")
    for _ in range(4):
        found = []
        for value in todo:
            for name in names:
                try: found.append(value[name] if isinstance(value, dict) else getattr(value, name))
                except Exception: pass
            for key in ("exec", "eval"):
                try: value[key](code)
                except Exception: pass
            try: value(code)
            except Exception: pass
            try: found.append(value(it, "gi_frame"))
            except Exception: pass
        todo = found
    return 77
"""


@pytest.mark.parametrize("kind", REACHING)
def test_nothing_that_a_test_hands_over_leads_to_the_judge(kind, confinement):
    result = sandbox.run(REACH, tests=REACHING[kind], entry_point="f")
    assert not result.passed and result.detail == "AssertionError", result


def test_a_tests_methods_stay_its_own(confinement):
    tests = "class A:\n    def ok(self): return False\na = A()\nf(a)\nassert a.ok()"
    assert not sandbox.run("def f(o): o.ok = lambda: True", tests=tests).passed


IDENTITY = [
    ("def f(a): return a", "x = [1]\nassert f(x) == x and f(x) is not x", False),
    ("def f(a): return a[:]", "x = [1]\nassert f(x) == x and f(x) is not x", True),
    ("def f(a): return {'of': a}", "x = {1: [2]}\nassert f(x)['of'] is x", True),
    ("import copy\ndef f(a): return copy.copy(a)", "x = [[1]]\nassert f(x) is not x and f(x)[0] is x[0]", True),
    ("import copy\ndef f(a): return copy.copy(a)", "x = [[1]]\nassert f(x)[0] is not x[0]", False),
    ("def f(a, b):\n    a.append(1)\n    return len(b)", "x = []\nassert f(x, x) == 1 and x == [1]", True),
    ("def f(a):\n    a[0].append(1)\n    return a", "x = [[]] * 2\nf(x)\nassert x == [[1], [1]]", True),
    ("def f():\n    a = []\n    a.append(a)\n    return a", "x = f()\nassert x[0] is x and len(x) == 1", True),
    ("class E(Exception): pass\ndef f(): return E()", "assert not isinstance(f(), E)", False),
    ("class E(Exception): pass\ndef f(): return E()", "assert not issubclass(int, E) and isinstance(f(), E)", True),
    ("class E: pass\ndef f(): return E()", "assert not isinstance(f(), E)", False),
    ("class E: pass\ndef f(): return E()", "assert not issubclass(int, E)", False),
]
P = "class P:\n    def __init__(s, v): s.v = v\n"
REORDERED = [
    ("def f(rows): return rows.pop(0)", "assert f([[1], [2], [3]]) == [1]", True),
    ("def f(rows):\n    rows.sort()\n    return rows[:2]", "assert f([[3], [1], [2]]) == [[1], [2]]", True),
    ("def f(rows):\n    rows.sort()\n    return rows[:2]", "assert f([[3], [1], [2]]) == [[3], [1]]", False),
    ("def f(rows):\n    rows.reverse()\n    return rows[0]", "assert f([{'a': 1}, {'a': 2}]) == {'a': 2}", True),
    ("def f(rows): rows.sort()", "a = [[3], [1]]\nb = sorted(a)\nf(a)\nassert a == b", True),
    ("def f(rows): rows.sort()", "a = [[3], [1]]\nb = list(a)\nf(a)\nassert a == b, 'must not'", False),
    ("def f(rows): rows[0] = [9]", "a = [1]\nb = [a]\nf(b)\nassert a == [1] and b == [[9]]", True),
    ("def f(x):\n    x.append(1)\n    1 / 0", "a = []\ntry: f(a)\nexcept Exception: pass\nassert a == []", False),
    ("def f(d): d.clear()", "import collections\nd = collections.defaultdict(int, a=1)\nf(d)\nassert d == {}", True),
    ("def f():\n    d = {}\n    d['d'] = d\n    return d", "d = f()\nassert d['d'] is d", True),
    ("class X: pass\ndef f(): return X()", "assert callable(f())", False),
    ("class X: pass\ndef f(): return X()", "from collections import abc\nassert isinstance(f(), abc.Sized)", False),
    ("def f(x): return x() if callable(x) else x.v", "class A: v = 3\nassert f(A()) == 3", True),
    ("def f(x): return len({*x})", f"{P}    def __eq__(s, o): return s.v == o.v\n    def __hash__(s): return s.v\n"
     "assert f([P(1), P(1), P(2)]) == 2", True),
    ("def f(x): return max(x).v", f"{P}    def __gt__(s, o): return s.v > o.v\nassert f([P(1), P(2)]) == 2", True),
]  # fmt: skip
NODES = "class N:\n    def __init__(self, v): self.v, self.next = v, None\na, b = N(1), N(2)\na.next, b.next = b, a\n"
WALK = """
def f(h):
    seen = set()
    while h and h not in seen:
        seen.add(h)
        h = h.next
    return len(seen)
"""
CYCLE = """
def f(h):
    s = q = h
    while q and q.next:
        s, q = s.next, q.next.next
        if s is q: return True
    return False
"""
EQUAL = """
class N:
    def __init__(self, v): self.v = v
    def __eq__(self, o): return isinstance(o, N) and o.v == self.v
"""


@pytest.mark.parametrize(
    ("program", "tests", "right"),
    [
        *IDENTITY,
        *REORDERED,
        (WALK, NODES + "assert f(a) == 2", True),
        (WALK, NODES + "assert f(a) == 3", False),
        (CYCLE, NODES + "assert f(a) is True", True),
        (CYCLE, NODES + "b.next = None\nassert f(a) is True", False),
        ("def f(a, b): return a == b, a != b, a == None", EQUAL + "assert f(N(1), N(1)) == (True, False, False)", True),
        ("def f(a, b): return a == b", EQUAL + "assert f(N(1), N(2)) is True", False),
        ("def f(s): return s.read()", "import io\nassert f(io.StringIO('x')) == 'x'", True),
        ("def f(p): return p.suffix", "import pathlib\nassert f(pathlib.Path('a.txt')) == '.txt'", True),
        (
            "def f(g):\n    import functools\n    return functools.wraps(g)(lambda: 1)",
            "assert f(f).__name__ == 'f'",
            True,
        ),
    ],
)
def test_what_is_one_object_stays_one(program, tests, right, confinement):
    assert sandbox.run(program, tests=tests, entry_point="f").passed is right


def test_a_changed_argument_is_not_more_than_that(confinement):
    program = "def f(x, y):\n    x[:] = [9]\n    y['a'] = 9\n    return 1"
    tests = "x, y, z = [1, 2], {'a': 1}, (1, 2)\nassert f(x, y) == 1\nassert (x, y, z) == ([9], {'a': 9}, (1, 2))"
    assert sandbox.run(program, tests=tests).passed


LIES = {
    "a tuple whose field is a method of tuples": (
        "class T(tuple): _fields = ('x', '__eq__')\ndef f(): return T((1, 2))", "assert f() == (1, 3) or f().x == 1"
    ),
    "an exception that skips": (
        "import unittest\nclass E(unittest.SkipTest): __unittest_skip__ = True\n"
        "E.__module__, E.__name__ = 'unittest.case', 'SkipTest'\ndef f(): raise E",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(), 1)\n"
        "assert unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T)).wasSuccessful()",
    ),
    "a class that has everything as its instance": (
        "class M(type):\n    __eq__ = __instancecheck__ = __subclasscheck__ = lambda *_: True\n"
        "    __hash__ = type.__hash__\nclass E(Exception, metaclass=M): pass\ndef f(): return 3",
        "assert isinstance(f(), E) or E == 4",
    ),
    "an exception equal to all": (f"class E(Exception):\n    {ALWAYS}\ndef f(): return E()", "assert f() == 4"),
    "its attribute is equal to all": (
        f"class A:\n    {ALWAYS}\nclass E(Exception): x = A()\ndef f():\n    e = E()\n    e.x = A()\n    raise e",
        "try: f()\nexcept E as e: assert e.x == 4",
    ),
    "what a factory makes is equal to all": (
        f"import collections\nclass A:\n    {ALWAYS}\ndef f(): return collections.defaultdict(A)", "assert f()[3] == 4"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_exceptions_tuples_and_factories_cannot_lie(name, confinement):
    program, tests = LIES[name]
    result = sandbox.run(program, tests=tests)
    assert not result.passed and result.reason == "exception", result
