"""Makes the embedded corpus: English speech with transcripts, in GigaSpeech's schema.

    python data/generate.py --hours 3.5 --out new --seed 0          # a corpus like the embedded one
    python data/generate.py --hours 20 --splits train --out big --seed 1 --codec flac    # more
    python data/generate.py --hours 2 --splits train --out some --engines pico hibari    # by pip

`grammar.py` decides what is said and `voices.py` who says it. Here speech becomes clips, clips
become splits, and splits become Parquet files. Everything random is drawn from generators seeded
with (seed, purpose, index), so the same command gives the same speech, and other training hours
leave the held-out splits as they are.
"""

import argparse
import io
import itertools
import math
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
import soxr
from grammar import (
    DIGITS,
    GARBAGE,
    SENTENCES,
    SPLITS,
    UNKNOWN,
    VOCABULARY,
    WORD_SPLITS,
    digit_string,
    fill,
    other_speech,
    short_phrase,
    split_of,
    transcript,
    words_of,
)
from tqdm.auto import tqdm
from voices import (
    CORE_SPEAKERS,
    ENGINES,
    SAMPLE_RATE,
    SLOW_ENGINES,
    CorpusError,
    Request,
    Speaker,
    check_engines,
    say,
    single_word_speakers,
    train_speaker,
    unseen_speakers,
    word_speakers,
)

MIN_SECONDS, MAX_SECONDS = 0.4, 5.0  # of a clip; the model's window is 500 frames of 10 ms
MEAN_SECONDS = 2.1  # of a clip, for planning only: generation stops when the hours are reached
DIGIT_SHARE = 0.43  # of the clips are digit strings; half of these are joined isolated words
SHORT_SHARE = 0.25  # of the clips of training are a word alone, or a fragment (--short)
PAUSE_SHARE = 0.1  # of the sentences of training pause somewhere
TELEPHONE_SHARE = 0.12  # of the clips of training come over a telephone
GARBAGE_SHARE = 0.01  # of the clips have no transcript, as in GigaSpeech
SILENT_SHARE = 0.02  # of the clips of training are no words, and nothing is to be written
KNOCKS = "<KNOCKS>"  # sound of this kind, which GigaSpeech has no tag for
OTHER_SHARE = 0.08  # of the clips of training are words outside the vocabulary
OPUS_LEVEL = 0.97  # libsndfile's compression level: 13 kbit/s (above 0.985 high bands are lost)
CLIPS_PER_FILE = 6_000
HELD_OUT_CLIPS = 360  # in each of the held-out splits
WORD_CLIPS = 720  # in train_words


# ---------------------------------------------------------------------------------------------
# 1. Clips
# ---------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """What is to be said, and later the encoded audio."""

    sentence: str
    joined: bool = False  # digits spoken one by one
    pause: bool = False  # somewhere between two words
    telephone: bool = False
    unknown: bool = False  # outside the vocabulary: nothing is to be written
    seconds: float = 0.0
    sound: bytes = field(default=b"", repr=False)

    @property
    def text(self) -> str:
        if self.unknown:
            return UNKNOWN
        return self.sentence if self.sentence in GARBAGE else transcript(self.sentence)


