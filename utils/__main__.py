"""The command line: python -m utils train | evaluate | transcribe | diagnose | plot | export.

Bad input ends with one line on stderr and exit code 2, Ctrl-C with exit code 130. Each command
imports what it needs when it runs: help comes at once, and transcribing loads no training.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

__all__ = ["main"]


def boolean(text: str) -> bool:
    """True or False, as openai-whisper spells them."""
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def number(text: str) -> int | float | None:
    """A number, or None."""
    if text == "None":
        return None
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def words(text: str) -> str | None:
    """Any text, or None."""
    return None if text == "None" else text


def temperatures(text: str) -> int | float | list | None:
    """One temperature, or several with commas between."""
    steps = [number(step) for step in text.split(",")]
    return steps if len(steps) > 1 else steps[0]


DATA = ("--data", str, "corpus, gigaspeech:xs, a folder of recordings, …")
DEVICE = ("--device", str, "cpu, cuda:0 or mps (default: the best one here)")
MODEL = "a checkpoint, or a name such as tiny.en"

# Tables of options: name, kind, help with the default. What is not given keeps the library's default.
DECODING = [
    ("--language", words, "code such as en (default: detect it)"),
    ("--task", str, "transcribe, or translate into English"),
    ("--batch-size", number, "cut at pauses, and decode so many windows together"),
    ("--word-timestamps", boolean, "find the times of words"),
    ("--compression-ratio-threshold", number, "above it, decode again (2.4)"),
    ("--logprob-threshold", number, "below this average log-probability, decode again (-1)"),
    ("--no-speech-threshold", number, "above this probability, a guess is silence (0.6)"),
    ("--condition-on-previous-text", boolean, "the text so far is the prompt (True)"),
    ("--initial-prompt", words, "prompt of the first window: spellings, style"),
    ("--carry-initial-prompt", boolean, "keep it in the prompt of every window"),
    ("--clip-timestamps", words, "start,end,start,… in seconds: transcribe only these"),
    ("--hallucination-silence-threshold", number, "seconds of silence that make words suspect"),
    ("--beam-size", number, "beams at temperature 0"),
    ("--patience", number, "beam search waits for so many times its beams (1)"),
    ("--best-of", number, "samples at temperatures above 0"),
    ("--length-penalty", number, "alpha from 0 to 1 (default: divide by the length)"),
    ("--sample-len", number, "tokens per window at most"),
    ("--prefix", words, "how the text of each window begins"),
    ("--suppress-tokens", words, "ids with commas; -1: symbols that nobody speaks (-1)"),
    ("--suppress-blank", boolean, "no text begins with a blank (True)"),
    ("--without-timestamps", boolean, "decode without timestamp tokens"),
    ("--max-initial-timestamp", number, "seconds at which the first segment begins at most (1)"),
    ("--ctc-weight", number, "weight of a CTC head in rescoring (0.1)"),
]
TEMPERATURE = [
    ("--temperature", temperatures, "the first one; or all of them, such as 0,0.4,0.8"),
    ("--temperature-increment-on-fallback", number, "from the first one up to 1 (0.2)"),
]
OUTPUT = [
    ("--output-format", str, "txt, vtt, srt, tsv, json or all (default: print the text)"),
    ("--output-dir", Path, "folder of the files (default: this one)"),
]
LAYOUT = [  # of subtitles, for which --word-timestamps is needed
    ("--max-line-width", number, "characters in a line"),
    ("--max-line-count", number, "lines in a subtitle"),
    ("--max-words-per-line", number, "words in a line"),
    ("--highlight-words", boolean, "underline each word as it is spoken"),
]
OPTIONS = {
    "train": [
        ("--preset", str, "seed, cpu or an official size (cpu)"),
        DATA,
        ("--out", Path, "folder of the run (runs/ and the preset's name)"),
        ("--start", str, "begin with the weights of this checkpoint"),
        ("--resume", boolean, "continue what is in the folder (True)"),
        ("--compile", boolean, "torch.compile the network"),
        ("--tensorboard", boolean, "write for TensorBoard too"),
    ],
    "evaluate": [DATA, DEVICE, ("--examples", int, "sentences to show (5)")],
    "transcribe": [
        ("--model", str, f"{MODEL} (default: the shipped one)"),
        DEVICE,
        ("--threads", number, "threads on the CPU"),
        *OUTPUT,
        ("--verbose", boolean, "print each segment with its times"),
        *DECODING,
        *TEMPERATURE,
        *LAYOUT,
    ],
    "diagnose": [DATA, DEVICE],
    "plot": [],
    "export": [],
}
ARGUMENTS = {
    "train": [],
    "evaluate": [("model", MODEL)],
    "transcribe": [("files", "WAV, FLAC, MP3 or Ogg")],
    "diagnose": [("model", MODEL)],
    "plot": [("history", "the history.jsonl of a run"), ("picture", "such as loss.png")],
    "export": [("model", MODEL), ("folder", "for transformers' from_pretrained")],
}
SHORT = {"--output-format": ["-f"], "--output-dir": ["-o"]}
FLAGS = {name for table in OPTIONS.values() for name, kind, _ in table if kind is boolean}


def keys(table: list) -> set[str]:
    """The names that the options of a table have in Python."""
    return {name[2:].replace("-", "_") for name, *_ in table}


class Parser(argparse.ArgumentParser):
    """Raises `ValueError` with one sentence instead of printing the usage."""

    def error(self, message: str):
        raise ValueError(f"{message}: see --help for what can be given.")


def make_parser() -> Parser:
    """The parser of all commands; its result holds what was given, and nothing else."""
    parser = Parser(prog="python -m utils", description="Whisper from scratch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in COMMANDS.items():
        about = {"help": run.__doc__, "description": run.__doc__}
        about |= {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
        command = commands.add_parser(name, **about)
        for argument, text in ARGUMENTS[name]:
            several = {"nargs": "+"} if argument == "files" else {}
            command.add_argument(
                argument, metavar=argument.rstrip("s").upper(), help=text, **several
            )
        for option, kind, text in OPTIONS[name]:
            shown = "True|False" if kind is boolean else option.split("-")[-1].upper()
            names = [option, *SHORT.get(option, [])]
            command.add_argument(*names, type=kind, metavar=shown, help=text)
        if name == "train":
            several = {"nargs": "*", "metavar": "NAME=VALUE", "dest": "settings"}
            command.add_argument("--set", **several, help="settings of the run: epochs=20 …")
    return parser


def normalise(argv: list[str]) -> list[str]:
    """Underscores in the names of options become hyphens; a flag alone is followed by True."""
    spelled = []
    for word in [*argv, ""]:
        if spelled and spelled[-1] in FLAGS and word.lower() not in ("true", "false"):
            spelled.append("True")
        name, equals, value = word.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if word[:2] == "--" else word)
    return spelled[:-1]


def parse_settings(pairs: list[str]) -> dict:
    """["epochs=20", …] -> {"epochs": 20, …}. Raises `ValueError` for unknown names."""
    from utils.config import ModelArgs

    names, settings = {item.name for item in fields(ModelArgs)}, {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in names:
            raise ValueError(f"unknown setting {name!r}: choose from {', '.join(sorted(names))}.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def tensorboard_logger(folder: Path) -> Callable:
    """A `watch` for `train` that writes every number of the history for TensorBoard."""
    if find_spec("tensorboard") is None:
        raise ValueError("TensorBoard is not here: `pip install tensorboard`, or do without it.")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")

    def watch(history):
        for name in history[-1].keys() - {"epoch", "step"}:
            writer.add_scalar(name, history[-1][name], history[-1]["step"])
        writer.flush()

    return watch


def run_train(
    preset: str = "cpu", data: str = "corpus", out: Path | None = None, settings: list = (),
    tensorboard: bool = False, **options,
) -> int:  # fmt: skip
    """Train a model, or continue its training."""
    from utils.config import ModelArgs
    from utils.distributed import current_processes, process_group
    from utils.recipes import run_training

    args, out = ModelArgs.preset(preset, **parse_settings(settings)), out or Path("runs", preset)
    with process_group(args) as args:
        first = current_processes().rank == 0
        watch = tensorboard_logger(out) if tensorboard and first else None
        if first:
            print(f"Training the preset {preset!r} on {args.device}.")
        history = run_training(args, data, out=out, watch=watch, **options)
    if len(history) < args.epochs:
        return 130
    if first:
        print(f"Test it: python -m utils evaluate {out}/model.safetensors --data {data}")
    return 0


def run_evaluate(model: str, data: str = "corpus", device: str | None = None, **options) -> None:
    """Measure the word error rate of a model on clips that it was not trained on."""
    from utils.config import check_device, default_device
    from utils.evaluation import print_report

    device = device or default_device()
    check_device(device)
    print_report(model, data, device, **options)


def run_diagnose(model: str, data: str = "corpus", device: str | None = None) -> None:
    """Check whether the loss of a model can be believed."""
    from utils.checkpoints import load_model
    from utils.config import default_device
    from utils.data import ClipDataset
    from utils.diagnose import diagnose
    from utils.evaluation import test_rows

    loaded, tokenizer = load_model(model, device or default_device())
    rows, described = test_rows(data, loaded.args)
    print(f"{model} on {described}:")
    diagnose(loaded, ClipDataset(rows, tokenizer, loaded.args))


def run_plot(history: str, picture: str) -> None:
    """Draw the curves of a training run."""
    from utils.plotting import plot_history, read_history, save_picture

    save_picture(plot_history(read_history(history)), picture)


def run_export(model: str, folder: str) -> None:
    """Write a folder that transformers and CTranslate2's converter read."""
    from utils.checkpoints import export_hf, load_model

    loaded, tokenizer = load_model(model)
    export_hf(loaded, folder, tokenizer)
    print(f"Written to {folder}: transformers' from_pretrained opens it.")


