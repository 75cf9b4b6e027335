"""Transcription: where windows lie, kinds of recordings, batches, subtitles, bad input."""

import copy
import io
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import librosa
import numpy as np
import pytest
import soundfile
import torch
import whisper
from recordings import (
    TOKENIZER,
    TWO,
    babble,
    hiss,
    official,
    recording,
    silence,
    sound_file,
    wild_model,
)

from utils.alignment import WordTiming
from utils.audio import HOP_LENGTH, SAMPLE_RATE
from utils.checkpoints import load_model
from utils.data import load_clips
from utils.decoding import DecodingResult, decode
from utils.long_form import padded_log_mel, transcribe_long_form
from utils.model import Whisper
from utils.tokenizer import Tokenizer
from utils.transcribe import (
    DEFAULT_MODEL,
    FORMATS,
    HIGH_PASS,
    MIN_PHRASE,
    VAD_FRAME,
    check_layout,
    decode_windows,
    energy_db,
    merge_windows,
    speech_windows,
    transcribe,
    window_mel,
    write_result,
)
from utils.waveforms import load_waveform

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
    above = 10 * math.log10(1 - HIGH_PASS / 8000)  # dB: white noise without its lowest part
    torch.testing.assert_close(energy_db(noise + offset)[2:-2], reference + above, rtol=0, atol=0.3)


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
@pytest.mark.parametrize("longest", [LONGEST, SAMPLE_RATE, 3 * VAD_FRAME])
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
    keys = "id seek start end text tokens temperature avg_logprob compression_ratio no_speech_prob"
    assert [*result["segments"][0]] == keys.split()  # those of openai-whisper
    assert result["text"] == " ".join(s["text"] for s in result["segments"] if s["text"])
    assert result["segments"][0]["end"] <= result["segments"][1]["start"]


def check_same(result, other):
    """The same text and segments; probabilities to rounding."""
    assert (result["text"], result["language"]) == (other["text"], other["language"])
    for segment, right in zip(result["segments"], other["segments"], strict=True):
        assert segment == {
            key: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v
            for key, v in right.items()
        }


def test_batches_and_training_mode_change_nothing(model):
    parts = [torch.cat([babble(0.5 + 0.3 * i, i), silence(0.9)]) for i in range(9)]
    audio = torch.cat(parts)
    result = transcribe(model, audio, TOKENIZER)
    assert len(result["segments"]) == 9 and len({s["text"] for s in result["segments"]}) > 1
    for size in (1, 2, 100):
        check_same(transcribe(model, audio, TOKENIZER, batch_size=size), result)
    model.train()
    check_same(transcribe(model, audio, TOKENIZER), result)
    assert model.training
    model.eval()


@pytest.mark.parametrize("name", [(False, 0), (True, 1)])
def test_training_mode_changes_no_long_form(name):
    """With dropout, any pass in training mode would change texts, languages or word times."""
    _, ours = MODELS[name]
    noisy, asked = copy.deepcopy(ours), dict(temperature=0.0, sample_len=4, word_timestamps=True)
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    noisy.train()
    noisy.encoder.blocks[0].eval()  # frozen, say
    modes = [module.training for module in noisy.modules()]
    mel, tokenizer = padded_log_mel(recording(1, 2), ours.args), Tokenizer.for_args(ours.args)
    ways = [lambda m: transcribe(m, recording(1, 2), **asked)]
    ways += [lambda m: transcribe_long_form(m, mel, tokenizer, **asked)]
    ways += [lambda m: decode(m, mel[:, :3000], sample_len=4).tokens]
    ways += [lambda m: decode(m, mel[:, :3000], task="lang_id").language] if name[0] else []
    for way in ways:
        assert way(noisy) == way(ours)
        assert [module.training for module in noisy.modules()] == modes
    with pytest.raises(ValueError, match="beam_size"):
        transcribe(noisy, TWO, beam_size=0)
    assert noisy.training


def test_a_window_alone_has_the_same_text(model):
    windows = [babble(1.3, 1), babble(4.9, 2), babble(0.2, 3)]
    together = [result.text for result, _ in decode_windows(model, TOKENIZER, windows)]
    for window, text in zip(windows, together, strict=True):
        assert decode_windows(model, TOKENIZER, [window])[0][0].text == text
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


