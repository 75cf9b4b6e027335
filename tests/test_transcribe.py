"""Transcription: where windows lie, kinds of recordings, batches, bad input, the command line."""

import io
import subprocess
import sys
from dataclasses import replace

import pytest
import soundfile
import torch

from utils.audio import HOP_LENGTH, SAMPLE_RATE
from utils.checkpoints import save_checkpoint
from utils.config import ModelArgs
from utils.model import Whisper
from utils.tokenizer import Tokenizer
from utils.transcribe import FRAME, decode_windows, find_windows, main, transcribe

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
    windows = find_windows(audio - audio.mean(), LONGEST)
    check_structure(windows, len(audio))
    assert len(windows) == 2
    for (start, stop), (first, last) in zip(windows, SPOKEN, strict=True):
        assert 0.05 <= first - start / SAMPLE_RATE <= 0.2
        assert 0.05 <= stop / SAMPLE_RATE - last <= 0.2


@pytest.mark.parametrize("pause", [0.12, 0.2, 0.4])
def test_a_long_stretch_is_cut_in_its_pauses(pause):
    audio = torch.cat([torch.cat([babble(1.6, seed), silence(pause)]) for seed in range(9)])
    windows = find_windows(audio, LONGEST)
    check_structure(windows, len(audio))
    assert len(windows) > 2
    for _, stop in windows[:-1]:
        around = audio[stop - FRAME : stop + FRAME]
        assert (around == 0).any(), "cut amid speech although there was a pause"


@pytest.mark.parametrize("seconds", [5.01, 12, 61])
@pytest.mark.parametrize("longest", [LONGEST, SAMPLE_RATE, FRAME])
def test_a_stretch_without_any_pause_is_covered(seconds, longest):
    audio = babble(seconds)
    windows = find_windows(audio, longest)
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


def test_a_batch_size_of_none_is_refused(model):
    with pytest.raises(ValueError, match="batch_size is 0"):
        transcribe(model, TWO, batch_size=0)


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


def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "utils.transcribe", str(tmp_path / "absent.wav")]
    command += ["--model", str(tmp_path / "absent.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "there is no checkpoint" in done.stderr
