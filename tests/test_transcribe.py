"""Transcription: where windows lie, kinds of recordings, batches, bad input, the command line."""

import io
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
import whisper
from references import Payload, random_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.alignment import WordTiming, split_to_word_tokens
from utils.audio import HOP_LENGTH, SAMPLE_RATE, load_audio
from utils.checkpoints import load_official, save_checkpoint
from utils.config import ModelArgs
from utils.data import load_clips
from utils.decoding import DecodingResult
from utils.model import Whisper
from utils.tokenizer import Tokenizer
from utils.transcribe import (
    FORMATS,
    VAD_FRAME,
    LongFormOptions,
    clock,
    decode_windows,
    is_silence,
    load_model,
    main,
    merge_windows,
    needs_fallback,
    speech_windows,
    split_at_timestamps,
    transcribe,
    write_result,
)

LONGEST = 5 * SAMPLE_RATE
TOKENIZER = Tokenizer.small()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = dict(embeddings_dims=16, no_of_heads=2, no_of_encoder_layers=1, no_of_decoder_layers=1)
    model = Whisper(ModelArgs.preset("cpu", block_size=8, device="cpu", **shape)).eval()
    for weight in model.parameters():  # so wild that different sounds have different texts
        torch.nn.init.normal_(weight)
    torch.nn.init.normal_(model.decoder.blocks[0].cross_attn.out.weight, std=10.0)
    return model


def silence(seconds):
    return torch.zeros(int(seconds * SAMPLE_RATE))


