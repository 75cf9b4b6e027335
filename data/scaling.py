"""The learning curve of chapter 22: word error rate over hours of speech and over width.

    OMP_NUM_THREADS=1 python data/scaling.py         # measures what data/scaling.json lacks

Every run takes the same number of AdamW's steps with the preset `cpu`, without augmentation, so
that only the speech or the width differs: a small subset is repeated more often. Subsets are
nested, their clips drawn from all speakers. Each point is written as soon as it is measured, so
that a stopped script continues.
"""

import copy
import itertools
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from utils.config import ModelArgs
from utils.data import ClipDataset, load_clips
from utils.evaluation import bootstrap_interval, count_errors, transcribe_dataset, word_error_rate
from utils.files import write_atomic
from utils.loss import validate
from utils.model import count_parameters
from utils.recipes import recipe_for
from utils.tokenizer import Tokenizer
from utils.training import Run, train_step

TARGET = Path(__file__).with_name("scaling.json")
STEPS, WIDTHS = 2000, (64, 32, 96, 128)
SHORT = ((1.0, 100), (1.5, 200))  # at the start: seconds that a clip may last, steps
SHARES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the corpus's training sentences
GRID = [(share, WIDTHS[0]) for share in SHARES] + [(1, width) for width in WIDTHS[1:]]


def sentences(split):
    """The clips of a split, without the single words and fragments of train_words."""
    return load_clips("corpus", split).filter(lambda title: title != "words", input_columns="title")


def passes(clips, **limits):
    """The batches of `clips` again and again, each time in another order."""
    for epoch in itertools.count():
        yield from clips.batches(epoch, **limits)


def schedule(clips, steps):
    """`steps` batches, however few clips there are: at first short clips, in half batches."""
    half = clips.args.batch_size // 2
    for longest, number in SHORT:
        yield from itertools.islice(passes(clips, longest=longest, size=half), number)
    yield from itertools.islice(passes(clips), steps - sum(number for _, number in SHORT))


def subset(clips, share):
    """The first `share` of the clips in an order that is the same for all shares."""
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = order[: round(share * len(clips))]
    part = copy.copy(clips)
    for name in ("audio", "tokens", "texts", "speakers", "lengths"):
        setattr(part, name, [getattr(clips, name)[i] for i in chosen])
    return part


def measure(clips, held_out, args, steps=STEPS):
    """Train on `clips` -> one point: what was given, and what came of it."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args, clips, clips, folder, recipe_for(args))
    run.total_steps, losses = steps, []
    bar = tqdm(schedule(clips, steps), total=steps, mininterval=10)
    for run.step, indices in enumerate(bar):
        loss, tokens = train_step(run, indices)
        losses.append((loss.item(), tokens))
        bar.set_postfix(loss=f"{losses[-1][0] / tokens:.2f}", refresh=False)
    run.model.eval()
    loss, tokens = (sum(column) for column in zip(*losses[-steps // 10 :], strict=True))
    point = {"hours": sum(map(len, clips.audio)) / args.sr / 3600, "width": args.embeddings_dims}
    point |= {"weights": count_parameters(args), "steps": steps, "train_loss": loss / tokens}
    texts = transcribe_dataset(run.model, held_out["validation"])
    low, high = bootstrap_interval(count_errors(*texts))
    point |= {**validate(run.model, held_out["validation"]), "low": low, "high": high}
    unseen = transcribe_dataset(run.model, held_out["test_unseen_voices"])
    point |= {"wer_unseen_voices": word_error_rate(*unseen)}
    point |= {"cpu_seconds": time.process_time() - start}
    return {name: round(value, 4) for name, value in point.items()}


def main(grid=GRID, target=TARGET, steps=STEPS):
    points = json.loads(target.read_text()) if target.exists() else []
    plain = dict(augment_strength=0.0, use_muon=False, weight_decay_optim=0.01, label_smoothing=0.0)
    args = ModelArgs.preset("cpu", device="cpu", **plain)
    tokenizer = Tokenizer.for_args(args)
    splits = ("train", "validation", "test_unseen_voices")
    data = {split: ClipDataset(sentences(split), tokenizer, args) for split in splits}
    for share, width in grid:
        clips = subset(data["train"], share)
        hours = round(sum(map(len, clips.audio)) / args.sr / 3600, 4)
        if any((point["hours"], point["width"]) == (hours, width) for point in points):
            continue
        point = measure(clips, data, replace(args, embeddings_dims=width), steps)
        points = sorted([*points, point], key=lambda point: (point["width"], point["hours"]))
        lines = ",\n".join(f" {json.dumps(point)}" for point in points)
        write_atomic(target, f"[\n{lines}\n]\n".encode())
        print(json.dumps(point), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
