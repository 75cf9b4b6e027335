"""The command line: python -m utils COMMAND, where COMMAND is one of `COMMANDS`.

Bad input ends with one line on stderr and exit code 2, Ctrl-C with exit code 130; where nobody
reads the output any more (| head), it ends quietly with 141. The arguments of a command are those
that its docstring lists. Each command imports what it needs when it runs, so help comes at once.
"""

import argparse
import inspect
import io
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from shlex import join

__all__ = ["main"]


def boolean(text: str) -> bool:
    """True or False, as openai-whisper spells them."""
    return ["false", "true"].index(text.lower()) == 1


def number(text: str) -> int | float | list | None:
    """A number, None, or several with commas between."""
    if "," in text:
        return [number(part) for part in text.split(",")]
    if text in ("None", "null"):
        return None
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def count(text: str) -> int:
    """A number of things."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text}")
    return int(text)


def setting(text: str) -> tuple:
    """A setting of a run, spelled as in Python or JSON: epochs=20 -> ("epochs", 20)."""
    name, _, value = text.partition("=")
    for kind in (boolean, number):
        with suppress(ValueError):
            return name, kind(value)
    return name, value


KINDS = {"TRUE|FALSE": boolean, "NUMBER": number, "COUNT": count, "FOLDER": Path, "SECONDS": float}
KINDS |= {"NAME=VALUE": setting, "TEXT": lambda text: None if text == "None" else text}
ARGUMENT = re.compile(r"^    ([A-Z]+)(\.{3})? +(.+)$", re.MULTILINE)  # MODEL  what it is
OPTION = re.compile(r"^    (?:(-\w), )?(--[\w-]+) (\S+) +(.+)$", re.MULTILINE)  # --name KIND  …


def one_line(text) -> str:
    """Whatever is in a name or a message, on one line."""
    return " ".join(part.strip() for part in f"{text}".splitlines())


def complain(problem) -> None:
    """One line on stderr."""
    print(one_line(problem), file=sys.stderr)


@contextmanager
def one_line_each(failed: list, name: str = "") -> Iterator[None]:
    """Within this block bad input, and what the machine refuses, is one line and joins `failed`."""
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as problem:
        ours = isinstance(problem, RuntimeError) and "memory" not in f"{problem}"
        if ours or isinstance(problem, BrokenPipeError):
            raise
        if isinstance(problem, OSError):
            from utils.files import machine_advice

            problem = f"{problem}: {machine_advice(problem)}."
        complain(problem if name in f"{problem}" else f"{name}: {problem}")
        failed.append(name)


class Parser(argparse.ArgumentParser):
    """Raises `ValueError` with one sentence instead of printing the usage."""

    def error(self, message: str):
        raise ValueError(f"{message}: see --help for the options.")


def make_parser() -> Parser:
    """The parser of all commands; its result holds what was given, and nothing else."""
    parser = Parser(prog="python -m utils", description="Whisper from scratch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in COMMANDS.items():
        purpose = run.__doc__.partition("\n")[0]
        about = {"help": purpose, "description": purpose, "allow_abbrev": False}
        command = commands.add_parser(name, **about, argument_default=argparse.SUPPRESS)
        for argument, several, text in ARGUMENT.findall(run.__doc__):
            nargs = "+" if several else None
            command.add_argument(argument.lower(), metavar=argument, help=text, nargs=nargs)
        for short, option, kind, text in OPTION.findall(run.__doc__):
            how = {"metavar": kind, "type": KINDS.get(kind), "help": text}
            how |= {"nargs": "*", "action": "extend"} if kind == "NAME=VALUE" else {}
            command.add_argument(*filter(None, [short, option]), **how)
    return parser


def normalise(argv: list[str]) -> list[str]:
    """Underscores in the names of options become hyphens; a flag alone is followed by True.

    What follows "--" are names of files, and stays as it is.
    """
    flags = set(re.findall(r"(--[\w-]+) TRUE", "".join(run.__doc__ for run in COMMANDS.values())))
    end = argv.index("--") if "--" in argv else len(argv)
    spelled = []
    for word in [*argv[:end], ""]:
        if spelled and spelled[-1] in flags and word.lower() not in ("true", "false"):
            spelled.append("True")
        name, equals, value = word.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if word[:2] == "--" else word)
    return spelled[:-1] + argv[end:]


def tensorboard_logger(folder: Path) -> Callable:
    """A `watch` for `train` that writes every number of the history for TensorBoard."""
    from utils.files import as_value_error

    with as_value_error("TensorBoard is missing", "`pip install tensorboard`, or leave it out"):
        from torch.utils.tensorboard import SummaryWriter
    open_once = cache(SummaryWriter)

    def watch(history):
        writer = open_once(folder / "tensorboard")  # by the first process alone, which calls this
        for name in history[-1].keys() - {"epoch", "step"}:
            writer.add_scalar(name, history[-1][name], history[-1]["step"])
        writer.flush()

    return watch


def run_train(
    preset: str = "cpu", data: str = "corpus", out: Path | None = None, set: list = (),
    tensorboard: bool = False, **options,
) -> int | None:  # fmt: skip
    """Train a model, or continue its training.

    --preset NAME  seed, cpu, ten-hours or an official size (cpu)
    --data NAME  corpus, gigaspeech:xs or a folder of recordings (corpus)
    --out FOLDER  where the run is saved (runs/PRESET)
    --start MODEL  start from these weights: a checkpoint, or a name such as tiny.en
    --set NAME=VALUE  settings of the run, such as epochs=20
    --resume TRUE|FALSE  continue the run in the folder (True)
    --compile TRUE|FALSE  compile the blocks with torch.compile
    --tensorboard TRUE|FALSE  also write logs for TensorBoard
    """
    from utils.config import OFFICIAL_SIZES, ModelArgs
    from utils.files import print_once
    from utils.recipes import fine_tuning_settings, run_training

    chosen = fine_tuning_settings(preset) if options.get("start") else {}
    args, out = ModelArgs.preset(preset, **chosen | dict(set)), out or Path("runs", preset)
    print_once(f"Training the preset {preset!r} on {args.device}.")
    watch = tensorboard_logger(out) if tensorboard else None
    if len(run_training(args, data, out=out, watch=watch, **options)) < args.epochs:
        return 130
    best = "best" if preset in OFFICIAL_SIZES else "model"
    paths = join([f"{out}/{best}.safetensors", "--data", str(data)])
    print_once(f"Test it: python -m utils evaluate {paths}")


def run_evaluate(model: str, data: str = "corpus", device: str | None = None, **options) -> None:
    """Measure the word error rate of a model on clips that it was not trained on.

    MODEL  a checkpoint, or a name such as tiny.en
    --data NAME  corpus, gigaspeech:xs or a folder of recordings (corpus)
    --device NAME  cpu, cuda:0 or mps (the best available)
    --examples COUNT  transcripts to show (5)
    --split NAME  split to test, such as test_single_words (unseen voices, or the test split)
    --all TRUE|FALSE  test all clips: also those not held out, and more than 2,000
    --normalise TRUE|FALSE  compare after Whisper's text normaliser (True for OpenAI's models)
    --min-kept NUMBER  smallest share of the clips that must fit the model (0.5)
    --skip-broken TRUE|FALSE  leave out recordings that cannot be decoded
    """
    from utils.config import default_device
    from utils.evaluation import print_report

    print_report(model, data, default_device() if device is None else device, **options)


def run_diagnose(model: str, data: str = "corpus", device: str | None = None) -> None:
    """Check whether a model's loss can be trusted.

    MODEL  a checkpoint, or a name such as tiny.en
    --data NAME  corpus, gigaspeech:xs or a folder of recordings (corpus)
    --device NAME  cpu, cuda:0 or mps (the best available)
    """
    from utils.checkpoints import load_model
    from utils.config import default_device
    from utils.diagnose import diagnose
    from utils.evaluation import load_test_clips

    loaded, tokenizer = load_model(model, default_device() if device is None else device)
    clips, described = load_test_clips(data, tokenizer, loaded.args)
    print(f"{model} on {described}:")
    diagnose(loaded, clips)


def run_plot(history: str, picture: str) -> None:
    """Draw the curves of a training run.

    HISTORY  the history.jsonl of the run
    PICTURE  the file to write, such as loss.png
    """
    from utils.plotting import plot_history, read_history, save_picture

    save_picture(plot_history(read_history(history)), picture)


def run_export(model: str, folder: str) -> None:
    """Export a model for transformers and CTranslate2's converter.

    MODEL  a checkpoint, or a name such as tiny.en
    FOLDER  where it is written
    """
    from utils.checkpoints import export_hf, load_model

    if Path(model).exists() and Path(folder).resolve() in Path(model, "_").resolve().parents[:2]:
        raise ValueError(f"{folder} is where the model itself lies: choose another folder.")
    loaded, tokenizer = load_model(model)
    export_hf(loaded, folder, tokenizer)
    print(f"Written to {folder}: transformers' from_pretrained opens it. For faster-whisper:")
    command = ["ct2-transformers-converter", "--model", folder, "--output_dir", f"{folder}-ct2"]
    print(join([*command, "--copy_files", "tokenizer.json", "preprocessor_config.json"]))


def run_words(phrases: str, out: Path = Path("runs/words"), seed: int = 0) -> int:
    """Train a recogniser of your own phrases on synthetic speech.

    PHRASES  a text file with one phrase per line: turn (on | off) the [kitchen] light
    --out FOLDER  where the model and its speech are saved (runs/words)
    --seed COUNT  another seed draws other voices (0)
    """
    from utils.files import DATA_DIR, check_folder

    check_folder(out)
    sys.path.insert(0, f"{DATA_DIR}")  # the project's scripts, which make the speech
    from words import report, teach

    results = teach(phrases, out, seed)
    if results:
        report(results, out / "model.safetensors")
    return 0 if results else 130


def choose_temperatures(options: dict) -> None:
    """In `options`, one temperature and the increment become a list, as in openai-whisper's command."""
    import numpy

    increment = "temperature_increment_on_fallback"
    if not options.keys() & {"temperature", increment}:
        return
    first, step = options.get("temperature", 0), options.pop(increment, 0.2)
    if isinstance(first, int | float) and first < float("inf") and step is not None:
        if not 0 < step < float("inf"):
            raise ValueError(f"`{increment}` must be above 0, or None, got {step}.")
        first = numpy.arange(first, 1 + 1e-6, step).round(6).tolist() or [first]
    options["temperature"] = first


