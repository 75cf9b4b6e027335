"""Your own vocabulary: a file of phrases becomes a recogniser that writes them, and nothing else.

    python -m utils words phrases.txt --out runs/mine

A line of the file is a phrase in the notation of JSGF (https://www.w3.org/TR/jsgf/): words,
alternatives `(on | off)`, parts that may be missing `[the kitchen]`, and `//` before a comment. The
voices that are installed say your phrases, other words, and noise; the shipped model learns to
write the phrases, and nothing for the rest. Then it is tested on voices that it has never met.
"""

import json
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from itertools import count, islice, pairwise, product
from pathlib import Path
from shlex import quote

import numpy as np
import pyarrow as pa
from generate import TELEPHONE_SHARE, Clip, garbage_clips, perform, write
from grammar import UNKNOWN, VOCABULARY, other_words
from tqdm.auto import tqdm
from voices import (
    ENGINES,
    MODULES,
    PACKAGES,
    TRAIN_HUMAN,
    TRAIN_PACKAGED,
    CorpusError,
    Speaker,
    check_engines,
    draw_speaker,
    single_word_speakers,
    train_speaker,
)

from utils.checkpoints import load_model
from utils.config import ModelArgs
from utils.data import ClipDataset, clean_text, load_clips
from utils.evaluation import bootstrap_interval, count_errors, error_rate
from utils.files import DATA_DIR, as_value_error, list_checkpoints, write_atomic
from utils.recipes import run_training
from utils.tokenizer import Tokenizer
from utils.transcribe import transcribe

MOST_PHRASES = 10_000  # of one line
MOST_LETTERS = 64  # of a phrase: slow voices need 5 s for them
SPEAKERS = 120  # of training; those of the tests are held out
CLIPS_PER_WORD = 30  # of training, for each word and for each line of the file
OTHER_SHARE = 0.4  # clips of other words, for each clip of a phrase
NOISE_CLIPS = 60
HELD_OUT_CLIPS = {"validation": 96, "test_unseen_voices": 360, "test_other_words": 240}
SETTINGS = dict(epochs=6, max_lr=1e-3, curriculum_epochs=0, splice_share=0.0)
SPLITS = ("train", *HELD_OUT_CLIPS)


# ---------------------------------------------------------------------------------------------
# 1. Phrases
# ---------------------------------------------------------------------------------------------


def alternatives(tokens: list[str], closing: str = "") -> list[str]:
    """Every text that the tokens up to `closing` allow; what was read is removed from `tokens`."""
    found, texts, token = [], [""], ""
    while tokens and (token := tokens.pop(0)) != closing:
        if token in ")]":
            raise ValueError(f"{token} closes nothing")
        if token == "|":
            found, texts = found + texts, [""]
            continue
        part = [token]
        if token in "([":
            part = alternatives(tokens, ")" if token == "(" else "]")
            if "" in part:
                raise ValueError("an alternative is empty: put what may be missing into [ ]")
            part = part + [""] * (token == "[")
        if len(texts) * len(part) > MOST_PHRASES:
            raise ValueError(f"it stands for more than {MOST_PHRASES:,} phrases: divide it")
        texts = [f"{a} {b}".strip() for a, b in product(texts, part)]
    if token != closing and closing:
        raise ValueError(f"{closing} is missing")
    return found + texts


def parse_line(line: str, tokenizer: Tokenizer, longest: int) -> list[str]:
    """The phrases of one line, in lower case, each of at most `longest` tokens, or `ValueError`."""
    odd = re.search(r"[^a-z'\s,.?!()\[\]|-]", line.lower())
    if odd:
        raise ValueError(f"{odd[0]!r} cannot be spoken: write words, in the letters a to z")
    tokens = re.findall(r"[()\[\]|]|[^()\[\]|\s]+", line)
    texts = list(map(clean_text, alternatives(tokens)))
    if None in texts:
        raise ValueError("one of its phrases has no words: add some")
    for text in texts:
        size = len(tokenizer.encode(text))
        if size > longest:
            raise ValueError(f"{text!r} has {size} tokens and at most {longest} fit: shorten it")
        if len(text) > MOST_LETTERS:
            raise ValueError(f"{text!r} takes more than 5 s to say: shorten it")
    return sorted(set(texts))


def read_phrases(path: str | Path, tokenizer: Tokenizer, longest: int) -> list[list[str]]:
    """The phrases of a file, a list for each line. Raises `ValueError` that names the line."""
    with as_value_error(f"{path} cannot be read", "give a text file in UTF-8"):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    phrases = []
    for number, line in enumerate(lines, 1):
        if line := line.partition("//")[0].replace("’", "'").strip():
            try:
                phrases.append(parse_line(line, tokenizer, longest))
            except (ValueError, RecursionError) as problem:  # brackets within brackets within …
                raise ValueError(f"{path}, line {number}: {problem}.") from None
    if not phrases:
        raise ValueError(f"{path} has no phrases: write one a line.")
    return phrases


