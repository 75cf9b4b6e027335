"""Puts a trained model into data/, with its history and its results.

    python data/ship.py runs/small [runs/words ...]

Each run began with what the one before had learnt. What is shipped is the mean of the weights of
the last two (Wortsman et al. 2022, "Model soups"), in 16 bits, with the history of all. Writes
data/model.safetensors, data/history.jsonl and data/results.json.
"""

import json
import platform
import sys
from pathlib import Path

import torch

from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.data import ClipDataset, load_clips
from utils.decoding import ctc_rescoring
from utils.evaluation import transcribe_dataset, word_error_rate
from utils.files import write_atomic
from utils.loss import validate
from utils.training import write_history
from utils.transcribe import transcribe

DATA = Path(__file__).parent
MEAN = 2  # runs, of whose weights the mean is shipped


def written(model, tokenizer):
    """For which share of the clips outside the vocabulary `transcribe` writes anything."""
    clips = load_clips("corpus", "test_other_words")
    texts = [transcribe(model, clip["bytes"], tokenizer)["text"] for clip in clips["audio"]]
    return sum(map(bool, texts)) / len(texts)


def joined(histories):
    """The histories of runs of which each went on from the one before, as one."""
    history, last = [], {"epoch": 0, "step": 0, "seconds": 0.0}
    for rows in histories:
        history += [row | {name: row[name] + last[name] for name in last} for row in rows]
        last = {name: history[-1][name] for name in last}
    return history


def load_mean(runs):
    """The model whose weights are the mean of those of the runs, its tokenizer, their histories."""
    models = [load_checkpoint(Path(run, "model.safetensors")) for run in runs]
    model, tokenizer, _ = models[-1]
    states = [model.state_dict() for model, _, _ in models]
    model.load_state_dict({n: torch.stack([s[n] for s in states]).mean(0) for n in states[0]})
    return model, tokenizer, [extra["history"] for _, _, extra in models]


def main(runs):
    if not runs:
        print("give the folder of the run: python data/ship.py runs/small", file=sys.stderr)
        return 2
    earlier = [load_checkpoint(Path(run, "model.safetensors"))[2] for run in runs[:-MEAN]]
    model, tokenizer, histories = load_mean(runs[-MEAN:])
    history = joined([*(extra["history"] for extra in earlier), *histories])
    for weight in model.parameters():
        weight.data = weight.half()
    target = DATA / "model.safetensors"
    save_checkpoint(target, model, tokenizer, history=history)
    write_history(DATA, history)
    model, tokenizer, _ = load_checkpoint(target)  # what is measured is what is shipped
    results = {"epochs": len(history), "training_seconds": round(history[-1]["seconds"])}
    results |= {"torch": torch.__version__, "processor": platform.machine()}
    for split in ("validation", "test_seen_voices", "test_unseen_voices", "test_single_words"):
        clips = ClipDataset(load_clips("corpus", split), tokenizer, model.args)
        scores = validate(model, clips)
        scores["ctc_rescoring_wer"] = word_error_rate(
            *transcribe_dataset(model, clips, **ctc_rescoring(model))
        )
        results[split] = {name: round(value, 5) for name, value in scores.items()}
    results["test_other_words"] = {"written": round(written(model, tokenizer), 5)}
    write_atomic(DATA / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
