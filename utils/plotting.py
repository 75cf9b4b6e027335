import json
import sys
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt

from utils.checkpoints import write_safely

TRAIN, VALIDATION, GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito's colour-blind-safe set


def read_history(path):
    """The rows that `train` wrote, one dict an epoch. Raises `ValueError` where there are none."""
    if not Path(path).is_file():
        raise ValueError(f"there is no history {path}: train first, for example with `make run`.")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    if not rows:
        raise ValueError(f"the history {path} is empty: let the training finish an epoch.")
    return rows


def column(history, name):
    return [row[name] for row in history]


def plot_losses(history, axes):
    """Loss in nats per token over epochs, beside ln V, what a model pays that knows nothing."""
    epochs = column(history, "epoch")
    axes.axhline(history[0]["uniform_loss"], color=GREY, linestyle=":", label="ln V: knows nothing")
    axes.plot(epochs, column(history, "train_loss"), "o-", ms=4, color=TRAIN, label="training")
    axes.plot(epochs, column(history, "val_loss"), "s-", ms=4, color=VALIDATION, label="validation")
    axes.set(xlabel="epoch", ylabel="loss (nats per token)", title="Loss", ylim=(0, None))
    axes.legend(frameon=False)


def plot_errors(history, axes):
    """Word error rate on the validation clips, in percent."""
    percent = [100 * wer for wer in column(history, "wer")]
    axes.plot(column(history, "epoch"), percent, "s-", ms=4, color=VALIDATION)
    axes.set(xlabel="epoch", ylabel="word error rate (%)", title="Validation words", ylim=(0, None))
    axes.annotate(
        f"{percent[-1]:.1f} %",
        (history[-1]["epoch"], percent[-1]),
        xytext=(0, 12),
        textcoords="offset points",
        ha="center",
    )


def plot_gap(history, axes):
    """How much worse the loss is with somebody else's audio: large where the model listens."""
    axes.plot(column(history, "epoch"), column(history, "gap"), "^-", ms=4, color="#009E73")
    axes.axhline(0, color=GREY, linestyle=":")
    axes.set(xlabel="epoch", ylabel="shuffled − right audio (nats)", title="Does it listen?")


def plot_history(history):
    """One figure of a run: losses with ln V, word error rate, shuffled-audio gap."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    plot_losses(history, left)
    plot_errors(history, middle)
    plot_gap(history, right)
    return figure


def save_picture(figure, path):
    """Write a figure safely; the format is the ending of `path`."""
    buffer = BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:], dpi=150, facecolor="white")
    write_safely(path, buffer.getvalue())


def main(words=None):
    """`python -m utils.plotting HISTORY PICTURE`."""
    words = sys.argv[1:] if words is None else words
    try:
        if len(words) != 2:
            raise ValueError("give two paths: python -m utils.plotting history.jsonl img/loss.jpg")
        save_picture(plot_history(read_history(words[0])), words[1])
    except ValueError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
