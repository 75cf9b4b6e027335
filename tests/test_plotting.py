"""Plots: what is drawn is what was written; pictures are whole; bad input ends with a sentence."""

import json
import math
import os
import threading

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from utils import plotting
from utils.__main__ import main
from utils.plotting import plot_history, read_history, save_picture


def row(epoch):
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train_loss": 6 / epoch,
        "val_loss": 5 / epoch,
        "gap": epoch / 2,
        "wer": 1 / epoch,
        "lr": 0.001 / epoch,
        "seconds": 7.0 * epoch,
        "uniform_loss": math.log(512),
    }


@pytest.fixture
def history(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(row(epoch)) + "\n" for epoch in (1, 2, 3)))
    yield path
    plt.close("all")


def test_all_that_was_written_is_drawn(history):
    rows = read_history(history)
    losses, errors, gap, rate = plot_history(rows).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in losses.lines}
    assert drawn["training"] == [6, 3, 2] and drawn["validation"] == [5, 2.5, 5 / 3]
    assert drawn["ln V: uniform"] == [math.log(512)] * 2
    assert list(errors.lines[0].get_ydata()) == pytest.approx([100, 50, 100 / 3])
    assert errors.texts[0].get_text() == "33.3 %"
    assert list(gap.lines[0].get_ydata()) == [0.5, 1, 1.5]
    assert list(rate.lines[0].get_ydata()) == [0.001, 0.0005, 0.001 / 3]
    for axes in (losses, errors, gap, rate):
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel() and axes.get_title()
        assert all(place == round(place) for place in axes.get_xticks())
        assert axes.lines[-1 if axes is losses else 0].get_xdata()[-1] == 3


@pytest.mark.parametrize("ending, name", [("jpg", "JPEG"), ("png", "PNG")])
def test_picture_is_whole_and_white(history, tmp_path, ending, name):
    path = tmp_path / "deep" / f"loss.{ending}"
    save_picture(plot_history(read_history(history)), path)
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == name and picture.size[0] > 1000
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.posix
def test_a_history_may_come_through_a_pipe(history, tmp_path):
    """From another machine: plot <(ssh … cat history.jsonl) loss.png."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[history.read_bytes()])
    writer.start()
    assert read_history(tmp_path / "pipe") == read_history(history)
    writer.join()


def test_one_epoch_is_enough(tmp_path):
    save_picture(plot_history([row(1)]), tmp_path / "loss.png")
    plt.close("all")


BAD = {
    "empty": ("", "is empty: let the training finish an epoch"),
    "no JSON": ("epoch 1 loss 2\n", "line 1 of the history .* cannot be drawn"),
    "cut short": (json.dumps(row(1)) + "\n" + json.dumps(row(2))[:40], "line 2 .* cannot be drawn"),
    "a number": ("3\n", "line 1 .* cannot be drawn"),
    "a string": (json.dumps(" ".join(row(1))) + "\n", "line 1 .* cannot be drawn"),
    "a list": (json.dumps(list(row(1))) + "\n", "line 1 .* cannot be drawn"),
    "no number": (json.dumps(row(1) | {"wer": None}) + "\n", "cannot be drawn .*NoneType"),
    "no UTF-8": (b'{"epoch": "\xe9"}\n', "line 1 of the history .* cannot be drawn"),
    "other columns": ('{"epoch": 1, "step": 3}\n', "cannot be drawn .*train_loss"),
    "nested": ("[" * 100_000, "line 1 of the history .* cannot be drawn"),
    "text": (json.dumps(row(1) | {"lr": "1"}) + "\n", "cannot be drawn .*str"),
    "infinite": (json.dumps(row(1) | {"val_loss": math.inf}) + "\n", "cannot be drawn .*too large"),
    "huge": (json.dumps(row(1) | {"step": 10**400}) + "\n", "cannot be drawn .*too large"),
}


@pytest.mark.parametrize("text, sentence", BAD.values(), ids=BAD)
def test_bad_history_is_refused(tmp_path, text, sentence):
    path = tmp_path / "history.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=sentence):
        read_history(path)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nowhere.jsonl", "loss.jpg"], "the history nowhere.jsonl cannot be read (FileNotFound"),
        ([".", "loss.jpg"], ": give the history.jsonl of a run"),
        (["HISTORY", "loss.docx"], "'docx' is not supported"),
        (["HISTORY", "loss"], "not supported"),
        (["HISTORY", "loss.pgf"], "xelatex'): choose a name that ends in .png"),
        (["HISTORY", "HISTORY"], "'jsonl' is not supported"),  # it stays as it is
        (["HISTORY", "history.jsonl/loss.png"], "history.jsonl'"),
    ],
)
def test_the_command_ends_with_a_sentence(words, sentence, history, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no TeX
    with pytest.raises(SystemExit) as end:
        main(["plot", *(str(history) if word == "HISTORY" else word for word in words)])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and sentence in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]
    assert len(read_history(history)) == 3


def test_unknown_formats_are_refused(history, tmp_path):
    for name in ("loss.docx", "loss"):
        with pytest.raises(ValueError, match="not supported"):
            save_picture(plot_history(read_history(history)), tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def test_a_picture_that_fails_leaves_the_old_one(history, tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")
    figure = plot_history(read_history(history))
    monkeypatch.setattr(figure, "savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(ValueError, match="loss.png cannot be drawn .*full.*: choose a name"):
        plotting.save_picture(figure, path)
    assert path.read_bytes() == b"old"
