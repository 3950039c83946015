"""The package as a whole: what importing it does, which way imports go, and what the wheel holds."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlx_align"
# Left never imports right.
ORDER = [
    "errors", "files", "settings", "demo", "data", "kernels", "model", "losses", "train", "rollout",
    "evaluate", "export", "importer", "api", "cli",
]  # fmt: skip


def python(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, **kwargs
    )


def test_importing_is_quick_and_pulls_in_nothing_heavy():
    code = """
import sys, time
started = time.perf_counter()
import mlx_align
mlx_align.METHODS
seconds = time.perf_counter() - started
print(seconds, [m for m in ("mlx_lm", "transformers", "torch", "gguf") if m in sys.modules])
"""
    seconds, heavy = min(python(code).stdout.strip().split(" ", 1) for _ in range(3))
    assert heavy == "[]" and float(seconds) < 0.6


def test_importing_changes_nothing_elsewhere():
    code = """
import mlx.core, mlx.nn, mlx_lm.models.base, mlx_lm.models.llama, yaml
modules = [mlx.core, mlx.nn, mlx_lm.models.base, mlx_lm.models.llama, yaml]
before = [dict(vars(m)) for m in modules]
import mlx_align, mlx_align.api, mlx_align.cli, mlx_align.model.packed
mlx_align.cli._register()
after = [dict(vars(m)) for m in modules]
assert all(a[k] is b[k] for a, b in zip(before, after) for k in a if k != "__builtins__")
"""
    python(code)


def test_public_names_are_what_they_say():
    """In a fresh process, as a user imports them; a room of the same name would win silently."""
    code = """
import types
import mlx_align.api
for name in mlx_align.__all__:
    assert not isinstance(getattr(mlx_align, name), types.ModuleType), name
try:
    mlx_align.nothing
except AttributeError:
    pass
"""
    python(code)


def test_the_readmes_python_runs_word_for_word(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        python(block, cwd=tmp_path)
    assert list(tmp_path.glob("runs/python/export/*.gguf"))


def imported_rooms(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "mlx_align":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("mlx_align."):
                yield node.module.split(".")[1]


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_imports_go_one_way(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    for other in imported_rooms(file):
        assert ORDER.index(other) <= ORDER.index(room), f"{room} imports {other}"


def test_losses_know_only_mathematics():
    for file in (PACKAGE / "losses").glob("*.py"):
        assert set(imported_rooms(file)) <= {"losses", "settings", "errors"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip(
        "build", reason="the wheel is built where build and hatchling are installed"
    )
    pytest.importorskip(
        "hatchling", reason="the wheel is built where build and hatchling are installed"
    )
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_demo_and_kernels_and_is_small(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "mlx_align/metal/tree_attention.metal", "mlx_align/metal/token_log_prob.metal",
        "mlx_align/demo/model/model.safetensors", "mlx_align/demo/data/pairs/train.jsonl",
        "mlx_align/cli/train.py",
    ):  # fmt: skip
        assert needed in names
    assert not [n for n in names if n.startswith(("tests/", "scripts/"))]
    assert wheel.stat().st_size < 8e6


def test_the_wheel_finds_its_kernels(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
from mlx_align.kernels.source import metal_folder, read_kernels, read_source
print(metal_folder(), *read_kernels(read_source("tree_attention")))
"""
    found = python(
        code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    ).stdout.split()
    assert found == [
        str(tmp_path / "mlx_align" / "metal"),
        "tree_attention_forward",
        "tree_attention_gradient",
    ]


def test_the_wheel_runs_the_demo_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = "import mlx_align; print(mlx_align.__file__)"
    where = python(code, cwd=tmp_path, env=environment).stdout
    assert where.startswith(str(site))
    command = [sys.executable, "-m", "mlx_align", "dpo", "--steps", "2", "--output", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "run folder: run" in done.stdout
    assert (tmp_path / "run" / "adapters.safetensors").exists()


def test_no_path_of_a_machine_and_no_leftovers_in_the_tree():
    words = [
        "/".join(("", "work", "")),
        "/".join(("", "root", "")),
        "/".join(("", "tmp", "")),
        "TO" + "DO",
        "FIX" + "ME",
    ]
    for file in [*PACKAGE.rglob("*"), *(ROOT / "scripts").iterdir(), ROOT / "README.md"]:
        if file.suffix in (".py", ".md", "") and file.is_file():
            text = file.read_text()
            assert not [w for w in words if w in text], file


def test_the_readmes_table_of_methods_is_the_registers():
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme_methods"], capture_output=True, text=True
    )
    assert made.stdout in (ROOT / "README.md").read_text(encoding="utf-8")
