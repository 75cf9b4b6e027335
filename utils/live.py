"""Where live samples come from, and how growing text is shown: what `python -m utils live` needs."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from queue import Empty, SimpleQueue

import numpy as np
import soxr
import torch

from .audio import SAMPLE_RATE, load_audio
from .checkpoints import load_model
from .config import default_device
from .files import as_value_error, graceful_interrupt
from .streaming import StreamingTranscriber
from .transcribe import DEFAULT_MODEL, name_language

__all__ = []


def microphone(seconds: float) -> Iterator[torch.Tensor]:
    """Chunks of about `seconds` or more at 16 kHz from the microphone, without end.

    It is opened at its own rate, because many have no other. Raises `ValueError` where there is
    none, and when it has stopped.
    """
    advice = "`pip install sounddevice`, and on Linux `sudo apt install libportaudio2`"
    with as_value_error("the microphone needs sounddevice", advice):
        sounddevice = import_module("sounddevice")
    arrived = SimpleQueue()

    def note(samples, *_):  # float32 (n, 1), which is overwritten
        arrived.put(samples[:, 0].copy())

    with as_value_error("the microphone cannot be used", "connect it, and begin again"):
        rate = round(sounddevice.query_devices(kind="input")["default_samplerate"])
        resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1)
        step = round(seconds * rate)
        with sounddevice.InputStream(rate, step, channels=1, callback=note), suppress(Empty):
            while True:
                samples = [arrived.get(timeout=seconds + 5)]
                samples += [arrived.get() for _ in range(arrived.qsize())]
                yield torch.from_numpy(resampler.resample_chunk(np.concatenate(samples)))
    raise ValueError("the microphone has stopped: connect it, and begin again.")


def played(audio: torch.Tensor, step: int) -> Iterator[torch.Tensor]:
    """A recording (samples,) in chunks of at least `step` samples, as fast as they were spoken."""
    fed, began = 0, time.monotonic()
    while fed < len(audio):
        now = int((time.monotonic() - began) * SAMPLE_RATE)
        arrived = min(len(audio), max(fed + step, now))
        time.sleep(max(0, arrived - now) / SAMPLE_RATE)
        yield audio[fed:arrived]
        fed = arrived


def show_live(live, chunks: Iterator[torch.Tensor], times: bool) -> bool:
    """Print the text of chunks as it becomes final -> whether Ctrl-C ended it.

    On a terminal the unsure text follows, dimmed, as far as there is room in the line. `times`:
    each phrase begins with its second.
    """
    begins, terminal = True, sys.stdout.isatty()  # a line; the output is shown on a terminal

    def show(found):
        nonlocal begins
        for second, text in found:
            if begins:
                text = f"[{second:.1f}] " * times + text.removeprefix(" ")
            print("\033[K" * terminal + text, end="", flush=True)
            begins = text.endswith("\n")
        if terminal:  # without wrapping, and the cursor goes back to where the final text ends
            unsure = f"\033[?7l\033[2m{live.unsure}\033[0m\033[?7h"
            print(f"\033[K\0337{unsure}\0338", end="", flush=True)

    with graceful_interrupt() as pressed:
        try:
            for samples in chunks:
                show(live.feed(samples))
                if pressed:
                    break
        finally:  # also where the microphone has stopped
            show(live.feed(torch.zeros(0), end=True))
    return bool(pressed)


def transcribe_live(
    as_if_live: str | None = None, chunk: float = 0.5, times: bool = False,
    model: str = DEFAULT_MODEL, device: str | None = None, language: str | None = None, **options,
) -> bool:  # fmt: skip
    """The command; `options` are those of `StreamingTranscriber` -> whether Ctrl-C ended it."""
    if not 0.01 <= chunk <= 30:
        raise ValueError(f"`chunk` must be 0.01 to 30 seconds, got {chunk}.")
    audio = None if as_if_live is None else load_audio(as_if_live)
    model, tokenizer = load_model(model, device or default_device())
    spoken = language or tokenizer.config.get("language")
    live = StreamingTranscriber(model, name_language(tokenizer, spoken, "transcribe"), **options)
    chunks = microphone(chunk) if audio is None else played(audio, round(chunk * SAMPLE_RATE))
    return show_live(live, chunks, times)
