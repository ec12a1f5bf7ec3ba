"""Which parts of the package import which, read from the source: imports inside functions count as well."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jcdp_diffusers


ROOT = Path(jcdp_diffusers.__file__).parent
# From the bottom to the top: a part imports from its own layer and from those before it. Below them all is the method
# with what it runs on: every part that is not named here.
LAYERS = (
    {"data"},
    {"victims", "train", "purify"},
    {"poisons", "countermeasures"},
    {"trials"},
    {"audit"},
    {"score", "detect", "quickstart", "demo", "publish"},
    {"cli"},
)
# No part reaches one of the others, neither itself nor through what it imports.
NEVER = {
    "victims": {"pipeline_jcdp", "poisons", "countermeasures", "train", "purify"},
    "poisons": {"pipeline_jcdp", "countermeasures", "train", "purify"},
    "countermeasures": {"poisons"},
    "acceleration": {"pipeline_jcdp", "data"},
    "data": {"pipeline_jcdp", "train", "purify", "victims"},
    "pipeline_jcdp": {"data", "cli", "engines", "train", "purify"},
}


def imported(file: Path, root: Path = ROOT.parent) -> set[str]:
    """Names that a file imports, from the top: relative ones as absolute ones, `from . import a` as `package.a`."""
    package = file.relative_to(root).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = (*base, *(node.module.split(".") if node.module else ()))
            found |= {".".join((*base, alias.name)) for alias in node.names}
    return found


def part_of(name: str) -> str | None:
    """The file or folder directly below the package that a module belongs to; None for what is outside."""
    words = name.split(".")
    return words[1] if words[0] == "jcdp_diffusers" and len(words) > 1 else None


@pytest.fixture(scope="module")
def parts() -> dict[str, set[str]]:
    """Part -> parts that it imports."""
    edges = {}
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).with_suffix("").parts[0]
        # The package itself imports nothing before it is asked to, and a `__main__` is a command, above all parts.
        if name != "__init__" and file.name != "__main__.py":
            targets = {part_of(target) for target in imported(file)} - {None, name}
            edges.setdefault(name, set()).update(target for target in targets if not target.startswith("__"))
    return edges


def test_imports_point_one_way(parts):
    level = dict.fromkeys(parts, 0) | {name: 1 + number for number, layer in enumerate(LAYERS) for name in layer}
    assert level.keys() == parts.keys()
    upward = [f"{name} -> {target}" for name in parts for target in parts[name] if level[target] > level[name]]
    assert upward == []


@pytest.mark.parametrize("name", NEVER)
def test_some_parts_never_reach_others(parts, name):
    reached, waiting = set(), [name]
    while waiting:
        for target in parts[waiting.pop()] - reached:
            reached.add(target)
            waiting.append(target)
    assert reached & NEVER[name] == set()


def test_nothing_imports_the_evaluation_or_the_tests():
    for file in ROOT.rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(file)} & {"eval", "tests", "training"}, file


def test_imports_within_the_package_are_relative():
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level or (node.module or "").split(".")[0] != "jcdp_diffusers", file
            elif isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "jcdp_diffusers" for alias in node.names), file


def test_the_reader_sees_every_form_of_an_import(tmp_path):
    file = tmp_path / "jcdp_diffusers/train/loop.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import torch.nn\nfrom .. import victims\nfrom . import images\n\n\ndef f():\n    from ..data.roles import FEW\n"
    )
    assert imported(file, tmp_path) == {
        "torch.nn",
        "jcdp_diffusers.victims",
        "jcdp_diffusers.train.images",
        "jcdp_diffusers.data.roles.FEW",
    }


@pytest.mark.parametrize(
    "statement",
    [
        "import jcdp_diffusers",
        "from jcdp_diffusers.cli import main; main(['--help'])",
    ],
)
def test_neither_the_package_nor_the_help_page_loads_a_heavy_library(statement):
    script = (
        "import sys, contextlib\n"
        f"with contextlib.suppress(SystemExit): exec({statement!r})\n"
        "print('loaded', [n for n in ('torch', 'diffusers', 'datasets', 'numpy', 'PIL') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("loaded []"), done.stdout
