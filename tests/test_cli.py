"""The command line: what each command does, and how it complains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import whisper
from recordings import TOKENIZER, TONE, TWO, silence, sound_file, wild_model
from references import Payload
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.__main__ import main
from utils.audio import SAMPLE_RATE
from utils.checkpoints import load_model, save_checkpoint
from utils.transcribe import FORMATS, transcribe


@pytest.fixture(scope="module")
def model():
    return wild_model()


def test_the_command_line(model, tmp_path, capsys):
    checkpoint = tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, model, TOKENIZER)
    names = ["two.wav", "silence.flac", "broken.wav"]
    two, quiet, broken = (str(tmp_path / name) for name in names)
    soundfile.write(two, TWO.numpy(), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(quiet, silence(2).numpy(), SAMPLE_RATE)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    main(["transcribe", two, quiet, "--model", str(checkpoint)])
    out, err = capsys.readouterr()
    assert out == transcribe(model, two, TOKENIZER)["text"] + "\n\n"
    assert "no speech was found" in err and "silence.flac" in err
    for words in ([broken, "--model", str(checkpoint)], [two, "--model", broken]):
        with pytest.raises(SystemExit, match="2"):
            main(["transcribe", *words])
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "broken.wav" in err


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
    main(["transcribe", *words, "--output-format", "all", "--device", "cpu"])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted(f"clip.{kind}" for kind in FORMATS)
    result = json.loads((tmp_path / "out" / "clip.json").read_text())
    assert result == transcribe(load_model(checkpoint)[0], SOUNDS[name], TOKENIZER)
    assert len(capsys.readouterr().out.splitlines()) == len(FORMATS)


def refused(words, capsys, command="transcribe"):
    """The one sentence of a command line that is refused."""
    with pytest.raises(SystemExit, match="2"):
        main([command, *map(str, words)])
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
        ("--language fr", "`language` must be one of en, got 'fr'"),
        ("--language English", "`language` must be one of en, got 'English'"),
        ("--task translate", "`task` must be transcribe for this model, got 'translate'"),
        ("--task sing", "for this model, got 'sing'"),
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
        pytest.skip("nothing is read only to this user")
    else:
        (tmp_path / "taken").mkdir(mode=0o500)
    out = tmp_path / "taken" / ("new/er" if "below" in kind else "")
    heard = []
    monkeypatch.setattr("utils.checkpoints.load_model", lambda *given: heard.append(given))
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


def test_the_command_writes_word_times(checkpoint, tmp_path):
    soundfile.write(tmp_path / "two.wav", TWO.numpy(), SAMPLE_RATE)
    words = [tmp_path / "two.wav", "--model", checkpoint, "--output-dir", tmp_path]
    main(["transcribe", *map(str, words), "--word-timestamps", "--output-format", "json"])
    assert "words" in json.loads((tmp_path / "two.json").read_text())["segments"][0]


def test_the_command_takes_an_official_model(tmp_path, capsys):
    dims = whisper.model.ModelDimensions(80, 1500, 32, 2, 1, 51865, 16, 32, 2, 1)  # 8 tokens
    weights = whisper.model.Whisper(dims).state_dict()
    torch.save({"dims": vars(dims), "model_state_dict": weights}, tmp_path / "nano.pt")
    soundfile.write(tmp_path / "two.wav", TWO.numpy(), SAMPLE_RATE)
    words = [tmp_path / "two.wav", "--model", tmp_path / "nano.pt", "--output-dir", tmp_path]
    main(["transcribe", *map(str, words), *"--language de --task translate --output-format json".split()])
    result = json.loads((tmp_path / "two.json").read_text())
    assert result["language"] == "de" and len(result["segments"]) > 0
    capsys.readouterr()
    assert "got 'klingon'" in refused([*words, "--language", "klingon"], capsys)


def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "utils", "transcribe", str(tmp_path / "absent.wav")]
    command += ["--model", str(tmp_path / "absent.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "there is no checkpoint" in done.stderr
