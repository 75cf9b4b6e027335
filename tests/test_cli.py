"""The command line: what each command does, and how it complains."""

import errno
import inspect
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
import soundfile
import torch
from recordings import TOKENIZER, TONE, TWO, official, silence, sound_file, wild_model
from references import Payload, openai_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.__main__ import COMMANDS, OPTION, choose_temperatures, main, tensorboard_logger
from utils.audio import SAMPLE_RATE
from utils.checkpoints import load_model, save_checkpoint
from utils.config import default_device
from utils.decoding import DecodingOptions
from utils.files import write_atomic
from utils.long_form import LongFormOptions
from utils.recipes import run_training
from utils.training import train
from utils.transcribe import DEFAULT_MODEL, FORMATS, transcribe, transcribe_batched
from utils.transcribe import LAYOUT as LAYOUT_OPTIONS

ROOT = Path(__file__).parent.parent
COMMAND_LINE = str(ROOT / "utils" / "__main__.py")


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
    "text": (b"this is no sound at all", "cannot be decoded (Format not recognised): convert"),
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
def test_what_is_no_sound_leaves_no_file(name, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # ffmpeg, if there, has words of its own
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
        ("--language fr", "en and transcribe for this model, got 'fr' and 'transcribe'"),
        ("--language German", "en and transcribe for this model, got 'de' and"),
        ("--task translate", "en and transcribe for this model, got None and 'translate'"),
        ("--task sing", "for this model, got None and 'sing'"),
        ("--output-format doc", "unknown output format 'doc': choose one of txt, vtt, srt"),
        ("--device toaster", "`device` must be 'cpu', 'cuda:0' or 'mps', got 'toaster'"),
        ("--device cuda:77", "no device 'cuda:77' here"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--model nowhere.safetensors", "there is no checkpoint nowhere.safetensors"),
        ("--model gigantic", "gigantic is no file, no folder and no size"),
        ("--model=", "is not a whole model"),
        ("--device=", "`device` must be 'cpu', 'cuda:0' or 'mps', got ''"),
        ("--output-format=", "unknown output format '': choose one of txt"),
        ("--threads -1", "argument --threads: must be a whole number, 0 or more, got -1"),
        ("--threads 1.5", "argument --threads: must be a whole number, 0 or more, got 1.5"),
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
    nano = openai_model(80, 1500, 32, 2, 1, 51865, 16, 32, 2, 1)
    dims, weights, name = nano.dims, nano.state_dict(), "decoder.blocks.0.mlp.0.bias"
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
    monkeypatch.setattr("utils.checkpoints.load_model", lambda *given: heard.append(given))
    (tmp_path / "clip.wav").write_bytes(SOUNDS["10 ms"])
    words = [tmp_path / "clip.wav", "--output-format", "all", "--output-dir", out]
    assert f"the folder {out} cannot be written to" in refused(words, capsys)
    assert heard == [] and {path.name for path in tmp_path.iterdir()} == {"taken", "clip.wav"}


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
    nano = openai_model(80, 1500, 32, 2, 1, 51865, 16, 32, 2, 1)  # 8 tokens
    file = {"dims": vars(nano.dims), "model_state_dict": nano.state_dict()}
    torch.save(file, tmp_path / "nano.pt")
    soundfile.write(tmp_path / "two.wav", TWO.numpy(), SAMPLE_RATE)
    words = [tmp_path / "two.wav", "--model", tmp_path / "nano.pt", "--output-dir", tmp_path]
    main(
        [
            "transcribe",
            *map(str, words),
            *"--language German --task translate --output-format json".split(),
        ]
    )
    result = json.loads((tmp_path / "two.json").read_text())
    assert result["language"] == "de" and len(result["segments"]) > 0
    capsys.readouterr()
    assert "unknown language 'klingon'" in refused([*words, "--language", "klingon"], capsys)


def test_the_module_runs_as_a_program(tmp_path):
    (tmp_path / "clip.wav").write_bytes(SOUNDS["10 ms"])
    command = [sys.executable, "-m", "utils", "transcribe", str(tmp_path / "clip.wav")]
    command += ["--model", str(tmp_path / "absent.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "there is no checkpoint" in done.stderr


# What every command has in common


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("listen", "invalid choice: 'listen'"),
        ("train --epochs 3", "unrecognized arguments: --epochs 3"),
        ("evaluate", "the following arguments are required: MODEL"),
        ("evaluate model --device", "argument --device: expected one argument"),
        ("evaluate model --examples 1.5", "--examples: must be a whole number, 0 or more, got 1.5"),
        (
            "evaluate model --examples many",
            "--examples: must be a whole number, 0 or more, got many",
        ),
        ("transcribe --beam-size 5", "the following arguments are required: FILE"),
        ("transcribe a.wav --beam-size five", "argument --beam-size: invalid number value: 'five'"),
        ("transcribe a.wav --carry_initial_prompt=maybe", "invalid boolean value: 'maybe'"),
        ("transcribe a.wav --lang en", "unrecognized arguments: --lang en"),
        ("diagnose", "the following arguments are required: MODEL"),
        ("plot only-one.jsonl", "the following arguments are required: PICTURE"),
        ("export", "the following arguments are required: MODEL, FOLDER"),
        ("live --pause None", "argument --pause: invalid float value: 'None'"),
        ("live --margin 1,2", "argument --margin: invalid float value: '1,2'"),
    ],
)
def test_a_wrong_command_is_one_line(line, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1
    assert err.endswith(" see --help for the options.\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert (
        f"usage: python -m utils {command}" in shown
        and COMMANDS[command].__doc__.split("\n")[0] in shown
    )


INNER = {
    "train": ("utils.recipes.run_training", ""),
    "evaluate": ("utils.evaluation.print_report", "model.safetensors"),
    "transcribe": ("utils.checkpoints.load_model", "a.wav"),
    "live": ("utils.live.load_model", "--as-if-live a.wav"),
    "diagnose": ("utils.checkpoints.load_model", "model.safetensors"),
    "words": ("utils.tokenizer.Tokenizer.for_args", "phrases.txt"),
    "plot": ("utils.plotting.read_history", "history.jsonl loss.png"),
    "export": ("utils.checkpoints.load_model", "model.safetensors folder"),
    "summary": ("inspect.getsource", ""),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "Interrupted."),
        (ValueError("one thing,\nand another."), 2, "one thing, and another."),
        (
            OSError(28, "No space left on device"),
            2,
            "[Errno 28] No space left on device: make room on the disk.",
        ),
        (
            PermissionError(13, "Permission denied", "x"),
            2,
            "[Errno 13] Permission denied: 'x': change its permissions, or choose another place.",
        ),
        (OSError(5, "I/O error"), 2, "[Errno 5] I/O error: check the path and the disk."),
    ],
)
def test_ctrl_c_and_problems_in_each_command(
    command, problem, code, line, capsys, monkeypatch, tmp_path
):
    def fails(*given, **named):
        raise problem

    function, words = INNER[command]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(SOUNDS["10 ms"])
    monkeypatch.setattr(function, fails)
    with pytest.raises(SystemExit) as end:
        main([command, *words.split()])
    assert end.value.code == code and capsys.readouterr().err == line + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_the_summary_is_all_of_whisper_in_reading_order(capsys):
    main(["summary"])
    text = capsys.readouterr().out
    parts = "def frame_signal, def log_mel_spectrogram, class MultiHeadAttention"
    parts += ", class AudioEncoder, class TextDecoder, class Whisper, def greedy_generate"
    places = [text.index(part) for part in parts.split(", ")]
    assert places == sorted(places) and len(text.splitlines()) < 400
    compile(text, "summary", "exec")


@pytest.mark.posix
def test_ctrl_c_ends_the_program_with_130(tmp_path):
    """A real signal, while the command loads its model."""
    script = """
import signal, sys, time, utils.checkpoints
from utils.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
def load_model(*given):
    print("loading", flush=True)
    time.sleep(600)
utils.checkpoints.load_model = load_model
main(["transcribe", sys.argv[1]])
"""
    (tmp_path / "a.wav").write_bytes(SOUNDS["10 ms"])
    command = [sys.executable, "-c", script, str(tmp_path / "a.wav")]
    pipes = dict(stdout=subprocess.PIPE, text=True)
    running = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, **pipes)
    assert running.stdout.readline() == "loading\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and err == "Interrupted.\n"


