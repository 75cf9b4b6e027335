"""The notebook is the source: every module of utils/ is what its notebook exports, by AST."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUMBING = set("files exercises live recipes sound sources tables waveforms".split())  # no chapters
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def module_of(path):
    found = [re.search(r"#\| *default_exp +(\S+)", source) for source in code_cells(path)]
    names = [match.group(1) for match in found if match]
    assert len(names) <= 1, f"{path.name} names {len(names)} modules with #| default_exp"
    return names[0] if names else None


def statements(source):
    """The statements of a module as AST dumps, without its docstring and `__all__`."""
    tree = ast.parse(source)
    body = [node for node in tree.body[ast.get_docstring(tree) is not None :] if not sets_all(node)]
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:  # the export writes .audio
            node.module, node.level = f"utils.{node.module}", 0
    return [ast.dump(node) for node in body]


def sets_all(node):
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"


EXPORTS = {path: module_of(path) for path in NOTEBOOKS}
MODULES = {name: path for path, name in EXPORTS.items() if name}


@pytest.mark.parametrize("name", MODULES)
def test_module_is_what_its_notebook_exports(name):
    cells = [s for s in code_cells(MODULES[name]) if re.match(r"#\| *export[is]?\b", s.lstrip())]
    exported = [line for cell in cells for line in statements(cell)]
    module = statements((ROOT / "utils" / f"{name}.py").read_text(encoding="utf-8"))
    assert module == exported, f"utils/{name}.py and {MODULES[name].name} differ: run make export"


def test_every_module_has_a_notebook():
    modules = {path.stem for path in (ROOT / "utils").glob("*.py") if path.stem[0] != "_"}
    assert modules - PLUMBING == set(MODULES) - PLUMBING, (
        "a module without a notebook, or a notebook not exported"
    )


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_modules_of_earlier_notebooks(name):
    tree = ast.parse((ROOT / "utils" / f"{name}.py").read_text(encoding="utf-8"))
    mine = MODULES[name].name
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("utils")):
            other = node.module.removeprefix("utils.")
            if other in PLUMBING - set(MODULES):
                continue
            assert MODULES[other].name < mine, f"{name} imports {other}, built in a later notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_run_once_from_top_to_bottom(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 1.5e6, f"{path.name} is larger than 1.5 MB"


def test_setup_cell_is_the_same_everywhere():
    cells = {s for p in NOTEBOOKS for s in code_cells(p) if "google.colab" in s}
    assert len(cells) == 1, f"{len(cells)} different set-up cells: one text for all notebooks"
    assert all(any("google.colab" in s for s in code_cells(p)) for p in NOTEBOOKS)


def test_files_imports_nothing_of_the_project():
    tree = ast.parse((ROOT / "utils" / "files.py").read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert not any(node.level for node in froms), "files.py stands alone"
    assert not any(n.startswith("utils") for n in [*names, *(f.module for f in froms)])
