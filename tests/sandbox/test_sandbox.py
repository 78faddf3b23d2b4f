"""Untrusted programs: what each attack does to the host (nothing), and what it counts as (wrong)."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffmas import sandbox
from diffmas.sandbox import Limits, SandboxError

SYSTEM_PYTHON = "/usr/bin/python3"


def works(mode):
    try:
        sandbox.run("pass", mode=mode)
    except SandboxError:
        return False
    return True


@pytest.fixture(params=["root", "user", "uid"])
def mode(request, monkeypatch):
    """Every way of confinement that works here."""
    if works(request.param):
        return request.param
    # An interpreter below a private folder (such as root's home) is out of another user's reach.
    monkeypatch.setattr(sandbox.sys, "executable", SYSTEM_PYTHON)
    monkeypatch.setattr(sandbox.sys, "base_prefix", "/usr")
    if not (os.path.exists(SYSTEM_PYTHON) and works(request.param)):
        pytest.skip(f"this machine does not allow the mode {request.param}")
    return request.param


def alive(marker):
    """Command lines of the host's processes that contain `marker`; ends none of them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if marker.encode() in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


DAEMON = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.execv("/bin/sleep", ["sleep", "{marker}"])
    os._exit(0)
os.wait()
"""
KILLS = """
import os, signal
for target in (-1, os.getppid()):
    try:
        os.kill(target, signal.SIGKILL)
    except OSError:
        pass