LOADING = """
import signal, sys, threading, time
import utils.data, utils.distributed
from utils.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
function, *words = sys.argv[1:]
def load(*given):
    if threading.current_thread() is threading.main_thread() or function == "prepare_clip":
        print("loading", flush=True)
        time.sleep(2)
    return 0.0, "without text"
if function == "read":
    utils.distributed.ClipStream.read = load
else:
    utils.data.prepare_clip = load
main(["train", "--data", "speech", "--out", "run", "--set", "device=cpu", *words])
"""


@pytest.mark.posix
@pytest.mark.parametrize("line", ["prepare_clip", "read stream_steps=3 splice_share=0"])
def test_ctrl_c_while_clips_are_read_ends_training_at_once(line, recordings, tmp_path):
    """Of a thousand recordings of two seconds each, and of a stream's first epoch."""
    names = [recordings(f"{i}.wav", SOUNDS["silence"]) for i in range(40)]
    (tmp_path / "speech").mkdir()
    table = ["file_name,text", *(f"../{names[i % 40]},word {i}" for i in range(1000))]
    (tmp_path / "speech" / "metadata.csv").write_text("\n".join(table))
    command = [sys.executable, "-c", LOADING, *line.split(), "curriculum_epochs=0"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
    while "loading" not in running.stdout.readline():
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and err == "Interrupted.\n"
    assert not list(tmp_path.glob("run/*"))


def test_help_needs_no_library():
    script = "import sys; from utils.__main__ import make_parser; make_parser().format_help()"
    script += "; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# The options of transcribe


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What reaches `load_model` and `transcribe`, which is not run."""
    seen = {}
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.wav").touch()

    def load(source, device):
        seen["model"], seen["device"] = source, device
        return None, None

    def record(model, audio, tokenizer, on_segment, **options):
        seen["options"] = options
        segment = {"id": 0, "start": 1.0, "end": 2.5, "text": " one two"}
        if options.get("word_timestamps"):
            names = ("word", "start", "end", "probability")
            words = [(" one", 1.0, 1.6, 0.9), (" two", 1.8, 2.5, 0.9)]
            segment["words"] = [dict(zip(names, word, strict=True)) for word in words]
        on_segment(segment, "en")
        return {"text": " one two", "segments": [segment], "language": "en"}

    def load_audio(file):
        seen.setdefault("files", []).append(file)

    monkeypatch.setattr("utils.audio.load_audio", load_audio)
    monkeypatch.setattr("utils.checkpoints.load_model", load)
    monkeypatch.setattr("utils.transcribe.transcribe", record)
    return seen


def options_of(command):
    """The names that the options of a command have in Python."""
    found = OPTION.findall(COMMANDS[command].__doc__)
    return {option[2:].replace("-", "_") for _, option, *_ in found}


def test_every_option_of_the_library_is_an_option_of_the_command():
    library = {item.name for kind in (LongFormOptions, DecodingOptions) for item in fields(kind)}
    library |= set(inspect.signature(transcribe_batched).parameters)
    library -= {"prompt", "model", "audio", "tokenizer", "progress", "on_segment", "thresholds"}
    library -= {"windows"}  # of `transcribe` to itself
    known = options_of("transcribe")
    assert library <= known and set(LAYOUT_OPTIONS) <= known
    trained = set(inspect.signature(run_training).parameters) | set(
        inspect.signature(train).parameters
    )
    trained -= {"args", "dataset", "validation", "recipe", "watch", "options"}
    assert trained <= options_of("train")


def test_what_is_not_given_is_left_to_the_library(asked, capsys):
    main(["transcribe", "a.wav", "b.wav"])
    assert asked["options"] == {"progress": True} and asked["files"] == ["a.wav", "b.wav"]
    assert asked["model"] == DEFAULT_MODEL and asked["device"] == default_device()
    assert capsys.readouterr().out == "one two\none two\n"


def test_the_words_of_openai_whisper_are_understood(asked, capsys):
    threads = torch.get_num_threads()
    line = """transcribe a.wav --model tiny.en --device cpu -o out -f srt --verbose False
        --task transcribe --language en --temperature 0.4 --best_of 5 --beam_size 5
        --patience None --length_penalty 0.5 --suppress_tokens -1 --initial_prompt=Zoë
        --carry_initial_prompt True --condition_on_previous_text False
        --temperature_increment_on_fallback 0.3 --compression_ratio_threshold None
        --logprob_threshold -1.0 --no_speech_threshold 0.6 --word_timestamps True
        --highlight_words True --max_line_width 20 --max_line_count 2 --max_words_per_line None
        --threads 2 --clip_timestamps 0,5 --hallucination_silence_threshold 2"""
    main(line.split())
    set_to = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert set_to == 2 and (asked["model"], asked["device"]) == ("tiny.en", "cpu")
    assert asked["options"] == {
        "progress": True,
        "task": "transcribe",
        "language": "en",
        "temperature": [0.4, 0.7, 1.0],
        "best_of": 5,
        "beam_size": 5,
        "patience": None,
        "length_penalty": 0.5,
        "suppress_tokens": "-1",
        "initial_prompt": "Zoë",
        "carry_initial_prompt": True,
        "condition_on_previous_text": False,
        "compression_ratio_threshold": None,
        "logprob_threshold": -1.0,
        "no_speech_threshold": 0.6,
        "word_timestamps": True,
        "clip_timestamps": "0,5",
        "hallucination_silence_threshold": 2,
    }
    LongFormOptions(temperature=asked["options"]["temperature"])
    assert capsys.readouterr().out == f"{Path('out', 'a.srt')}\n"
    assert "<u>one</u> two" in Path("out", "a.srt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--temperature 0", [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ("--temperature 0.5", [0.5, 0.7, 0.9]),
        ("--temperature 0 --temperature-increment-on-fallback None", 0),
        ("--temperature-increment-on-fallback 0.5", [0, 0.5, 1.0]),
        ("--temperature 0,0.5,0.75", [0, 0.5, 0.75]),
        ("--temperature 2", [2]),
    ],
)
def test_temperatures(line, expected, asked):
    main(["transcribe", "a.wav", *line.split()])
    assert asked["options"]["temperature"] == expected


@pytest.mark.parametrize("words", ["a.wav --word-timestamps", "--word_timestamps a.wav"])
def test_a_flag_alone_means_true(words, asked):
    main(["transcribe", *words.split(), "--device", "cpu"])
    assert asked["options"]["word_timestamps"] is True and asked["files"] == ["a.wav"]


def test_a_folder_alone_means_all_formats(asked, tmp_path):
    main(["transcribe", "a.wav", "-o", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"a.{kind}" for kind in FORMATS}


def test_verbose_prints_each_segment(asked, capsys):
    main(["transcribe", "a.wav", "--verbose", "True"])
    assert capsys.readouterr().out == "[00:01.000 --> 00:02.500]  one two\n"
    assert asked["options"]["progress"] is False


@pytest.mark.parametrize("multilingual", [False, True])
def test_verbose_prints_what_openai_whisper_prints(multilingual, tmp_path, capsys):
    theirs, _ = official(multilingual, 0)
    weights = {"dims": vars(theirs.dims), "model_state_dict": theirs.state_dict()}
    torch.save(weights, tmp_path / "nano.pt")
    audio = torch.cat([TWO, silence(24), TWO])
    soundfile.write(tmp_path / "two.wav", audio.numpy(), SAMPLE_RATE, subtype="FLOAT")
    theirs.transcribe(audio, verbose=True, temperature=0.0, sample_len=16, fp16=False)
    expected = re.sub("^Detecting language.*\n", "", capsys.readouterr().out)
    assert multilingual == expected.startswith("Detected language: ")
    line = "--verbose --temperature 0 --temperature-increment-on-fallback None --clamp-times False"
    line += " --sample-len 16"
    main(
        [
            "transcribe",
            str(tmp_path / "two.wav"),
            "--model",
            str(tmp_path / "nano.pt"),
            *line.split(),
        ]
    )
    assert capsys.readouterr().out == expected and expected.count("-->") > 1


@pytest.mark.parametrize(
    ("full", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
        (MemoryError("Unable to allocate 7 GiB for an array"), "Unable to allocate 7 GiB"),
    ],
)
def test_a_full_memory_is_one_line(full, said, asked, monkeypatch, capsys):
    monkeypatch.setattr("utils.transcribe.transcribe", Mock(side_effect=full))
    with pytest.raises(SystemExit) as end:
        main(["transcribe", "a.wav"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.count("\n") == 1


def test_more_threads_than_a_machine_can_use_are_not_started(asked, monkeypatch):
    started = []
    monkeypatch.setattr(torch, "set_num_threads", started.append)
    main(["transcribe", "a.wav", "--threads", "99999"])
    assert started == [4 * os.cpu_count()]


@pytest.mark.parametrize("first", ["nan", "inf"])
def test_what_is_no_start_of_a_list_of_temperatures_is_left_to_the_library(first):
    options = {"temperature": float(first)}
    choose_temperatures(options)
    assert str(options["temperature"]) == first


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("the GPU is full")])
@pytest.mark.parametrize("line", ["", "--verbose", "-f srt", "-f all -o out", "--verbose -f txt"])
def test_what_was_transcribed_before_ctrl_c_is_kept(line, stop, asked, monkeypatch, capsys):
    """Under a name that no whole transcript has; the recordings after it are not begun."""

    def stopped(model, audio, tokenizer, on_segment, **options):
        for i in range(2):
            on_segment({"id": i, "start": 4.0 * i, "end": 4.0 * i + 4, "text": f" part {i}"}, "de")
        raise stop

    monkeypatch.setattr("utils.transcribe.transcribe", stopped)
    with pytest.raises(SystemExit if stop is KeyboardInterrupt else RuntimeError) as end:
        main(["transcribe", "a.wav", "b.wav", *line.split()])
    assert getattr(end.value, "code", 130) == 130 and asked["files"] == ["a.wav"]
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "a.wav: stopped after 8 s of audio."
    shown = (
        "[00:00.000 --> 00:04.000]  part 0" in out and "[00:04.000 --> 00:08.000]  part 1" in out
    )
    assert shown == ("--verbose" in line) and ("part 0 part 1\n" in out) == (line == "")
    folder = Path("out" if "out" in line else ".")
    kinds = FORMATS if "all" in line else line.split()[-1:] if "-f" in line else []
    expected = {"a.wav", "b.wav", *(["out"] if "out" in line else [])}
    assert {path.name for path in Path().iterdir()} | {path.name for path in folder.iterdir()} == (
        expected | {f"a.partial.{kind}" for kind in kinds}
    )
    for kind in kinds:
        text = (folder / f"a.partial.{kind}").read_text(encoding="utf-8")
        assert "part 0" in text and "part 1" in text


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--highlight-words True -f srt", "`highlight_words` needs the times of words"),
        ("--max_line_width 0 --word_timestamps True", "`max_line_width` must be a whole number"),
        ("--max-line-count 2 --word-timestamps", "no effect without `max_line_width`"),
        ("--max-line-width 20 --word-timestamps", "give --output-format too"),
        ("--temperature_increment_on_fallback -1", "must be above 0, or None, got -1"),
    ],
)
def test_options_without_effect_are_refused_before_any_work(line, sentence, asked, capsys):
    assert sentence in refused(["a.wav", *line.split()], capsys)
    assert asked == {}


def test_transcribing_loads_no_training(tmp_path):
    script = """
import sys
from utils.__main__ import main
try:
    main(["transcribe", sys.argv[1]])
except SystemExit as end:
    print(end.code)
heavy = "datasets pandas jiwer matplotlib utils.data utils.training utils.evaluation"
print([name for name in heavy.split() if name in sys.modules])
"""
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    command = [sys.executable, "-c", script, str(tmp_path / "broken.wav")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "2\n[]\n" and "broken.wav" in done.stderr


# Several recordings: one that fails, names, consoles, pipes


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    """A folder that is the working directory, and `record(name)`, which puts a recording there."""
    monkeypatch.chdir(tmp_path)

    def record(name, content=SOUNDS["10 ms"]):
        with open(os.path.join(tmp_path, name), "wb") as file:
            file.write(content)
        return name

    return record


def ends_with(code, *words):
    """Call the command line, which ends with this exit code."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    assert end.value.code == code


@pytest.mark.parametrize("kind", ["absent", "folder", "text", "empty", "cut"])
@pytest.mark.parametrize("name", ["a.wav", "b.wav", "c.wav"])
def test_one_recording_that_fails_stops_no_other(
    kind, name, checkpoint, recordings, tmp_path, capsys
):
    for other in {"a.wav", "b.wav", "c.wav"} - {name}:
        recordings(other)
    contents = {"text": b"no sound", "empty": b"", "cut": SOUNDS["10 ms"][:20]}
    if kind == "folder":
        (tmp_path / name).mkdir()
    elif kind != "absent":
        recordings(name, contents[kind])
    words = ["a.wav", "b.wav", "c.wav", "--model", checkpoint, "-f", "srt", "-o", "out"]
    ends_with(2, "transcribe", *words)
    written = {f"{other[0]}.srt" for other in {"a.wav", "b.wav", "c.wav"} - {name}}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "no speech" not in line]
    assert len(lines) == 1 and name in lines[0] and len(out.splitlines()) == 2


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "make room"), (errno.EROFS, "or choose another place"), (errno.EIO, "another")],
)
def test_a_disk_that_takes_no_more_ends_it_at_once(number, advice, asked, monkeypatch, capsys):
    """What has been written stays; the recordings after it are not begun."""

    def write(path, data):
        if path.stem == "b":
            raise OSError(number, "it is full")
        write_atomic(path, data)

    Path("c.wav").touch()
    monkeypatch.setattr("utils.transcribe.write_atomic", write)
    ends_with(2, *"transcribe a.wav b.wav c.wav -f all -o out".split())
    err = capsys.readouterr().err
    assert err.startswith("the folder out cannot be written to (OSError: [Errno ")
    assert advice in err and err.count("\n") == 1 and asked["files"] == ["a.wav", "b.wav"]
    assert {path.name for path in Path("out").iterdir()} == {f"a.{kind}" for kind in FORMATS}