# ---------------------------------------------------------------------------------------------
# 2. Speech
# ---------------------------------------------------------------------------------------------


def engines_at_hand() -> list[str]:
    """The speech synthesisers that are installed. Raises `ValueError` where there is none."""
    found = []
    for engine in ENGINES:
        try:
            check_engines((engine,))
        except CorpusError:
            continue
        found.append(engine)
    if not found:
        modules, programs = " ".join(m for _, m in MODULES.values()), " ".join(PACKAGES.values())
        raise ValueError(
            f"no voice is installed: `pip install {modules}`, or Debian's packages {programs}."
        )
    return found


def training_speakers(engines: list[str], seed: int) -> list[Speaker]:
    speakers = (train_speaker(seed, i) for i in count())
    return list(islice((s for s in speakers if s.voice.engine in engines), SPEAKERS))


def unseen_speakers(engines: list[str], seed: int) -> list[Speaker]:
    """Voices that training never has or, without such an engine, new vocal tracts of known ones."""
    unseen = [s for s in single_word_speakers(seed) if s.voice.engine in engines]
    known = [v for v in (*TRAIN_HUMAN, *TRAIN_PACKAGED) if v.engine in engines]
    rng = np.random.default_rng([seed, 10])
    tracts = (draw_speaker(v, rng, held_out_tract=True) for _ in range(12) for v in known)
    return unseen or list(tracts)


def phrase_clips(phrases: list[list[str]], number: int, rng: np.random.Generator) -> list[Clip]:
    """Of several phrases always the one whose rarest word has been said least."""
    clips, said = [], Counter()
    for _ in range(number):
        lines = [phrases[i] for i in rng.integers(len(phrases), size=8)]
        texts = [line[rng.integers(len(line))] for line in lines]
        text = min(texts, key=lambda t: (min(said[w] for w in t.split()), said[t]))
        said.update({text, *text.split()})
        clips.append(Clip(text + rng.choice(list("..,?"))))
    return clips


