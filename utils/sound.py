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
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from utils.files import graceful_interrupt, machine_advice

__all__ = []  # `load_audio` of utils.audio is its face

BLOCK = 1 << 16  # frames that are decoded at a time
MIN_RATE, MAX_RATE = 1000, 1_000_000  # Hz: a broken header might ask for all the memory
UNKNOWN = 0x7FFFF000  # bytes: a WAV file that was written into a pipe gives this size, or more
ENDLESS = 1 << 40  # bytes: told this size, libsndfile reads an MP3 to its end
INFO = rb"\xff[\xe2-\xff]..(?:.{9}|.{17}|.{32})(?:Xing|Info)\0\0\0[\3\7\x0b\x0f](.{8})"  # counts
MPEG = rb"(\xff[\xe2\xe3\xf2\xf3\xfa\xfb])(?:.{20,1440}?\1){7}"  # eight frames of an MP3
ADTS = rb"\xff[\xf0\xf1\xf8\xf9]"  # AAC, which is no MP3
FRAME = rb"\xff[\xe2-\xff]"  # one of them: much else begins so, too
# how a damaged recording goes on, or an MP3 behind a WAV file
FRAMES = {"mp3": MPEG, b"fLaC": rb"\xff[\xf8\xf9]", b"RIFF": MPEG}
OPENINGS = {  # how recordings that may be joined begin
    b"fLaC": rb"fLaC[\0\x80]\0\0\x22",
    b"RIFF": rb"RIFF....WAVE",
    b"RF64": rb"RF64....WAVE",
    b"FORM": rb"FORM....AIF[CF]",
    b".snd": rb"\.snd\0\0......\0\0\0",
    b"caff": rb"caff\0[\1\2]\0\0desc",
    b"riff": rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb",  # W64
}
SIZES = re.compile(r"(?:data|riff|SSND|BODY|Data Size|Riff size) .*?(\d+) \(should be (\d+)\)")
FRAME_COUNTS = re.compile(r"(?:Frames +:|Cols +:|sample_count -i) (\d+)")  # AVR, MAT, NIST
# of ffmpeg's log, without the names and titles that it shows too
DURATION = re.compile(r"^ *Duration: (\d+):(\d+):(\d+)", re.M)
DAMAGE = r"(?m)^(?! |Input).*(Invalid data|[Cc]orrupt|partial file|EBML number|exceeds containing|packet_\w+_size)"
FAILURES = {"contain any stream": "it has no audio track", "moov atom not": "its end is missing"}
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
ADVICE = "convert it to WAV, FLAC, MP3 or Ogg"


class View(io.RawIOBase):
    """The bytes `head`, then those from `start` to `stop` of a file; it tells `size`, or their number."""

    def __init__(self, file, start: int, stop: int, head: bytes = b"", size: int | None = None):
        self.file, self.head, self.stop, self.at = file, head, stop, 0
        self.start = start - len(head)  # where it would begin, were the head in the file
        self.size = size or stop - self.start

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer):
        data = self.head[self.at : self.at + len(buffer)]
        place = self.start + self.at + len(data)
        if place >= self.stop and self.at == self.size - 128:  # a tag is looked for
            data = bytes(len(buffer))
        elif 0 <= place < self.stop:  # libsndfile seeks to before the file, too
            self.file.seek(place)
            data += self.file.read(min(len(buffer) - len(data), self.stop - place))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class Forward(soundfile.SoundFile):
    """A sound file without the seek after each block, at which MP3 decoders lose samples."""

    def seekable(self):
        return False


def find_all(file, pattern: bytes, start: int, stop: int) -> Iterator[int]:
    """Where `pattern`, of at most 16 KB, occurs in a file."""
    for at in range(start, stop, 1 << 20):
        file.seek(at)
        data = file.read(min((1 << 20) + (1 << 14), stop - at))
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


def mend_wav(file, start: int, stop: int) -> tuple[bytes, int]:
    """A header for samples whose size was never written, or too early, or nothing; where they end."""

    def chunk(at):
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        return name if re.fullmatch(rb"[ -~]{4}", name) else b"", length, at + 8 + length

    end, name, length = start + 12, b"RIFF", 0
    while name and name != b"data":
        place = end + length % 2 + 8
        name, length, end = chunk(place - 8)
    follower, _, follower_end = chunk(end)
    file.seek(end)
    if re.match(rb"ID3[\2-\4]\0|" + MPEG, file.read(1 << 14), re.S):
        return b"", end  # an MP3 is behind it
    is_cut = stop - place < length < UNKNOWN
    if not name or is_cut or end in (stop, stop - 1) or follower and follower_end <= stop + 1:
        return b"", stop
    file.seek(start + 8)  # told these sizes, libsndfile reads a WAV file to its end
    return b"RIFF\x08\0\0\0" + file.read(place - 12 - start) + bytes(4), stop