class Decoder:
    """As torchcodec has it, and `datasets` with it."""

    def get_all_samples(self):
        return SimpleNamespace(data=TWO.expand(2, -1), sample_rate=SAMPLE_RATE)


SAMPLES = TWO.numpy()
GIVEN = {
    "array": SAMPLES,
    "float64": SAMPLES.astype(np.float64),
    "float16": SAMPLES.astype(np.float16),
    "another byte order": SAMPLES.astype(">f4"),
    "backwards": SAMPLES[::-1].copy()[::-1],
    "every second": np.repeat(SAMPLES, 2)[::2],
    "read-only": np.frombuffer(SAMPLES.tobytes(), dtype=np.float32),
    "double tensor": TWO.double(),
    "half tensor": TWO.half(),
    "tensor with gradients": TWO.clone().requires_grad_(),
    "datasets": {"path": None, "array": SAMPLES, "sampling_rate": np.int64(SAMPLE_RATE)},
    "datasets for torch": {"array": TWO, "sampling_rate": float(SAMPLE_RATE)},
    "undecoded": {"bytes": sound_file(SAMPLES), "path": "nowhere.wav"},
    "bytearray": bytearray(sound_file(SAMPLES)),
    "memoryview": memoryview(sound_file(SAMPLES)),
    "torchcodec": Decoder(),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_what_libraries_give_is_taken(kind, model, recwarn):
    audio, rounding = load_waveform(GIVEN[kind]), 1e-3 if "16" in kind or "half" in kind else 0
    assert audio.dtype == torch.float32 and not audio.requires_grad and not recwarn.list
    torch.testing.assert_close(audio, TWO, rtol=0, atol=rounding)
    if kind == "datasets":
        assert transcribe(model, GIVEN[kind]) == transcribe(model, TWO)


@pytest.mark.parametrize("rate", [8000, 11_127, 44_100, 48_000])
def test_arrays_of_any_rate_are_resampled_as_files_are(rate, tmp_path):
    samples = 0.5 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate).astype(np.float32)
    found = load_waveform({"array": samples, "sampling_rate": rate})
    (tmp_path / "a.wav").write_bytes(sound_file(samples, rate))
    expected = load_waveform({"bytes": None, "path": str(tmp_path / "a.wav")})
    assert len(found) == len(expected) == SAMPLE_RATE
    torch.testing.assert_close(found[400:-400], expected[400:-400], rtol=0, atol=2e-3)


REFUSED = [
    (torch.zeros(2, 16_000), r"Tensor \(float32, \(2, 16000\)\): .*average channels"),
    (np.zeros((16_000, 2)), r"float64, \(16000, 2\)\): .*average channels"),
    (np.float32(0.5), r"float32 \(float32, \(\)\)"),
    (np.zeros(0, dtype=np.float32), r"float32, \(0,\)\)"),
    (torch.zeros(16_000, dtype=torch.int16), "int16, .*divide whole numbers"),
    (np.zeros(16_000, dtype=np.int16), "int16, .*divide whole numbers"),
    (np.zeros(16_000, dtype=np.uint8), "uint8"),
    (np.zeros(16_000, dtype=bool), "bool"),
    (np.zeros(16_000, dtype=complex), "complex128"),
    (np.array(["a"]), "got ndarray .<U1"),
    ([0.0] * 16_000, "got list .*: numpy.array makes one"),
    ((SAMPLES, 16_000), "got tuple"),
    (None, "got NoneType"),
    (16_000, "got int"),
    (torch.full((16_000,), torch.nan), "not finite"),
    (np.full(16_000, -np.inf, dtype=np.float32), "not finite"),
    (20_000 * SAMPLES, "up to .* instead of 1: divide by"),
    ({"array": np.zeros(9, dtype=np.int16), "sampling_rate": 8000}, "int16"),
    ({"array": [0.0], "sampling_rate": 8000}, "got list"),
    ({"array": SAMPLES}, "must be 1000 to 1000000 Hz, got None"),
    ({"array": SAMPLES, "sampling_rate": 0}, "got 0"),
    ({"array": SAMPLES, "sampling_rate": "16k"}, "got '16k'"),
    ({"bytes": None, "path": None}, "got one with bytes, path"),
    ({}, "got one with nothing"),
    ("nowhere.wav", "nowhere.wav is not a file"),
    (b"no sound", "cannot be decoded"),
    (b"", "cannot be decoded"),
]