def check_outputs(files: list, output_format: str, output_dir: str | Path) -> None:
    """Raise `ValueError` for an unknown format or folder, and where two files would be one."""
    from utils.files import check_folder
    from utils.transcribe import output_paths

    read, written = {os.path.realpath(file) for file in files}, set()
    for file in files:
        for path in output_paths(file, output_format, output_dir).values():
            place = os.path.realpath(path)
            if place in read:
                raise ValueError(f"{path} is a recording itself: choose another --output-dir.")
            if place in written:
                raise ValueError(f"two recordings are called {path.stem}: use two --output-dir.")
            written.add(place)
    check_folder(output_dir)


def transcribe_file(model, audio, tokenizer, verbose: bool, options: dict) -> tuple:
    """-> the result and None, or what there was of it when it was stopped, and the exception."""
    from utils.transcribe import transcribe

    so_far = {"text": "", "segments": [], "language": "en"}

    def keep(segment, language):
        if verbose:
            from whisper.tokenizer import LANGUAGES  # imported late: it takes a second
            from whisper.utils import format_timestamp

            detected = tokenizer and tokenizer.config.get("multilingual")
            if detected and not options.get("language") and not so_far["segments"]:
                print(f"Detected language: {LANGUAGES[language].title()}")
            start, end = (format_timestamp(segment[name]) for name in ("start", "end"))
            print(f"[{start} --> {end}] {segment['text']}")
        so_far["segments"].append(segment)
        so_far["language"] = language

    try:
        how = {"progress": not verbose, "on_segment": keep, **options}
        return transcribe(model, audio, tokenizer, **how), None
    except (KeyboardInterrupt, RuntimeError) as stop:  # a GPU can be full
        if not so_far["segments"]:
            raise
        so_far["text"] = " ".join(segment["text"].strip() for segment in so_far["segments"])
        return so_far, stop


