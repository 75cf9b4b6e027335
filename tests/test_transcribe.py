"""Transcription: where windows lie, kinds of recordings, batches, subtitles, bad input."""

import copy
import io
import sys
from dataclasses import replace

import librosa
import pytest
import soundfile
import torch
import whisper
from recordings import TOKENIZER, TWO, babble, hiss, official, recording, silence, wild_model

from utils.audio import HOP_LENGTH, SAMPLE_RATE
from utils.model import Whisper
from utils.transcribe import (
    FORMATS,
    MIN_PHRASE,
    VAD_FRAME,
    check_layout,
    decode_windows,
    energy_db,
    merge_windows,
    speech_windows,
    transcribe,
    write_result,
)

LONGEST = 5 * SAMPLE_RATE
MODELS = {name: official(*name) for name in [(False, 0), (True, 1), (True, 3)]}


@pytest.fixture(scope="module")
def model():
    return wild_model()


SPOKEN = [(1.0, 3.0), (4.0, 5.5)]  # seconds


def check_structure(windows, samples, longest=LONGEST):
    edges = [0, *(edge for window in windows for edge in window), samples]
    assert edges == sorted(edges), "windows overlap or leave the recording"
    assert all(0 < stop - start <= longest for start, stop in windows)


@pytest.mark.parametrize(
    "audio",
    [
        pytest.param(TWO, id="clean"),
        pytest.param(hiss(TWO, 0.01), id="noisy"),
        pytest.param(0.02 * TWO, id="quiet"),
        pytest.param((8 * TWO).clamp(-1, 1), id="clipped"),
        pytest.param(0.5 * TWO + 0.3, id="offset"),
        pytest.param(TWO.double(), id="float64"),
    ],
)
def test_windows_hold_the_speech_and_a_small_margin(audio):
    windows = speech_windows(audio - audio.mean(), LONGEST)
    check_structure(windows, len(audio))
    assert len(windows) == 2
    for (start, stop), (first, last) in zip(windows, SPOKEN, strict=True):
        assert 0.05 <= first - start / SAMPLE_RATE <= 0.2
        assert 0.05 <= stop / SAMPLE_RATE - last <= 0.2


def test_windows_hold_what_librosa_finds():
    clips = [recording(seed, 3) for seed in range(3)]
    audio = hiss(torch.cat([torch.cat([clip, silence(0.9)]) for clip in clips]), 5e-4)
    windows, slack = speech_windows(audio, LONGEST), 1600  # librosa has blocks of whole windows
    found = librosa.effects.split(audio.numpy(), top_db=35, frame_length=1600, hop_length=VAD_FRAME)
    long = [pair for pair in found.tolist() if pair[1] - pair[0] > MIN_PHRASE * VAD_FRAME]
    edges = [edge for window in windows for edge in window]
    assert len(long) > 5 and edges == sorted(edges)
    for start, stop in long:
        covered = sum(max(0, min(stop, b) - max(start, a)) for a, b in windows)
        assert covered > stop - start - 2 * slack, "librosa finds speech between the windows"


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_energy_is_librosas_level_whatever_the_offset(offset):
    noise = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    rms = librosa.feature.rms(y=noise.numpy(), frame_length=1600, hop_length=320, center=False)[0]
    reference = 20 * torch.from_numpy(rms).log10()  # (frames - 4,): whole windows only
    torch.testing.assert_close(energy_db(noise + offset)[2:-2], reference, rtol=0, atol=0.1)


@pytest.mark.parametrize("pause", [0.12, 0.2, 0.4])
def test_a_long_stretch_is_cut_in_its_pauses(pause):
    audio = torch.cat([torch.cat([babble(1.6, seed), silence(pause)]) for seed in range(9)])
    windows = speech_windows(audio, LONGEST)
    check_structure(windows, len(audio))
    assert len(windows) > 2
    for _, stop in windows[:-1]:
        around = audio[stop - VAD_FRAME : stop + VAD_FRAME]
        assert (around == 0).any(), "cut amid speech although there was a pause"


@pytest.mark.parametrize("seconds", [5.01, 12, 61])
@pytest.mark.parametrize("longest", [LONGEST, SAMPLE_RATE, VAD_FRAME])
def test_a_stretch_without_any_pause_is_covered(seconds, longest):
    audio = babble(seconds)
    windows = speech_windows(audio, longest)
    check_structure(windows, len(audio), longest)
    covered = sum(stop - start for start, stop in windows)
    assert covered > len(audio) - 0.3 * SAMPLE_RATE
    assert all(a[1] == b[0] for a, b in zip(windows[:-1], windows[1:], strict=True))


