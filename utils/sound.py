"""Recordings of any kind, whole or damaged -> mono samples at one rate, decoded in blocks."""

import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from utils.files import graceful_interrupt

__all__ = []  # `load_audio` of utils.audio is its face

BLOCK = 1 << 16  # frames that are decoded at a time
LOWEST_RATE = 1000  # Hz: no sound below; a broken header might ask for any amount of memory
UNKNOWN = 0x7FFFF000  # bytes: a WAV file that was written into a pipe gives this size, or more
ENDLESS = 1 << 40  # bytes: told this size, libsndfile reads an MP3 to its end
SYNC = rb"\xff[\xe2-\xff]"  # how a frame of an MP3 begins; and the tag that counts them
INFO = SYNC + rb"..(?:.{9}|.{17}|.{32})(?:Xing|Info)\0\0\0[\3\7\x0b\x0f](.{8})"
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
ADVICE = "convert it to WAV, FLAC, MP3 or Ogg"


class View(io.RawIOBase):
    """The bytes from `start` to `stop` of a file, some of them changed: {position: byte}.

    The size that it tells goes to `end`, which may lie further away.
    """

    def __init__(self, file, start: int, stop: int, changes: dict, end: int):
        self.file, self.start, self.stop, self.changes = file, start, stop, changes
        self.size, self.at = end - start, 0

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer):
        at = self.file.seek(self.start + self.at)
        if at >= self.stop and self.at == self.size - 128:  # a tag is looked for
            return len(buffer)
        buffer = memoryview(buffer)[: max(0, self.stop - at)]
        count = self.file.readinto(buffer)
        for place, byte in self.changes.items():
            if at <= place < at + count:
                buffer[place - at] = byte
        self.at += count
        return count


class Forward(soundfile.SoundFile):
    """A sound file without the seek after each block, at which MP3 decoders lose samples."""

    def seekable(self):
        return False


def find_all(file, pattern: bytes, start: int, stop: int) -> Iterator[int]:
    """Where `pattern`, of at most 64 bytes, occurs in a file."""
    for at in range(start, stop, 1 << 20):
        file.seek(at)
        data = file.read((1 << 20) + 64)
        places = (mark.start() for mark in re.finditer(pattern, data, re.S))
        yield from (at + place for place in places if place < 1 << 20)