def test_recordings_that_are_not_there_need_no_model(recordings, capsys):
    ends_with(2, "transcribe", "a.wav", "b\n.wav", "", ".", "--model", "absent.safetensors")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "a folder: name the recordings in it" in lines[3]
    assert all("is not a file" in line for line in lines[:3])
    words = [recordings("a.wav"), "b.wav", "--model", "absent.safetensors"]
    ends_with(2, "transcribe", *words)  # reported before the model is loaded
    assert capsys.readouterr().err.startswith("b.wav is not a file")


def test_a_recording_is_never_overwritten(recordings, tmp_path, capsys):
    recordings("talk.txt")
    for words in (
        ["talk.txt"],
        ["talk.txt", "-f", "txt"],
        ["./talk.txt", "-f", "all", "-o", "x/.."],
    ):
        words = [*words, "--output-dir", tmp_path] if "-o" not in words else words
        assert "talk.txt is a recording itself" in refused(words, capsys)
    assert (tmp_path / "talk.txt").read_bytes() == SOUNDS["10 ms"]


NAMES = ["a.b.wav", "-a.wav", "--my_file.wav", "-", "東京.wav", "no suffix", ".wav"]
if os.name == "posix":  # Windows has shorter names
    NAMES += ["two\nlines.wav", "東" * 82 + "a.wav", "x" * 251 + ".wav", "😀" * 62 + "a.flac"]
