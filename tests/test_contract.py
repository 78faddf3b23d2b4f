"""The import contract of pyproject.toml holds, and what checks it sees an import that points upwards."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def packages(tmp_path):
    """A copy of both packages and of their contract."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("diffmas", "diffmas_ops"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "*.safetensors", "__pycache__")
        )
    return tmp_path


def check(folder: Path) -> subprocess.CompletedProcess:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_contract_is_kept():
    done = check(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module, upward",
    [("diffmas_ops.trace", "diffmas.models"), ("diffmas.agents.topology", "diffmas.training.trainer")],
)
def test_upward_import_is_caught(packages, module, upward):
    with (packages / f"{module.replace('.', '/')}.py").open("a") as file:
        file.write(f"\nimport {upward}  # noqa\n")
    done = check(packages)
    assert done.returncode == 1
    assert f"{module} -> {upward}" in done.stdout.replace("\n", " ")