def trim(speech: np.ndarray, margin: float = 0.02, depth: float = 45.0) -> np.ndarray:
    """Cuts the silence at both ends, `margin` seconds away from the sound.

    Sound is what lies 6 dB above the engine's own background and at most `depth` dB below the
    loudest 10 ms. The first difference stresses high frequencies, so F, TH, S and T are kept.
    """
    hop = SAMPLE_RATE // 100
    edges = np.diff(speech, prepend=0.0)[: len(speech) // hop * hop].reshape(-1, hop)
    level = 10 * np.log10(np.mean(edges**2, axis=1) + 1e-10)  # dB, one value each 10 ms
    background = np.median(np.concatenate([level[:6], level[-6:]]))
    loud = np.flatnonzero(level > max(min(background + 6, level.max() - 30), level.max() - depth))
    first, last = loud[0] * hop, (loud[-1] + 1) * hop
    keep = round(margin * SAMPLE_RATE)
    cut = speech[max(0, first - keep) : last + keep].copy()
    ramp = np.linspace(0, 1, min(80, len(cut)), dtype=np.float32)  # 5 ms, so that nothing clicks
    cut[: len(ramp)] *= ramp
    cut[-len(ramp) :] *= ramp[::-1]
    return cut


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def join(words: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Isolated words in a row, each 3 dB louder or softer, with gaps of 30 to 300 ms.

    In half of the clips all gaps are the same; a clip that would be too long gets shorter gaps.
    """
    room = MAX_SECONDS - 0.1 - sum(map(len, words)) / SAMPLE_RATE
    longest = min(0.3, max(0.03, room / len(words)))
    gaps = rng.uniform(0.03, longest, len(words))
    if rng.random() < 0.5:
        gaps[:] = gaps[0]
    parts = []
    for word, gap in zip(words, gaps, strict=True):
        level = 10 ** (rng.uniform(-3, 3) / 20) / np.sqrt(np.mean(word**2))
        parts += [silence(gap), word * level]
    return np.concatenate(parts[1:])


def finish(speech: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Pads both ends by 0 to 0.3 s, sets the peak to 0.1 to 0.9, adds a faint hiss (-90 to -70 dB).

    Returns None if the result is shorter or longer than a clip may be.
    """
    pads = rng.uniform(0, 0.3, 2)
    spare = MAX_SECONDS - len(speech) / SAMPLE_RATE
    pads *= min(1.0, max(0.0, 0.98 * spare / pads.sum()))
    speech = np.concatenate([silence(pads[0]), speech, silence(pads[1])])
    if not MIN_SECONDS <= len(speech) / SAMPLE_RATE <= MAX_SECONDS:
        return None
    speech *= math.exp(rng.uniform(math.log(0.1), math.log(0.9))) / np.abs(speech).max()
    hiss = 10 ** (rng.uniform(-90, -70) / 20)
    return speech + hiss * rng.standard_normal(len(speech), dtype=np.float32)


def telephone(speech: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same over a telephone: 8 kHz, 200 to 3400 Hz or so, 8 bits by the mu law (G.711)."""
    narrow = soxr.resample(speech, SAMPLE_RATE, 8000)
    spectrum, hz = np.fft.rfft(narrow), np.fft.rfftfreq(len(narrow), 1 / 8000)
    low, high = rng.uniform(100, 350), rng.uniform(3000, 3700)
    spectrum *= 1 / (1 + (low / np.maximum(hz, 1)) ** 6) / (1 + (hz / high) ** 24)
    narrow = np.fft.irfft(spectrum, len(narrow)) * (rng.uniform(0.2, 0.9) / np.abs(narrow).max())
    code = np.round(127 * np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / math.log(256))
    narrow = np.sign(code) * np.expm1(np.abs(code) / 127 * math.log(256)) / 255
    return soxr.resample(narrow.astype(np.float32), 8000, SAMPLE_RATE)


def encode(samples: np.ndarray, codec: str) -> bytes:
    """Ogg Opus or FLAC bytes."""
    buffer = io.BytesIO()
    if codec == "flac":
        sf.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    else:
        sf.write(
            buffer, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL
        )
    return buffer.getvalue()


def digit_renderings(count: int, rng: np.random.Generator) -> list[Request]:
    """Every digit `count` times: as a statement, a question or within a list, fast and slow."""
    return [
        Request(
            pronounced(digit, rng) + mark, rng.uniform(0.9, 1.12), math.exp(rng.uniform(-0.55, 0.4))
        )
        for digit in DIGITS
        for mark in rng.choice([".", "?", ","], count)
    ]


def pronounced(digit: str, rng: np.random.Generator) -> str:
    """The digit as spelt for the engines: a third of all zeros have the vowel of SEE."""
    return "zee roe" if digit == "ZERO" and rng.random() < 0.33 else digit.lower()


def make_clips(job: tuple[Speaker | None, list[Clip], list[int], str]) -> list[Clip]:
    """Lets one speaker say all its clips; those too long or too short are left out."""
    speaker, clips, seeds, codec = job
    rng = np.random.default_rng(seeds)
    if speaker is None:
        sounds = [garbage_sound(clip.sentence, rng) for clip in clips]
    else:
        sounds = speak_clips(speaker, clips, rng)
    for clip, sound in zip(clips, sounds, strict=True):
        samples = finish(telephone(sound, rng) if clip.telephone else sound, rng)
        if samples is not None:
            clip.seconds = len(samples) / SAMPLE_RATE
            clip.sound = encode(samples, codec)
    return [clip for clip in clips if clip.sound]


def speak_clips(speaker: Speaker, clips: list[Clip], rng: np.random.Generator) -> list[np.ndarray]:
    """Trimmed speech of every clip: sentences and fluent digits as they are, others joined.

    Slow engines do not join, because they would have to say every digit twice or more.
    """
    if speaker.voice.engine in SLOW_ENGINES:
        clips = [replace(clip, joined=False) for clip in clips]
    fluent = [clip for clip in clips if not clip.joined]
    words = sum(len(words_of(clip.sentence)) for clip in clips if clip.joined)
    count = min(8, 2 + words // 20) if words else 0
    isolated = digit_renderings(count, rng)
    spoken = [
        Request(aloud(clip, rng), rng.uniform(0.93, 1.08), math.exp(rng.uniform(-0.15, 0.15)))
        for clip in fluent
    ]
    with tempfile.TemporaryDirectory() as folder:
        speech = say(speaker, isolated + spoken, Path(folder))
    of_digit = {d: speech[n * count : (n + 1) * count] for n, d in enumerate(DIGITS)}
    sentences = iter(speech[len(isolated) :])
    sounds = []
    for clip in clips:
        if clip.joined:
            cut = {"margin": rng.uniform(0.0, 0.03), "depth": rng.uniform(35, 50)}
            chosen = [of_digit[w][rng.integers(count)] for w in words_of(clip.sentence)]
            sounds.append(join([trim(word, **cut) for word in chosen], rng))
        else:
            sounds.append(trim(next(sentences)))
    return sounds


def aloud(clip: Clip, rng: np.random.Generator) -> str:
    """The sentence as an engine reads it; digit strings are sometimes spoken in two groups."""
    sentence, words = clip.sentence, words_of(clip.sentence)
    if set(words) <= set(DIGITS) and len(words) > 3 and rng.random() < 0.3:
        cut = rng.integers(2, len(words) - 1)
        sentence = " ".join(words[:cut]) + ", " + " ".join(words[cut:]) + "."
    elif clip.pause:
        spoken = sentence.split(" ")
        cut = rng.integers(1, max(2, len(spoken)))
        sentence = ", ".join(filter(None, (" ".join(spoken[:cut]), " ".join(spoken[cut:]))))
    return sentence.lower()


def garbage_sound(tag: str, rng: np.random.Generator) -> np.ndarray:
    """Sound without words: near silence, a tune, knocks, noise, or clicks and whistles."""
    seconds = rng.uniform(0.8, 3.5)
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    if tag == "<SIL>":
        sound = 1e-3 * rng.standard_normal(len(t))
    elif tag == "<MUSIC>":
        sound, beat = np.zeros(len(t)), rng.uniform(0.15, 0.5)
        root = rng.uniform(110, 330)
        for start in np.arange(0, seconds, beat):
            age = np.maximum(t - start, 0)
            note = root * 2 ** (rng.choice([0, 2, 4, 5, 7, 9, 12]) / 12)
            for overtone in range(1, 6):
                tone = np.sin(2 * np.pi * note * overtone * age) / overtone
                sound += tone * np.exp(-3 * overtone * age) * (t >= start)
    elif tag == KNOCKS:
        sound = knocks(t, rng)
    elif tag == "<NOISE>":
        spectrum = np.fft.rfft(rng.standard_normal(len(t)))
        shape = (1 + np.arange(len(spectrum)) / rng.uniform(50, 5000)) ** -rng.uniform(0.3, 1.5)
        sound = np.fft.irfft(spectrum * shape, len(t)) * (1 + 0.5 * np.sin(rng.uniform(1, 20) * t))
    else:
        sound = np.sin(
            2 * np.pi * np.cumsum(900 + 400 * np.sin(rng.uniform(3, 30) * t)) / SAMPLE_RATE
        )
        sound *= np.sin(np.pi * t / seconds) ** 2 * (rng.random(len(t)) < 0.999)
        for start in rng.integers(0, len(t) - 400, rng.integers(3, 12)):
            sound[start : start + 400] += rng.standard_normal(400) * np.exp(-np.arange(400) / 60)
    return sound.astype(np.float32)


def knocks(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One to eight knocks, taps or clicks of one object: resonances that die away, and a burst."""
    sound = 10 ** rng.uniform(-4, -2.5) * rng.standard_normal(len(t))
    modes = np.exp(rng.uniform(math.log(60), math.log(4000), rng.integers(1, 5)))  # Hz
    decay = np.exp(rng.uniform(math.log(0.002), math.log(0.06)))  # s
    burst = rng.uniform(0, 1)
    for start in rng.uniform(0, t[-1] - 0.1, rng.integers(1, 9)):
        after = t >= start
        age = t[after] - start
        wave = burst * rng.standard_normal(len(age))
        wave += sum(np.sin(2 * np.pi * mode * rng.uniform(0.97, 1.03) * age) for mode in modes)
        sound[after] += rng.uniform(0.3, 1) * wave * np.exp(-age / decay)
    return sound


# ---------------------------------------------------------------------------------------------
# 2. Splits
# ---------------------------------------------------------------------------------------------


class Writer:
    """Invents the sentences of one split; of several candidates it takes the one whose rarest word
    has been said least, so that every word occurs about as often as the grammar allows."""

    def __init__(self, split: str, seed: int, short_share: float = SHORT_SHARE):
        self.split, self.short_share = split, short_share
        self.rng = np.random.default_rng([seed, 3, SPLITS.index(split)])
        self.said = Counter()
        self.seen: set[str] = set()
        self.words: list[str] = []

    def allowed(self, sentence: str) -> bool:
        """In the right split, short enough, and in a held-out split not said before."""
        new = self.split == "train" or sentence not in self.seen
        return new and split_of(sentence) == self.split and len(words_of(sentence)) <= 12

    def draw(self, invent) -> str:
        return next(s for s in iter(invent, None) if self.allowed(s))

    def clip(self) -> Clip:
        if self.split == "test_single_words":
            self.words = self.words or list(self.rng.permutation(VOCABULARY))  # each about as often
            return Clip(f"{self.words.pop()}.")
        if self.split == "test_other_words":
            return Clip(other_speech(self.rng, self.split), unknown=True)
        if self.split == "train_words":
            self.words = self.words or list(self.rng.permutation(VOCABULARY))  # each at least once
            said = f"{self.words.pop()}." if self.rng.random() < 0.4 else short_phrase(self.rng)
            return Clip(said, telephone=self.rng.random() < TELEPHONE_SHARE)
        training = self.split == "train"
        if training and self.rng.random() < OTHER_SHARE:
            clip = Clip(other_speech(self.rng), unknown=True)
        elif training and self.rng.random() < self.short_share:
            clip = Clip(self.draw(lambda: short_phrase(self.rng)))
        elif self.rng.random() < DIGIT_SHARE:
            clip = Clip(self.draw(lambda: digit_string(self.rng)), joined=self.rng.random() < 0.5)
        else:
            candidates = [
                self.draw(lambda: fill(SENTENCES[self.rng.integers(len(SENTENCES))], self.rng))
                for _ in range(16)
            ]
            clip = Clip(min(candidates, key=lambda s: min(self.said[w] for w in words_of(s))))
            self.said.update(set(words_of(clip.sentence)))
        self.seen.add(clip.sentence)
        if training:
            clip.pause = self.rng.random() < PAUSE_SHARE
            clip.telephone = self.rng.random() < TELEPHONE_SHARE
        return clip


def garbage_clips(count: int, unknown: bool = False) -> list[Clip]:
    """Clips without words: GigaSpeech's four tags, and knocks where nothing is to be written."""
    tags = itertools.cycle((*GARBAGE, KNOCKS) if unknown else GARBAGE)
    return [Clip(tag, unknown=unknown) for tag in itertools.islice(tags, count)]


def fixed_split(split: str, seed: int, codec: str, pool) -> list[tuple[str, Clip]]:
    """(speaker id, clip) of a split of fixed size; it does not depend on the hours of training."""
    number, writer = SPLITS.index(split), Writer(split, seed)
    if split == "test_unseen_voices":
        speakers = unseen_speakers(seed)
    elif split == "train_words":
        speakers = word_speakers(seed)
    elif split in WORD_SPLITS:
        speakers = single_word_speakers(seed)
    else:
        speakers = [train_speaker(seed, index) for index in range(CORE_SPEAKERS)]
    each = (WORD_CLIPS if split == "train_words" else HELD_OUT_CLIPS) // len(speakers)
    jobs = [
        (speaker, [writer.clip() for _ in range(each)], [seed, 4, number, index], codec)
        for index, speaker in enumerate(speakers)
    ]
    if split not in WORD_SPLITS:
        jobs.append((None, garbage_clips(8), [seed, 5, number], codec))
    rows = perform(jobs, pool, split)
    if split == "train_words":  # some fragments are sentences of a test
        rows = [(name, clip) for name, clip in rows if split_of(clip.sentence) == "train"]
    return rows


def train_split(
    hours: float, seed: int, codec: str, engines, short: float, pool
) -> Iterator[list[tuple[str, Clip]]]:
    """(speaker id, clip) of the training split, speaker after speaker until it is long enough.

    Comes in parts, one a file, so that twenty hours need not fit into memory.
    """
    voices = ((i, train_speaker(seed, i, "kokoro" in engines)) for i in itertools.count())
    voices = ((i, speaker) for i, speaker in voices if speaker.voice.engine in engines)
    wanted, made = hours * 3600, 0.0
    speakers = max(96, round(30 * hours))
    each = max(1, math.ceil(wanted / MEAN_SECONDS / speakers))
    writer = Writer("train", seed, short)
    garbage = garbage_clips(round(GARBAGE_SHARE * wanted / MEAN_SECONDS))
    garbage += garbage_clips(round(SILENT_SHARE * wanted / MEAN_SECONDS), unknown=True)
    jobs, part = [(None, garbage, [seed, 7], codec)], []
    with tqdm(total=round(wanted), desc="train", unit="s of speech") as bar:
        while True:
            jobs += [
                (speaker, [writer.clip() for _ in range(each)], [seed, 6, i], codec)
                for i, speaker in itertools.islice(voices, 24)
            ]
            for row in perform(jobs, pool):
                if made < wanted:
                    part.append(row)
                    made += row[1].seconds
                    bar.update(round(made) - bar.n)
            jobs = []
            if made >= wanted or len(part) >= CLIPS_PER_FILE:
                yield part
                part = []
            if made >= wanted:
                return


def perform(jobs: list, pool, label: str | None = None) -> list[tuple[str, Clip]]:
    """Runs the jobs in the pool and keeps their order."""
    results = tqdm(pool.imap(make_clips, jobs), desc=label, total=len(jobs), disable=label is None)
    speakers = [speaker.id if speaker else "none" for speaker, *_ in jobs]
    return [(name, clip) for name, clips in zip(speakers, results, strict=True) for clip in clips]


# ---------------------------------------------------------------------------------------------
# 3. Files
# ---------------------------------------------------------------------------------------------

GIGASPEECH_SOURCES = ["audiobook", "podcast", "youtube"]
GIGASPEECH_CATEGORIES = [
    "People  and  Blogs", "Business", "Nonprofits  and  Activism", "Crime", "History",
    "Pets  and  Animals", "News and Politics", "Travel and Events", "Kids and Family", "Leisure",
    "N/A", "Comedy", "News  and  Politics", "Sports", "Arts", "Science  and  Technology",
    "Autos  and  Vehicles", "Science and Technology", "People and Blogs", "Music",
    "Society and Culture", "Education", "Howto  and  Style", "Film  and  Animation", "Gaming",
    "Entertainment", "Travel  and  Events", "Health and Fitness", "audiobook",
]  # fmt: skip


def schema() -> pa.Schema:
    """GigaSpeech's columns, with the note by which `datasets` knows which of them is audio."""
    from datasets import Audio, ClassLabel, Features, Value  # imported late: it takes a second

    text, real = Value("string"), Value("float32")
    columns = {
        "segment_id": text,
        "speaker": text,
        "text": text,
        "audio": Audio(sampling_rate=SAMPLE_RATE),
        "begin_time": real,
        "end_time": real,
        "audio_id": text,
        "title": text,
        "url": text,
        "source": ClassLabel(names=GIGASPEECH_SOURCES),
        "category": ClassLabel(names=GIGASPEECH_CATEGORIES),
        "original_full_path": text,
    }
    return Features(columns).arrow_schema


class Records:
    """Turns the clips of a split into tables; a speaker's clips make up one imaginary recording."""

    def __init__(self, split: str, seed: int, codec: str):
        self.split, self.prefix = split, f"SYN{seed:03d}-{split}"
        self.suffix = "flac" if codec == "flac" else "ogg"
        self.rng = np.random.default_rng([seed, 8])
        self.begin, self.number = Counter(), Counter()

    def record(self, speaker: str, clip: Clip) -> dict:
        audio_id, kind = f"{self.prefix}-{speaker}", "words"
        if self.split != "train_words":
            kind = "digits" if set(words_of(clip.sentence)) <= set(DIGITS) else "sentences"
        self.number[speaker] += 1
        segment = f"{audio_id}_S{self.number[speaker]:07d}"
        begin = self.begin[speaker]
        self.begin[speaker] += clip.seconds
        return {
            "segment_id": segment,
            "speaker": speaker,
            "text": clip.text,
            "audio": {"bytes": clip.sound, "path": f"{segment}.{self.suffix}"},
            "begin_time": begin,
            "end_time": self.begin[speaker],
            "audio_id": audio_id,
            "title": kind,
            "url": "",
            "source": None,  # neither audiobook, nor podcast, nor youtube
            "category": GIGASPEECH_CATEGORIES.index("N/A"),
            "original_full_path": f"synthetic/{audio_id}.{self.suffix}",
        }

    def table(self, rows: list[tuple[str, Clip]]) -> pa.Table:
        """The rows in an order that mixes the speakers."""
        records = [self.record(*row) for row in rows]
        order = self.rng.permutation(len(records))
        return pa.Table.from_pylist([records[i] for i in order], schema=schema())


def write(tables: Iterator[pa.Table], split: str, out: Path) -> None:
    """Writes under temporary names, then renames: never half a file, never two runs mixed.

    One table becomes `train.parquet`; several become `train-00000.parquet`, ...
    """
    parts = []
    try:
        for table in tables:
            parts.append(out / f".{split}-{len(parts):05d}.part")
            pq.write_table(table, parts[-1], row_group_size=500, compression="zstd")
        for pattern in (f"{split}.parquet", f"{split}-[0-9]*.parquet"):
            for old in out.glob(pattern):
                old.unlink()
        for part in parts:
            name = part.stem.removeprefix(".") if len(parts) > 1 else split
            part.rename(out / f"{name}.parquet")
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def generate(
    hours: float, out: Path, seed: int, splits: list[str], codec: str, workers: int, engines: list,
    short: float,
) -> None:  # fmt: skip
    """Makes the splits asked for; `hours` counts all of them together.

    The held-out splits have a fixed size, and training gets the rest.
    """
    out.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for split in [s for s in SPLITS[::-1] if s in splits]:  # training last
            records = Records(split, seed, codec)
            if split == "train":
                parts = train_split(hours, seed, codec, engines, short, pool)
            else:
                parts = iter([fixed_split(split, seed, codec, pool)])
            write(map(records.table, parts), split, out)
            hours -= records.begin.total() / 3600


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=3.5, help="of speech, all splits together")
    parser.add_argument(
        "--out", type=Path, default=Path("data/corpus"), help="folder for the files"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--codec", choices=("opus", "flac"), default="opus")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES + SLOW_ENGINES, default=ENGINES, help="who speaks"
    )
    parser.add_argument(
        "--short", type=float, default=SHORT_SHARE, help="share of words alone and of fragments"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.hours < math.inf or options.workers < 1 or options.seed < 0:
            raise CorpusError("--hours and --workers must be positive and --seed not negative.")
        if not 0 <= options.short <= 1:
            raise CorpusError("--short is a share: give a number from 0 to 1.")
        if len(options.splits) > 1 and "train" in options.splits and options.hours < 1:
            raise CorpusError("with held-out splits, --hours must be at least 1.")
        if options.splits != ["train"] and set(options.engines) != set(ENGINES):
            raise CorpusError("all engines speak in the held-out splits: give --splits train too.")
        check_engines(tuple(options.engines))
        generate(**vars(options))
    except (CorpusError, OSError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