if sys.platform == "linux":
    NAMES += [os.fsdecode(b"caf\xe9.wav")]  # no UTF-8


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_names_of_all_kinds(encoding, checkpoint, recordings, tmp_path, monkeypatch):
    """Each has its transcript, called as openai-whisper calls it, whatever the console can show."""
    for name in NAMES:
        recordings(name)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    files = ["./-" if name == "-" else name for name in NAMES]
    main(
        ["transcribe", "--model", checkpoint, "-f", "json", "-o", "out", "--verbose", "--", *files]
    )
    stems = [os.path.splitext(name)[0] for name in NAMES]
    expected = {f"{stem if len(stem) < 251 else stem[:250]}.json" for stem in stems}
    assert set(os.listdir("out")) == expected
    said, problems = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    assert said.count(".json\n") == len(said.splitlines()) == len(NAMES)
    assert problems == "" or problems.count("\n") == problems.count("no speech")


def test_standard_input(checkpoint, recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(SOUNDS["10 ms"])))
    main(["transcribe", "-", "--model", checkpoint, "-f", "txt"])
    assert [path.name for path in tmp_path.iterdir()] == ["stdin.txt"]
    assert capsys.readouterr().out == "stdin.txt\n"
    monkeypatch.setattr(sys, "stdin", None)
    assert "input" in refused(["-", "--model", checkpoint], capsys)


