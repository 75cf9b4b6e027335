"""Latency, error rate, computing and memory of chapter 18's policies: called by hand.

python tests/bench_streaming.py [--model tiny.en] [--policies pause=0.5 alignment=0.5] [--cores 2]

The talk joins 42 clips of unseen voices (two minutes); `--memory` replays it for ten. With several
folders of `--data`, each gives a talk, and the figures are of all their words. The clock is the
time of one core, whatever else the machine does; with `--cores 2` that on the wall.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

from utils import streaming
from utils.audio import SAMPLE_RATE
from utils.checkpoints import load_model
from utils.evaluation import word_error_rate
from utils.long_form import has_timestamps
from utils.transcribe import DEFAULT_MODEL, transcribe

BOOK = Path(__file__).parent.parent / "notebooks" / "18_streaming.ipynb"
POLICIES = "pause=0.3 pause=0.5 agreement=0.25 agreement=0.5 alignment=0.25 alignment=0.5".split()
POLICIES += ["alignment=0.75"]
PARAMETER = {"pause": "pause", "alignment": "margin"}  # that of agreement is the chunk


def chapter_functions(*names):
    """What chapter 18 imports, the functions of its cells that define `names`, and the module."""
    space = vars(streaming).copy()
    for cell in json.loads(BOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if source.startswith("#| default_exp") or any(f"def {name}(" in source for name in names):
            exec(source.partition("\n\n\ntalk, said")[0], space)
    return space


def joined_clips(chapter, source, clips, title):
    """A talk of so many unseen clips, its words, and the seconds at which they end."""
    rows = chapter["load_clips"](source, "test_unseen_voices")
    rows = [row for row in rows if chapter["clean_text"](row["text"])]
    rows = [row for row in rows if title in (None, row["title"])]
    return chapter["make_talk"](rows[:: len(rows) // clips][:clips])


def transcriber(pair, name):
    policy, _, value = name.partition("=")
    given = {PARAMETER[policy]: float(value)} if policy in PARAMETER else {}
    return streaming.StreamingTranscriber(*pair, policy, **given), policy, float(value)


def measure(pair, name, talks, chunk, clock, normalise, latencies):
    """Print what one policy costs."""
    texts, waits, busy = [], [], 0.0
    for talk, said, ends in talks:
        live, policy, value = transcriber(pair, name)
        step = max(value, chunk) if policy == "agreement" else chunk
        final, took = streaming.replay(live, talk, step, clock)
        waits.append(latencies(said, ends, final, normalise)[:, 1])
        texts.append(normalise(" ".join(word for word, _ in final)))
        busy += took
    errors = word_error_rate([normalise(" ".join(said)) for _, said, _ in talks], texts)
    median, late = np.quantile(np.concatenate(waits), (0.5, 0.9))
    print(f"{name:15} {errors:6.2%} word errors, latency {median:.2f} s (median), ", end="")
    factor = busy / seconds_of(talks)
    print(f"{late:.2f} s (90 %), real-time factor {factor:.2f}", flush=True)


def seconds_of(talks):
    return sum(len(talk) for talk, _, _ in talks) / SAMPLE_RATE


def memory(pair, name, talk, chunk, minutes=10):
    """Print what a transcriber holds while somebody speaks for `minutes`."""
    (live, *_), fed, worst = transcriber(pair, name), 0, 0
    step = round(chunk * SAMPLE_RATE)
    for minute in range(1, minutes + 1):
        while fed < minute * 60 * SAMPLE_RATE:
            live.feed(talk[fed % (len(talk) - step) :][:step])
            fed, worst = fed + step, max(worst, len(live.audio))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        held = f"at most {worst / SAMPLE_RATE:.1f} s of audio, {len(live.tokens)} tokens"
        print(f"{name}, minute {minute:2}: {held}; peak of the process {peak:.0f} MB", flush=True)


def main(options):
    torch.set_num_threads(options.cores)
    clock = time.process_time if options.cores == 1 else time.perf_counter
    chapter = chapter_functions("end_of_speech", "make_talk", "latencies")
    chapter["model"], chapter["tokenizer"] = load_model(DEFAULT_MODEL)  # finds the words' ends
    pair = load_model(options.model)
    official = has_timestamps(pair[1])
    normalise = chapter["EnglishTextNormalizer"]() if official else str
    title, chunk = ("sentences", 1.0) if official else (None, 0.25)
    talks = [joined_clips(chapter, source, options.clips, title) for source in options.data]
    chunk = options.chunk or chunk
    if options.memory:
        return [memory(pair, name, talks[0][0], chunk) for name in options.policies]
    truth = [normalise(" ".join(said)) for _, said, _ in talks]
    texts = [normalise(transcribe(pair[0], talk, pair[1])["text"]) for talk, _, _ in talks]
    words = sum(len(said) for _, said, _ in talks)
    print(f"{seconds_of(talks):.0f} s, {words} words; ", end="")
    print(f"offline {word_error_rate(truth, texts):.2%} word errors")
    for name in options.policies:
        measure(pair, name, talks, chunk, clock, normalise, chapter["latencies"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="POLICY=SECONDS")
    parser.add_argument("--data", nargs="+", default=["corpus"], help="whose unseen voices speak")
    parser.add_argument("--clips", type=int, default=42)
    parser.add_argument("--chunk", type=float, help="seconds (0.25; official models 1)")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    main(parser.parse_args())
