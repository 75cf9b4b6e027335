"""Samples as audio libraries and datasets give them -> one waveform at 16 kHz."""

import numpy as np
import soxr
import torch

from .audio import SAMPLE_RATE, load_audio

__all__ = ["load_waveform"]

WANTED = "the recording must be a float array or tensor (samples,) at 16 kHz"
LOUDEST = 10  # beyond it, samples are no fractions of full scale


def unpack(source: dict) -> tuple:
    """A dictionary of datasets -> (an array, its rate in Hz), or (what `load_audio` takes, None)."""
    if source.get("array") is None:
        encoded = source.get("bytes") or source.get("path")
        if encoded:
            return encoded, None
        wanted = "'array' and 'sampling_rate', or 'bytes' or 'path'"
        raise ValueError(f"a dictionary must have {wanted}, this one has {', '.join(source)}.")
    rate = source.get("sampling_rate")
    if not isinstance(rate, int | float | np.number) or not 0 < rate < float("inf"):
        raise ValueError(f"`sampling_rate` must be a number of Hz above 0, got {rate!r}.")
    return source["array"], rate


def check_samples(source) -> None:
    """Raise `ValueError` unless `source` is a float array or tensor (samples,)."""
    if not hasattr(source, "__array__"):
        advice = "numpy.array(…, dtype=numpy.float32) makes an array of other samples"
        raise ValueError(f"{WANTED}, got {type(source).__name__}: {advice}.")
    found, dtype = f"got {source.dtype} of shape {tuple(source.shape)}", source.dtype
    if not (dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype.kind == "f"):
        raise ValueError(f"{WANTED}, {found}: divide whole numbers by the largest (int16: 32768).")
    if len(source.shape) != 1:
        raise ValueError(f"{WANTED}, {found}: average its channels first.")


def load_waveform(source) -> torch.Tensor:
    """Whatever holds samples -> (samples,) float32 at 16 kHz.

    What `load_audio` takes (a path, bytes, a file object, …); a float array or tensor (samples,) at
    16 kHz; {"array", "sampling_rate"} at any rate; {"bytes", "path"}; a decoder of torchcodec. Raises
    `ValueError` for anything else, and for samples that are no audio.
    """
    rate = SAMPLE_RATE
    if hasattr(source, "get_all_samples"):  # torchcodec, and datasets with it
        decoded = source.get_all_samples()
        source = {"array": decoded.data.mean(dim=0), "sampling_rate": decoded.sample_rate}
    if isinstance(source, dict):
        source, rate = unpack(source)
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if isinstance(source, str | bytes) or hasattr(source, "read") or hasattr(source, "__fspath__"):
        return load_audio(source)
    check_samples(source)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().float().numpy()
    audio = np.require(source, np.float32, "CW")
    audio = audio if rate == SAMPLE_RATE else soxr.resample(audio, rate, SAMPLE_RATE)
    if not audio.size:
        raise ValueError(f"{WANTED}, got no samples: record it again.")
    loudest = max(-audio.min(), audio.max())  # NaN where there is one
    if not np.isfinite(loudest):
        raise ValueError("the recording holds samples that are not finite (NaN): export it again.")
    if loudest > LOUDEST:
        advice = "divide by the largest of their type (32768 for 16 bits)"
        raise ValueError(f"samples must lie between -1 and 1, got up to {loudest:.0f}: {advice}.")
    return torch.from_numpy(audio)