def other_clips(
    phrases: list[list[str]], number: int, split: str, rng: np.random.Generator
) -> list[Clip]:
    """As many words as a phrase has, or one more; none is in any phrase, in singular or plural."""
    texts = [text for line in phrases for text in line]
    known = {word for text in texts for word in text.split()}
    known |= {word.removesuffix("s") for word in known} | {f"{word}s" for word in known}
    words = [word for word in map(str.lower, other_words(split)) if word not in known]
    common = words[: len(words) // 10]  # they are in the order of their frequency
    if split == "train":  # what the shipped model knows, and has to forget
        common += sorted({word.lower() for word in VOCABULARY} - known)
    clips = []
    for _ in range(number):
        length = len(rng.choice(texts).split()) + rng.integers(2)
        said = rng.choice(common if rng.random() < 0.5 else words, length)
        clips.append(Clip(" ".join(said) + ".", unknown=True))
    return clips


def clips_of(split: str, phrases: list[list[str]], rng: np.random.Generator) -> list[Clip]:
    """What is said in a split, in random order."""
    words = {word for line in phrases for text in line for word in text.split()}
    number = HELD_OUT_CLIPS.get(split, CLIPS_PER_WORD * max(len(words), len(phrases)))
    if split == "test_other_words":
        clips = other_clips(phrases, number, split, rng)
    else:
        clips = phrase_clips(phrases, number, rng)
    if split == "train":
        clips += other_clips(phrases, round(OTHER_SHARE * number), split, rng)
        for clip in clips:
            clip.telephone = rng.random() < TELEPHONE_SHARE
    return [clips[i] for i in rng.permutation(len(clips))]


def speak(split: str, phrases: list, engines: list, seed: int, pool) -> pa.Table:
    """A split: columns speaker, text and audio."""
    number = SPLITS.index(split)
    clips = clips_of(split, phrases, np.random.default_rng([seed, 11, number]))
    training = split in ("train", "validation")
    speakers = (training_speakers if training else unseen_speakers)(engines, seed)
    jobs = [
        (speaker, clips[i :: len(speakers)], [seed, 12, number, i], "flac")
        for i, speaker in enumerate(speakers)
    ]
    if split == "train":
        jobs.append((None, garbage_clips(NOISE_CLIPS, unknown=True), [seed, 13], "flac"))
    rows = [
        {
            "speaker": name,
            "text": UNKNOWN if clip.unknown else clip.sentence[:-1],
            "audio": {"bytes": clip.sound, "path": f"{split}-{i:05d}.flac"},
        }
        for i, (name, clip) in enumerate(perform(jobs, pool, split))
    ]
    return pa.Table.from_pylist(rows)


def make_speech(phrases: list, engines: list, seed: int, folder: Path) -> None:
    """Write every split as a Parquet file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ignore = signal.SIGINT, signal.SIG_IGN  # Ctrl-C is for the program, not for its helpers
    workers = min(8, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore) as pool:
        for split in SPLITS:
            write(iter([speak(split, phrases, engines, seed, pool)]), split, folder)


# ---------------------------------------------------------------------------------------------
# 3. The recogniser
# ---------------------------------------------------------------------------------------------


def recognise(model, clips: ClipDataset) -> list[str]:
    """What `transcribe` makes of each clip; "" where it finds no phrase."""
    sounds = tqdm(clips.audio, clips.name)
    return [transcribe(model, audio / 32767, clips.tokenizer)["text"] for audio in sounds]


def scores(model_path: Path, source: Path) -> dict:
    """The error rate on phrases by unseen voices, the share of other speech that gives no text."""
    model, tokenizer = load_model(model_path)
    phrases, others = (
        ClipDataset(load_clips(source, split), tokenizer, model.args, split) for split in SPLITS[2:]
    )
    heard, silent = recognise(model, phrases), recognise(model, others).count("")
    counts = count_errors(phrases.texts, heard)
    low, high = bootstrap_interval(counts, phrases.speakers)
    wrong = Counter(pair for pair in zip(phrases.texts, heard, strict=True) if pair[0] != pair[1])
    return {
        "clips": len(phrases),
        "speakers": len(set(phrases.speakers)),
        "wer": round(error_rate(counts).item(), 4),
        "interval": [round(low, 4), round(high, 4)],
        "other_clips": len(others),
        "rejected": round(silent / len(others), 4),
        "confusions": [[*pair, times] for pair, times in wrong.most_common(3)],
    }


def teach(path: str | Path, out: Path, seed: int = 0, **settings) -> dict | None:
    """Phrases in a file -> `out`/model.safetensors and results.json; the results, None if stopped.

    A run that was stopped is continued, if the phrases, the voices and the seed are the same; any
    other begins with the shipped model. `settings` are those of `ModelArgs`. Raises `ValueError`
    for phrases that do not fit, and where no voice is installed.
    """
    start = load_model(DATA_DIR / "model.safetensors")[0]
    shape = {"no_of_encoder_layers": start.args.no_of_encoder_layers}
    args = ModelArgs.preset("cpu", **shape | SETTINGS | settings, seed=seed)
    tokenizer, speech, times = Tokenizer.for_args(args), out / "speech", [time.perf_counter()]
    begun = out / "unfinished.json"  # what a run is made of, until it is complete
    phrases = read_phrases(path, tokenizer, args.block_size - len(tokenizer.prompt))
    engines = engines_at_hand()
    print(f"Phrases: {sum(map(len, phrases))}; lines: {len(phrases)}; voices: {', '.join(engines)}")
    plan = json.dumps([phrases, engines, seed]).encode()
    if not (begun.is_file() and begun.read_bytes() == plan):
        if list_checkpoints(out) and not speech.is_dir():
            raise ValueError(f"{out} holds another run: choose another --out.")
        for old in [begun, *list_checkpoints(out)]:
            old.unlink(missing_ok=True)
        make_speech(phrases, engines, seed, speech)
        write_atomic(begun, plan)
    times.append(time.perf_counter())
    data = [ClipDataset(load_clips(speech, split), tokenizer, args) for split in SPLITS[:2]]
    history = run_training(args, *data, out, start=DATA_DIR / "model.safetensors")
    if len(history) < args.epochs:
        return None
    times.append(time.perf_counter())
    model = out / "model.safetensors"
    results = {"phrases": sum(map(len, phrases)), "voices": engines, **scores(model, speech)}
    times.append(time.perf_counter())
    results["minutes"] = [round((b - a) / 60, 2) for a, b in pairwise(times)]
    write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    begun.unlink()
    return results


def report(results: dict, model: Path) -> None:
    """Print what was measured, and how to go on."""
    low, high = results["interval"]
    speech, training, test = results["minutes"]
    print(f"Word error rate on {results['clips']} clips by {results['speakers']} speakers", end=" ")
    print(f"that were not in training: {results['wer']:.1%} ({low:.1%} to {high:.1%})")
    for text, heard, times in results["confusions"]:
        print(f"  {text!r} came out as {heard!r} ({times} times)")
    print(f"Other words: {results['rejected']:.0%} of {results['other_clips']} clips gave no text")
    print(f"Minutes: {speech:.1f} for the speech, {training:.1f} training, {test:.1f} testing")
    model = quote(str(model))
    print(f"Recognise your voice: python -m utils live --model {model}")
    print(f"Transcribe a recording: python -m utils transcribe recording.wav --model {model}")