"""
FORK_BOMB = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
THREADS = "import threading, time\nfor _ in range(99):\n    threading.Thread(target=time.sleep, args=(9,)).start()\n"
CLOSED = "import os, sys\nos.close(1)\nos.close(2)\n"
SHORT = Limits(seconds=0.8)

# (name, program, reasons it may end for, limits)
CASES = [
    ("passes", "x = 1\nassert x == 1", {"passed"}, None),
    ("prints and passes", "print('é' * 99)", {"passed"}, None),
    ("closed output, then passes", CLOSED, {"passed"}, None),
    ("leaves threads behind", "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
     {"passed"}, None),
    ("fails", "assert 1 == 2", {"exception"}, None),
    ("syntax", "def f(:", {"exception"}, None),
    ("parts", ["x = 1", "from __future__ import annotations\ny = 2", "assert x + y == 3"], {"passed"}, None),
    ("open string", ["x = " + "'" * 3, "assert False", "'" * 3], {"exception"}, None),
    ("null byte", "x = 1\0", {"exception"}, None),
    ("lone surrogate", "x = '\ud800'", {"exception"}, None),
    ("recursion", "def f(): f()\nf()", {"exception"}, None),
    ("input", "input()", {"exception"}, None),
    ("sys.exit", "import sys\nsys.exit(0)\nassert False", {"exception"}, None),
    ("quits in a test", "def f(): raise SystemExit\nf()\nassert False", {"exception"}, None),
    ("os._exit", "import os\nos._exit(0)\nassert False", {"exit"}, None),
    ("exits at exit", "import atexit, os\natexit.register(os._exit, 0)\nassert False", {"exception"}, None),
    ("execs true", "import os\nos.execv('/bin/true', ['true'])", {"exit"}, None),
    ("writes to every file", "import os\nfor fd in range(9):\n    try: os.write(fd, b'passed')\n"
     "    except OSError: pass\nos._exit(0)", {"exception", "exit"}, None),
    ("kills itself", "import os\nos.kill(os.getpid(), 9)", {"signal"}, None),
    ("crashes", "import ctypes\nctypes.string_at(0)", {"signal"}, None),
    ("endless loop", "while True: pass", {"timeout"}, SHORT),
    ("processor time", "while True: pass", {"timeout"}, Limits(cpu_seconds=1)),
    ("sleeps", "import time\ntime.sleep(10**6)", {"timeout"}, SHORT),
    ("ignores signals", "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
     "while True: pass", {"timeout"}, SHORT),
    ("closed output, then loops", CLOSED + "while True: pass", {"timeout"}, SHORT),
    ("100 GB", "x = bytearray(100 << 30)", {"memory"}, None),
    ("grows", "x = []\nwhile True: x.append(bytearray(1 << 24))", {"memory"}, Limits(memory_bytes=256 << 20)),
    ("prints without end", "while True: print('x' * 1000)", {"output"}, None),
    ("errors without end", "import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}, None),
    ("fork bomb", FORK_BOMB, {"timeout"}, SHORT),
    ("threads", THREADS, {"exception"}, Limits(seconds=5)),
    ("large file", "f = open('x', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))\nf.close()",
     {"exception", "signal"}, None),
    ("many files", "fs = [open(f'{i}', 'w') for i in range(999)]", {"exception"}, None),
    ("shell kills all", "import os\nos.system('kill -9 -1')\nos.execv('/bin/sh', ['sh', '-c', 'kill -9 -1; exit 1'])",
     {"signal", "exit"}, None),
]  # fmt: skip


def test_how_programs_end(mode):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: sandbox.run(case[1], case[3], mode=mode), CASES))
    for (name, _, reasons, _), result in zip(CASES, results, strict=True):
        assert result.reason in reasons and result.passed == (reasons == {"passed"}), (name, result)
        assert result.seconds < 11 and len(result.output) <= 1 << 20, (name, result.seconds)
        assert result.isolation == sandbox.MODES[mode]


def test_what_a_result_tells(mode):
    result = sandbox.run("print('before')\nassert 1 == 2, 'differs'", mode=mode)
    assert result.detail == "AssertionError" and result.output.startswith("before\n") and "differs" in result.output
    assert sandbox.run("import os; os._exit(7)", mode=mode).detail == "7"
    assert sandbox.run("import os; os.kill(os.getpid(), 15)", mode=mode).detail == "15"


def test_killing_everything_reaches_nobody_else(mode):
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        assert sandbox.run(KILLS + "while True: pass", SHORT, mode=mode).reason == "timeout"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("ends", ["", "assert False", "while True: pass", "import os\nos._exit(0)"])
def test_nothing_stays_behind(mode, ends):
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    folders = set(Path(sandbox.tempfile.gettempdir()).glob("diffmas-sandbox-*"))
    sandbox.run(DAEMON.format(marker=marker) * 2 + ends, SHORT, mode=mode)
    assert not alive(marker)
    assert set(Path(sandbox.tempfile.gettempdir()).glob("diffmas-sandbox-*")) <= folders


def test_a_daemon_is_seen_by_the_test_above():
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    process = subprocess.Popen(["sleep", marker])
    try:
        time.sleep(0.1)
        assert alive(marker)
    finally:
        process.kill()
        process.wait()


def test_the_folder_is_empty_and_goes_away(mode):
    nested = "import os\nfor _ in range(1050):\n    os.mkdir('d')\n    os.chdir('d')\nos.chmod('.', 0)\n"
    folders = set(Path(sandbox.tempfile.gettempdir()).glob("diffmas-sandbox-*"))
    assert sandbox.run("import os\nassert os.listdir() == []\nopen('x', 'w').write('x')", mode=mode).passed
    sandbox.run(nested, mode=mode)
    assert set(Path(sandbox.tempfile.gettempdir()).glob("diffmas-sandbox-*")) <= folders


def test_files_outside_stay_as_they_are(mode, tmp_path):
    target = tmp_path / "target"
    target.write_text("kept")
    target.chmod(0o644)
    for action in ("open({0!r}, 'w').write('x')", "__import__('os').remove({0!r})", "open({0!r} + '2', 'w')"):
        assert not sandbox.run(action.format(str(target)), mode=mode).passed
    assert target.read_text() == "kept" and list(tmp_path.iterdir()) == [target]
    for place in ("/usr/x", "/x", "/dev/x", sys.base_prefix + "/x", "/bin/x"):
        assert not sandbox.run(f"open({place!r}, 'w')", mode=mode).passed
        assert not os.path.exists(place)


def test_secrets_are_out_of_reach(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_HOST", "hunter2")
    private = tmp_path / "private"
    private.write_text("hunter2")
    private.chmod(0o600)
    search = (
        "import os, glob\ntexts = [repr(dict(os.environ))]\n"
        f"for path in [*glob.glob('/proc/*/environ'), {str(private)!r}]:\n"
        "    try: texts.append(open(path, errors='replace').read())\n    except OSError: pass\n"
        "assert any('hunter2' in t for t in texts)"
    )
    assert sandbox.run(search, mode=mode).reason == "exception"
    environment = (
        "import os\nassert not set(os.environ) - {'HOME', 'TMPDIR', 'LANG', 'OPENBLAS_NUM_THREADS', 'LC_CTYPE'}"
    )
    assert sandbox.run(environment, mode=mode).passed


def test_network(mode):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        assert sandbox.run(connect, mode=mode).reason == "exception"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_way_to_more_privileges(mode):
    tries = ["libc.mount(b'none', b'/', b'tmpfs', 0, None)", "libc.chroot(b'/')", "libc.setuid(0)"]
    # An unprivileged user may open a user namespace; a chroot forbids even that.
    tries += ["libc.unshare(0x10000000)"] if mode != "uid" else []
    program = f"import ctypes, os\nlibc = ctypes.CDLL(None)\nassert [{', '.join(tries)}] == [-1] * {len(tries)}"
    result = sandbox.run(program + "\nassert os.getuid() != 0", mode=mode)
    assert result.passed, result


def test_packages(confinement):
    with_numpy = sandbox.run("import numpy as np\nassert np.arange(4).sum() == 6", packages=["numpy"])
    assert with_numpy.passed, with_numpy
    assert sandbox.run("import numpy").detail == "ModuleNotFoundError"
    assert sandbox.run("import torch", packages=["numpy"]).detail == "ModuleNotFoundError"
    with pytest.raises(ValueError, match="packages has 'no_such_package'"):
        sandbox.run("pass", packages=["no_such_package"])


def test_many_at_once(mode):
    programs = [f"assert {i} % 3\n" + "#" * (i * 10_000) for i in range(12)]
    done = []
    results = sandbox.run_many(programs, workers=3, advance=done.append, mode=mode)
    assert [r.passed for r in results] == [i % 3 != 0 for i in range(12)] and sum(done) == 12


def test_a_killed_parent_takes_its_programs_along(mode):
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    program = DAEMON.format(marker=marker) + "import time\ntime.sleep(60)"
    code = (
        "import sys, types\npackage = types.ModuleType('diffmas')\n"
        f"package.__path__ = [{str(Path(sandbox.__file__).parents[1])!r}]\nsys.modules['diffmas'] = package\n"
        f"from diffmas import sandbox\nsys.base_prefix = {sandbox.sys.base_prefix!r}\n"
        f"sandbox.run({program!r}, sandbox.Limits(seconds=50), mode={mode!r})"
    )
    parent = subprocess.Popen([sandbox.sys.executable, "-c", code], start_new_session=True)
    try:
        assert until(lambda: alive(f"sleep\0{marker}"))
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert until(lambda: not alive(marker))


def until(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_without_confinement_it_has_to_be_asked_for(monkeypatch):
    def refuse(program, *, mode):
        raise SandboxError(f"mode {mode} does not work on this machine: refused")

    sandbox.best_mode.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(sandbox, "run", refuse)
        with pytest.raises(SandboxError, match='user.* refused.*accept mode="none"'):
            sandbox.best_mode()
    assert sandbox.run("assert True", mode="none").passed
    assert "resource limits alone" in sandbox.run("assert False", mode="none").isolation


def test_bad_arguments():
    with pytest.raises(ValueError, match="mode is 'docker'; allowed: root"):
        sandbox.run("pass", mode="docker")
    with pytest.raises(ValueError, match="seconds is 0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="workers is 0"):
        sandbox.run_many(["pass"], workers=0)