def run_transcribe(files: list, verbose: bool = False, **options) -> int:
    """Transcribe recordings: print their text, or write subtitles.

    FILES...  WAV, FLAC, MP3 or Ogg; m4a, mp4 and webm with ffmpeg; - is standard input
    --model MODEL  a checkpoint, or a name such as tiny.en (the shipped one)
    --device NAME  cpu, cuda:0 or mps (the best available)
    --threads COUNT  CPU threads
    -f, --output-format NAME  txt, vtt, srt, tsv, json or all (none: print the text)
    -o, --output-dir FOLDER  where the files are written (the current folder)
    --verbose TRUE|FALSE  print each segment with its times as soon as it is decoded
    --language TEXT  such as en or English (detected)
    --task NAME  transcribe, or translate into English
    --batch-size NUMBER  cut at pauses and decode this many windows together
    --word-timestamps TRUE|FALSE  find word times; then, for subtitles:
    --max-line-width NUMBER  characters in a line
    --max-line-count NUMBER  lines in a subtitle
    --max-words-per-line NUMBER  words in a line
    --highlight-words TRUE|FALSE  underline each word as it is spoken
    --temperature NUMBER  the first temperature, or all of them, such as 0,0.4,0.8
    --temperature-increment-on-fallback NUMBER  added after each failed attempt, up to 1 (0.2)
    --compression-ratio-threshold NUMBER  decode again if the text compresses better than this (2.4)
    --logprob-threshold NUMBER  decode again if the average log-probability is below this (-1)
    --no-speech-threshold NUMBER  no-speech probability above which a failed window is silent (0.6)
    --condition-on-previous-text TRUE|FALSE  use the text so far as the prompt (True)
    --initial-prompt TEXT  prompt of the first window: spellings, style
    --carry-initial-prompt TRUE|FALSE  keep it in the prompt of every window
    --clip-timestamps TEXT  start,end,start,… in seconds: transcribe only these
    --hallucination-silence-threshold NUMBER  skip suspect words near silences of so many seconds
    --beam-size NUMBER  beams at temperature 0
    --patience NUMBER  beam search collects so many times its beams of finished texts (1)
    --best-of NUMBER  samples at temperatures above 0
    --length-penalty NUMBER  alpha from 0 to 1 (None: divide by the length)
    --sample-len NUMBER  most tokens per window
    --prefix TEXT  how the text of each window begins
    --suppress-tokens TEXT  token ids separated by commas; -1: non-speech symbols (-1)
    --suppress-blank TRUE|FALSE  forbid a blank at the beginning (True)
    --without-timestamps TRUE|FALSE  decode without timestamp tokens
    --max-initial-timestamp NUMBER  latest start of the first segment, in seconds (1)
    --clamp-times TRUE|FALSE  no time after the end of the recording (True)
    --ctc-weight NUMBER  weight of a CTC head in rescoring (0.1)
    --hotwords TEXT  names and phrases to expect, separated by commas
    --hotword-bonus NUMBER  added to the log-probability of each of their tokens, in nats (2)
    """
    import torch

    from utils.audio import load_audio
    from utils.checkpoints import load_model
    from utils.config import default_device
    from utils.files import graceful_interrupt
    from utils.sound import check_recording
    from utils.transcribe import DEFAULT_MODEL, LAYOUT, check_layout, output_paths, write_result

    layout = {name: options.pop(name) for name in LAYOUT if name in options}
    check_layout(layout, options.get("word_timestamps"))
    writes = options.keys() & {"output_format", "output_dir"}
    place = options.pop("output_format", "all"), options.pop("output_dir", Path())
    if writes:
        check_outputs(files, *place)
    elif layout:
        raise ValueError("these options lay out subtitles: give --output-format too, such as srt.")
    model, device = options.pop("model", DEFAULT_MODEL), options.pop("device", default_device())
    choose_temperatures(options)
    if threads := options.pop("threads", 0):
        torch.set_num_threads(min(threads, 4 * os.cpu_count()))  # each is a thread from now on
    failed, load_once = [], cache(load_model)
    for file in files:  # what is missing is reported before any work
        with one_line_each(failed, file):
            check_recording(file)
    for file in [file for file in files if file not in failed]:
        with one_line_each(failed, file):
            audio = load_audio(file)
        if file in failed:
            continue
        loaded, tokenizer = load_once(model, device)  # there is something to transcribe
        result, stop = transcribe_file(loaded, audio, tokenizer, verbose, options)
        if not result["segments"]:
            complain(f"{file}: no speech was found: record closer to the microphone and louder.")
        if stop:
            complain(f"{file}: stopped after {result['segments'][-1]['end']:.0f} s of audio.")
            file = f"{output_paths(file, 'txt')['txt'].stem[:60]}.partial.wav"
        with graceful_interrupt() as pressed:  # a failed write ends the run: so would the next
            if writes:
                print(*map(one_line, write_result(result, file, *place, **layout)), sep="\n")
            elif not verbose:
                print(result["text"].strip())
        if stop or pressed:
            raise stop or KeyboardInterrupt
    return 2 if failed else 0