@pytest.mark.parametrize(
    "audio",
    [
        pytest.param(silence(3), id="silence"),
        pytest.param(silence(0.001), id="16 samples"),
        pytest.param(torch.full((48_000,), 0.5), id="offset alone"),
        pytest.param(hiss(silence(20), 0.003), id="hiss"),
        pytest.param(hiss(silence(20), 0.2), id="loud noise"),
        pytest.param(torch.sin(0.02 * torch.arange(48_000)), id="hum"),
        pytest.param(torch.cat([silence(2), babble(0.04), silence(2)]), id="knock"),
    ],
)
def test_where_nobody_speaks_the_text_is_empty(model, audio):
    assert transcribe(model, audio) == {"text": "", "segments": [], "language": "en"}


@pytest.mark.parametrize("samples", [1, 319, 321, 4000, 16_001, 79_999])
def test_any_length_goes_through(model, samples):
    result = transcribe(model, babble(6)[:samples], TOKENIZER)
    assert all(0 <= s["start"] < s["end"] <= samples / SAMPLE_RATE for s in result["segments"])


def test_segments_are_ordered_and_make_the_text(model):
    result = transcribe(model, TWO)
    assert [segment["id"] for segment in result["segments"]] == [0, 1]
    assert set(result["segments"][0]) == {"id", "start", "end", "text"}
    assert result["text"] == " ".join(s["text"] for s in result["segments"] if s["text"])
    assert result["segments"][0]["end"] <= result["segments"][1]["start"]


def test_batches_and_training_mode_change_nothing(model):
    parts = [torch.cat([babble(0.5 + 0.3 * i, i), silence(0.9)]) for i in range(9)]
    audio = torch.cat(parts)
    result = transcribe(model, audio, TOKENIZER)
    assert len(result["segments"]) == 9 and len({s["text"] for s in result["segments"]}) > 1
    for size in (1, 2, 100):
        assert transcribe(model, audio, TOKENIZER, batch_size=size) == result
    model.train()
    assert transcribe(model, audio, TOKENIZER) == result and model.training
    model.eval()


@pytest.mark.parametrize("name", [(False, 0), (True, 1)])
def test_training_mode_changes_no_long_form(name):
    """With dropout, any pass in training mode would change texts, languages or word times."""
    _, ours = MODELS[name]
    noisy, asked = copy.deepcopy(ours), dict(temperature=0.0, sample_len=6, word_timestamps=True)
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    expected = transcribe(ours, recording(1, 4), **asked)
    assert transcribe(noisy.train(), recording(1, 4), **asked) == expected and noisy.training
    with pytest.raises(ValueError, match="beam_size"):
        transcribe(noisy, TWO, beam_size=0)
    assert noisy.training


def test_a_window_alone_has_the_same_text(model):
    windows = [babble(1.3, 1), babble(4.9, 2), babble(0.2, 3)]
    together = decode_windows(model, TOKENIZER, windows)
    assert together == [decode_windows(model, TOKENIZER, [window])[0] for window in windows]
    assert decode_windows(model, TOKENIZER, []) == []


def test_a_context_that_is_no_whole_half_second(model):
    torch.manual_seed(0)
    small = Whisper(replace(model.args, max_t=72)).eval()
    segments = transcribe(small, babble(3))["segments"]
    assert all(s["end"] - s["start"] <= 72 * HOP_LENGTH / SAMPLE_RATE for s in segments)
    assert len(segments) > 3


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_of_any_rate_and_channels(model, rate, channels):
    time = torch.arange(3 * rate) / rate
    spoken = (time > 1) & (time < 2)
    sound = 0.3 * spoken * torch.sin(2 * torch.pi * 300 * time)
    file = io.BytesIO()
    soundfile.write(file, sound[:, None].expand(-1, channels).numpy(), rate, format="WAV")
    (segment,) = transcribe(model, file.getvalue())["segments"]
    assert segment["start"] == pytest.approx(0.9, abs=0.06)
    assert segment["end"] == pytest.approx(2.1, abs=0.06)


@pytest.mark.parametrize(
    ("audio", "sentence"),
    [
        (torch.zeros(2, 16_000), r"shape \(2, 16000\)"),
        (torch.zeros(0), r"shape \(0,\)"),
        (torch.zeros(16_000, dtype=torch.int16), "int16"),
        (torch.full((16_000,), torch.nan), "not finite"),
        ("nowhere.wav", "nowhere.wav is not a file"),
        (b"no sound", "cannot be decoded"),
        (b"", "cannot be decoded"),
    ],
)
def test_bad_recordings_are_refused(model, audio, sentence):
    with pytest.raises(ValueError, match=sentence):
        transcribe(model, audio)


