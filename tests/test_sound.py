"""Recordings as they arrive: joined, cut short, damaged, unfinished, long, of odd rates; ffmpeg."""

import errno
import io
import os
import signal
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from utils import sound
from utils.audio import load_audio
from utils.files import graceful_interrupt
from utils.sound import BLOCK
from utils.waveforms import load_waveform

VORBIS, OPUS = dict(format="OGG", subtype="VORBIS"), dict(format="OGG", subtype="OPUS")
FLAC, MP3, WAV = dict(format="FLAC"), dict(format="MP3"), dict(format="WAV")
ID3 = b"ID3\4\0\0\0\0\0\x64" + bytes(100)
NOISE = np.random.default_rng(0)
JUNK = NOISE.integers(0, 256, 5000, dtype=np.uint8).tobytes()


def encode(seconds=2.0, hz=440, sr=16000, channels=1, **options):
    """A tone and a little noise, as a file."""
    time = np.arange(round(seconds * sr)) / sr
    wave = 0.3 * np.sin(2 * np.pi * hz * time) + 0.02 * NOISE.standard_normal(len(time))
    file = io.BytesIO()
    soundfile.write(file, np.stack([wave] * channels, axis=1), sr, **options)
    return file.getvalue()


def replaced(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def with_sizes(data, riff, samples):
    """A WAV file whose header gives these sizes."""
    at = data.index(b"data") + 4
    return replaced(
        replaced(data, 4, riff.to_bytes(4, "little")), at, samples.to_bytes(4, "little")
    )


def of_unknown_length(data):
    at = data.index(b"fLaC") + 21
    return replaced(data, at, bytes([data[at] & 0xF0, 0, 0, 0, 0]))


def without_info(data):
    return data.replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))


def pitches(sound):
    """The strongest tone of each second, in Hz."""
    return [torch.fft.rfft(s).abs().argmax().item() for s in sound.split(16000) if len(s) == 16000]


