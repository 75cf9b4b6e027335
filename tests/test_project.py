"""The files around the code agree with each other."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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
    assert "make test" in read(".ci/run") and "make test" in read(".github/workflows/ci.yml")
    assert re.search(r"^test: setup$", read("Makefile"), re.M)


def test_the_readme_tells_the_rates_of_the_shipped_model():
    """Those that data/ship.py wrote down."""
    results = json.loads(read("data/results.json"))
    rows = {"test_seen_voices": "voices it knows", "test_unseen_voices": "unseen voices"}
    for split, name in rows.items():
        [row] = re.findall(rf"^\| unseen sentences, {name} \|(.+)\|$", read("README.md"), re.M)
        careful, greedy = (
            f"{100 * results[split][key]:.1f} %" for key in ("ctc_rescoring_wer", "wer")
        )
        loss, gap = f"{results[split]['val_loss']:.3f}", f"{results[split]['gap']:.1f}"
        found = [cell.split("(")[0].strip() for cell in row.split("|")]
        assert found == [careful, greedy, loss, gap]


def test_data_is_small():
    size = sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file())
    assert size <= 25e6, f"data/ has {size / 1e6:.1f} MB"
    assert (ROOT / "data" / "model.safetensors").stat().st_size <= 6e6


def test_links_in_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", read("README.md")):
        assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"


@pytest.mark.parametrize("repo", ["someone/some-fork"])
def test_badges_stamp_the_address_everywhere(tmp_path, repo):
    for name in ["pyproject.toml", "README.md", ".ci", "notebooks", "data"]:
        ignore = shutil.ignore_patterns("*.parquet", "*.safetensors")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(
            ROOT / name, tmp_path / name, **({"ignore": ignore} if copy is shutil.copytree else {})
        )
    old = re.search(r"github\.com/([\w.-]+/[\w.-]+)", read("pyproject.toml")).group(1)
    subprocess.run([sys.executable, tmp_path / ".ci" / "badges.py", repo], check=True)
    texts = [
        tmp_path / "README.md",
        tmp_path / "pyproject.toml",
        *tmp_path.glob("notebooks/*.ipynb"),
    ]
    assert all(old not in path.read_text(encoding="utf-8") for path in texts)
    assert all(repo in path.read_text(encoding="utf-8") for path in texts)


def test_ruff_is_content():
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "utils", "tests", "data", ".ci"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
