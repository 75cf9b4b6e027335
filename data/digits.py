"""Word error rate on people: recorded digits, joined into strings.

    python data/digits.py fsdd data/model.safetensors

`fsdd` is a folder of single spoken digits named DIGIT_SPEAKER_TAKE.wav, such as those of the Free
Spoken Digit Dataset. Of every speaker 40 strings of three to five digits are made, 100 ms apart,
drawn with seed 0, and transcribed. No model of this project was trained on any of it.
"""

import random
import sys
from collections import defaultdict
from pathlib import Path

import jiwer
import torch
from grammar import DIGITS

from utils.audio import SAMPLE_RATE, load_audio
from utils.checkpoints import load_model
from utils.transcribe import transcribe

STRINGS, GAP = 40, torch.zeros(SAMPLE_RATE // 10)


def digit_strings(takes, seed=0):
    """[(digit, audio)] of one speaker -> [(text, audio (samples,))]."""
    chance = random.Random(seed)
    for _ in range(STRINGS):
        chosen = [chance.choice(takes) for _ in range(chance.randint(3, 5))]
        parts = [part for _, audio in chosen for part in (audio, GAP)]
        yield " ".join(DIGITS[digit].lower() for digit, _ in chosen), torch.cat(parts[:-1])


def read_takes(folder):
    """-> {speaker: [(digit, audio)]}. Raises `ValueError` where the folder holds none."""
    takes = defaultdict(list)
    for path in sorted(Path(folder).glob("[0-9]_*_*.wav")):
        digit, speaker, _ = path.stem.split("_")
        takes[speaker].append((int(digit), load_audio(path)))
    if not takes:
        raise ValueError(f"{folder} holds no DIGIT_SPEAKER_TAKE.wav: give the digits' folder.")
    return takes


def main(words):
    try:
        if len(words) != 2:
            raise ValueError("give two paths: python data/digits.py FOLDER data/model.safetensors")
        takes, (model, tokenizer) = read_takes(words[0]), load_model(words[1])
        references, hypotheses = [], []
        for speaker, digits in takes.items():
            said, audio = map(list, zip(*digit_strings(digits), strict=True))
            written = [transcribe(model, clip, tokenizer)["text"] for clip in audio]
            print(f"{speaker:12} word error rate {jiwer.wer(said, written):6.1%}")
            references, hypotheses = references + said, hypotheses + written
        print(f"{'all':12} word error rate {jiwer.wer(references, hypotheses):6.1%}")
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
