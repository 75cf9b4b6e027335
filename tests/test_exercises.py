"""Every exercise: its check waits with dots, accepts the folded solution, refuses wrong answers."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.exercises import feedback

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


def run(capsys, answer, check, replaced=None, by=None):
    """What the check says after the answer, in an empty namespace; a name in it may be replaced."""
    space = {"__name__": "__main__"}
    exec(compile(answer, "answer", "exec"), space)
    if replaced:
        space[replaced] = by(space[replaced])
    capsys.readouterr()
    exec(compile(check, "check", "exec"), space)
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


# Other right answers: lists, tuples or tensors; positional or by keyword; the layer's own dropout.
OTHERS = {
    ("00_overview", 1): """
def possible_heads(width): return (k for k in range(1, width + 1) if width % k == 0)""",
    ("17_transcription", 3): """
import torch
def finals(mask, pause):
    found, start, last = [], None, None
    for now, speech in enumerate(mask):
        if speech:
            start, last = now if start is None else start, now
        elif start is not None and now - last == pause:
            found, start = [*found, torch.tensor([start, last + 1, now])], None
    return tuple(found)""",
    ("20_speed", 2): """
import torch
def best_segment(blocks, inside):
    k = torch.arange(1, blocks + 1)
    return k[(torch.ceil(blocks / k) + inside * k).argmin()]""",
    ("21_several_gpus", 2): """
import torch
def ring_sum(vectors):
    n = len(vectors)
    return torch.tensor(vectors).sum(0).expand(n, n), torch.tensor(2 * (n - 1))""",
    (
        "01_mel_spectrograms",
        1,
    ): "def picture_shape(seconds, n_mels): return [n_mels, int(100 * seconds)]",
    ("07_official_weights", 1): """
import torch
def nearest(table, i, count):
    order = torch.cosine_similarity(table, table[i : i + 1]).argsort(descending=True)
    return order[order != i][:count]""",
    ("07_official_weights", 2): """
import torch
def quantise(weight):
    scale = 127 / weight.abs().max(dim=1, keepdim=True).values.clamp(min=1e-9)
    return [torch.round(weight * scale).char(), scale]""",
    ("08_data", 1): """
import torch
def kept_share(seconds, max_t): return (torch.tensor(seconds) <= max_t / 100).float().mean()""",
    ("08_data", 3): """
import torch
def positions(row, padding):
    return (torch.cumsum((torch.tensor(row) != padding).cumsum(0) > 0, 0) - 1).clamp(min=0)""",
    ("08a_loss", 1): """
import torch
def batch_loss(means, counts):
    means, counts = torch.tensor(means), torch.tensor(counts)
    return (means * counts).sum() / counts.sum()""",
    ("08a_loss", 2): """
import torch
def bits_per_character(loss, tokenizer, texts):
    tokens = torch.tensor([len(tokenizer.encode(text)) + 1.0 for text in texts])
    return loss * tokens.sum() / torch.tensor(2.0).log() / len("".join(texts))""",
    ("08a_loss", 3): """
import torch
def floor(smoothing, V):
    target = torch.full((V,), smoothing / V)
    target[0] += 1 - smoothing
    return torch.special.entr(target).sum()""",
    ("10_loss_curves", 1): """
import numpy as np
def seconds_of_epochs(history): return np.diff([line["seconds"] for line in history], prepend=0)""",
    ("02_tokenizer", 1): """
import torch
def cost_of_capitals(tokenizer, texts):
    both = [[tokenizer.encode(text) for text in map(f, texts)] for f in (str.upper, str.lower)]
    upper, lower = torch.tensor([sum(map(len, rows)) for rows in both])
    return upper / lower""",
    ("02_tokenizer", 2): """
import torch
def timestamp(tokenizer, seconds):
    if seconds < 0 or seconds > 30:
        raise ValueError
    return tokenizer.special["<|0.00|>"] + torch.tensor(50 * seconds).round().long()""",
    ("09_training", 2): """
import torch
def resumed(numbers, cut):
    drawn = [torch.rand(()) for _ in range(cut)]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.set_rng_state(state)
    return drawn + [torch.rand(()).item() for _ in range(numbers - cut)]""",
    ("10_loss_curves", 2): """