def run_live(**options) -> int:
    """Transcribe the microphone while you speak, until Ctrl-C.

    --as-if-live FILE  play this recording at its own speed instead of the microphone
    --model MODEL  a checkpoint, or a name such as tiny.en (the shipped one)
    --device NAME  cpu, cuda:0 or mps (the best available)
    --language NAME  such as de or German (that of the model, else English)
    --policy NAME  when words become final: pause, agreement or alignment (alignment)
    --pause SECONDS  of silence that end a phrase (0.5)
    --margin SECONDS  words that end this close to the end of the audio are not final (0.5)
    --chunk SECONDS  of new audio per pass (0.5)
    --times TRUE|FALSE  print the start of each phrase in seconds
    """
    from utils.live import transcribe_live

    return 130 if transcribe_live(**options) else 0


SUMMARY = {
    "audio": "frame_signal power_spectrum hz_to_mel mel_to_hz mel_filters mel_spectrogram "
    "log_compress log_mel_spectrogram",
    "attention": "causal_mask attention split_heads merge_heads KVCache MultiHeadAttention",
    "encoder": "sinusoids feed_forward EncoderBlock AudioEncoder",
    "decoder": "DecoderBlock TextDecoder",
    "model": "Whisper greedy_generate",
}


def run_summary() -> None:
    """Print all of Whisper in reading order, from audio to text."""
    for module, names in SUMMARY.items():
        print(f"# -- utils/{module}.py {'-' * 40}\n")
        found = vars(import_module(f"utils.{module}"))
        print(*(inspect.getsource(found[name]) for name in names.split()), sep="\n")