@pytest.mark.parametrize("size", [0, -1, 2.5, "x", None])
def test_a_batch_size_that_is_none_is_refused(model, size):
    for hearer in (model, MODELS[True, 1][1]):
        with pytest.raises(
            ValueError, match=f"`batch_size` must be a whole number > 0, got {size!r}[.]$"
        ):
            transcribe(hearer, TWO, batch_size=size)


def words(text, start, step=0.3):
    parts = [" " + word for word in text.split()]
    return [
        {"word": part, "start": start + step * i, "end": start + step * (i + 0.9), "probability": 1}
        for i, part in enumerate(parts)
    ]


def result_of(texts, step=1800.5, timed=False):
    segments = [
        {"id": i, "start": step * i, "end": step * i + 2.3456, "text": text}
        for i, text in enumerate(texts)
    ]
    for segment in segments if timed else []:
        segment["words"] = words(segment["text"], segment["start"])
    return {"text": "".join(texts), "segments": segments, "language": "en"}


NASTY = [
    " one, two --> three",
    "tab\there",
    " größer 東京 🎧 \u2028 ﬁ",
    "",
    "  ",
    "two\nlines",
    '"x"',
]
RESULTS = {
    "plain": result_of([" hello", " you there"], step=2.5),
    "nasty": result_of(NASTY),
    "nothing": {"text": "", "segments": [], "language": "de"},
    "seconds that round up": result_of(["a", "b", "c"], step=59.9996),
    "half milliseconds": result_of(list("abcdefgh"), step=0.0005),
    "days": result_of(["a", "b"], step=360_000.0),
    "words": result_of(NASTY, timed=True),
    "first without words": result_of(["", " one two"], timed=True),
    "longer than a line": result_of(["no " * 700, " yes " + "o" * 1200 + " end"], timed=True),
    "all details": {
        "text": " a",
        "segments": [{"id": 0, "seek": 0, "start": 0.0, "end": 1.02, "text": " a", "tokens": [1, 2]}
                     | {"temperature": 0.2, "avg_logprob": -0.123456789, "no_speech_prob": 1e-12}],
        "language": "en",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", [*FORMATS, "all"])
def test_files_equal_those_of_openai_whisper_byte_for_byte(kind, tmp_path):
    for name, result in RESULTS.items():
        ours, theirs = tmp_path / name / "ours", tmp_path / name / "theirs"
        theirs.mkdir(parents=True)
        paths = write_result(result, "some/where/a talk.v2.mp3", kind, ours)
        whisper.utils.get_writer(kind, str(theirs))(result, "some/where/a talk.v2.mp3")
        written = {path.name: path.read_bytes() for path in theirs.iterdir()}
        assert {path.name: path.read_bytes() for path in ours.iterdir()} == written, name
        assert sorted(path.name for path in paths) == sorted(written)


LAYOUTS = [
    {"max_line_width": 12},
    {"max_line_width": 12, "max_line_count": 2},
    {"max_words_per_line": 2},
    {"highlight_words": True},
    {"highlight_words": True, "max_line_width": 30, "max_line_count": 1},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_equal_those_of_openai_whisper(layout, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    for name in ("words", "longer than a line"):
        write_result(RESULTS[name], f"{name}.wav", "all", ours, **layout)
        whisper.utils.get_writer("all", str(theirs))(RESULTS[name], f"{name}.wav", **layout)
    written = {path.name: path.read_bytes() for path in theirs.iterdir()}
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == written
    plain = tmp_path / "plain"
    write_result(RESULTS["words"], "words.wav", "srt", plain)
    assert (plain / "words.srt").read_bytes() != written["words.srt"], "without effect"


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"max_line_width": 0}, "`max_line_width` must be a whole number > 0, or None, got 0"),
        ({"max_line_width": "20"}, "`max_line_width` must be .* got '20'"),
        ({"max_line_count": 2}, "`max_line_count` has no effect without `max_line_width`"),
        ({"colour": "red"}, "unknown option 'colour': choose from max_line_width"),
    ],
)
def test_layouts_that_cannot_work_leave_no_file(layout, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        write_result(RESULTS["words"], "a.wav", "all", tmp_path, **layout)
    with pytest.raises(ValueError, match="`highlight_words` needs the times of words"):
        write_result(RESULTS["plain"], "a.wav", "all", tmp_path, highlight_words=True)
    assert list(tmp_path.iterdir()) == []
    check_layout({"max_line_width": None, "highlight_words": False}, words=False)


def test_results_that_cannot_be_written_leave_no_file(tmp_path):
    unwritable = result_of(["a"]) | {"language": object()}  # JSON comes last of all formats
    with pytest.raises(TypeError):
        write_result(unwritable, "a.wav", "all", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="unknown output format 'doc': choose one of txt, vtt"):
        write_result(result_of(["a"]), "a.wav", "doc", tmp_path)
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="cannot be written to"):
        write_result(result_of(["a"]), "a.wav", "txt", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"


def test_official_models_read_phrases_together_too():
    _, ours = MODELS[True, 3]
    result = transcribe(ours, recording(1, 16), batch_size=3, language="de")
    assert result["language"] == "de" and len(result["segments"]) > 1
    assert result == transcribe(ours, recording(1, 16), batch_size=1, language="de")


def test_short_phrases_share_the_window_of_an_official_model(monkeypatch):
    longest, audio = 30 * SAMPLE_RATE, recording(1, 70)
    phrases, seconds = speech_windows(audio, longest), len(audio) / SAMPLE_RATE
    windows = merge_windows(phrases, longest)
    check_structure(windows, len(audio), longest)
    assert len(phrases) > 4 * len(windows) and seconds / 30 <= len(windows) <= seconds / 27
    for start, stop in phrases:
        assert sum(a <= start and stop <= b for a, b in windows) == 1
    monkeypatch.setattr("utils.transcribe.padded_log_mel", None)  # nothing here needs it
    result = transcribe(MODELS[False, 0][1], audio, batch_size=4)
    times = [(round(s["start"] * SAMPLE_RATE), s["end"]) for s in result["segments"]]
    assert times == [(start, stop / SAMPLE_RATE) for start, stop in windows]


def test_windows_are_packed_up_to_the_last_sample():
    assert merge_windows([], 10) == []
    assert merge_windows([(0, 4), (5, 10), (10, 12)], 10) == [(0, 10), (10, 12)]
    assert merge_windows([(1, 4), (5, 12)], 10) == [(1, 4), (5, 12)]
    assert merge_windows([(i, i + 1) for i in range(100)], 10) == [
        (i, i + 10) for i in range(0, 100, 10)
    ]


@pytest.mark.parametrize("way", ["long", "phrases", "small"])
def test_words_have_times_within_the_recording(model, way):
    _, ours = MODELS[True, 3]
    audio = TWO if way == "small" else recording(2, 9 if way == "long" else 2)
    options = {"long": dict(temperature=0.0, sample_len=14), "phrases": dict(batch_size=4)}
    result = transcribe(
        model if way == "small" else ours, audio, word_timestamps=True, **options.get(way, {})
    )
    assert any(segment["words"] for segment in result["segments"])
    for segment in result["segments"]:
        times = [time for word in segment["words"] for time in (word["start"], word["end"])]
        assert times == sorted(times) and all(0 <= t <= len(audio) / SAMPLE_RATE for t in times)
        spelled = "".join(word["word"] for word in segment["words"])
        assert way == "long" or segment["text"].startswith(spelled)  # as far as the context goes
    plain = transcribe(model if way == "small" else ours, audio, **options.get(way, {}))
    assert way == "long" or plain["text"] == result["text"]  # a long one goes on by its words


def test_options_that_a_model_does_not_have_are_refused(model):
    with pytest.raises(ValueError, match="unknown option 'beam_size': choose from batch_size"):
        transcribe(model, TWO, beam_size=5)
    _, ours = MODELS[False, 0]
    with pytest.raises(ValueError, match="unknown option 'volume'"):
        transcribe(ours, TWO, volume=11)
    with pytest.raises(ValueError, match="`language` must be one of en, got 'fr'"):
        transcribe(ours, TWO, language="fr")
    with pytest.raises(ValueError, match="`beam_size` must be a whole number > 0"):
        transcribe(ours, TWO, beam_size=0)
    with pytest.raises(ValueError, match="`language` must be .* got 'yue'"):
        transcribe(MODELS[True, 1][1], TWO, language="yue")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_progress_on_a_terminal_alone(model, monkeypatch):
    _, ours = MODELS[False, 0]
    long = dict(temperature=0.0, sample_len=2)
    for hearer, options, unit in ((model, {}, "windows"), (ours, long, "frames")):
        for file, progress in ((Terminal(), True), (Terminal(), False), (io.StringIO(), True)):
            monkeypatch.setattr(sys, "stderr", file)
            transcribe(hearer, TWO, progress=progress, **options)
            assert (unit in file.getvalue()) == (file.isatty() and progress)
