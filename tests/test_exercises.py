"""Every exercise: with dots its check waits, with the folded solution it says that all is right."""

import json
import re
from pathlib import Path

import pytest

from utils.exercises import verdict

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
TITLE = re.compile(r"^### Exercise (\d+) · (easy|medium|hard)$", re.MULTILINE)
SOLUTION = re.compile(r"<details><summary>Solution</summary>(.*?)</details>", re.DOTALL)
PYTHON = re.compile(r"^ *```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def exercises_of(path):
    """(question, exercise cell, check cell) of every exercise that has a check."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = []
    for question, code, check in zip(cells, cells[1:], cells[2:], strict=False):
        if "check" in check["metadata"].get("tags", []):
            assert "exercise" in code["metadata"].get("tags", []), "a check without an exercise"
            found.append(tuple("".join(cell["source"]) for cell in (question, code, check)))
    return found


EXERCISES = [(path, *parts) for path in NOTEBOOKS for parts in exercises_of(path)]


def run(capsys, *cells):
    """What the last cell prints when the cells are run in an empty namespace."""
    space = {"__name__": "__main__"}
    for cell in cells:
        capsys.readouterr()
        exec(compile(cell, "cell", "exec"), space)
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("path", "question", "code", "check"), EXERCISES, ids=lambda v: getattr(v, "stem", "-")
)
def test_dots_wait_and_the_solution_is_right(path, question, code, check, capsys):
    (solution,) = SOLUTION.findall(question[question.rindex("### Exercise") :])
    (answer,) = PYTHON.findall(solution)
    assert run(capsys, code, check).startswith("Nothing to check yet")
    said = run(capsys, answer, check)
    assert re.fullmatch(r"Right: all \d+ checks hold\.", said), said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_has_exercises_with_checks(path):
    checked = exercises_of(path)
    least = 1 if path.stem == "00a_exercises" else 2
    assert len(checked) >= least, f"{path.name} has {len(checked)} exercises with a check"
    for question, _, _ in checked:
        assert TITLE.search(question), f"no title in {question[:60]!r}"


def test_the_judge():
    claims = ((lambda f: f(2) == 4, "twice 2 is 4"), (lambda f: f(5) == 10, "twice 5 is 10"))
    assert verdict(..., claims) == verdict(None, claims) == verdict(lambda x: ..., claims)
    assert verdict(lambda x: None, claims).startswith("Nothing to check yet")
    assert verdict(lambda x: x + 2, claims) == "Not yet: twice 5 is 10."
    assert "ZeroDivisionError" in verdict(lambda x: x / 0, claims)
    assert verdict(lambda x: 2 * x, claims) == "Right: all 2 checks hold."
    assert verdict(0, ((lambda x: x == 0, "zero is an answer"),)).startswith("Right")
    assert verdict(int, ((lambda kind: kind is int, "a class is an answer"),)).startswith("Right")