@pytest.mark.parametrize(("audio", "sentence"), REFUSED)
def test_bad_recordings_are_refused(model, audio, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        transcribe(model, audio)
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")


def hum(samples, mains, level):
    """A ground loop: the mains, some harmonics, and an offset."""
    phases = 2 * torch.pi * mains * torch.arange(samples) / SAMPLE_RATE
    return level * (1 + sum((k * phases + k).sin() / k**2 for k in range(1, 6)))


@pytest.mark.parametrize("mains", [50, 60])
@pytest.mark.parametrize("level", [0.05, 1.0])
def test_hum_hides_no_phrase(mains, level):
    clean = speech_windows(TWO, LONGEST)
    found = speech_windows(TWO + hum(len(TWO), mains, level), LONGEST)
    assert len(found) == len(clean) == 2
    for edges in zip(found, clean, strict=True):
        for edge, right in zip(*edges, strict=True):
            assert edge == pytest.approx(right, abs=0.1 * SAMPLE_RATE)
    for samples in (8_000, 9_333, 160_000, 163_333):  # cut at several phases
        assert speech_windows(hum(samples, mains, level), LONGEST) == []


def test_a_bang_hides_no_more_than_what_is_near():
    """A door that slams, once in a recording of somebody who speaks quietly."""
    quiet, bang = 0.01 * TWO, (2 * babble(0.3)).clamp(-1, 1)
    audio = hiss(torch.cat([quiet, silence(30), bang, silence(30), quiet]), 1e-5)
    (first, second), later = speech_windows(quiet, LONGEST), len(audio) - len(quiet)
    slam = len(quiet) + 30 * SAMPLE_RATE
    expected = [first, second, (slam, slam + len(bang))]
    expected += [(start + later, stop + later) for start, stop in (first, second)]
    found = speech_windows(audio, LONGEST)
    assert len(found) == 5, "somebody was not found"
    for edges in zip(found, expected, strict=True):
        for edge, right in zip(*edges, strict=True):
            assert edge == pytest.approx(right, abs=0.2 * SAMPLE_RATE)


def clicks(seed=0):
    """Ten seconds of a finger on the microphone."""
    generator, audio = torch.Generator().manual_seed(seed), hiss(silence(10), 1e-4)
    for start in torch.randint(159_000, (20,), generator=generator).tolist():
        decay = (-torch.arange(160) / 30).exp()
        audio[start : start + 160] += 0.3 * decay * torch.randn(160, generator=generator)
    return audio


def breath():
    swell = torch.sin(torch.pi * torch.arange(160_000) / 32_000).clamp(min=0).square()
    return hiss(silence(10), 0.02) * swell + hiss(silence(10), 1e-4, seed=2)


@pytest.mark.parametrize(("noise", "most"), [(clicks, 1), (breath, 0)])
def test_what_is_no_speech_is_left_out_and_has_a_score(noise, most, one_thread):
    """Of twenty clicks the model itself rejects all but one."""
    model, tokenizer = load_model(DEFAULT_MODEL)
    off = dict(no_speech_threshold=None)
    everything = transcribe(model, noise(), tokenizer, **off)["segments"]
    kept = transcribe(model, noise(), tokenizer)["segments"]
    assert len(kept) <= len(everything) == most
    assert all(s["avg_logprob"] < 0 and 0 <= s["no_speech_prob"] <= 1 for s in everything)
    none = transcribe(model, noise(), tokenizer, no_speech_threshold=0.0, logprob_threshold=None)
    assert none["segments"] == []
    assert transcribe(model, recording(0, 12), tokenizer) == transcribe(
        model, recording(0, 12), tokenizer, **off
    ), "speech was left out"


def test_the_thresholds_leave_out_text_of_speech_outside_the_vocabulary():
    model, tokenizer = load_model(DEFAULT_MODEL)
    clips = [row["bytes"] for row in load_clips("corpus", "test_other_words")[40:100]["audio"]]
    written = {}
    for name, asked in (("all", dict(no_speech_threshold=None)), ("kept", {})):
        results = [transcribe(model, clip, tokenizer, **asked) for clip in clips]
        written[name] = [i for i, result in enumerate(results) if result["text"]]
    assert set(written["kept"]) < set(written["all"]) and len(written["kept"]) <= 10


def test_windows_without_speech_are_left_out_of_batches(monkeypatch):
    """By the token <|nospeech|>, where the vocabulary has one that was trained."""
    _, ours = MODELS[True, 1]
    monkeypatch.setattr("utils.transcribe.no_speech_prob", lambda model, result: 0.9)
    asked = dict(batch_size=4, language="en", logprob_threshold=0.0)
    assert transcribe(ours, recording(1, 2), **asked)["segments"] == []
    assert transcribe(ours, recording(1, 2), **asked, no_speech_threshold=0.95)["segments"]


def test_the_language_is_detected_where_somebody_speaks(monkeypatch):
    """Speech is found once, for the language and for the windows, and not where neither asks."""
    (_, ours), seen, searched = MODELS[True, 1], [], []

    def search(*given):
        searched.append(speech_windows(*given))
        return searched[-1]

    def detect(model, mel, *given, task=None, **options):
        if task != "lang_id":
            return decode(model, mel, *given, **options)
        seen.append(mel)
        return DecodingResult(mel, "de")

    monkeypatch.setattr("utils.transcribe.decode", detect)
    monkeypatch.setattr("utils.transcribe.speech_windows", search)
    for before, batch in ((0, {}), (20, {}), (40, {}), (29.9, {}), (40, {"batch_size": 4})):
        audio = torch.cat([silence(before), recording(1, 1)])
        result = transcribe(ours, audio, **(batch or {"temperature": 0.0, "sample_len": 1}))
        assert result["language"] == "de"
        sounding = (seen[-1] > seen[-1].amin()).any(dim=0).nonzero().flatten()
        onset = sounding[0].item() / 100  # s
        assert seen[-1].shape == (80, 3000)
        assert onset == pytest.approx(before if before < 29 else 0.1, abs=0.4)
        if before < 29:
            assert torch.equal(seen[-1], padded_log_mel(audio, ours.args)[:, :3000])
    assert len(searched) == 5
    transcribe(ours, recording(1, 1), language="de", temperature=0.0, sample_len=1)
    assert len(searched) == 5


@pytest.mark.parametrize("name", ["small", "batched"])
def test_phrases_are_reported_as_they_come(model, name):
    told, audio = [], torch.cat([torch.cat([babble(1, i), silence(1)]) for i in range(11)])
    one, asked = (model, {}) if name == "small" else (MODELS[False, 0][1], {})
    result = transcribe(one, audio, batch_size=1, on_segment=lambda *new: told.append(new), **asked)
    assert [segment for segment, _ in told] == result["segments"] and told[0][1] == "en"
    assert result["segments"] == sorted(result["segments"], key=lambda s: s["start"])


@pytest.mark.posix
def test_a_long_recording_is_not_copied():
    """Ten minutes at 16 kHz are 38 MB; what finding and decoding phrases adds."""
    program = """if True:
        import resource, torch
        from utils.audio import load_audio
        from utils.checkpoints import load_model
        from utils.data import load_clips
        from utils.transcribe import DEFAULT_MODEL, transcribe
        model, tokenizer = load_model(DEFAULT_MODEL)
        audio = torch.zeros(6, 1_600_000)
        row = load_clips("corpus", "test_seen_voices")[0]
        clip = load_audio(row["audio"]["bytes"])
        audio[:, : len(clip)] = clip
        asked = dict(tokenizer=tokenizer, no_speech_threshold=None)
        transcribe(model, audio[:, :100_000].flatten(), **asked)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(len(transcribe(model, audio.flatten(), **asked)["segments"]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    phrases, grown = map(int, done.stdout.split())
    assert phrases == 6 and grown < 60_000, f"{grown} kB more"


def test_flags_are_no_strings_where_windows_are_decoded_together(model):
    with pytest.raises(ValueError, match="`word_timestamps` must be True or False, got 'False'"):
        transcribe(model, TWO, word_timestamps="False")


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
    check_same(transcribe(ours, recording(1, 16), batch_size=1, language="de"), result)


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
        assert way == "long" or segment["text"].startswith(spelled.strip())  # what fits
    plain = transcribe(model if way == "small" else ours, audio, **options.get(way, {}))
    assert way == "long" or plain["text"] == result["text"]  # a long one goes on by its words


def test_options_that_a_model_does_not_have_are_refused(model):
    with pytest.raises(ValueError, match="unknown option 'beam_size': choose from batch_size"):
        transcribe(model, TWO, beam_size=5)
    _, ours = MODELS[False, 0]
    with pytest.raises(ValueError, match="unknown option 'volume'"):
        transcribe(ours, TWO, volume=11)
    with pytest.raises(ValueError, match="must be en and transcribe .* got 'fr' and 'transcribe'"):
        transcribe(ours, TWO, language="fr")
    with pytest.raises(ValueError, match="`beam_size` must be a whole number > 0"):
        transcribe(ours, TWO, beam_size=0)
    with pytest.raises(ValueError, match="unknown language 'yue': choose one of en zh"):
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


# Which value reaches which function


def test_words_begin_with_their_segment_and_end_before_the_padding(model, monkeypatch):
    """Of two phrases of 2 and 1.5 s, in windows of whole half seconds."""
    heard = []

    def find(model, mel, tokens, tokenizer, frames):
        heard.append(frames)
        return [WordTiming(" a", [7], 0.25, 0.5, 0.9)]

    monkeypatch.setattr("utils.transcribe.find_words", find)
    segments = transcribe(model, TWO, TOKENIZER, word_timestamps=True)["segments"]
    assert [round((s["end"] - s["start"]) * 100) for s in segments] == pytest.approx(heard, abs=1)
    assert all(frames % 50 for frames in heard), "this case proves nothing"
    for segment in segments:
        (word,) = segment["words"]
        assert word["start"] == pytest.approx(segment["start"] + 0.25, abs=0.006)
        assert segment["seek"] == round(segment["start"] * 100)


@pytest.fixture
def asked(monkeypatch):
    """The `DecodingOptions` of each call of `decode` by `transcribe`, which is then run."""
    seen = []

    def spy(model, mels, options, tokenizer):
        seen.append(options)
        return decode(model, mels, options, tokenizer)

    monkeypatch.setattr("utils.transcribe.decode", spy)
    return seen


def test_hotwords_and_their_bonus_reach_the_search(model, asked):
    transcribe(model, TWO, TOKENIZER, hotwords="lamp,zoe", hotword_bonus=7.0)
    assert {(o.hotwords, o.hotword_bonus) for o in asked} == {("lamp,zoe", 7.0)}
    asked.clear()
    transcribe(model, TWO, TOKENIZER)
    assert {(o.hotwords, o.beam_size) for o in asked} == {(None, None)}, "no CTC head: greedy"


def test_windows_are_rescored_where_there_is_a_ctc_head(asked):
    shipped, tokenizer = load_model(DEFAULT_MODEL)
    transcribe(shipped, recording(1, 1), tokenizer)
    assert asked and all(o.beam_size == 8 and o.suppress_blank == 3 for o in asked)


def test_language_and_task_reach_windows_that_are_decoded_together(asked):
    _, ours = MODELS[True, 1]
    options = dict(language="de", task="translate", batch_size=2)
    transcribe(ours, recording(1, 1), **options)
    assert {(o.language, o.task, o.without_timestamps) for o in asked} == {
        ("de", "translate", True)
    }


def test_the_task_stays_where_the_language_is_detected(monkeypatch):
    (_, ours), told = MODELS[True, 1], []
    german = SimpleNamespace(language="de")
    monkeypatch.setattr("utils.transcribe.decode", lambda *_, **options: german)
    monkeypatch.setattr(
        "utils.transcribe.transcribe_long_form",
        lambda model, mel, tokenizer, **_: told.append(tokenizer.config),
    )
    transcribe(ours, TWO, task="translate")
    assert (told[0]["language"], told[0]["task"]) == ("de", "translate")


def test_an_offset_and_the_loudness_of_a_window_do_not_count(model):
    window = babble(1)
    plain, other = (window_mel(model, [w], 20_000) for w in (window, 0.2 * window + 0.3))
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-3)