def is_whole(page: bytes) -> bool:
    """Whether the checksum of a page of Ogg is right: CRC-32 as zlib's, with all bits mirrored."""
    checked = page[:22] + bytes(4) + page[26:]
    crc = zlib.crc32(checked.translate(MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return page[22:26] == int(f"{crc:032b}"[::-1], 2).to_bytes(4, "little")


def ogg_streams(file, start: int, size: int) -> tuple[list[int], str]:
    """Where the recordings begin that are chained in an Ogg file, and what is wrong with it."""
    openings, end, inside, numbers, whole = [], start, True, {}, True
    for at in find_all(file, rb"OggS\0", start, size):
        file.seek(at)
        head = file.read(282).ljust(27, b"\0")
        end = at + 27 + head[26] + sum(head[27 : 27 + head[26]])
        stream, number = head[14:18], int.from_bytes(head[18:22], "little")
        first = head[5] & 2  # page of a stream; several streams may begin together
        openings += [at] if first and inside else []
        file.seek(at)
        in_order = first or number == numbers.get(stream, -1) + 1
        whole = whole and in_order and is_whole(file.read(end - at))
        inside, numbers[stream] = not first, number
    return openings, "" if whole and end > size - 129 else "pages are damaged or missing"


def mend_wav(file, start: int, stop: int) -> tuple[dict, int, str]:
    """Changes where the size of the samples was never written, or too early; end; what is wrong."""

    def chunk(at):
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        return name if re.fullmatch(rb"[ -~]{4}", name) else b"", length, at + 8 + length

    end, name, length = start + 12, b"RIFF", 0
    while name and name != b"data":
        place = end + length % 2 + 8
        name, length, end = chunk(place - 8)
    follower, _, follower_end = chunk(end)
    if not name or end in (stop, stop - 1) or follower and follower_end <= stop + 1:
        return {}, stop, ""
    rest = stop - place
    problem = f"{length - rest} bytes are missing" if rest < length < UNKNOWN else ""
    return dict(enumerate(struct.pack("<I", min(rest, 0xFFFFFFFF)), place - 4)), stop, problem


def mend_mp3(file, start: int, stop: int) -> tuple[dict, int, str]:
    """Changes where an Info tag counts less than is there, as in joined files; end; nothing."""
    file.seek(start)
    info = re.match(INFO, file.read(64), re.S)
    if not info:
        return {}, ENDLESS, ""
    frames, size = struct.unpack(">2I", info[1])
    if stop - start - size <= 128 + 2 * size / max(1, frames):  # the tag's own frame, and ID3
        return {}, stop, ""
    first, last = start + info.start(1), start + info.end(1)
    return dict.fromkeys(range(first, last), 255), start + 0xFFFFFFFF, ""


def find_parts(file, size: int) -> tuple[list[int], Callable, str]:
    """Where the recordings in a file begin, the function that mends each, and what is wrong."""
    file.seek(0)
    head, start, problem = file.read(10), 0, ""
    if head[:3] == b"ID3":
        start = 10 + sum((byte & 127) << 21 - 7 * i for i, byte in enumerate(head[6:]))
        file.seek(start)
        head = file.read(4)
    kind, openings, mend = head[:4], [], lambda file, start, stop: ({}, stop, "")
    if kind == b"OggS":
        openings, problem = ogg_streams(file, start, size)
    elif kind == b"fLaC":
        openings = [*find_all(file, rb"fLaC[\0\x80]\0\0\x22", start, size)]
    elif kind == b"RIFF":
        openings, mend = [*find_all(file, rb"RIFF....WAVE", start, size)], mend_wav
    elif start or head[:1] == b"\xff":
        openings, mend = [next(find_all(file, SYNC, start, size), size)], mend_mp3
    return openings or [start], mend, problem


def decode_part(view: View, sr: int, samples: bytearray, name: str, pressed: list) -> str:
    """Append the samples of one recording to `samples`. -> what is wrong with it, or nothing."""
    try:
        sound = Forward(view)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")  # of a broken MP3 it is that there is no such file
        return "no sound was found" if "regular file" in reason else reason
    with sound:
        rate, count, problem = sound.samplerate, 0, ""
        if rate < LOWEST_RATE:
            return f"a sample rate of {rate} Hz"
        resampler = soxr.ResampleStream(rate, sr, 1) if rate != sr else None
        block = np.empty((min(BLOCK, sound.frames), sound.channels), np.float32)
        while count < sound.frames and not problem and not pressed:
            block.fill(np.nan)
            try:
                read = sound.buffer_read_into(block, "float32")
            except soundfile.LibsndfileError as error:
                read, problem = 0, error.error_string.removeprefix("Error : ").rstrip(".")
            read = read or int((~np.isnan(block[:, 0])).sum())  # decoded before the damage
            if not read:
                break
            count += read
            mono = torch.from_numpy(block[:read]).mean(dim=1).numpy()  # (frames, channels)
            if not np.isfinite(mono).all():
                raise ValueError(f"{name} holds samples that are not finite (NaN): export again.")
            mono = mono if rate == sr else resampler.resample_chunk(mono)
            samples += mono.clip(-1, 1).tobytes()
        if rate != sr:
            mono = resampler.resample_chunk(np.empty(0, np.float32), last=True)
            samples += mono.clip(-1, 1).tobytes()
        if count + rate // 10 < sound.frames < 1 << 36:  # more: of unknown length
            return problem or "it ends too early"
        return problem if count < sound.frames else ""


def decode_parts(file, sr: int, name: str) -> tuple[bytearray, str]:
    """The recordings in a file -> their samples, one after another, and what is wrong."""
    size = file.seek(0, io.SEEK_END)
    if size == 0:
        raise ValueError(f"{name} cannot be decoded (it is empty): record it again.")
    openings, mend, problem = find_parts(file, size)
    samples = bytearray()
    with graceful_interrupt() as pressed:  # libsndfile would lose an exception
        for first, stop in pairwise([*openings, size]):
            changes, end, found = mend(file, first, stop)
            problem, start = problem or found, first
            while start < stop and not pressed:
                view, before = View(file, start, stop, changes, end), len(samples)
                found = decode_part(view, sr, samples, name, pressed)
                heard = len(samples) > before
                problem = problem or (found if heard or start == first else "")
                start += max(1, view.at - 4) if heard else 1
                unread = (
                    mend is mend_mp3 and stop - start > 132
                )  # behind a change of rate, or no sound
                start = next(find_all(file, SYNC, start, stop), stop) if unread else stop
    for number in pressed[:1]:
        signal.raise_signal(number)
    return samples, problem


def decode_with_ffmpeg(file, sr: int, name: str) -> bytearray:
    """The samples of a recording that libsndfile cannot read, decoded as openai-whisper does."""
    samples = bytearray()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        path = getattr(file, "name", os.path.join(folder, "recording"))
        if not hasattr(file, "name"):  # m4a and mp4 cannot be read from a pipe
            Path(path).write_bytes(file.getbuffer())
        words = f"-f s16le -ac 1 -acodec pcm_s16le -ar {sr} -".split()
        command = ["ffmpeg", "-nostdin", "-threads", "0", "-i", os.path.abspath(path), *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            while block := process.stdout.read(2 * BLOCK):
                integers = np.frombuffer(block, "<i2", len(block) // 2)
                samples += (integers / np.float32(32768)).tobytes()
        if process.returncode:
            errors.seek(0)
            reason = errors.read().decode(errors="replace").strip().split("\n")[-1].strip(" .")
            reason = reason.removeprefix(f"{command[5]}: ")
            raise ValueError(f"{name} cannot be decoded (ffmpeg: {reason}): {ADVICE}.")
    return samples


def open_source(source, name: str):
    """Path, "-", bytes or binary file object -> a binary file that can be searched."""
    if isinstance(source, str | os.PathLike) and os.fspath(source) == "-":
        source = getattr(sys.stdin, "buffer", sys.stdin)
    elif isinstance(source, str | os.PathLike):
        if os.path.isdir(source):
            raise ValueError(f"{name} is not a file but a folder: name the recordings in it.")
        if not os.path.exists(source):
            raise ValueError(f"{name} is not a file: check the path.")
        file = open(source, "rb")  # noqa: SIM115
        if file.seekable():
            return file
        with file:
            source = file.read()
    binary = hasattr(source, "read") and not isinstance(source, io.TextIOBase)
    data = source.read() if binary else source
    if not isinstance(data, bytes | bytearray | memoryview):
        reason = f"{type(data).__name__} instead of bytes"
        raise ValueError(f"{name} cannot be decoded ({reason}): give a path or a binary file.")
    return io.BytesIO(bytes(data))


def decode_recording(source: str | os.PathLike | bytes | io.IOBase, sr: int) -> torch.Tensor:
    """Path, "-" for standard input, bytes or binary file object -> mono (samples,) float32.

    Reads what libsndfile reads, joined and damaged files too, and the rest with ffmpeg where it is
    installed. Warns where a part of the recording is missing. Raises `ValueError`.
    """
    name = f"{source}" if isinstance(source, str | os.PathLike) else "the recording"
    name = "standard input" if name == "-" else name
    try:
        file = open_source(source, name)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}.") from error
    with file:
        samples, problem = decode_parts(file, sr, name)
        if problem and not samples and shutil.which("ffmpeg"):
            samples, problem = decode_with_ffmpeg(file, sr, name), ""
    if problem and not samples:
        advice = f"{ADVICE}, or install ffmpeg, which reads m4a, mp4 and webm"
        raise ValueError(f"{name} cannot be decoded ({problem}): {advice}.")
    if not samples:
        raise ValueError(f"{name} holds no samples: record it again.")
    if problem:
        seconds = len(samples) / 4 / sr
        warnings.warn(f"{name} is damaged ({problem}): {seconds:.1f} s are read.", stacklevel=3)
    return torch.frombuffer(samples, dtype=torch.float32)
