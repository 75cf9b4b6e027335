"""OpenAI's tiny.en in use, beside openai-whisper, transformers and CTranslate2 (faster-whisper).

    python tests/bench_decoding.py             # everything
    python tests/bench_decoding.py transcribe  # one of BENCHES, below

The weights are real and the same for all, and so are the lengths: clips of the corpus in a row.
Contestants take turns; medians; only the ratios mean something. The tables go to data/bench.json.
`make bench` installs CTranslate2, the engine of faster-whisper; where it or a folder of its own
format is missing, the others race alone.
"""

import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import soundfile
import torch
import transformers
import whisper
from bench import LINUX, print_memory_of, race, record, rows_of
from recordings import recording
from references import openai_twin, write_openai
from transformers.modeling_outputs import BaseModelOutput
from whisper.audio import N_SAMPLES

from utils.audio import SAMPLE_RATE, log_mel_spectrogram, pad_or_trim
from utils.checkpoints import export_hf, load_official
from utils.decoding import decode, suppressed_tokens
from utils.sources import find_packaged
from utils.tokenizer import Tokenizer
from utils.transcribe import transcribe as transcribe_ours

try:
    import ctranslate2
except ImportError:
    ctranslate2 = None

CLIPS, ALONE = 64, 8  # ALONE: clips that are timed one by one
PLAIN = dict(language="en", without_timestamps=True)
WAYS = {
    "greedy": dict(temperature=0.0),
    "5 beams and word times": dict(temperature=0.0, beam_size=5, word_timestamps=True),
}


def models():
    """-> openai-whisper's tiny.en, ours."""
    ours = load_official("tiny.en")
    return openai_twin(ours), ours


def windows(clips):
    """(clips, 80, 3000): windows in which one to eight sentences of the corpus are said."""
    spoken = [recording(i, 1 + i % 8)[:N_SAMPLES] for i in range(clips)]
    return log_mel_spectrogram(torch.stack([pad_or_trim(audio, N_SAMPLES) for audio in spoken]))


def speech(minutes):
    """(samples,): sentences of the corpus in a row."""
    return recording(0, 25 * minutes)[: 60 * minutes * SAMPLE_RATE]


def their_decode(model, mel, **options):
    return whisper.decode(model, mel, whisper.DecodingOptions(fp16=False, **options))


def ctranslate2_models(kinds=("float32", "int8")):
    """{kind: CTranslate2's tiny.en from the same folder}, or {} without it."""
    folder, threads = find_packaged(), torch.get_num_threads()
    if folder is None or ctranslate2 is None:
        print("CTranslate2 or a folder for it is missing, so it is not in the race")
        return {}
    load = partial(ctranslate2.models.Whisper, str(folder), intra_threads=threads)
    return {kind: load(compute_type=kind) for kind in kinds}


def loading(rounds=9):
    """tiny.en from the disk's cache into a model of float32: milliseconds."""
    folder = find_packaged()
    if folder is None:
        print("\nloading: tiny.en's folder is not installed here")
        return
    contestants = {
        "ours": lambda: load_official("tiny.en"),
        "the bytes of its file, read": (folder / "model.bin").read_bytes,
    }
    if ctranslate2_models(["float32"]):
        contestants["CTranslate2, float32"] = partial(ctranslate2_models, ["float32"])
    with tempfile.TemporaryDirectory() as temporary:
        path = write_openai(models()[0], Path(temporary, "tiny.en.pt"))
        contestants["openai-whisper"] = lambda: whisper.load_model(str(path), "cpu")
        seconds = race(contestants, rounds)
    record("loading tiny.en", "ms", rows_of({n: 1000 * s for n, s in seconds.items()}))


def one(tokens=100, rounds=7):
    """Greedy, one clip whose states are given: milliseconds per token."""
    theirs, ours = models()
    end = Tokenizer.for_args(ours.args).end
    never_end = PLAIN | dict(sample_len=tokens, suppress_tokens=f"-1,{end}")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        export_hf(ours, folder)
        hugging = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
        states = ours.encoder(windows(8)[7:])
        given = BaseModelOutput(last_hidden_state=states)
        forced = dict(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, num_beams=1)
        seconds = race(
            {
                "ours": lambda: decode(ours, states, **never_end),
                "openai-whisper": lambda: their_decode(theirs, states, **never_end),
                "transformers": lambda: hugging.generate(encoder_outputs=given, **forced),
            },
            rounds,
        )
    milliseconds = {name: 1000 * median / tokens for name, median in seconds.items()}
    record("greedy, tiny.en, one clip", "ms per token", rows_of(milliseconds))


