"""PEP 517 backend: setuptools, plus the one thing build isolation hides, a torch to compile against.

Only torch's headers and link libraries are needed, and through the LibTorch Stable ABI any torch >= 2.11 serves.
So an installed torch is used where it is; a torch is asked for only where there is none, by the exact pin of
constraints.txt, because pip does not apply constraint files to build requirements.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401  (hooks that PEP 517 looks up here)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_TORCH = (2, 11)
_FIND_TORCH = (
    "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
)


def _serves(torch_root: Path) -> bool:
    version_file = torch_root / "version.py"
    found = version_file.is_file() and re.search(
        r"__version__ = ['\"](\d+)\.(\d+)", version_file.read_text(encoding="utf-8")
    )
    return bool(found) and tuple(map(int, found.groups())) >= MINIMUM_TORCH


def installed_torch() -> Path | None:
    """Directory of the torch this interpreter has outside the build environment, if it is recent enough."""
    # -I ignores PYTHONPATH, through which pip puts its isolation in place.
    done = subprocess.run([sys.executable, "-I", "-c", _FIND_TORCH], capture_output=True, text=True)
    root = Path(done.stdout.strip()) if done.returncode == 0 and done.stdout.strip() else None
    return root if root and _serves(root) else None


def torch_root() -> Path:
    """Directory of the torch to compile against: the installed one, otherwise the build environment's."""
    if root := installed_torch():
        return root
    spec = importlib.util.find_spec("torch")
    if spec and _serves(root := Path(spec.submodule_search_locations[0])):
        return root
    wanted = ".".join(map(str, MINIMUM_TORCH))
    raise RuntimeError(f"torch: none found to compile against; torch>={wanted} must be importable by {sys.executable}")


def torch_pin() -> str:
    """The line of constraints.txt that pins torch."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.search(r"^torch==\S+$", text, re.MULTILINE).group()


def _torch_requirement() -> list[str]:
    return [] if installed_torch() else [torch_pin()]


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _torch_requirement()