def mend(file, kind: str | bytes, first: int, start: int, stop: int) -> View:
    """What libsndfile can read of the recording that begins at `first`, from a frame at `start` on."""
    file.seek(start)
    begins = file.read(64)
    if begins[:4] == b"RIFF":
        head, stop = mend_wav(file, start, stop)
        return View(file, start + len(head), stop, head)
    if kind == b"fLaC" and re.match(FRAMES[kind], begins):
        file.seek(first + 8)  # its first block, marked as the last; of unknown length
        head = bytearray(b"fLaC\x80\0\0\x22" + file.read(34))
        head[21:26] = head[21] & 0xF0, 0, 0, 0, 0
        return View(file, start, stop, bytes(head))
    if kind != "mp3" and not re.match(FRAME, begins):
        return View(file, start, stop)
    info = re.match(INFO, begins, re.S)
    if not info:
        return View(file, start, stop, size=ENDLESS)
    frames, size = struct.unpack(">2I", info[1])
    if stop - start - size <= 128 + 2 * size / max(1, frames):  # its own frame, and ID3
        return View(file, start, stop)
    head = info[0][:-8] + b"\xff" * 8  # it must not count less than is there
    return View(file, start + len(head), stop, head, 0xFFFFFFFF)


def find_parts(file, size: int) -> tuple[list[int], str | bytes, str]:
    """Where the recordings in a file begin, of what kind they are, and what is wrong."""
    file.seek(0)
    head, start, problem = file.read(10), 0, ""
    if head[:3] == b"ID3":
        start = 10 + sum((byte & 127) << 21 - 7 * i for i, byte in enumerate(head[6:]))
        file.seek(start)
        head = file.read(4)
    kind, openings = head[:4], []
    if kind == b"OggS":
        openings, problem = ogg_streams(file, start, size)
    elif kind in OPENINGS:
        openings = [*find_all(file, OPENINGS[kind], start, size)]
        behind = find_all(file, MPEG, start, size) if kind == b"fLaC" else ()
        openings = sorted([*openings, *islice(behind, 1)])
    elif not re.match(ADTS, head) and (start or head[:1] == b"\xff"):
        kind, openings = "mp3", [next(find_all(file, FRAME, start, size), size)]
    return openings or [start], kind, problem


def check_level(samples: np.ndarray, name: str) -> None:
    """Raise `ValueError` for numbers that are no audio."""
    loudest = max(-samples.min(initial=0), samples.max(initial=0))  # NaN where there is one
    if not np.isfinite(loudest):
        raise ValueError(f"{name} holds samples that are not finite (NaN): export it again.")
    if loudest > 10:  # far beyond full scale
        found = f"{name} holds samples up to {loudest:.5g} instead of 1"
        raise ValueError(f"{found}: divide by the largest of their type (32768 for 16 bits).")


@contextmanager
def delayed_interrupt() -> Iterator[None]:
    """Within this block Ctrl-C waits for its end: libsndfile would lose an exception."""
    with graceful_interrupt() as pressed:
        yield
    for number in pressed:
        signal.raise_signal(number)


