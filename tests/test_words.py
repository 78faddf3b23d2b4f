"""What pages say of the code: paths and names that CONTRIBUTING gives, and the table of environment variables."""

import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
#: A variable that is read by its name, or a constant that holds one.
READ = re.compile(r"""(?:environ(?:\.get)?[\[(]|getenv\()\s*["'](\w+)["']|"(DIFFMAS_\w+)"(?=\n)""")


def test_paths_exist():
    paths = re.findall(r"`((?:\.ci|csrc|diffmas|diffmas_ops|docs|tests)/[\w./]*)`", GUIDE)
    assert len(paths) > 50
    missing = [p for p in paths if not re.search(r"NAME|OPERATOR", p) and not (ROOT / p).exists()]
    assert not missing


def test_names_are_where_they_are_said_to_be():
    named = re.findall(r"`(\w+)`\s(?:in|around)\s`([\w./]+\.py)`", GUIDE)
    assert len(named) > 8
    missing = [(name, path) for name, path in named if not re.search(rf"\b{name}\b", (ROOT / path).read_text())]
    assert not missing


def test_environment_variables_are_listed():
    table = (ROOT / "docs" / "environment.md").read_text()
    files = [ROOT / "setup.py", *(p for d in ("diffmas", "diffmas_ops", "csrc") for p in (ROOT / d).rglob("*.*"))]
    texts = [path.read_text() for path in files if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    found = {name for text in texts for pair in READ.findall(text) for name in pair if name} - {"PATH"}
    assert {"DIFFMAS_CUDA", "DIFFMAS_ISA", "DIFFMAS_THREADS", "DIFFMAS_FLASH_ENGINE"} <= found
    assert not [name for name in sorted(found) if f"`{name}`" not in table]


def test_reference_shows_things_and_no_modules():
    # The site's builder takes a package for the function of the same name, and shows nothing of it.
    names = re.findall(r"^::: (\S+)", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert len(names) > 15
    things = [getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    assert not [name for name, thing in zip(names, things, strict=True) if not thing.__doc__]
    assert not [name for name in names if (ROOT / name.replace(".", "/")).is_dir()]