def babble(seconds, seed=0):
    """Noise whose loudness changes as that of syllables does, peak about 0.5."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    syllables = 0.3 + 0.7 * torch.sin(2 * torch.pi * 2.5 * time).square()
    return 0.15 * syllables * torch.randn(len(time), generator=generator)


def hiss(audio, level, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return audio + level * torch.randn(len(audio), generator=generator)


TWO = torch.cat([silence(1), babble(2), silence(1), babble(1.5, seed=2), silence(0.8)])
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
        with pytest.raises(ValueError, match=f"batch_size is {size!r}: give a whole number.*[.]$"):
            transcribe(hearer, TWO, batch_size=size)


def test_the_command_line(model, tmp_path, capsys):
    checkpoint = tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, model, TOKENIZER)
    names = ["two.wav", "silence.flac", "broken.wav"]
    two, quiet, broken = (str(tmp_path / name) for name in names)
    soundfile.write(two, TWO.numpy(), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(quiet, silence(2).numpy(), SAMPLE_RATE)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    main([two, quiet, "--model", str(checkpoint)])
    out, err = capsys.readouterr()
    assert out == transcribe(model, two, TOKENIZER)["text"] + "\n\n"
    assert "no speech was found" in err and "silence.flac" in err
    for words in ([broken, "--model", str(checkpoint)], [two, "--model", broken]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "broken.wav" in err


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


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("kind", [*FORMATS, "all"])
def test_files_equal_those_of_openai_whisper_byte_for_byte(name, kind, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    paths = write_result(RESULTS[name], "some/where/a talk.v2.mp3", kind, ours)
    whisper.utils.get_writer(kind, str(theirs))(RESULTS[name], "some/where/a talk.v2.mp3")
    written = {path.name: path.read_bytes() for path in theirs.iterdir()}
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == written
    assert sorted(path.name for path in paths) == sorted(written)


def test_the_clock_equals_that_of_openai_whisper():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1, 100, 10_000, 1_000_000], dtype=torch.float64)
    times = torch.rand(1000, 4, generator=generator, dtype=torch.float64) * scale
    for seconds in times.flatten().tolist():
        for hours in (True, False):
            assert clock(seconds, hours, ".") == whisper.utils.format_timestamp(seconds, hours)


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


def sound_file(samples, rate=SAMPLE_RATE, subtype="FLOAT"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


TONE = 0.3 * torch.sin(0.1 * torch.arange(96_000))
SOUNDS = {
    "stereo": sound_file(torch.stack([TONE, TONE.flip(0)], dim=1).numpy()),
    "8 bit": sound_file(TONE.numpy(), subtype="PCM_U8"),
    "96 kHz": sound_file(TONE.numpy(), 96_000),
    "10 ms": sound_file(TONE[:160].numpy()),
    "silence": sound_file(silence(1).numpy()),
    "clipping": sound_file((20 * TONE).clamp(-1, 1).numpy(), subtype="PCM_16"),
}
NO_SOUNDS = {
    "text": (b"this is no sound at all", "cannot be decoded as sound"),
    "mp4": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(500), "cannot be decoded"),
    "mkv": (b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\xf7\x81\1" + bytes(500), "cannot be decoded"),
    "avi": (b"RIFF\x00\x02\0\0AVI LIST" + bytes(500), "cannot be decoded"),
    "zero seconds": (sound_file(TONE[:0].numpy()), "holds no samples"),
    "NaN": (sound_file((TONE * torch.nan).numpy()), "NaN"),
    "infinite": (sound_file((TONE / 0).numpy()), "not finite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_checkpoint(path, model, TOKENIZER)
    return str(path)


@pytest.mark.parametrize("name", SOUNDS)
def test_odd_recordings_go_through_the_command(name, checkpoint, tmp_path, capsys):
    (tmp_path / "clip.wav").write_bytes(SOUNDS[name])
    words = [
        str(tmp_path / "clip.wav"),
        "--model",
        checkpoint,
        "--output-dir",
        str(tmp_path / "out"),
    ]
    main([*words, "--output-format", "all", "--device", "cpu"])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted(f"clip.{kind}" for kind in FORMATS)
    result = json.loads((tmp_path / "out" / "clip.json").read_text())
    assert result == transcribe(load_model(checkpoint)[0], SOUNDS[name], TOKENIZER)
    assert len(capsys.readouterr().out.splitlines()) == len(FORMATS)


def refused(words, capsys):
    """The one sentence of a command line that is refused."""
    with pytest.raises(SystemExit, match="2"):
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith(".\n"), err
    return err


@pytest.mark.parametrize("name", NO_SOUNDS)
def test_what_is_no_sound_leaves_no_file(name, checkpoint, tmp_path, capsys):
    content, sentence = NO_SOUNDS[name]
    clip, out = tmp_path / "clip.wav", tmp_path / "out"
    clip.write_bytes(content)
    words = [clip, "--model", checkpoint, "--output-format", "all", "--output-dir", out]
    err = refused(words, capsys)
    assert sentence in err and "clip.wav" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--language fr", "unknown language 'fr': this model knows en"),
        ("--language English", "unknown language 'English'"),
        ("--task translate", "unknown task 'translate': this model can transcribe"),
        ("--task sing", "unknown task 'sing'"),
        ("--output-format doc", "unknown output format 'doc': choose one of txt, vtt, srt"),
        ("--device toaster", "device is 'toaster'"),
        ("--device cuda:77", "the device cuda:77 cannot be used"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--model nowhere.safetensors", "there is no checkpoint nowhere.safetensors"),
        ("--model gigantic", "gigantic is no file, no folder and no size"),
        ("../clip.flac --output-format txt", "two recordings are called clip"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, sentence, checkpoint, tmp_path, capsys):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(SOUNDS["10 ms"])
    words = ["--model", checkpoint, "--output-dir", tmp_path / "out", clip, *options.split()]
    assert sentence in refused(words, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.wav"]


def broken_models(folder):
    """{name: (path, words of the complaint)} of checkpoints that are none."""
    dims = whisper.model.ModelDimensions(80, 1500, 32, 2, 1, 51865, 16, 32, 2, 1)
    weights, name = whisper.model.Whisper(dims).state_dict(), "decoder.blocks.0.mlp.0.bias"
    missing = {n: t for n, t in weights.items() if n != name}
    changed = {"shape": {**weights, name: torch.ones(3)}, "missing": missing, "hostile": None}
    for kind, tensors in changed.items():
        tensors = tensors or Payload(folder / "the code was run")
        torch.save({"dims": vars(dims), "model_state_dict": tensors}, folder / f"{kind}.pt")
    return {
        "shape": f"the tensor {name} is of shape (3,) and should be of shape (128,)",
        "missing": f"the tensor {name} is absent",
        "hostile": "nothing in it was run",
    }


def our_broken_models(checkpoint, folder):
    """The same for checkpoints of this course."""
    data, weights = Path(checkpoint).read_bytes(), load_file(checkpoint)
    with safe_open(checkpoint, framework="pt") as file:
        header = file.metadata()
    name = "model.decoder.ln.bias"
    missing = {n: t for n, t in weights.items() if n != name}
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    save_file(missing, folder / "missing.safetensors", metadata=header)
    save_file({**weights, name: torch.ones(3)}, folder / "shape.safetensors", metadata=header)
    return {"cut": "is not a whole checkpoint", "missing": "is absent", "shape": "shape (3,)"}


def test_broken_checkpoints_leave_no_file(checkpoint, tmp_path, capsys):
    clip, out = tmp_path / "clip.wav", tmp_path / "out"
    clip.write_bytes(SOUNDS["10 ms"])
    kinds = {f"{name}.pt": words for name, words in broken_models(tmp_path).items()}
    data = (tmp_path / "shape.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    kinds |= {"cut.pt": "is not a whole OpenAI checkpoint"}
    ours = our_broken_models(checkpoint, tmp_path)
    kinds |= {f"{name}.safetensors": words for name, words in ours.items()}
    assert len(kinds) == 7
    for name, sentence in kinds.items():
        words = [clip, "--model", tmp_path / name, "--output-format", "all", "--output-dir", out]
        err = refused(words, capsys)
        assert sentence in err and name in err
        assert not out.exists() and not (tmp_path / "the code was run").exists()


@pytest.mark.parametrize("kind", ["a file", "below a file", "read only", "below read only"])
def test_a_folder_that_takes_no_files_is_noticed_first(kind, tmp_path, capsys, monkeypatch):
    if kind == "a file" or kind == "below a file":
        (tmp_path / "taken").write_text("old")
    elif os.name != "posix" or os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    else:
        (tmp_path / "taken").mkdir(mode=0o500)
    out = tmp_path / "taken" / ("new/er" if "below" in kind else "")
    heard = []
    monkeypatch.setattr("utils.transcribe.load_model", lambda *given: heard.append(given))
    words = [tmp_path / "clip.wav", "--output-format", "all", "--output-dir", out]
    assert f"the folder {out} cannot be written to" in refused(words, capsys)
    assert heard == [] and [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_that_is_to_be_made_is_not_made_early(tmp_path, capsys):
    out = tmp_path / "new" / "er"
    words = [tmp_path / "absent.wav", "--output-format", "all", "--output-dir", out]
    assert "absent.wav is not a file" in refused(words, capsys)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_do_is_refused(capsys):
    assert "the following arguments are required: FILE" in refused([], capsys)


def official(multilingual, seed):
    """openai-whisper's model with official context and vocabulary, tiny, wild weights; and ours."""
    torch.manual_seed(seed)
    vocabulary = 51865 if multilingual else 51864
    dims = whisper.model.ModelDimensions(80, 1500, 32, 2, 1, vocabulary, 448, 32, 2, 1)
    theirs = whisper.model.Whisper(dims).eval()
    for name, weight in theirs.named_parameters():
        if weight.ndim > 1:
            scale = 2.0 if "attn" in name else 1.0
            torch.nn.init.normal_(weight, std=scale * weight[0].numel() ** -0.5)
    embedding = theirs.decoder.token_embedding.weight
    torch.nn.init.normal_(embedding, std=3 * 32**-0.5)
    with torch.no_grad():
        embedding[50256 + multilingual] *= 1.3  # the end, so that it comes now and then
        theirs.decoder.blocks[0].cross_attn.out.weight *= 4  # listen
    return theirs, load_official(theirs)


