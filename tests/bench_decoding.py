"""Decoding beside openai-whisper, transformers and, where it is installed, faster-whisper.

    python tests/bench_decoding.py            # everything
    python tests/bench_decoding.py one        # one clip, per token
    python tests/bench_decoding.py many       # 64 clips
    python tests/bench_decoding.py memory     # peak memory of 64 clips

The shape is `tiny`, the weights are random (the same for all), the sound is noise of 30 s, encoding
included where clips are counted; of such a clip at most 96 tokens are written, about what is said
in 30 s. Contestants take turns; medians; only the ratios mean something. The tables go to
data/bench.json. `make bench` installs CTranslate2, the engine of faster-whisper, for its race.
"""

import statistics
import subprocess
import sys
import tempfile
from functools import partial

import torch
import transformers
import whisper
from bench import print_memory_of, race, record, rows_of
from transformers.modeling_outputs import BaseModelOutput
from whisper.model import ModelDimensions

from utils.checkpoints import export_hf, load_official
from utils.decoding import decode, suppressed_tokens
from utils.tokenizer import Tokenizer

END, CLIPS, ALONE = Tokenizer.whisper().end, 64, 8  # ALONE: clips that are timed one by one
STEP = CLIPS // ALONE
PLAIN = dict(language="en", without_timestamps=True)
MANY = dict(PLAIN, sample_len=96)
NEVER_END = dict(PLAIN, suppress_tokens=f"-1,{END}")


@torch.no_grad()
def twins(ending=0.0):
    """The same random weights in openai-whisper's tiny and in ours; `ending` makes texts end."""
    torch.manual_seed(0)
    theirs = whisper.model.Whisper(ModelDimensions(80, 1500, 384, 6, 4, 51865, 448, 384, 6, 4))
    for weight in theirs.parameters():
        if weight.ndim > 1:
            weight.normal_(std=1.3 * weight[0].numel() ** -0.5)
    bias = theirs.decoder.ln.bias.normal_(std=0.5)
    theirs.decoder.token_embedding.weight[END] += ending * bias / bias.square().sum()
    return theirs.eval(), load_official(theirs)


def sounds(clips):
    """(clips, 80, 3000): noises of different colours, so that the texts differ in length."""
    draw = torch.Generator().manual_seed(0)
    colours = 2 * torch.randn(clips, 80, 1, generator=draw)
    return colours + torch.randn(clips, 80, 3000, generator=draw)


def their_decode(model, mel, **options):
    return whisper.decode(model, mel, whisper.DecodingOptions(fp16=False, **options))


def one(tokens=100, rounds=7):
    """Greedy, one clip whose states are given: milliseconds per token."""
    theirs, ours = twins()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        export_hf(ours, folder)
        hugging = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
        states = ours.encoder(sounds(1))
        given = BaseModelOutput(last_hidden_state=states)
        forced = dict(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, num_beams=1)
        seconds = race(
            {
                "ours": lambda: decode(ours, states, sample_len=tokens, **NEVER_END),
                "openai-whisper": lambda: their_decode(
                    theirs, states, sample_len=tokens, **NEVER_END
                ),
                "transformers": lambda: hugging.generate(
                    encoder_outputs=given, language="en", task="transcribe", **forced
                ),
            },
            rounds,
        )
    milliseconds = {name: 1000 * median / tokens for name, median in seconds.items()}
    record("greedy, tiny, one clip", "ms per token", rows_of(milliseconds))


def many(rounds=3):
    """64 clips of 30 s, encoded and decoded greedily: seconds per clip."""
    theirs, ours = twins(ending=7.0)
    mels = sounds(CLIPS)
    results, expected = decode(ours, mels, **MANY), their_decode(theirs, mels, **MANY)
    if [result.tokens for result in results] != [result.tokens for result in expected]:
        raise SystemExit("the tokens differ from openai-whisper's: look at the tests first")
    lengths = [len(result.tokens) for result in results]
    print(f"\ntokens per clip: {statistics.mean(lengths):.0f}, {min(lengths)} to {max(lengths)}")
    print(f"in the {ALONE} clips timed one by one: {statistics.mean(lengths[::STEP]):.0f}")
    contestants = {
        "ours": lambda: decode(ours, mels, **MANY),
        "openai-whisper, one by one": lambda: [
            their_decode(theirs, mel, **MANY) for mel in mels[::STEP]
        ],
        "openai-whisper, batched": lambda: their_decode(theirs, mels, **MANY),
    }
    contestants |= faster_whisper(ours, mels, [result.tokens for result in results])
    seconds = race(contestants, rounds, warm_up=False)  # each has run once
    amount = {"openai-whisper, one by one": ALONE}
    per_clip = {name: s / amount.get(name, CLIPS) for name, s in seconds.items()}
    record(f"greedy, tiny, {CLIPS} clips", "s per clip", rows_of(per_clip))


def faster_whisper(ours, mels, tokens):
    """CTranslate2 with the same weights, float32 and int8, where it is installed."""
    try:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        print("CTranslate2 is not installed, so it is not in the race: see `make bench`")
        return {}
    tokenizer, contestants = Tokenizer.whisper(), {}
    rules = dict(beam_size=1, max_length=2 * MANY["sample_len"])  # it writes at most half of these
    rules["suppress_tokens"] = suppressed_tokens("-1", tokenizer)
    folder, threads = tempfile.mkdtemp(), torch.get_num_threads()
    export_hf(ours, f"{folder}/hf", tokenizer)
    view = ctranslate2.StorageView.from_array(mels.numpy())
    for kind in ("float32", "int8"):
        TransformersConverter(f"{folder}/hf").convert(f"{folder}/{kind}", quantization=kind)
        model = ctranslate2.models.Whisper(
            f"{folder}/{kind}", compute_type=kind, intra_threads=threads
        )
        run = partial(model.generate, view, [tokenizer.prompt] * len(mels), **rules)
        contestants[f"CTranslate2, {kind}"] = run
        same = [list(r.sequences_ids[0]) == t for r, t in zip(run(), tokens, strict=True)]
        print(f"CTranslate2, {kind}: the same tokens as ours in {sum(same)} of {len(same)} clips")
    return contestants


def peak(who):
    """What one contestant, in this process, adds to the memory for 64 clips: MB."""
    theirs, ours = twins()
    mels = sounds(CLIPS)
    run = {"ours": lambda: decode(ours, mels, sample_len=30, **PLAIN)}
    run["openai-whisper"] = lambda: their_decode(theirs, mels, sample_len=30, **PLAIN)
    print_memory_of(run[who])


def memory():
    """Peak memory of 64 clips in one batch, each contestant in a process of its own."""
    peaks = {}
    for who in ("ours", "openai-whisper"):
        command = [sys.executable, __file__, "peak", who]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[who] = float(done.stdout.split()[-1])
    title = f"{CLIPS} clips in one batch, memory on top of weights and sound"
    record(title, "MB", rows_of(peaks))


def main(which=("one", "many", "memory")):
    for name in which:
        {"one": one, "many": many, "memory": memory}[name]()


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2])
    else:
        main(sys.argv[1:] or ("one", "many", "memory"))