COMMANDS = {name[4:]: run for name, run in [*globals().items()] if name.startswith("run_")}


def main(argv: list[str] | None = None) -> None:
    """Run one command. Exits with 2 after bad input, with 130 after Ctrl-C, with 141 unread."""
    code, problems = 0, []
    for name in ("stdout", "stderr"):  # what they cannot show becomes "?"; a line is shown at once
        stream = getattr(sys, name) or io.StringIO()  # closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)
        setattr(sys, name, stream)
    try:
        with one_line_each(problems):
            argv = normalise(sys.argv[1:] if argv is None else argv)
            options = vars(make_parser().parse_args(argv))
            code = COMMANDS[options.pop("command")](**options)
    except BrokenPipeError:
        code = 141
    except KeyboardInterrupt:
        complain("Interrupted.")
        code = 130
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads it: Python would say so once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code or problems:
        sys.exit(code or 2)


def interrupt(number: int, frame) -> None:
    """Ctrl-C; within an import, which would lose the exception or break, a little later."""
    if not any("importlib" in f.f_code.co_filename for f, _ in traceback.walk_stack(frame)):
        raise KeyboardInterrupt
    threading.Timer(0.05, signal.raise_signal, [number]).start()


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"{one_line(message)}\n"
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, interrupt)
    main()
