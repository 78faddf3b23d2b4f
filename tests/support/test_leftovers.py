"""What a process leaves behind when it is killed: nothing."""

import signal
import subprocess
import sys
import time

import psutil

from diffmas.support import leftovers
from diffmas.support.leftovers import companion, vanishing_folder

#: By its path: importing all of the package takes seconds.
MODULE = leftovers.__file__
FOLDER = """
import runpy, sys, time
with runpy.run_path(sys.argv[1])["vanishing_folder"](sys.argv[2]) as folder:
    (folder / "inside").mkdir()
    (folder / "inside" / "file").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""
PROGRAM = """
import os, runpy, sys, time
with runpy.run_path(sys.argv[1])["companion"]([sys.executable, "-c", sys.argv[2]], os.environ, grace=1) as process:
    time.sleep(60)
"""
#: Ends on no request, and has started another that does not either.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", code]).pid, flush=True)
time.sleep(60)
"""


def soon(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


def test_a_folder_is_gone(tmp_path):
    with vanishing_folder(tmp_path / "new") as folder:
        assert folder.parent == tmp_path / "new" and folder.is_dir()
    assert not folder.exists()


def test_a_folder_is_gone_after_a_kill(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", FOLDER, MODULE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n" and len(list(tmp_path.rglob("file"))) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert soon(lambda: not list(tmp_path.iterdir()))


def test_a_program_ends():
    with companion([sys.executable, "-c", "import time; time.sleep(60)"], {}) as process:
        assert soon(lambda: psutil.Process(process.pid).children())
        (child,) = psutil.Process(process.pid).children()
    assert process.poll() is not None and not child.is_running()


def test_its_status_is_passed_on():
    with companion([sys.executable, "-c", "raise SystemExit(3)"], {}) as process:
        assert process.wait(20) == 3


def test_a_stubborn_program_ends_after_a_kill():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, MODULE, STUBBORN], stdout=subprocess.PIPE, text=True)
    other = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert soon(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE)