def decode_part(view: View, sr: int, samples: bytearray, name: str) -> str:
    """Append the samples of one recording to `samples`. -> what is wrong with it, or nothing."""
    try:
        with delayed_interrupt():
            sound = Forward(view)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")  # of a broken MP3 it is that there is no such file
        return "no sound was found" if "regular file" in reason else reason
    with sound:
        rate, count, read, problem = sound.samplerate, 0, 1, ""
        if not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(f"{name} has a sample rate of {rate} Hz: export it again.")
        resampler = soxr.ResampleStream(rate, sr, 1)
        block = np.empty((BLOCK, sound.channels), np.float32)
        while read and not problem:
            block.fill(np.nan)
            try:
                with delayed_interrupt():
                    read = sound.buffer_read_into(block, "float32")
            except soundfile.LibsndfileError as error:
                problem = error.error_string.removeprefix("Error : ").rstrip(".")
                read = int((~np.isnan(block[:, 0])).sum())  # decoded before the damage
            count += read
            mono = sum(block[:read].T) / sound.channels  # (frames,)
            check_level(mono, name)
            mono = resampler.resample_chunk(mono, last=not read or problem != "")
            samples += mono.clip(-1, 1).tobytes()
        if problem and count < sound.frames:
            return problem
        log, stated = sound.extra_info, [sound.frames]
        if sound.format in ("AVR", "MPC2K", "MAT4", "MAT5", "NIST"):  # `frames` are those there
            view.seek(0)  # the header of NIST is not in the log
            stated += map(int, FRAME_COUNTS.findall(log + str(view.read(1024), "latin-1")))
        cut = any(int(said) > int(there) for said, there in SIZES.findall(log))
        cut = cut or any(count + rate // 10 < n < 1 << 36 for n in stated)
        return "it ends too early" if cut or "Seems to be a truncated file" in log else ""  # VOC


def decode_parts(file, sr: int, name: str) -> tuple[bytearray, str]:
    """The recordings in a file -> their samples, one after another, and what is wrong."""
    size = file.seek(0, io.SEEK_END)
    openings, kind, problem = find_parts(file, size)
    samples = bytearray()
    for first, stop in pairwise([*openings, size]):
        start = first
        while start < stop:
            view, before = mend(file, kind, first, start, stop), len(samples)
            found = decode_part(view, sr, samples, name)
            heard = len(samples) > before
            problem = problem or (found if heard or start == first else "")
            # go on behind damage, or a change of rate; what is left may be a tag
            start = max(start + 1, view.start + view.at - 4 if heard else 0)
            if kind not in FRAMES or kind == b"RIFF" and not heard:  # an AVI is no recording
                break
            start = next(find_all(file, FRAMES[kind], start, stop - 128), stop)
    return samples, problem


def decode_with_ffmpeg(file, sr: int, name: str) -> tuple[memoryview, str]:
    """A recording that libsndfile cannot read -> its samples, as openai-whisper decodes them, and
    what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = getattr(file, "name", os.path.join(folder, "recording"))
        if not hasattr(file, "name"):  # m4a and mp4 cannot be read from a pipe
            Path(path).write_bytes(file.getvalue())
        words = f"-f s16le -ac 1 -acodec pcm_s16le -ar {sr} -".split()
        command = ["ffmpeg", "-nostdin", "-threads", "0", "-i", os.path.abspath(path), *words]
        done = subprocess.run(command, capture_output=True)
    log = done.stderr.decode(errors="replace")
    if done.returncode:
        last = log.strip().split("\n")[-1].strip(" .").removeprefix(f"{command[5]}: ")
        known = [said for words, said in FAILURES.items() if words in log]
        reason, advice = (known[0], "give another") if known else (f"ffmpeg: {last}", ADVICE)
        raise ValueError(f"{name} cannot be decoded ({reason}): {advice}.")
    integers = np.frombuffer(done.stdout, "<i2", len(done.stdout) // 2)
    hours, minutes, seconds = map(int, DURATION.search(f"{log}\nDuration: 0:0:0").groups())
    ends_early = len(integers) / sr < 3600 * hours + 60 * minutes + seconds - 1
    samples = memoryview(integers / np.float32(32768)).cast("B")
    return samples, "parts are missing" if ends_early or re.search(DAMAGE, log) else ""


def check_recording(path: str | os.PathLike) -> None:
    """Raise `ValueError` where there is no recording to open."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is not a file but a folder: name the recordings in it.")
    if os.fspath(path) != "-" and not os.path.exists(path):
        raise ValueError(f"{path} is not a file: check the path.")


def open_source(source, name: str):
    """Path, "-", bytes or binary file object -> a binary file that can be searched."""
    if isinstance(source, str | os.PathLike) and os.fspath(source) == "-":
        source = getattr(sys.stdin, "buffer", sys.stdin)
    elif isinstance(source, str | os.PathLike):
        check_recording(source)
        source = open(source, "rb")  # noqa: SIM115
        if source.seekable():
            return source
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
        reason = f"{error.strerror or error}: {machine_advice(error)}"
        raise ValueError(f"{name} cannot be read: {reason}.") from error
    with file:
        if file.read(6) == b"\x93NUMPY":
            raise ValueError(f"{name} is a NumPy array: read it with np.load, and give the array.")
        samples, problem = decode_parts(file, sr, name)
        if problem and not samples and shutil.which("ffmpeg"):
            samples, missing = decode_with_ffmpeg(file, sr, name)
            problem = problem if "malformed" in problem else missing  # libsndfile knew the format
    if not samples:
        retry = "record it again" + " or call its seek(0)" * hasattr(source, "read")
        advice = f"{ADVICE}, or install ffmpeg, which reads m4a, mp4 and webm" if problem else retry
        reason = problem or "it holds no samples"
        raise ValueError(f"{name} cannot be decoded ({reason}): {advice}.")
    if problem:
        seconds = len(samples) / 4 / sr
        warnings.warn(f"{name} is damaged ({problem}): {seconds:.1f} s are read.", stacklevel=3)
    return torch.frombuffer(samples, dtype=torch.float32)