def transcribe(rounds=3, minutes=1):
    """A minute of speech, the greedy way, and with five beams and the times of words: seconds."""
    theirs, ours = models()
    audio = speech(minutes)
    for how, options in WAYS.items():
        contestants = {
            "ours": partial(transcribe_ours, ours, audio, **options),
            "openai-whisper": partial(theirs.transcribe, audio, fp16=False, **options),
        }
        texts = {run()["text"] for run in contestants.values()}
        if len(texts) > 1:
            raise SystemExit("the texts differ: look at tests/test_people.py first")
        seconds = race(contestants, rounds, warm_up=0)  # each has run once
        record(f"a minute of speech, tiny.en, {how}", "s", rows_of(seconds))


def many(rounds=2):
    """64 windows, encoded and decoded greedily: seconds per window."""
    theirs, ours = models()
    mels = windows(CLIPS)
    results, expected = decode(ours, mels, **PLAIN), their_decode(theirs, mels, **PLAIN)
    tokens = [result.tokens for result in results]
    if tokens != [result.tokens for result in expected]:
        raise SystemExit("the tokens differ from openai-whisper's: look at the tests first")
    lengths = [len(written) for written in tokens]
    print(f"\ntokens per window: {statistics.mean(lengths):.0f}, {min(lengths)} to {max(lengths)}")
    step = CLIPS // ALONE + 1  # windows with all numbers of sentences
    contestants = {
        "ours": lambda: decode(ours, mels, **PLAIN),
        "openai-whisper, one by one": lambda: [
            their_decode(theirs, mel, **PLAIN) for mel in mels[::step]
        ],
        "openai-whisper, batched": lambda: their_decode(theirs, mels, **PLAIN),
    }
    contestants |= faster_whisper(mels, tokens)
    seconds = race(contestants, rounds, warm_up=0)  # each has run once
    amount = {"openai-whisper, one by one": len(mels[::step])}
    per_clip = {name: s / amount.get(name, CLIPS) for name, s in seconds.items()}
    record(f"greedy, tiny.en, {CLIPS} windows", "s per window", rows_of(per_clip))


def faster_whisper(mels, tokens):
    """CTranslate2's contestants, and how often they write the same tokens as ours."""
    tokenizer, contestants = Tokenizer.whisper(multilingual=False), {}
    rules = dict(beam_size=1, max_length=448)  # it writes at most half of these
    rules["suppress_tokens"] = suppressed_tokens("-1", tokenizer)
    for kind, model in ctranslate2_models().items():
        run = partial(
            model.generate,
            ctranslate2.StorageView.from_array(mels.numpy()),
            [tokenizer.prompt] * len(mels),
            **rules,
        )
        contestants[f"CTranslate2, {kind}"] = run
        same = [list(r.sequences_ids[0]) == t for r, t in zip(run(), tokens, strict=True)]
        print(f"CTranslate2, {kind}: the same tokens as ours in {sum(same)} of {len(same)}")
    return contestants


# What a user of each library writes, in a process that loads nothing else
OURS = """
from utils.checkpoints import load_model
from utils.transcribe import transcribe
transcribe(load_model({model!r})[0], {audio!r}, **{options})
"""
THEIRS = """
import soundfile, whisper
model = whisper.load_model({model!r}, "cpu")
model.transcribe(soundfile.read({audio!r}, dtype="float32")[0], fp16=False, **{options})
"""
PEAK = """
import re
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def memory(minutes=4):
    """The most memory of a process that loads tiny.en and transcribes some minutes: MB."""
    if not LINUX:
        print("\nmemory: only Linux tells what a process has held")
        return
    with tempfile.TemporaryDirectory() as folder:
        audio, path = f"{folder}/speech.wav", write_openai(models()[0], f"{folder}/tiny.en.pt")
        soundfile.write(audio, speech(minutes), SAMPLE_RATE)
        for how, options in WAYS.items():
            peaks = {}
            for name, script in {"ours": OURS, "openai-whisper": THEIRS}.items():
                program = script.format(model=path, audio=audio, options=options) + PEAK
                command = [sys.executable, "-c", program]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peaks[name] = int(done.stdout.split()[-1]) / 1024
            title = f"memory of a process for {minutes} minutes of speech, tiny.en, {how}"
            record(title, "MB", rows_of(peaks))


def peak(who):
    """What one contestant, in this process, adds to the memory for 64 windows: MB."""
    theirs, ours = models()
    mels, short = windows(CLIPS), PLAIN | dict(sample_len=30)
    run = {"ours": lambda: decode(ours, mels, **short)}
    run["openai-whisper"] = lambda: their_decode(theirs, mels, **short)
    print_memory_of(run[who])


def batch_memory():
    """Peak memory of 64 windows in one batch, each contestant in a process of its own."""
    peaks = {}
    for who in ("ours", "openai-whisper"):
        command = [sys.executable, __file__, "peak", who]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[who] = float(done.stdout.split()[-1])
    title = f"{CLIPS} windows in one batch, memory on top of weights and sound"
    record(title, "MB", rows_of(peaks))


BENCHES = {b.__name__: b for b in (loading, one, transcribe, many, memory, batch_memory)}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2])
    else:
        for chosen in sys.argv[1:] or BENCHES:
            BENCHES[chosen]()
