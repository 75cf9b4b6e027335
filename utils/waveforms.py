"""Samples as audio libraries and datasets give them -> one waveform at 16 kHz."""

import os

import numpy as np
import soxr
import torch

from .audio import SAMPLE_RATE, load_audio
from .files import as_value_error
from .sound import MAX_RATE, MIN_RATE, check_level

__all__ = []


def unpack(source: dict) -> tuple:
    """A dictionary of datasets -> its samples or encoded audio, and the rate in Hz of samples."""
    given = [source[key] for key in ("array", "bytes", "path") if source.get(key) is not None]
    if not given:
        found, wanted = ", ".join(map(str, source)) or "nothing", "array, bytes or path"
        raise ValueError(f"the dictionary of a recording needs {wanted}, got one with {found}.")
    return given[0], SAMPLE_RATE if source.get("array") is None else source.get("sampling_rate")


def as_samples(source, rate) -> tuple[np.ndarray, float]:
    """Float array, tensor (samples,) or decoder -> float32, and the rate. Else raises `ValueError`."""
    with as_value_error("the recording cannot be read", "give a float array (samples,) at 16 kHz"):
        if hasattr(source, "get_all_samples"):  # torchcodec, and datasets with it
            decoded = source.get_all_samples()
            source, rate = decoded.data.mean(dim=0), decoded.sample_rate
        if isinstance(source, torch.Tensor):
            # NumPy has no bfloat16
            source = source.detach().to("cpu", torch.float if source.is_floating_point() else None)
        # lists, and what pydub slices, are not looked into: it would take hours
        array = np.asarray(source if hasattr(source, "__array__") else None)
    if array.dtype.kind != "f" or array.ndim != 1 or not len(array):
        wanted = "the recording must be a float array or tensor (samples,) at 16 kHz"
        kind = f"{type(source).__name__} ({array.dtype}, {array.shape})"
        advice = "divide whole numbers by their largest (int16: 32768), average channels"
        raise ValueError(f"{wanted}, got {kind}: numpy.array makes one; {advice}.")
    rate = rate.item() if getattr(rate, "ndim", 1) == 0 else rate  # a scalar of NumPy or PyTorch
    if not isinstance(rate, int | float) or not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"`sampling_rate` must be {MIN_RATE} to {MAX_RATE} Hz, got {rate!r}.")
    return np.require(array, np.float32, "CW"), rate


def load_waveform(source) -> torch.Tensor:
    """Whatever holds samples -> (samples,) float32 at 16 kHz.

    What `load_audio` takes (a path, bytes, a file object, …); a float array or tensor (samples,) at
    16 kHz; {"array", "sampling_rate"} at any rate; {"bytes", "path"}; a decoder of torchcodec. Raises
    `ValueError` for anything else, and for samples that are no audio.
    """
    source, rate = unpack(source) if isinstance(source, dict) else (source, SAMPLE_RATE)
    encoded = str | os.PathLike | bytes | bytearray | memoryview
    if hasattr(source, "read") or isinstance(source, encoded):
        return load_audio(source)
    audio, rate = as_samples(source, rate)
    audio = audio if rate == SAMPLE_RATE else soxr.resample(audio, rate, SAMPLE_RATE)
    if not len(audio):
        raise ValueError("the recording holds no samples at 16 kHz: record it again.")
    check_level(audio, "the recording")
    return torch.from_numpy(audio)