@pytest.mark.posix
@pytest.mark.parametrize(
    "line", ["transcribe --help", "transcribe a.wav b.wav", "transcribe a.wav -f srt"]
)
def test_nobody_reads_the_output(line, asked, monkeypatch, capsys):
    """`| head` has gone: an end without a word, and nothing left that Python would complain of."""
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        ends_with(0 if "help" in line else 141, *line.split())
        nobody.flush()
    assert capsys.readouterr().err == "" and len(asked.get("files", [])) < 2


def test_streams_that_are_closed(asked, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    main(["transcribe", "a.wav", "-f", "txt"])
    assert Path("a.txt").read_text(encoding="utf-8") == "one two\n"
    ends_with(2, "transcribe", "absent.wav")


def test_warnings_are_one_line(asked, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["utils", "plot"])
    with pytest.raises(SystemExit):
        runpy.run_path(COMMAND_LINE, run_name="__main__")
    assert warnings.formatwarning("a is\n damaged.", UserWarning, "file", 1) == "a is damaged.\n"


def test_an_output_that_takes_nothing(asked, monkeypatch, capsys):
    with open(os.open("a.wav", os.O_RDONLY), "w") as full:  # as a full disk
        monkeypatch.setattr(sys, "stdout", full)
        ends_with(2, "transcribe", "a.wav", "b.wav")
        full.flush()
    err = capsys.readouterr().err
    assert err.startswith("[Errno ") and err.count("\n") == 1 and asked["files"] == ["a.wav"]


# The other commands


def test_export_does_not_replace_its_own_model(checkpoint, capsys):
    before = Path(checkpoint).read_bytes()
    err = refused([checkpoint, Path(checkpoint).parent], capsys, "export")
    assert "where the model itself lies" in err and Path(checkpoint).read_bytes() == before


def test_export_writes_what_loads_again(tmp_path, capsys):
    theirs, _ = official(False, 0)
    weights = {"dims": vars(theirs.dims), "model_state_dict": theirs.state_dict()}
    torch.save(weights, tmp_path / "nano.pt")
    main(["export", str(tmp_path / "nano.pt"), str(tmp_path / "hf")])
    assert f"Written to {tmp_path / 'hf'}" in capsys.readouterr().out
    before, after = (load_model(tmp_path / name)[0].state_dict() for name in ("nano.pt", "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluate_passes_its_options_on(monkeypatch):
    seen = []
    report = lambda *given, **named: seen.append((given, named))  # noqa: E731
    monkeypatch.setattr("utils.evaluation.print_report", report)
    line = "--examples 2 --all --normalise False --min-kept 0.3 --skip_broken"
    main(["evaluate", *"tiny.en --data mine --device cpu".split(), *line.split()])
    main(["evaluate", "a.safetensors"])
    expected = {"examples": 2, "all": True, "normalise": False, "min_kept": 0.3}
    assert seen[0] == (("tiny.en", "mine", "cpu"), expected | {"skip_broken": True})
    assert seen[1] == (("a.safetensors", "corpus", default_device()), {})


def test_train_passes_its_options_on(monkeypatch, tmp_path, capsys):
    seen = []

    def trains(args, data, **named):
        seen.append((args, data, named))
        return [{}] * args.epochs

    monkeypatch.setattr("utils.recipes.run_training", trains)
    out = str(tmp_path / "a run")
    line = "--data mine --start a.pt --resume False --compile --set device=cpu epochs=3"
    main(["train", "--out", out, *line.split()])
    args, data, named = seen[0]
    assert (args.epochs, args.device, data) == (3, "cpu", "mine")
    expected = {"out": Path(out), "start": "a.pt", "resume": False, "compile": True, "watch": None}
    assert named == expected
    command = f"python -m utils evaluate '{out}/model.safetensors' --data mine"
    assert command in capsys.readouterr().out
    for start in ([], ["--start", "tiny.en"]):  # settings of fine-tuning are for what was trained
        main(["train", "--preset", "tiny.en", *start, "--set", "device=cpu"])
    assert seen[1][0].max_lr > seen.pop()[0].max_lr and seen.pop()
    main(["train", "--preset", "cpu", "--set", "device=cpu"])
    assert seen[1][1:] == ("corpus", {"out": Path("runs/cpu"), "watch": None})


def test_a_start_that_is_not_there_is_noticed_before_the_data_is_read(tmp_path, capsys):
    line = f"train --preset cpu --data nowhere --start nowhere.pt --out {tmp_path}"
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    assert capsys.readouterr().err.startswith("nowhere.pt is not a whole OpenAI checkpoint")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("use_muon=True", "use_muon", True),
        ("use_muon=false", "use_muon", False),
        ("dropout=.1", "dropout", 0.1),
        ("micro_batch_size=None", "micro_batch_size", None),
        ("micro_batch_size=null", "micro_batch_size", None),
        ("max_lr=1E-3", "max_lr", 0.001),
        ("language=no", "language", "no"),
    ],
)
def test_settings_are_spelled_as_in_python_or_json(words, name, value, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "utils.recipes.run_training", lambda args, *_, **__: seen.append(args) or []
    )
    ends_with(130, "train", "--preset", "tiny", "--set", words, "device=cpu")
    assert getattr(seen[0], name) == value and type(getattr(seen[0], name)) is type(value)


def test_settings_may_be_given_in_several_options(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "utils.recipes.run_training", lambda args, *_, **__: seen.append(args) or []
    )
    line = "train --set epochs=3 seed=4 max_lr=1e-4 --compile --set device=cpu --set epochs=5"
    ends_with(130, *line.split())
    args = seen[0]
    assert (args.epochs, args.seed, args.max_lr, args.device) == (5, 4, 1e-4, "cpu")


@pytest.mark.parametrize("place", ["taken", "taken/below/it"])
def test_a_run_folder_that_takes_no_files_is_noticed_first(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").touch()
    monkeypatch.setattr("utils.training.Run", None)  # not called
    words = ["--set", "device=cpu", "--data", "nowhere", "--out", tmp_path / place]
    ends_with(2, "train", *words)
    assert f"the folder {tmp_path / place} cannot be written to" in capsys.readouterr().err


@pytest.mark.posix
def test_a_run_folder_on_a_disk_that_is_not_mounted_is_noticed_first(tmp_path, capsys):
    (tmp_path / "disk").symlink_to(tmp_path / "not mounted")
    for place in ("disk", "disk/below/it"):
        ends_with(2, *"train --set device=cpu --data nowhere --out".split(), tmp_path / place)
        assert f"the folder {tmp_path / place} cannot be written to" in capsys.readouterr().err


def test_a_stopped_run_ends_with_130(monkeypatch):
    monkeypatch.setattr("utils.recipes.run_training", lambda *given, **named: [])
    with pytest.raises(SystemExit) as end:
        main(["train", "--set", "device=cpu"])
    assert end.value.code == 130


def test_tensorboard_is_a_choice(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        tensorboard_logger(tmp_path)
    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == tmp_path / "tensorboard"
            written.append("opened")

        def add_scalar(self, *what):
            written.append(what)

        def flush(self):
            written.append("flushed")

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    watch = tensorboard_logger(tmp_path)
    assert written == [], "all processes have it, and the first alone calls it"
    for step in (7, 8):
        watch([{"epoch": 1, "step": step, "val_loss": 2.5}])
    assert written == ["opened", ("val_loss", 2.5, 7), "flushed", ("val_loss", 2.5, 8), "flushed"]


# Each option reaches what it names


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size 4", 4),
        ("--prefix 7,8", "7,8"),
        ("--prefix None", None),
        ("--hotwords lamp,Zoë", "lamp,Zoë"),
        ("--hotword-bonus 1.5", 1.5),
        ("--suppress-blank False", False),
        ("--without-timestamps", True),
        ("--clamp-times False", False),
        ("--max-initial-timestamp 0.5", 0.5),
        ("--max-initial-timestamp None", None),
        ("--sample-len 9", 9),
        ("--ctc-weight 0.2", 0.2),
        ("--clip-timestamps 3.5", "3.5"),
        ("--patience 1.5", 1.5),
    ],
)
def test_values_have_the_kind_that_the_library_takes(option, value, asked):
    main(["transcribe", *option.split(), "--verbose", "a.wav"])
    name = option.split()[0][2:].replace("-", "_")
    assert asked["options"] == {"progress": False, name: value}
    assert type(asked["options"][name]) is type(value)


def test_evaluate_takes_a_split(monkeypatch):
    seen = []
    monkeypatch.setattr("utils.evaluation.print_report", lambda *_, **named: seen.append(named))
    main(["evaluate", "a.safetensors", "--split", "test_single_words"])
    assert seen == [{"split": "test_single_words"}]


def test_diagnose_passes_its_options_on(monkeypatch, capsys):
    seen, loaded = [], SimpleNamespace(args="its settings")
    monkeypatch.setattr(
        "utils.checkpoints.load_model", lambda *given: seen.append(given) or (loaded, "tokenizer")
    )
    monkeypatch.setattr(
        "utils.evaluation.load_test_clips", lambda *given: seen.append(given) or ("clips", "some")
    )
    monkeypatch.setattr("utils.diagnose.diagnose", lambda *given: seen.append(given))
    main("diagnose a.pt --data mine --device cuda:1".split())
    clips = ("mine", "tokenizer", "its settings")
    assert seen == [("a.pt", "cuda:1"), clips, (loaded, "clips")]
    main(["diagnose", "a.pt"])
    assert seen[3:5] == [("a.pt", default_device()), ("corpus", *clips[1:])]
    assert capsys.readouterr().out == "a.pt on some:\n" * 2


def test_words_passes_its_options_on(monkeypatch, tmp_path):
    seen, results = [], [{"wer": 0}, None]
    stand_in = ModuleType("words")
    stand_in.teach = lambda *given: seen.append(given) or results.pop(0)
    stand_in.report = lambda *given: seen.append(given)
    monkeypatch.setitem(sys.modules, "words", stand_in)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    main("words mine.txt --out some --seed 7".split())
    path = Path("some", "model.safetensors")
    assert seen == [("mine.txt", Path("some"), 7), ({"wer": 0}, path)]
    ends_with(130, "words", "mine.txt")  # stopped, and nothing to report
    assert seen[2:] == [("mine.txt", Path("runs/words"), 0)]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_prints(rank, monkeypatch, tmp_path, capsys):
    seen = []

    def trains(args, data, **named):
        seen.append((args.device, named["watch"]))
        return [{}] * args.epochs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.recipes.run_training", trains)
    monkeypatch.setattr("utils.__main__.tensorboard_logger", lambda folder: ("for", folder))
    monkeypatch.setenv("RANK", rank)
    line = "train --preset tiny.en --start tiny.en --tensorboard --set device=cuda:0 epochs=1"
    main(line.split())
    shown = capsys.readouterr().out
    assert seen == [("cuda:0", ("for", Path("runs/tiny.en")))]
    if rank == "1":
        assert shown == ""
        return
    assert "on cuda:0." in shown
    assert "evaluate runs/tiny.en/best.safetensors --data corpus" in shown


@pytest.mark.posix
def test_ctrl_c_within_an_import_comes_after_it(tmp_path):
    """NumPy and others lose the exception, or fail in another way later."""
    script = """
import signal, sys, time
from utils.__main__ import interrupt
signal.signal(signal.SIGINT, interrupt)
sys.path.insert(0, sys.argv[1])
try:
    import interrupted
    assert interrupted.whole
    for _ in range(600):
        time.sleep(0.1)
except KeyboardInterrupt:
    print("later" if "interrupted" in sys.modules else "lost")
"""
    module = "import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n"
    (tmp_path / "interrupted.py").write_text(module)
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "later\n", done.stderr