MODELS = {name: official(*name) for name in [(False, 0), (True, 1), (True, 3)]}
CLIPS = [load_audio(row["audio"]["bytes"]) for row in load_clips("corpus", "validation").take(40)]


def recording(seed, clips):
    """Clips of the corpus in a row, with pauses."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(CLIPS), (clips,), generator=generator).tolist()
    return torch.cat([torch.cat([CLIPS[i], silence(0.3 * (i % 5))]) for i in order])


KEYS = ("id", "seek", "start", "end", "text", "tokens", "temperature")


def check_same(ours, theirs):
    """The same segments and text; numbers to rounding."""
    assert (ours["text"], ours["language"]) == (theirs["text"], theirs["language"])
    for mine, right in zip(ours["segments"], theirs["segments"], strict=True):
        assert [mine[key] for key in KEYS] == [right[key] for key in KEYS]
        for key in ("avg_logprob", "compression_ratio", "no_speech_prob"):
            assert mine[key] == pytest.approx(right[key], rel=1e-3, abs=1e-5)


CASES = [((False, 0), 7, {}), ((True, 1), 7, {}), ((True, 3), 7, {}), ((False, 0), 1, {})]
CASES += [((True, 3), 60, {"sample_len": 6}), ((False, 0), 25, {}), ((True, 1), 16, {})]
CASES += [((True, 3), clips, {}) for clips in (9, 10, 11, 12, 13, 14)]
CASES += [((False, 0), 230, {"sample_len": 8}), ((True, 3), 230, {"sample_len": 8})]  # 10 min
CASES += [
    ((False, 0), 8, {"condition_on_previous_text": False}),
    ((True, 3), 8, {"condition_on_previous_text": False, "language": "de"}),
    ((True, 1), 8, {"language": "ja", "task": "translate"}),
    ((True, 3), 8, {"initial_prompt": "Digits and names, said slowly: "}),
    ((False, 0), 8, {"initial_prompt": "one two", "suppress_tokens": ""}),
    ((True, 1), 8, {"initial_prompt": ""}),
    ((True, 1), 8, {"beam_size": 2, "sample_len": 6}),
    ((True, 3), 8, {"without_timestamps": True}),
    ((False, 0), 9, {"no_speech_threshold": 1e-5, "logprob_threshold": -2.7}),
    ((True, 3), 9, {"no_speech_threshold": 1e-9, "logprob_threshold": None}),
    ((True, 1), 9, {"no_speech_threshold": None, "compression_ratio_threshold": None}),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_long_recordings_equal_openai_whisper(case):
    name, clips, options = CASES[case]
    theirs, ours = MODELS[name]
    audio, options = recording(case, clips), {"temperature": 0.0, "sample_len": 14, **options}
    check_same(transcribe(ours, audio, **options), theirs.transcribe(audio, fp16=False, **options))


@pytest.fixture(scope="module")
def tiny_en():
    return random_tiny(51864)


# clips of a recording, and options
REAL = [(clips, {}) for clips in (1, 1, 2, 3, 4, 5, 6, 7, 8, 10)]
REAL += [(10, {"condition_on_previous_text": False}), (9, {"initial_prompt": "Ada, Zoë"})]
REAL += [(3, {"initial_prompt": "", "suppress_tokens": ""}), (2, {"beam_size": 3})]
REAL += [(4, {"beam_size": 2, "patience": 2.0, "length_penalty": 0.5})]
REAL += [(5, {"without_timestamps": True}), (8, {"max_initial_timestamp": None})]
REAL += [(10, {"no_speech_threshold": 1e-9, "logprob_threshold": -1.2})]
REAL += [(10, {"clip_timestamps": "2,11,14"}), (7, {"temperature": (0.0,), "sample_len": 20})]
REAL += [(225, {"sample_len": 6, "condition_on_previous_text": False})]  # ten minutes


def test_the_real_shape_equals_openai_whisper(tiny_en, one_thread):
    theirs, ours = tiny_en
    heard, ways, seconds = [], set(), []
    for case, (clips, options) in enumerate(REAL):
        audio, options = recording(case, clips), {"temperature": 0.0, "sample_len": 9, **options}
        result = transcribe(ours, audio, **options)
        check_same(result, theirs.transcribe(audio, fp16=False, **options))
        seeks = sorted({segment["seek"] for segment in result["segments"]})
        ways |= {b - a == 3000 for a, b in zip(seeks[:-1], seeks[1:], strict=True)}
        heard.append(result)
        seconds.append(len(audio) / SAMPLE_RATE)
    assert len(heard) > 20 and max(seconds) > 580
    texts = [result["text"] for result in heard]
    assert len(set(texts)) > len(texts) - 3, "the texts hardly vary: the comparison is too weak"
    lengths = {len(s["tokens"]) for result in heard for s in result["segments"]}
    assert len(lengths) > 4 and ways == {True, False}, "no times, or no windows that go on by them"


def said(result):
    """What a result says of its words; of segments that were emptied only that they are there."""
    return [
        (s["seek"], s["text"], (s["start"], s["end"]) if s["words"] else None)
        + tuple((word["word"], word["start"], word["end"]) for word in s["words"])
        for s in result["segments"]
    ]


@pytest.mark.parametrize("silence", [None, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_word_times_of_long_recordings_equal_openai_whisper(name, silence):
    (theirs, ours), audio = MODELS[name], recording(6, 20)
    options = dict(temperature=0.0, sample_len=14, word_timestamps=True, no_speech_threshold=None)
    options |= dict(language="en", hallucination_silence_threshold=silence)
    mine = transcribe(ours, audio, **options)
    right = theirs.transcribe(audio, fp16=False, **options)
    assert said(mine) == said(right) and mine["text"] == right["text"]
    found, wanted = ([w for s in r["segments"] for w in s["words"]] for r in (mine, right))
    assert len(found) > 3, "too weak"
    for word, other in zip(found, wanted, strict=True):
        assert word["probability"] == pytest.approx(other["probability"], abs=1e-4)


TEXTS = " yes| no.| (well),| 7| thank| you.| is| it?|.|!| über".split("|")


class Script:
    """Decoders and aligners that say the same in both libraries, call by call, at random."""

    def __init__(self, seed):
        self.seed, self.calls, self.prompts = seed, 0, []
        self.tokenizer = Tokenizer.whisper(multilingual=False)

    def draw(self):
        self.calls += 1
        return random.Random(f"{self.seed} {self.calls}")

    def written(self):
        """Tokens of a window, and numbers: words, and times in pairs, singly, or none."""
        chance, begin, tokens = self.draw(), self.tokenizer.special["<|0.00|>"], []
        times = sorted(chance.sample(range(0, 1501, 10), 6))
        for i in range(chance.randint(0, 3)):
            words = [chance.choice(TEXTS) for _ in range(chance.randint(0, 5))]
            tokens += [begin + times[2 * i], *self.tokenizer.encode("".join(words))]
            tokens += [begin + times[2 * i + 1]]
        tokens = tokens[: len(tokens) - chance.randint(0, 1)]
        nobody, sure = chance.choice([0.1, 0.1, 0.9]), chance.choice([-0.5, -0.5, -1.5])
        return dict(tokens=tokens, avg_logprob=sure, no_speech_prob=nobody, temperature=0.0)

    def aligned(self, tokens, frames):
        """[(word, tokens, start, end, probability)] within so many frames of 10 ms."""
        chance, now, rows = self.draw(), 0, []
        strange = chance.random() < 0.5
        for word, part in split_to_word_tokens(tokens, self.tokenizer):
            long = chance.choice([0, 1, 1, 2, 120] if strange else [10, 20, 30, 80])
            stop = min(now + long + chance.choice([0, 0, 0, 40]), frames // 2)
            sure = chance.random() * (0.2 if strange else 1)
            rows.append((word, part, now * 2 / 100, stop * 2 / 100, sure))
            now = stop
        return rows


@pytest.mark.parametrize("seed", range(150))
def test_rules_for_words_equal_openai_whisper_whatever_was_decoded(seed, monkeypatch):
    chance, (theirs, ours) = random.Random(seed), MODELS[False, 0]
    options = dict(temperature=0.0, word_timestamps=True, logprob_threshold=-1.0)
    options["hallucination_silence_threshold"] = chance.choice([None, 0.0, 0.5, 2.0, 8.0])
    options["clip_timestamps"] = chance.choice(["0", "0", "", "3.5", "1,20,31,75.5", [5, 80]])
    options["condition_on_previous_text"] = chance.random() < 0.7
    options["initial_prompt"] = chance.choice([None, "Ada, Zoë", "", "  "])
    options["carry_initial_prompt"] = chance.random() < 0.5
    audio, mine, other = TONE.repeat(14)[: 80 * SAMPLE_RATE], Script(seed), Script(seed)

    def our_decode(model, states, asked, tokenizer):
        mine.prompts.append(asked.prompt)
        return DecodingResult(None, "en", compression_ratio=1.0, **mine.written())

    def their_decode(mel, asked):
        other.prompts.append(asked.prompt)
        result = whisper.DecodingResult(None, "en", compression_ratio=1.0, **other.written())
        return result

    monkeypatch.setattr("utils.transcribe.encode_audio", lambda model, mel: mel)
    monkeypatch.setattr("utils.transcribe.decode", our_decode)
    monkeypatch.setattr(
        "utils.transcribe.find_alignment",
        lambda model, mel, tokens, tokenizer, frames: [
            WordTiming(*row) for row in mine.aligned(tokens, frames)
        ],
    )
    monkeypatch.setattr(theirs, "decode", their_decode)
    monkeypatch.setattr(
        whisper.timing,
        "find_alignment",
        lambda model, tokenizer, tokens, mel, frames: [
            whisper.timing.WordTiming(*row) for row in other.aligned(tokens, frames)
        ],
    )
    found = transcribe(ours, audio, **options)
    wanted = theirs.transcribe(audio, fp16=False, **options)
    assert found == wanted and mine.prompts == other.prompts


def test_the_cases_reach_every_way_on():
    ends = set()
    for case in (0, 2, 5, 6):
        name, clips, _ = CASES[case]
        audio = recording(case, clips)
        result = transcribe(MODELS[name][1], audio, temperature=0.0, sample_len=14)
        seeks = sorted({segment["seek"] for segment in result["segments"]})
        ends |= {(b - a) == 3000 for a, b in zip(seeks[:-1], seeks[1:], strict=True)}
    assert ends == {True, False}, "no window went on by a timestamp, or all did"


def tokens_of(text):
    return [1000 + int(word[1:]) if word[0] == "<" else int(word) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "segments", "on"),
    [
        ("", [(0, 30)], 30),
        ("7 8", [(0, 30)], 30),
        ("<0 7 8", [(0, 30)], 30),
        ("<5 7 8 <50", [(0, 1)], 30),
        ("<0 7 <50 <60 8", [(0, 1)], 1),
        ("<0 7 <50 <60 8 <100", [(0, 1), (1.2, 2)], 30),
        ("<0 7 <50 <60 8 <100 <100", [(0, 1), (1.2, 2)], 2),
        ("<0 7 <50 <50 <60 8", [(0, 1), (1, 1)], 1),
    ],
)
def test_windows_are_cut_at_pairs_of_times(text, segments, on):
    found, further = split_at_timestamps(tokens_of(text), 1000, 30)
    assert [(round(start, 2), round(end, 2)) for start, end, _ in found] == segments
    assert further == pytest.approx(on)
    kept = [token for _, _, tokens in found for token in tokens]
    assert kept == tokens_of(text)[: len(kept)]


@pytest.mark.parametrize(
    ("ratio", "logprob", "nobody", "failed", "silent"),
    [
        (1.0, -0.5, 0.1, False, False),
        (2.5, -0.5, 0.1, True, False),
        (1.0, -1.5, 0.1, True, False),
        (1.0, -1.5, 0.9, False, True),
        (2.5, -1.5, 0.9, False, True),
        (2.5, -0.5, 0.9, True, False),
    ],
)
def test_what_is_tried_again_and_what_is_silence(ratio, logprob, nobody, failed, silent):
    numbers = dict(compression_ratio=ratio, avg_logprob=logprob, no_speech_prob=nobody)
    result = DecodingResult(None, "en", **numbers)
    assert (needs_fallback(result, LongFormOptions()), is_silence(result, LongFormOptions())) == (
        failed,
        silent,
    )
    off = LongFormOptions(
        compression_ratio_threshold=None, logprob_threshold=None, no_speech_threshold=None
    )
    assert not needs_fallback(result, off) and not is_silence(result, off)


def test_a_failure_is_tried_at_every_temperature():
    _, ours = MODELS[True, 1]
    options = dict(sample_len=4, logprob_threshold=-0.001, no_speech_threshold=None)
    result = transcribe(ours, recording(0, 2), temperature=(0.0, 0.7), language="en", **options)
    assert {segment["temperature"] for segment in result["segments"]} == {0.7}
    again = transcribe(ours, recording(0, 2), temperature=0.0, language="en", **options)
    assert {segment["temperature"] for segment in again["segments"]} == {0.0}


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
    with pytest.raises(ValueError, match="unknown language 'fr': this model knows en"):
        transcribe(ours, TWO, language="fr")
    with pytest.raises(ValueError, match="`beam_size` must be a whole number > 0"):
        transcribe(ours, TWO, beam_size=0)
    with pytest.raises(ValueError, match="unknown language 'yue'"):
        transcribe(MODELS[True, 1][1], TWO, language="yue")


ODD = {
    "temperature": [(), [], "hot", None, -0.1, float("nan"), (0.0, "hot"), [0.2, None], ((),)],
    "initial_prompt": [["Ada"], 5, b"Ada"],
    "compression_ratio_threshold": ["2.4", [2.4]],
    "logprob_threshold": ["low"],
    "no_speech_threshold": [(0.6,)],
    "hallucination_silence_threshold": ["long", [2.0], float("nan")],
    "clip_timestamps": [5, None],
    "suppress_tokens": [5, 0, 2.5, {5}],
    "prefix": [7],
    "length_penalty": ["short"],
    "sample_len": ["x"],
    "beam_size": ["x"],
}


@pytest.mark.parametrize("name", ODD)
def test_options_of_the_wrong_kind_are_refused(name):
    for value in ODD[name]:
        with pytest.raises(ValueError, match=f"{name} is .*: give .*[.]$") as caught:
            options = {"temperature": 0.0, "word_timestamps": True, name: value}
            transcribe(MODELS[False, 0][1], TWO, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("samples", [1, 159, 160, 1600, 480_000, 480_001])
def test_official_models_take_any_length(samples):
    theirs, ours = MODELS[True, 1]
    audio, options = recording(5, 15)[:samples], dict(temperature=0.0, sample_len=5)
    check_same(transcribe(ours, audio, **options), theirs.transcribe(audio, fp16=False, **options))


def test_the_command_writes_word_times(checkpoint, tmp_path):
    soundfile.write(tmp_path / "two.wav", TWO.numpy(), SAMPLE_RATE)
    words = [tmp_path / "two.wav", "--model", checkpoint, "--output-dir", tmp_path]
    main([*map(str, words), "--word-timestamps", "--output-format", "json"])
    assert "words" in json.loads((tmp_path / "two.json").read_text())["segments"][0]


def test_the_command_takes_an_official_model(tmp_path, capsys):
    dims = whisper.model.ModelDimensions(80, 1500, 32, 2, 1, 51865, 16, 32, 2, 1)  # 8 tokens
    weights = whisper.model.Whisper(dims).state_dict()
    torch.save({"dims": vars(dims), "model_state_dict": weights}, tmp_path / "nano.pt")
    soundfile.write(tmp_path / "two.wav", TWO.numpy(), SAMPLE_RATE)
    words = [tmp_path / "two.wav", "--model", tmp_path / "nano.pt", "--output-dir", tmp_path]
    main([*map(str, words), *"--language de --task translate --output-format json".split()])
    result = json.loads((tmp_path / "two.json").read_text())
    assert result["language"] == "de" and len(result["segments"]) > 0
    capsys.readouterr()
    assert "unknown language 'klingon'" in refused([*words, "--language", "klingon"], capsys)


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


def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "utils.transcribe", str(tmp_path / "absent.wav")]
    command += ["--model", str(tmp_path / "absent.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "there is no checkpoint" in done.stderr


@pytest.mark.parametrize("times", ["3,1", "-1", "nan", "inf", "a,b", [None], "1e999", [5, 2]])
def test_clips_that_do_not_rise_are_refused(times):
    with pytest.raises(ValueError, match="clip_timestamps is .*give rising seconds"):
        transcribe(MODELS[False, 0][1], TWO, clip_timestamps=times)


@pytest.mark.parametrize("options", [{}, {"word_timestamps": False}, {"word_timestamps": True}])
def test_a_silence_that_no_words_can_tell_is_refused(options):
    silence = -1.0 if options.get("word_timestamps") else 2.0
    with pytest.raises(ValueError, match="hallucination_silence_threshold is"):
        transcribe(MODELS[False, 0][1], TWO, hallucination_silence_threshold=silence, **options)