import torch
def lowest_loss(words, successors, lengths):
    number, options = torch.tensor(lengths).float(), torch.tensor([words, successors]).float().log()
    nats = options[0] + options[1] * (number.mean() - 1) + torch.tensor(len(lengths)).log()
    return nats / (number.mean() + 1)""",
    ("12b_ctc", 2): """
from math import comb
def count_alignments(text, states):
    double = sum(a == b for a, b in zip(text, text[1:], strict=False))
    return comb(states + len(text) - double, 2 * len(text))""",
    ("12b_ctc", 3): """
import torch
def timed_words(scores):
    path, found, text = scores.argmax(dim=1).tolist(), [], ""
    for t, i in enumerate([*path, 1]):
        if i == 1:
            found += [(text, start)] if text else []
            text = ""
        elif i and (not t or i != path[t - 1]):
            start = start if text else torch.tensor(t)
            text += chr(94 + i)
    return tuple(found)""",
    ("12c_muon", 1): """
import torch
def rms(singular_values, rows, columns): return singular_values.norm() / (rows * columns) ** 0.5""",
    ("03_attention", 1): """
def first_hiss():
    return [[3, 0, 3], [0, 3, 2], [1, 0, 1], [3, 0, 0]], (2, 0, 2)""",
    ("03_attention", 3): """
def shuffled(layer, x, source, order):
    return [layer(source, source=source)[:, order], layer(x, source=source)]""",
    ("03_attention", 4): """
def ask_together(attend, query, key, value):
    row = query.unflatten(0, (len(key), -1)).squeeze(3).transpose(1, 2)
    return attend(query=row, key=key, value=value).transpose(1, 2).reshape(query.shape)""",
    ("04_encoder", 3): """
def through_blocks(encoder, x, order):
    return encoder.ln_post(encoder.blocks(x[:, order]))[:, order.argsort()]""",
    ("05_decoder", 1): """
import torch
def training_row(prompt, text, end):
    row = torch.tensor([*prompt, *text, end])
    return row[:-1], row[1:].where(torch.arange(len(row) - 1) >= len(prompt) - 1, -100)""",
    ("05_decoder", 2): "def misplaced(pieces): return range(pieces[0], sum(pieces))",
    ("05_decoder", 3): """
def post_norm(block, x, states):
    x = block.attn_ln(x + block.dropout(block.attn(x, causal=True)))
    x = block.cross_attn_ln(x + block.dropout(block.cross_attn(x, source=states)))
    return block.mlp_ln(x + block.dropout(block.mlp(x)))""",
    ("05_decoder", 4): """
import numpy as np
def strict_mask(queries, keys, device=None):
    mask = np.tri(queries, keys, keys - queries - 1, dtype=bool)
    mask[0, 0] |= queries == keys
    return mask""",
    ("06_whisper", 3): """
import torch.nn.functional as F
def alive(model, mel, tokens):
    model.zero_grad()
    F.cross_entropy(model(mel, tokens[:, :-1]).mT, tokens[:, 1:]).backward()
    return [name for name, w in model.named_parameters() if w.grad is not None and w.grad.any()]""",
    ("06_whisper", 4): """
import torch
@torch.no_grad()
def sample(model, mel, prompt, end, temperature):
    text, states = torch.tensor(prompt), model.encoder(mel)
    while len(text) < model.args.block_size:
        p = (model.decoder(text[None], states)[0, -1] / temperature).softmax(-1)
        token = torch.multinomial(p, 1)
        if token == end:
            break
        text = torch.cat([text, token])
    return text[len(prompt) :]""",
    ("19_fine_tuning", 3): """