@pytest.mark.parametrize(
    "options", [VORBIS, OPUS, FLAC, MP3, WAV], ids=lambda o: o.get("subtype", o["format"])
)
@pytest.mark.parametrize("second", [(16000, 1), (48000, 2), (24000, 1)], ids=str)
@pytest.mark.parametrize("between", [b"", ID3], ids=["", "tag"])
def test_all_of_joined_files_is_read(options, second, between):
    first = encode(hz=440, **options)
    joined = between + first + between + encode(hz=880, sr=second[0], channels=second[1], **options)
    joined += between + encode(1, hz=220, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sound = load_audio(joined)
    assert 5 <= len(sound) / 16000 < 5.5  # some more in MP3
    found = pitches(sound)
    assert abs(found[0] - 440) <= 2 and abs(found[3] - 880) <= 2 and abs(found[4] - 220) <= 2


def id3v2(picture):
    """A tag with a picture, which may hold anything."""
    size = bytes(len(picture) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\4\0\0" + size + picture


@pytest.mark.parametrize("first", [WAV, WAV | {"subtype": "PCM_U8"}, FLAC], ids=str)
@pytest.mark.parametrize("between", [b"", ID3, id3v2(JUNK)], ids=["", "tag", "picture"])
@pytest.mark.parametrize("prepare", [bytes, without_info])
def test_an_mp3_behind_another_recording_is_read(first, between, prepare):
    joined = encode(2.001, 440, **first) + between + prepare(encode(2, 880, **MP3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sound = load_audio(joined)
    assert 3.9 <= len(sound) / 16000 < 4.3
    assert pitches(sound)[:4] == pytest.approx([440, 440, 880, 880], abs=2)


def riff_chunk(name, content):
    return name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)


@pytest.mark.parametrize(
    "data",
    [
        encode(**WAV) + riff_chunk(b"LIST", b"INFOIART\4\0\0\0Ann\0"),
        encode(**WAV) + riff_chunk(b"id3 ", id3v2(JUNK)) + riff_chunk(b"bext", bytes(602)),
        encode(**WAV) + riff_chunk(b"LGWV", JUNK[:801]),
        encode(**WAV) + b"TAG" + bytes(125),
        encode(**FLAC) + b"TAG" + bytes(125),
        encode(**MP3) + b"APETAGEX\xd0\7\0\0" + JUNK[:100] + b"TAG" + bytes(125),
        encode(**MP3) + b"LYRICSBEGIN" + b"la " * 50 + b"000161LYRICS200TAG" + bytes(125),
        encode(**WAV)
        + riff_chunk(b"LIST", b"INFO" + riff_chunk(b"INAM", b"truncated Frames : 999999")),
        *(encode(format=name) for name in ("RF64", "W64", "AIFF", "CAF", "AU")),
        encode(format="AIFF") + id3v2(JUNK),
    ],
    ids=lambda data: f"{data[:4]}{len(data)}",
)
def test_what_follows_a_whole_recording_is_no_sound(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 2 <= len(load_audio(data)) / 16000 < 2.01


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT", "ULAW", "IMA_ADPCM"])
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 0),
        (8, 0),
        (36, 0),
        (32044, 0),
        (2**32 - 1, 2**32 - 1),
        (0x7FFFF024, 0x7FFFF000),
        (836, 800),
    ],
    ids=["never", "8", "36", "right-0", "pipe", "sox", "early"],
)
def test_wav_with_an_unfinished_header_is_read_whole(subtype, sizes):
    whole = encode(**WAV, subtype=subtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_audio(with_sizes(whole, *sizes)), load_audio(whole))


@pytest.mark.posix
@pytest.mark.parametrize("size", [0, 5000, 2**32 - 1])
def test_an_unfinished_wav_beyond_four_gigabytes_is_read_whole(size, tmp_path):
    """Its length does not fit into a header, nor does what is left of it after 2**32 bytes."""
    header, length = with_sizes(encode(0, **WAV, channels=2), 36, size), 5 * 2**30
    with (tmp_path / "long").open("w+b") as file:  # nearly all of it is a hole
        file.write(header)
        file.truncate(len(header) + length)
        view = sound.mend(file, b"RIFF", 0, 0, len(header) + length)
        assert soundfile.SoundFile(view).frames == length / 4


def test_a_piped_w64_file_is_read_without_a_word(monkeypatch):
    """As ffmpeg writes it: of 2**63 - 1 bytes. libsndfile then seeks to before the file."""
    whole = encode(format="W64")
    piped, seen = replaced(whole, 16, b"\xff" * 8), []
    piped = replaced(piped, whole.index(b"data") + 16, b"\xff" * 7 + b"\x7f")
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    assert torch.equal(load_audio(piped), load_audio(whole)) and not seen


def test_chunks_behind_the_samples_are_no_samples():
    whole, more = encode(**WAV), b"LIST\4\0\0\0INFO"
    assert torch.equal(load_audio(whole + more), load_audio(whole))
    with pytest.raises(ValueError, match="no samples"):
        load_audio(encode(0, **WAV) + more)


@pytest.mark.parametrize("tag", [b"", ID3], ids=["", "tag"])
def test_flac_of_unknown_length_is_read_whole(tag):
    whole = encode(**FLAC)
    assert torch.equal(load_audio(tag + of_unknown_length(whole)), load_audio(whole))
    with pytest.warns(UserWarning, match=r"lost sync\): 0.\d s are read"):
        load_audio(of_unknown_length(whole)[: len(whole) // 2])


@pytest.mark.parametrize(
    "options", [VORBIS, OPUS, FLAC, MP3, WAV], ids=lambda o: o.get("subtype", o["format"])
)
def test_what_a_cut_file_holds_is_read_with_a_warning(options):
    whole = encode(8, **options)
    for name, data in (("cut", whole[: len(whole) * 2 // 3]), ("joined", whole + whole[:-600])):
        with pytest.warns(UserWarning, match="the recording is damaged .*s are read") as caught:
            sound = load_audio(data)
        seconds = len(sound) / 16000
        assert (3 < seconds < 6) if name == "cut" else (13 < seconds < 16.2), name
        assert f"{seconds:.1f} s are read" in str(caught[0].message)
        torch.testing.assert_close(sound[:32000], load_audio(whole)[:32000], atol=1e-4, rtol=0)
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "least"), [(VORBIS, 3.5), (OPUS, 3.5), (FLAC, 6.9), (MP3, 7.9)]
)
def test_damage_in_the_middle_is_said(options, least):
    whole = encode(8, **options)
    middle = len(whole) // 2
    damaged = [whole[:middle] + JUNK + whole[middle:]]
    if options != MP3:
        damaged.append(replaced(whole, middle, bytes([whole[middle] ^ 1])))
    if options in (VORBIS, OPUS):  # a page is lost
        pages = whole.split(b"OggS")
        damaged.append(b"OggS".join(pages[:5] + pages[6:]))
    for data in damaged:
        with pytest.warns(UserWarning, match="damaged"):
            assert len(load_audio(data)) / 16000 > least


def test_junk_in_an_mp3_is_passed_over_at_once(monkeypatch):
    """A third of a megabyte of a failing card: what only looks like a frame is not tried."""
    calls, read = [], sound.View.readinto
    monkeypatch.setattr(sound.View, "readinto", lambda *given: calls.append(1) or read(*given))
    junk = NOISE.integers(0, 256, 300_000, dtype=np.uint8).tobytes()
    with pytest.warns(UserWarning, match="damaged"):
        heard = load_audio(encode(2, 440, **MP3) + junk + encode(2, 880, **MP3) + b"\xff" * 30_000)
    assert pitches(heard)[:4] == pytest.approx([440, 440, 880, 880], abs=2)
    assert len(calls) < 5000


@pytest.mark.parametrize("kind", ["AIFF", "AU", "CAF", "RF64", "W64"])
def test_rarer_files_are_joined_or_cut(kind, monkeypatch):
    monkeypatch.setenv("PATH", "")  # ffmpeg would read what is left of it
    whole = encode(8, format=kind, subtype="PCM_16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sound = load_audio(whole)
        assert len(sound) == 8 * 16000 and torch.equal(load_audio(whole + whole), sound.repeat(2))
    if kind == "CAF":
        with pytest.raises(ValueError, match="cannot be decoded .*malformed"):
            load_audio(whole[:90000])
    else:
        for data, seconds in ((whole[:90000], 2.8), (whole + whole[:90000], 10.8)):
            with pytest.warns(UserWarning, match=rf"ends too early\): {seconds} s are read"):
                load_audio(data)


@pytest.mark.parametrize("kind", ["SVX", "NIST", "VOC", "AVR", "MPC2K", "MAT4", "MAT5"])
def test_a_file_of_a_rare_format_is_whole_or_it_is_said(kind):
    whole = encode(8, format=kind, subtype="PCM_16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_audio(whole)) == 8 * 16000
    with pytest.warns(UserWarning, match=r"ends too early\): 2.8 s are read"):
        load_audio(whole[:90000])


def test_mp3_without_a_frame_count_is_read_to_its_end():
    """libsndfile guesses its length by its first frame, a quiet one here."""
    wave = np.concatenate([np.zeros(16000), 0.3 * NOISE.standard_normal(64000)])
    file = io.BytesIO()
    soundfile.write(file, wave, 16000, **MP3, bitrate_mode="VARIABLE")
    for data in (
        file.getvalue(),
        without_info(file.getvalue()),
        JUNK[:300].replace(b"\xff", b"x") + file.getvalue(),
    ):
        if data[:1] == b"\xff":
            assert abs(len(load_audio(ID3 + data)) - 80000) < 3000
    counted = file.getvalue() + without_info(file.getvalue())
    assert abs(len(load_audio(counted)) - 160000) < 5000


@pytest.mark.parametrize(
    "options", [VORBIS, OPUS, FLAC, MP3, WAV], ids=lambda o: o.get("subtype", o["format"])
)
def test_sixteen_kilohertz_are_left_alone(options):
    data = encode(5, channels=3 if options in (FLAC, WAV) else 2, **options)
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    theirs = torch.from_numpy(samples).mean(dim=1).clamp(-1, 1)
    torch.testing.assert_close(load_audio(data), theirs, atol=1e-7 if options == MP3 else 0, rtol=0)


@pytest.mark.parametrize("rate", [7350, 8000, 11025, 11127, 22050, 44100, 48000, 96000, 192000])
def test_blocks_are_resampled_as_the_whole_is(rate):
    data = encode(1.7 * BLOCK / rate, sr=rate, channels=2, **WAV)
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    theirs = soxr.resample(samples.mean(axis=1), rate, 16000)
    assert abs(len(theirs) / 16000 - 1.7 * BLOCK / rate) < 1e-4
    torch.testing.assert_close(load_audio(data), torch.from_numpy(theirs), atol=1e-6, rtol=0)


# Where it comes from


class Stream:
    """What a web server gives: nothing but `read`."""

    def __init__(self, data):
        self.data = data

    def read(self):
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


@pytest.mark.posix
def test_sources(tmp_path, monkeypatch):
    data = encode(**FLAC)
    ours = load_audio(data)
    path = tmp_path / "naïve \udce9\n.flac"  # as Python spells a name that is no UTF-8
    path.write_bytes(data)
    read, write = os.pipe()
    threading.Thread(target=os.fdopen(write, "wb").write, args=[data]).start()
    with open(read, "rb") as pipe, path.open("rb") as file:
        sources = [
            path,
            str(path),
            bytearray(data),
            memoryview(bytes(2) + data)[2:],
            io.BytesIO(data),
            file,
            pipe,
        ]
        for source in [*sources, Stream(data), Stream(bytearray(data))]:
            assert torch.equal(load_audio(source), ours), source
    for stdin in (io.TextIOWrapper(io.BytesIO(data)), Stream(data)):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert torch.equal(load_audio("-" if isinstance(stdin, Stream) else Path("-")), ours)


@pytest.mark.posix
def test_a_named_pipe(tmp_path):
    data, path = encode(**WAV), tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=[data]).start()
    assert torch.equal(load_audio(path), load_audio(data))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "it holds no samples.: record it again"),
        ("no/such.wav", "no/such.wav is not a file: check the path"),
        ("x" * 300, "is not a file"),
        ("a\0b", "is not a file"),
        (Path(__file__).parent, "is not a file but a folder: name the recordings in it"),
        (np.zeros(9, np.float32), "ndarray instead of bytes"),
        (Stream("text"), "str instead of bytes"),
        (Stream(b""), r"no samples\): record it again or call its seek\(0\)"),
        (
            Stream(PermissionError(13, "Permission denied")),
            "cannot be read: Permission denied: change its permissions",
        ),
        (io.TextIOWrapper(io.BytesIO(encode(**FLAC))), "TextIOWrapper instead of bytes"),
        (encode(**WAV)[:44], "no samples|ends too early"),
        (encode(**FLAC)[:90], "cannot be decoded"),
        (encode(**OPUS)[:90], "pages are damaged or missing"),
        (encode(**MP3)[:90], r"cannot be decoded \(no sound was found\)"),
        (
            b"RIFF\x00\x02\0\0AVI LIST" + bytes(500),
            "Format not recognised.*ffmpeg, which reads m4a",
        ),
        (encode(sr=1, **WAV), "a sample rate of 1 Hz"),
        (b"\0\0\0\x20ftypM4A " + bytes(500), "install ffmpeg"),
        (b"\xff\xf1\x50\x80\x2e\x7f\xfc" * 90, "install ffmpeg"),
        ("-", "NoneType instead of bytes"),
    ],
    ids="no none long nul dir np str end deny mode wav flac opus mp3 avi hz m4a aac in".split(),
)
def test_refusals(source, words, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match=words) as caught:
        load_audio(source)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


# Arrays, tensors and what is none of them


class Broken:
    """What fails when its samples are asked for."""

    def __array__(self, *given, **named):
        raise OSError(5, "the file is gone")


class BrokenDecoder:
    def get_all_samples(self):
        raise RuntimeError("could not push a packet.\nmore")


WAVE = 0.3 * np.sin(np.arange(16000, dtype=np.float32))
SPARSE = torch.tensor(WAVE).to_sparse()
STRANGE = {
    "sparse": SPARSE,
    "quantised": torch.quantize_per_tensor(torch.tensor(WAVE), 0.01, 0, torch.qint8),
    "meta": torch.zeros(16000, device="meta"),
    "broken": Broken(),
    "decoder": BrokenDecoder(),
    "sparse in a dictionary": {"array": SPARSE, "sampling_rate": 16000},
    "structured": np.zeros(9, dtype=[("left", "f4"), ("right", "f4")]),
    "masked objects": np.array([None, 0.5]),
    "path of a number": {"path": 5},
}


@pytest.mark.parametrize("name", STRANGE)
def test_arrays_that_are_none_are_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match=r"recording (cannot be|must be)") as caught:
        load_waveform(STRANGE[name])
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


class Segment:
    """As of pydub: each of its items is a segment again."""

    def __len__(self):
        return 3

    def __getitem__(self, at):
        raise AssertionError("it is looked into")


def test_a_file_of_an_array_is_no_recording(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(16_000, np.float32))
    with pytest.raises(ValueError, match=r"a\.npy is a NumPy array: read it with np\.load"):
        load_audio(tmp_path / "a.npy")


def test_what_is_no_array_is_not_looked_into():
    with pytest.raises(ValueError, match="got Segment .*: numpy.array makes one"):
        load_waveform(Segment())


def test_an_array_so_short_that_nothing_is_left_of_it():
    with pytest.raises(ValueError, match="holds no samples at 16 kHz: record it again"):
        load_waveform({"array": WAVE[:1], "sampling_rate": 48000})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    with pytest.raises(ValueError, match="cannot be read"):
        load_waveform(torch.nested.nested_tensor([torch.tensor(WAVE)]))


RATES = [1e12, 1e-3, 0, -16000, float("nan"), float("inf"), "16000", None, 999, True, [16000]]
RATES += [np.float64("nan"), np.complex64(16000), np.array([16000]), torch.tensor([8000, 16000])]


@pytest.mark.parametrize("rate", RATES, ids=repr)
def test_rates_that_no_sound_has_are_refused(rate):
    with pytest.raises(ValueError, match="must be 1000 to 1000000 Hz, got"):
        load_waveform({"array": WAVE, "sampling_rate": rate})


@pytest.mark.parametrize("rate", [8000, 8000.0, np.int32(8000), torch.tensor(8000)], ids=repr)
def test_rates_of_all_kinds_are_numbers(rate):
    found = load_waveform({"array": WAVE, "sampling_rate": rate})
    assert torch.equal(found, torch.from_numpy(soxr.resample(WAVE, 8000, 16000)))


# ffmpeg, played by a script


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """A folder of its own on PATH; calling it with the body of a script puts `ffmpeg` there."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.defpath}")

    def install(body):
        path = tmp_path / "bin" / "ffmpeg"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\nimport array, sys\nwords = sys.argv[1:]\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return install


M4A = b"\0\0\0\x20ftypM4A \0\0\2\0isomiso2" + bytes(500)
WRITES = """
assert words == ["-nostdin", "-threads", "0", "-i", words[4], *"-f s16le -ac 1 -acodec".split(),
                 "pcm_s16le", "-ar", "16000", "-"], words
assert open(words[4], "rb").read() == bytes.fromhex("%s")
sys.stderr.write("chatter" * 20000)
sys.stdout.buffer.write(array.array("h", [i %% 100 for i in range(300000)]).tobytes() + b"x")
"""


@pytest.mark.posix
def test_ffmpeg_reads_the_rest(ffmpeg, tmp_path):
    ffmpeg(WRITES % M4A.hex())
    path = tmp_path / "-i note: 1.m4a"
    path.write_bytes(M4A)
    expected = torch.arange(300000).remainder(100) / 32768
    for source in (path, M4A, io.BytesIO(M4A)):
        assert torch.equal(load_audio(source), expected)


@pytest.mark.posix
def test_ffmpeg_is_asked_last_and_its_refusal_is_a_sentence(ffmpeg):
    ffmpeg("sys.exit(f'noise\\n{words[4]}: Invalid data found.\\n')")
    assert len(load_audio(encode(**WAV))) == 32000
    refusal = r"cannot be decoded \(ffmpeg: Invalid data found\): convert it to WAV"
    with pytest.raises(ValueError, match=refusal):
        load_audio(M4A)


@pytest.mark.posix
@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("Output file does not contain any stream", r"\(it has no audio track\): give another"),
        ("[mov,mp4 @ 0x5] moov atom not found", r"\(its end is missing\): give another"),
    ],
)
def test_what_ffmpeg_says_before_its_last_line(log, words, ffmpeg):
    """Since version 6, its last line alone says nothing."""
    ffmpeg(f"sys.exit({log!r} + '\\nError opening output files: Invalid argument')")
    with pytest.raises(ValueError, match=words):
        load_audio(M4A)


@pytest.mark.posix
def test_ffmpeg_is_not_asked_for_a_rate_that_would_fill_the_memory(ffmpeg):
    """At 1 Hz, a minute of samples would last two weeks."""
    ffmpeg("sys.stdout.buffer.write(bytes(32000))")
    for rate in (1, 999, 1_000_001):
        with pytest.raises(ValueError, match=f"has a sample rate of {rate} Hz: export it again"):
            load_audio(encode(100 / rate, sr=rate, **WAV))


@pytest.mark.posix
@pytest.mark.parametrize(
    ("log", "problem"),
    [
        ("Duration: 00:00:08.00, start: 0.000000", "parts are missing"),
        ("Duration: 01:00:02.00, start: 0.000000", "parts are missing"),
        ("Packet corrupt (stream = 0, dts = 605520).", "parts are missing"),
        ("stream 0, offset 0x8869: partial file", "parts are missing"),
        ("Error while decoding stream #0:0: Invalid data found", "parts are missing"),
        ("0x00 at pos 5 (0x5) invalid as first byte of an EBML number", "parts are missing"),
        ("Element at 0x5 ending at 0x9 exceeds containing master element", "parts are missing"),
        ("[asf @ 0x5] packet_obj_size -5 invalid", "parts are missing"),
        ("Duration: 00:00:03.02, start: 0.000000", ""),
        ("Duration: N/A, start: 0.000000", ""),
        ("Input #0, mov, from 'partial file.m4a':\n  Metadata:\n    title : Corruption", ""),
        ("Input #0, webm, from 'a.webm':\n    title : EBML number, packet_obj_size", ""),
        ("  Metadata:\n    comment : Duration: 01:00:00\n            : Invalid data found", ""),
    ],
)
def test_what_ffmpeg_leaves_out_is_said(log, problem, ffmpeg):
    ffmpeg(f"sys.stderr.write({log!r}); sys.stdout.buffer.write(bytes(64000))")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(load_audio(M4A)) == 32000
    expected = [f"the recording is damaged ({problem}): 2.0 s are read."] if problem else []
    assert [str(warning.message) for warning in caught] == expected


@pytest.mark.posix
def test_a_known_format_that_only_ffmpeg_can_read_is_damaged(ffmpeg):
    ffmpeg("sys.stdout.buffer.write(bytes(64000))")
    with pytest.warns(UserWarning, match=r"damaged \(.*malformed\): 2.0 s are read"):
        assert len(load_audio(encode(8, format="CAF", subtype="PCM_16")[:90000])) == 32000


@pytest.mark.posix
@pytest.mark.parametrize("tag", [b"", ID3], ids=["", "tag"])
def test_aac_is_not_taken_for_mp3(tag, ffmpeg):
    """Its frames begin much alike, and somewhere in eight seconds are bytes as of an MP3."""
    ffmpeg("sys.stdout.buffer.write(bytes(64000))")
    for second in (0xF0, 0xF1, 0xF8, 0xF9):
        aac = bytes([0xFF, second, 0x50, 0x80, 0x2E, 0x7F, 0xFC]) + encode(**MP3)
        assert torch.equal(load_audio(tag + aac), torch.zeros(32000))


@pytest.mark.posix
def test_ffmpeg_finds_nothing(ffmpeg):
    ffmpeg("")
    with pytest.raises(ValueError, match="holds no samples"):
        load_audio(b"")
    with pytest.raises(ValueError, match="holds no samples"):
        load_audio(M4A)


# Long recordings

MEASURE = """
import resource, sys
from utils.audio import load_audio
load_audio(sys.argv[1])
for path in sys.argv[2:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = load_audio(path)
    print(len(samples), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.posix
def test_memory_is_that_of_the_samples_that_come_out(tmp_path):
    """Five minutes of stereo are 115 MB as they are decoded, 19 MB as they come out."""
    (tmp_path / "short").write_bytes(encode(1, **FLAC))
    for name, rate, channels, options in (("odd", 11127, 1, WAV), ("stereo", 48000, 2, FLAC)):
        with soundfile.SoundFile(tmp_path / name, "w", rate, channels, **options) as file:
            for _ in range(300):
                file.write(np.full((rate, channels), 0.1))
    command = [sys.executable, "-c", MEASURE, *(tmp_path / x for x in ("short", "odd", "stereo"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        samples, kilobytes = map(int, line.split())
        unit = 1e6 if sys.platform == "darwin" else 1e3
        assert samples == 300 * 16000 and kilobytes / unit < 19.2 + 25


@pytest.fixture
def pressing(monkeypatch):
    """Ctrl-C is pressed in a callback of libsndfile; the calls of it."""
    read, calls = sound.View.readinto, []

    def press(view, buffer):
        calls.append(view.at)
        if len(calls) == 40:
            signal.raise_signal(signal.SIGINT)
        return read(view, buffer)

    monkeypatch.setattr(sound.View, "readinto", press)
    return calls


def test_ctrl_c_while_decoding(pressing):
    """libsndfile would swallow it in a callback, and what is read would end there."""
    with pytest.raises(KeyboardInterrupt):
        load_audio(encode(600, **WAV))
    assert 40 <= len(pressing) < 60, "it reads on"


def test_a_ctrl_c_that_ends_nothing_cuts_no_recording(pressing):
    """Training only notes it; in the background of a script it is ignored."""
    with graceful_interrupt() as pressed:
        assert len(load_audio(encode(600, **WAV))) == 600 * 16000
    assert pressed == [signal.SIGINT] and len(pressing) > 60


@pytest.mark.posix
def test_a_full_disk_below_ffmpeg_is_one_exception(ffmpeg, tmp_path, monkeypatch):
    """Bytes are written to a file for it: that this fails must not hide behind their release."""
    ffmpeg("exit 1")

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        load_audio(M4A)