def temperature_steps(
    temperature: float | list | None = 0, temperature_increment_on_fallback: float | None = 0.2
) -> float | list | None:
    """The temperatures to try, as in openai-whisper's command: from one up to 1, or those given."""
    first, step = temperature, temperature_increment_on_fallback
    if step is None or not isinstance(first, int | float):
        return first
    if not 0 < step < float("inf"):
        raise ValueError(
            f"`temperature_increment_on_fallback` must be above 0, or None, got {step}."
        )
    count = int(max(0, (1 - first) / step + 1e-6)) + 1
    return [round(first + i * step, 6) for i in range(count)]


def check_outputs(files: list, output_format: str, output_dir: str | Path) -> None:
    """Raise `ValueError` for an unknown format or folder, and where two outputs are one file."""
    from utils.files import as_value_error
    from utils.transcribe import output_paths

    names = [Path(file).stem for file in files if output_paths(file, output_format)]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(
            f"two recordings are called {twice[0]}, and one transcript would overwrite the "
            "other: transcribe them one by one, with two --output-dir."
        )
    with as_value_error(f"the folder {output_dir} cannot be written to", "choose another"):
        path = Path(output_dir).absolute()  # made later; its nearest parent must take a file
        nearest = next(place for place in [path, *path.parents] if place.exists())
        tempfile.TemporaryFile(dir=nearest).close()