def repaired(rows, prompt_length, end):
    made = []
    for row in rows.tolist():
        text = row[prompt_length:]
        text = text[: text.index(end) + 1]
        made.append([-100] * (prompt_length - 1) + text + [-100] * (len(row) - prompt_length))
    return [row[: rows.shape[1] - 1] for row in made]""",
}


@pytest.mark.parametrize(("stem", "number"), OTHERS)
def test_other_right_answers_are_accepted(stem, number, capsys):
    (path,) = [path for path in NOTEBOOKS if path.stem == stem]
    said = run(capsys, OTHERS[stem, number], exercises_of(path)[number - 1][2])
    assert said.startswith("Right: "), said


def raising(*given, **named):
    raise ArithmeticError("wrong")


def first(*given, **named):
    return given[0] if given else ()


def always(value):
    """Of a function: this result, whatever is given; of another answer: the value itself."""
    return lambda answer: (lambda *given, **named: value) if callable(answer) else value


def other(result):
    """Something of the same kind, as far as that can be, and another value."""
    if isinstance(result, bool):
        return not result
    if isinstance(result, torch.Tensor) and result.dtype == torch.bool:
        return ~result
    if isinstance(result, (int, float, torch.Tensor, np.ndarray)):
        return result + 1
    if isinstance(result, (str, list, tuple)):
        return result[:-1] if result else type(result)("?")
    return {"?": 0}


def nearly(right):
    """The solution with another result; of a class, one that makes something else."""
    if not callable(right):
        return other(right)
    return lambda *given, **named: other(right(*given, **named))


@pytest.mark.parametrize(
    ("path", "question", "code", "check"), EXERCISES, ids=lambda v: getattr(v, "stem", "-")
)
def test_wrong_answers_are_refused(path, question, code, check, capsys):
    (solution,) = SOLUTION.findall(question[question.rindex("### Exercise") :])
    (answer,) = PYTHON.findall(solution)
    calls = [node for node in ast.walk(ast.parse(check)) if isinstance(node, ast.Call)]
    (name,) = [call.args[0].id for call in calls if getattr(call.func, "id", "") == "check"]
    wrongs = dict(raising=lambda _: raising, first=lambda _: first, nothing=always(None))
    wrongs |= dict(one=always(1), none=always([]), true=always(True), false=always(False))
    for kind, wrong in wrongs.items():
        said = run(capsys, code, check, name, wrong)
        expected = "Nothing to check yet" if kind == "nothing" else "Not yet: "
        assert said.startswith(expected), f"{kind}: {said}"
    said = run(capsys, answer, check, name, nearly)
    assert said.startswith("Not yet: "), f"the solution with another result: {said}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_has_two_to_four_exercises_from_easy_to_hard(path):
    checked = [question for question, _, _ in exercises_of(path)]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    titles = TITLE.findall(prose)
    assert len(titles) == len(re.findall("^#+ Exercise [0-9]", prose, re.MULTILINE)), "a bad title"
    assert [int(number) for number, _ in titles] == list(range(1, len(titles) + 1))
    levels = ["easy medium hard".split().index(level) for _, level in titles]
    assert levels == sorted(levels) and levels[0] == 0, f"{path.name}: not from easy to hard"
    assert 2 <= len(titles) <= 4
    found = [TITLE.findall(question)[-1] for question in checked]
    assert found == titles, f"{path.name}: an exercise without a check"
    assert levels[-1] == 2, f"{path.name}: no hard exercise"
    assert "Without a check" not in prose


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_leads_to_the_glossary(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    if path.stem == "00_overview":
        assert "\n## Glossary\n" in prose
    else:
        assert "[glossary](00_overview.ipynb#Glossary)" in prose


def test_the_checker():
    claims = ((lambda f: f(2) == 4, "twice 2 is 4"), (lambda f: f(5) == 10, "twice 5 is 10"))
    assert feedback(..., claims) == feedback(None, claims) == feedback(lambda x: ..., claims)
    assert feedback(lambda x: None, claims).startswith("Nothing to check yet")
    assert feedback(lambda x: x + 2, claims) == "Not yet: twice 5 is 10."
    assert "ZeroDivisionError" in feedback(lambda x: x / 0, claims)
    assert feedback(lambda x: 2 * x, claims) == "Right: all 2 checks hold."
    assert feedback(0, ((lambda x: x == 0, "zero is an answer"),)).startswith("Right")
    assert feedback(lambda x: x.double(), claims) == (
        "Not yet: twice 2 is 4. (It raised AttributeError: 'int' object has no attribute 'double')"
    )
    for answer in (torch.ones(2), np.ones(2)):  # compared with a number, neither true nor false
        assert feedback(lambda x, answer=answer: answer, claims).startswith("Not yet: twice 2 is 4")
    assert feedback(int, ((lambda kind: kind is int, "a class is an answer"),)).startswith("Right")
