"""Where live samples come from, and how growing text is shown: what `python -m utils live` needs."""

import shutil
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from queue import SimpleQueue

import torch

from .audio import SAMPLE_RATE, load_audio
from .checkpoints import load_model
from .config import default_device
from .files import graceful_interrupt
from .streaming import StreamingTranscriber
from .transcribe import DEFAULT_MODEL

__all__ = []


def microphone(step: int) -> Iterator[torch.Tensor]:
    """Chunks of at least `step` samples from the microphone, without end."""
    if find_spec("sounddevice") is None:
        raise ValueError("the microphone needs sounddevice: `pip install sounddevice`.")
    sounddevice, arrived = import_module("sounddevice"), SimpleQueue()

    def note(samples, *_):  # float32 (step, 1), which is overwritten
        arrived.put(torch.from_numpy(samples[:, 0].copy()))

    try:
        with sounddevice.InputStream(SAMPLE_RATE, step, channels=1, callback=note):
            while True:
                yield torch.cat([arrived.get() for _ in range(max(1, arrived.qsize()))])
    except sounddevice.PortAudioError as problem:
        raise ValueError(f"no microphone can be opened ({problem}): connect one.") from problem


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
    line, width = "", shutil.get_terminal_size().columns if sys.stdout.isatty() else 0

    def show(found):
        nonlocal line
        for second, text in found:
            if not line:
                text = f"[{second:.1f}] " * times + text.removeprefix(" ")
            print("\033[K" * bool(width) + text, end="", flush=True)
            line = "" if text.endswith("\n") else line + text
        if width:  # the cursor goes back to where the final text ends
            unsure = live.unsure[: width - len(line) % width - 1]
            print(f"\033[K\0337\033[2m{unsure}\033[0m\0338", end="", flush=True)

    with graceful_interrupt() as pressed:
        for samples in chunks:
            show(live.feed(samples))
            if pressed:
                break
        show(live.feed(torch.zeros(0), end=True))
    return bool(pressed)


def transcribe_live(
    as_if_live: str | None = None, chunk: float = 0.5, times: bool = False,
    model: str = DEFAULT_MODEL, device: str | None = None, **options,
) -> bool:  # fmt: skip
    """The command; `options` are those of `StreamingTranscriber` -> whether Ctrl-C ended it."""
    if not 0.01 <= chunk <= 30:
        raise ValueError(f"`chunk` must be 0.01 to 30 seconds, got {chunk}.")
    audio = None if as_if_live is None else load_audio(as_if_live)
    model, tokenizer = load_model(model, device or default_device())
    live, step = StreamingTranscriber(model, tokenizer, **options), round(chunk * SAMPLE_RATE)
    chunks = microphone(step) if audio is None else played(audio, step)
    return show_live(live, chunks, times)
