"""The house's rules: which part may import which, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part of mmcore may import of the others.
ALLOWED = {
    "errors": set(),
    "processors": set(),
    "config": {"errors"},
    "kernels": {"errors", "config"},
    "model": {"errors", "config", "kernels"},
    "distributed": {"errors", "config", "kernels", "model"},
    "data": {"errors", "config", "processors"},
    "checkpoint": {"errors", "config", "kernels", "model", "distributed", "data"},
    "planning": {"errors", "config", "model", "processors"},
    "hf": set(),  # and by these names a file of mmcore/hf that is shipped with a model could not be used without mmcore
    "training": {"errors", "config", "kernels", "model", "distributed", "checkpoint", "data", "planning"},
    "generation": {"errors", "config", "kernels", "model", "checkpoint", "data"},
    "evaluation": {"errors", "config", "kernels", "model", "checkpoint", "data", "generation"},
    "claims": {"errors", "config", "kernels", "model", "checkpoint", "data", "training", "evaluation"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # files shipped with a model name one another as transformers' loader of such files wants it
            assert node.level == 0 or path.parent.name == "hf", f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "mmcore").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    part = path.relative_to(ROOT / "mmcore").parts[0].removesuffix(".py")
    for name in imports(path):
        top, *rest = name.split(".")
        assert top not in ("mmcli", "typer", "rich"), f"mmcore must not know the command line: {name}"
        if top == "mmcore" and rest and part != "__init__" and rest[0] not in (part, "__version__"):
            assert rest[0] in ALLOWED.get(part, set()), f"{part} must not import {name}"


def test_model_code_knows_one_device():
    for path in (ROOT / "mmcore" / "model").glob("*.py"):
        assert not any(name.startswith("torch.distributed") for name in imports(path)), path


def test_import_mmcore_is_light():
    code = "import sys, mmcore; print([m for m in ('torch', 'numpy', 'typer', 'rich', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_pickle_and_no_code_in_files():
    banned = ("import pickle", "weights_only=False", "yaml.load(" + "text)", "trust_remote_code=True", "shell=True")
    for folder in ("mmcore", "mmcli"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not any(word in text for word in banned), path
