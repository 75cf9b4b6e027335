import argparse
import math
import sys
from pathlib import Path

import torch

from utils.audio import HOP_LENGTH, SAMPLE_RATE, load_audio, log_mel_spectrogram, pad_or_trim
from utils.checkpoints import load_checkpoint
from utils.data import BUCKET
from utils.tokenizer import Tokenizer

FRAME = 10 * HOP_LENGTH  # samples: loudness is measured over 100 ms


def loudness(audio):
    """(samples,) -> decibels of each 100 ms relative to the loudest, (frames,)."""
    frames = pad_or_trim(audio, math.ceil(len(audio) / FRAME) * FRAME).view(-1, FRAME)
    power = frames.square().mean(dim=1)
    return 10 * (power / power.max().clamp(min=1e-10)).clamp(min=1e-8).log10()


def cut_at_silences(audio, longest):
    """(samples,) -> [(start, stop) in samples], each at most `longest`, silence left out.

    A window ends at the quietest 100 ms of its second half, so that no word is cut where there
    is a pause; frames 35 dB below the loudest at its edges are dropped.
    """
    decibels, windows, start = loudness(audio), [], 0
    room = longest // FRAME
    loud = (decibels > -35).nonzero().flatten().tolist()
    if not loud or audio.abs().max() < 1e-4:
        return []
    start, stop = loud[0], loud[-1] + 1
    while start < stop:
        end = stop
        if stop - start > room:
            half = start + room // 2
            end = half + int(decibels[half : start + room].argmin()) + 1
        inside = [i for i in loud if start <= i < end]
        if inside:
            windows.append((inside[0] * FRAME, min(len(audio), (inside[-1] + 1) * FRAME)))
        start = end
    return windows


@torch.inference_mode()
def transcribe(model, source, tokenizer=None, batch_size=16):
    """A recording of any length -> {"text", "segments", "language"}, times in seconds.

    The recording is cut at pauses into windows that fit the model's context; windows are
    decoded greedily, together. `source` is what `load_audio` takes, or a (samples,) tensor.
    """
    args, tokenizer = model.args, tokenizer or Tokenizer.for_args(model.args)
    audio = source if isinstance(source, torch.Tensor) else load_audio(source, args.sr)
    windows = cut_at_silences(audio, args.max_t * HOP_LENGTH)
    segments = []
    for first in range(0, len(windows), batch_size):
        group = windows[first : first + batch_size]
        texts = decode_windows(model, tokenizer, [audio[start:stop] for start, stop in group])
        for (start, stop), text in zip(group, texts, strict=True):
            times = {"start": start / SAMPLE_RATE, "end": stop / SAMPLE_RATE}
            segments.append({"id": len(segments), **times, "text": text})
    text = " ".join(segment["text"] for segment in segments if segment["text"])
    return {"text": text, "segments": segments, "language": "en"}


def decode_windows(model, tokenizer, windows):
    """Waveforms of any lengths -> their texts; those of equal padded length share a batch."""
    lengths = [math.ceil(len(window) / BUCKET) * BUCKET for window in windows]
    texts = [""] * len(windows)
    for length in set(lengths):
        members = [i for i, n in enumerate(lengths) if n == length]
        audio = torch.stack([pad_or_trim(windows[i], length) for i in members])
        mel = log_mel_spectrogram(audio.to(model.device), model.args.log_mel_features)
        rows = model.greedy(mel, tokenizer.prompt, tokenizer.end)
        for i, row in zip(members, rows, strict=True):
            texts[i] = tokenizer.decode(row).strip()
    return texts


def main(words=None):
    """`python -m utils.transcribe FILE… --model PATH`."""
    parser = argparse.ArgumentParser(description="Write down what recordings say.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, MP3 or Ogg")
    default = Path(__file__).parent.parent / "data" / "model.safetensors"
    parser.add_argument("--model", default=default, help="a checkpoint of this project")
    options = parser.parse_args(words)
    try:
        model, tokenizer, _ = load_checkpoint(options.model)
        for file in options.files:
            print(transcribe(model, file, tokenizer)["text"])
    except ValueError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