def run_transcribe(
    files: list, model: str | None = None, device: str | None = None, threads: int | None = None,
    verbose: bool = False, **options,
) -> None:  # fmt: skip
    """Transcribe recordings: print their text, or write subtitles."""
    import torch

    from utils.checkpoints import load_model
    from utils.config import default_device
    from utils.transcribe import DEFAULT_MODEL, check_layout, transcribe, write_result

    layout, output, steps = (
        {name: options.pop(name) for name in keys(table) & options.keys()}
        for table in (LAYOUT, OUTPUT, TEMPERATURE)
    )
    if steps:
        options["temperature"] = temperature_steps(**steps)
    check_layout(layout, options.get("word_timestamps"))
    if layout and not output:
        raise ValueError("these options lay out subtitles: give --output-format too, such as srt.")
    place = output.get("output_format", "all"), output.get("output_dir", ".")
    if output:
        check_outputs(files, *place)
    if threads:
        torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model or DEFAULT_MODEL, device or default_device())
    for file in files:
        result = transcribe(loaded, file, tokenizer, progress=not verbose, **options)
        if not result["segments"]:
            print(f"{file}: no speech was found: record nearer and louder.", file=sys.stderr)
        for segment in result["segments"] if verbose else []:
            print(f"[{segment['start']:.2f} --> {segment['end']:.2f}] {segment['text'].strip()}")
        for path in write_result(result, file, *place, **layout) if output else []:
            print(path)
        if not (verbose or output):
            print(result["text"].strip())


RUNS = (run_train, run_evaluate, run_transcribe, run_diagnose, run_plot, run_export)
COMMANDS = {run.__name__.removeprefix("run_"): run for run in RUNS}


def main(argv: list[str] | None = None) -> None:
    """Run one command. Exits with 2 after bad input, and with 130 after Ctrl-C."""
    try:
        argv = normalise(sys.argv[1:] if argv is None else argv)
        options = vars(make_parser().parse_args(argv))
        code = COMMANDS[options.pop("command")](**options)
    except (ValueError, OSError) as problem:
        print(" ".join(str(problem).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = 130
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
