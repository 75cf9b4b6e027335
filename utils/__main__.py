"""The command line: `python -m utils train | evaluate | transcribe | diagnose | plot | export`."""

import argparse
import json
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from utils.config import ModelArgs, check_device, default_device

DATA_HELP = "corpus, gigaspeech:xs or a folder of recordings"


class Parser(argparse.ArgumentParser):
    """Complains as everything else here: one line on stderr, exit code 2."""

    def error(self, message):
        raise ValueError(f"{message}: see `python -m utils --help`.")


def parse_settings(pairs: list[str]) -> dict:
    """["epochs=20", …] -> {"epochs": 20, …}. Raises `ValueError` for unknown names."""
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


def tensorboard_logger(folder: Path):
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


def train(options) -> int:
    from utils.distributed import current_processes, process_group
    from utils.recipes import run_training

    args = ModelArgs.preset(options.preset, **parse_settings(options.set))
    out = Path(options.out or f"runs/{options.preset}")
    with process_group(args) as args:
        first = current_processes().rank == 0
        watch = tensorboard_logger(out) if options.tensorboard and first else None
        if first:
            print(f"Training the preset {options.preset!r} on {args.device}.")
        choices = {"compile": options.compile, "watch": watch, "start": options.start}
        history = run_training(args, options.data, out=out, **choices)
        if len(history) < args.epochs:
            return 130
        if first:
            print(
                f"Test it: python -m utils evaluate {out}/model.safetensors --data {options.data}"
            )
    return 0


def evaluate(options):
    from utils.evaluation import print_report

    check_device(options.device)
    print_report(options.model, options.data, options.device)


def diagnose(options):
    from utils import diagnose as chapter
    from utils.checkpoints import load_model
    from utils.data import ClipDataset
    from utils.evaluation import test_rows

    check_device(options.device)
    model, tokenizer = load_model(options.model, options.device)
    rows, what = test_rows(options.data, model.args)
    print(f"{options.model} on {what}:")
    chapter.diagnose(model, ClipDataset(rows, tokenizer, model.args))


def plot(options):
    from utils.plotting import plot_history, read_history, save_picture

    save_picture(plot_history(read_history(options.history)), options.picture)


def export(options):
    from utils.checkpoints import export_hf, load_model

    model, tokenizer = load_model(options.model)
    export_hf(model, options.folder, tokenizer)
    print(f"Written to {options.folder}: transformers' from_pretrained opens it.")


def build_parser() -> Parser:
    """One parser for all subcommands."""
    parser = Parser(prog="python -m utils", description="Whisper from scratch.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def add(function, description):
        command = commands.add_parser(function.__name__, help=description, description=description)
        command.set_defaults(function=function)
        return command.add_argument

    option = add(train, "train a model")
    option("--preset", default="cpu", help="seed, cpu or an official size")
    option("--data", default="corpus", help=DATA_HELP)
    option("--out", help="folder of the run (default: runs/ and the preset's name)")
    option("--start", metavar="MODEL", help="begin with the weights of this model")
    option("--set", nargs="*", default=[], metavar="NAME=VALUE", help="epochs=20 …")
    option("--compile", action="store_true", help="torch.compile the blocks")
    option("--tensorboard", action="store_true", help="write for TensorBoard too")
    for function, description in (
        (evaluate, "word error rate of a model on clips that it was not trained on"),
        (diagnose, "can the loss of this model be believed?"),
    ):
        option = add(function, description)
        option("model", help="a model.safetensors, OpenAI's .pt, a folder of transformers, a size")
        option("--data", default="corpus", help=DATA_HELP)
        option("--device", default=default_device(), help="cpu, cuda:0 or mps")
    option = add(plot, "draw the curves of a training run")
    option("history", help="the history.jsonl of a run")
    option("picture", help="the picture to write: .png, .jpg, .pdf …")
    option = add(export, "write a folder that transformers and faster-whisper's converter read")
    option("model", help="what `evaluate` takes")
    option("folder", help="the folder to write")
    return parser


def main(words: list[str] | None = None) -> None:
    """Run one command: exit code 2 and one line for bad input, 130 after Ctrl-C."""
    try:
        options = build_parser().parse_args(words)
        code = options.function(options)
    except ValueError as problem:
        print(" ".join(str(problem).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = 130
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
