"""How well people are recognised: `make people` fetches recordings of people and prints a table.

    python data/people.py [MODEL …]        (the shipped model, that of `make run` if there, tiny.en)

The recordings lie in Debian's packages, which Debian, Ubuntu and Colab can download; nothing is
installed and nothing is trained on them. For each person: the share of words said alone (numbers,
months, days) that come out wrong, and the word error rate of digits in strings, which are single
digits of that person, 100 ms apart. The intervals are 95 % (clips drawn with replacement; Bisani
and Ney 2004). Of the telephone prompts, sentences of other words, a model of ours should write
nothing; the third column is the share of them for which it writes something. Every word that comes
out wrong is listed below the line.
"""

import subprocess
import sys
from pathlib import Path

import soundfile
import torch
from digits import digit_strings
from grammar import COUNTED, DATES, DIGITS

from utils.checkpoints import load_model
from utils.data import is_whisper
from utils.evaluation import bootstrap_interval, count_errors, error_rate, normalizer_for
from utils.transcribe import DEFAULT_MODEL, transcribe
from utils.waveforms import load_waveform

FOLDER = Path("runs/people")
TEENS, TENS = COUNTED[10:20], COUNTED[20:28]
DAYS, MONTHS = DATES[:7], DATES[7:]  # Monday …, January …
NUMBERS = dict(enumerate(DIGITS + TEENS)) | {10 * i: name for i, name in enumerate(TENS, 2)}


def asterisk(root: Path) -> dict[str, Path]:
    """Asterisk's prompts: day-0 is Sunday, mon-0 January."""
    folder = next(root.glob("usr/share/asterisk/sounds/en*/digits"))
    words = {name: folder / f"{number}.wav" for number, name in NUMBERS.items()}
    words |= {name: folder / f"day-{(i + 1) % 7}.wav" for i, name in enumerate(DAYS)}
    return words | {name: folder / f"mon-{i}.wav" for i, name in enumerate(MONTHS)}


def saytime(root: Path) -> dict[str, Path]:
    folder = root / "usr/share/saytime"
    return {name: folder / f"{number}.au" for number, name in NUMBERS.items()}


def prompts(root: Path) -> list[Path]:
    """Every fifth sentence of the telephone prompts."""
    sounds = root.glob("usr/share/asterisk/sounds/en*/*.wav")
    return sorted(path for path in sounds if soundfile.info(path).duration > 1.5)[::5]


PEOPLE = {  # name: Debian's package, and where the words are in it
    "Allison (telephone prompts, US)": ("asterisk-core-sounds-en-wav", asterisk),
    "saytime's speaker": ("saytime", saytime),
}


def fetch(package: str) -> Path:
    """The unpacked files of one of Debian's packages; nothing is installed."""
    root = (FOLDER / package).resolve()
    if not root.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        for command in (f"apt-get download -q {package}", f"dpkg-deb -x {package}_*.deb {package}"):
            done = subprocess.run(command, shell=True, cwd=FOLDER, capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().rpartition("\n")[2]
                raise ValueError(
                    f"{package} could not be fetched ({reason}): "
                    "Debian, Ubuntu or Colab with a network is needed for this table."
                )
    return root


def read(path: Path) -> torch.Tensor:
    """One word at 16 kHz; saytime's .au have no header, and libsndfile goes by their name."""
    samples, rate = soundfile.read(path, dtype="float32")
    return load_waveform({"array": samples, "sampling_rate": rate})


def recognise(model, tokenizer, clips) -> tuple[list[str], list[str]]:
    """Some (text, audio) -> references, transcripts, both after the model's normaliser."""
    options = {"condition_on_previous_text": False} if is_whisper(tokenizer) else {}
    said = [transcribe(model, audio, tokenizer, **options)["text"] for _, audio in clips]
    normalise = spaced(normalizer_for(tokenizer))
    return [normalise(text) for text, _ in clips], list(map(normalise, said))


def share_wrong(references, transcripts) -> str:
    """`12.5 % (8.1 to 17.2)` of the transcripts differ from their references."""
    wrong = [a != b for a, b in zip(references, transcripts, strict=True)]
    return with_interval(torch.tensor([[1 - w, w, 0, 0] for w in map(int, wrong)]))


def with_interval(counts: torch.Tensor) -> str:
    low, high = bootstrap_interval(counts)
    return f"{error_rate(counts):6.1%} ({low:.1%} to {high:.1%})"


def spaced(normalise):
    """Numbers as digits with spaces between them, so that 1 2 3 and 123 are the same words."""
    return lambda text: " ".join(
        " ".join(word) if word.isdigit() else word for word in normalise(text.lower()).split()
    )


def main(models: list[str]) -> int:
    trained = Path("runs/cpu/model.safetensors")
    models = models or [str(DEFAULT_MODEL), *[str(trained)] * trained.is_file(), "tiny.en"]
    loaded = {name: load_model(name) for name in models}
    for person, (package, words_of) in PEOPLE.items():
        root = fetch(package)
        paths = words_of(root)
        sounds = {word: read(path) for word, path in paths.items() if path.is_file()}
        alone = [(word.lower(), audio) for word, audio in sounds.items()]
        strings = list(digit_strings([(i, sounds[digit]) for i, digit in enumerate(DIGITS)]))
        print(f"{person}: {len(alone)} words alone, {len(strings)} strings of digits")
        print(f"  {'model':<40}{'words wrong':<28}{'errors in strings':<28}prompts with text")
        others = [read(path) for path in prompts(root)]
        for name, (model, tokenizer) in loaded.items():
            words = recognise(model, tokenizer, alone)
            digits = with_interval(count_errors(*recognise(model, tokenizer, strings)))
            written = ""
            if others and not is_whisper(tokenizer):
                texts = [transcribe(model, audio, tokenizer)["text"] for audio in others]
                written = f"{sum(map(bool, texts))} of {len(texts)}"
            print(f"  {name:<40}{share_wrong(*words):<28}{digits:<28}{written}")
            misses = [f"{a} -> {b or 'nothing'}" for a, b in zip(*words, strict=True) if a != b]
            if misses:
                print(f"    wrong: {', '.join(misses)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
