"""Latency, error rate and computing of chapter 18's policies on a two-minute talk: called by hand.

python tests/bench_streaming.py [tiny.en]
"""

import json
import sys
from pathlib import Path

import torch

from utils.checkpoints import load_model
from utils.streaming import StreamingTranscriber
from utils.transcribe import DEFAULT_MODEL, transcribe

ROOT = Path(__file__).parent.parent
POLICIES = (("pause", 0.3), ("pause", 0.5), ("agreement", 0.5), ("alignment", 0.25))
POLICIES += (("alignment", 0.5), ("alignment", 0.75))


def chapter_functions(*names):
    """The functions of chapter 18's cells that define these, and what its other cells import."""
    book = json.loads((ROOT / "notebooks" / "18_streaming.ipynb").read_text(encoding="utf-8"))
    code = ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"]
    space = {}
    for source in [*code[1:3], *code[3:]]:
        heads = source.startswith(("#| default_exp", "#| export\nimport"))
        if heads or any(f"def {name}(" in source for name in names):
            exec(source.partition("\n\n\ntalk, said")[0], space)
    return space


def main(name):
    torch.set_num_threads(1)
    chapter = chapter_functions("end_of_speech", "make_talk", "latencies", "replay")
    chapter["model"], chapter["tokenizer"] = small = load_model(DEFAULT_MODEL)
    model, tokenizer = load_model(name) if name else small
    normalise = chapter["EnglishTextNormalizer"]() if name else str
    rows = chapter["load_clips"]("corpus", "test_unseen_voices")
    rows = [row for row in rows if chapter["clean_text"](row["text"])]
    if name:
        rows = [row for row in rows if row["title"] == "sentences"]
    talk, said, ends = chapter["make_talk"](rows[:: len(rows) // 42][:42])
    text = transcribe(model, talk, tokenizer)["text"]
    errors = chapter["word_error_rate"](normalise(" ".join(said)), normalise(text))
    print(f"{len(talk) / 16000:.0f} s, {len(said)} words; offline {errors:.1%} word errors")
    chunk = 1.0 if name else 0.25
    for policy, value in POLICIES:
        given = {"pause": {"pause": value}, "alignment": {"margin": value}}.get(policy, {})
        live = StreamingTranscriber(model, tokenizer, policy, **given)
        at = max(value, chunk) if policy == "agreement" else chunk
        times, errors, factor, _ = chapter["measure"](live, talk, said, ends, at, normalise)
        waits = torch.from_numpy(times[:, 1])
        median, late = waits.quantile(torch.tensor([0.5, 0.9], dtype=waits.dtype)).tolist()
        print(
            f"{policy:10}{value:5.2f} s: {errors:5.2f} % word errors, latency {median:.2f} s ",
            end="",
        )
        print(f"(median), {late:.2f} s (90 %), real-time factor {factor:.2f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or [None])
