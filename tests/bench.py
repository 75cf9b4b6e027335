"""Speed beside the references, in one process: medians and ratios. `make bench` runs it.

    python tests/bench.py            # all; on a GPU the rungs of a ladder and the published run too
    python tests/bench.py mel        # one of them

Times on shared machines are noisy, so that the contestants take turns and the median is told, and
only the ratio means something. Nothing here is asserted: the tests do that, without a clock. Each
table goes to data/bench.json too, with the machine and the versions; notebook 22 shows them.
"""

import json
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import librosa
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
import transformers
import whisper
from whisper.model import ModelDimensions
from whisper.tokenizer import get_encoding

import utils.training
from utils.audio import HOP_LENGTH, N_FFT, SAMPLE_RATE, log_mel_spectrogram, mel_filters
from utils.config import ModelArgs, default_device
from utils.data import IGNORE_INDEX, ClipDataset, load_clips
from utils.files import write_atomic
from utils.recipes import recipe_for
from utils.tokenizer import Tokenizer, load_mergeable_ranks
from utils.training import Run, autocast, forward_backward, optimizer_step, train_step

RUNGS = [  # on a GPU: name, products, recorded as a graph, compiled
    ("float32, kernel by kernel", lambda device: nullcontext(), False, False),
    ("products in bfloat16", autocast, False, False),
    ("recorded as a CUDA graph", autocast, True, False),
    ("blocks compiled", autocast, True, True),
]
RESULT = Path(__file__).parent.parent / "data" / "bench.json"
LINUX = Path("/proc/self/clear_refs").exists()


def race(contestants, rounds, warm_up=1):
    """{name: function} -> {name: median seconds}; they take turns, after `warm_up` for each."""
    times = {name: [] for name in contestants}
    for turn in range(rounds + warm_up):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name] += [] if turn < warm_up else [time.perf_counter() - start]
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def machine(device="cpu"):
    """What the figures were measured on."""
    versions = {lib.__name__: lib.__version__ for lib in (torch, transformers, whisper)}
    named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if LINUX else None
    name = named[1] if named else platform.processor() or platform.machine()
    if is_gpu(device):
        name = torch.cuda.get_device_name()
    return {"device": name, "threads": torch.get_num_threads(), **versions}


def record(title, unit, rows, device="cpu", more_is_better=False, **more):
    """Print a table, rows of {"name", "value", …}, ours first, and put it into data/bench.json."""
    where = machine(device)
    print(f"\n{title} ({where['device']}, {where['threads']} threads, torch {torch.__version__})")
    for row in rows:
        ratio = row["value"] / rows[0]["value"] if rows[0]["value"] else float("nan")
        extra = "".join(f"   {k}: {v}" for k, v in row.items() if k not in ("name", "value"))
        print(f"{row['name']:32}{row['value']:10.2f} {unit}   {ratio:5.2f} × ours{extra}")
    tables = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    tables[title] = {**where, "unit": unit, "more_is_better": more_is_better, **more, "rows": rows}
    write_atomic(RESULT, (json.dumps(tables, indent=1, ensure_ascii=False) + "\n").encode())


def rows_of(numbers):
    """{name: number} -> rows of a table, three digits each."""
    return [{"name": n, "value": float(f"{number:.3g}")} for n, number in numbers.items()]


def mel():
    """Log-mel spectrogram of 30 s, as the five libraries make it."""
    audio = torch.randn(30 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    samples, extract = audio.numpy(), transformers.WhisperFeatureExtractor()
    spectrogram = torchaudio.transforms.Spectrogram(N_FFT, hop_length=HOP_LENGTH)

    bank = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=80)  # the others keep theirs

    def by_librosa():
        power = np.abs(librosa.stft(samples, n_fft=N_FFT, hop_length=HOP_LENGTH)) ** 2
        log = np.log10(np.maximum(bank @ power, 1e-10))
        return (np.maximum(log, log.max() - 8) + 4) / 4

    def by_torchaudio():
        log = (mel_filters() @ spectrogram(audio)).clamp(min=1e-10).log10()
        return (torch.maximum(log, log.max() - 8) + 4) / 4

    contestants = {
        "ours": lambda: log_mel_spectrogram(audio),
        "openai-whisper": lambda: whisper.log_mel_spectrogram(audio),
        "transformers": lambda: extract(samples, sampling_rate=SAMPLE_RATE),
        "librosa": by_librosa,
        "torchaudio": by_torchaudio,
    }
    seconds = race(contestants, 15)
    milliseconds = {name: 1000 * median for name, median in seconds.items()}
    record("log-mel spectrogram of 30 s", "ms", rows_of(milliseconds))


def tokenizer():
    """Byte-pair encoding of 40,000 pieces of text: ours is Python, tiktoken is Rust."""
    ours, theirs = Tokenizer.gpt2(), get_encoding("gpt2")
    pieces = random.Random(0).choices(list(load_mergeable_ranks("gpt2"))[1000:6000], k=40_000)
    text = b"".join(pieces).decode("utf-8", "replace")

    def from_scratch():
        ours.cache.clear()
        return ours.encode(text)

    contestants = {
        "ours": partial(ours.encode, text),
        "ours, with words never met": from_scratch,
        "openai-whisper (tiktoken)": partial(theirs.encode_ordinary, text),
    }
    assert ours.encode(text) == theirs.encode_ordinary(text)
    milliseconds = {name: 1000 * median for name, median in race(contestants, 15).items()}
    record("tokens of 40,000 pieces of text", "ms", rows_of(milliseconds))


def peers(args):
    """openai-whisper's model and transformers', in the shape of `args`, without dropout."""
    half, D, H = args.max_t // 2, args.embeddings_dims, args.no_of_heads
    V, S, layers = args.tgt_vocab_size, args.block_size, args.no_of_decoder_layers
    dims = ModelDimensions(80, half, D, H, args.encoder_layers, V, S, D, H, layers)
    config = transformers.WhisperConfig(
        vocab_size=V, d_model=D, max_source_positions=half, max_target_positions=S,
        encoder_layers=args.encoder_layers, decoder_layers=layers, encoder_attention_heads=H,
        decoder_attention_heads=H, encoder_ffn_dim=4 * D, decoder_ffn_dim=4 * D,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    return whisper.model.Whisper(dims), transformers.WhisperForConditionalGeneration(config)


def is_gpu(device):
    return device.startswith("cuda")


def synchronise(device):
    """Wait until the GPU has done what was asked of it."""
    if is_gpu(device):
        torch.cuda.synchronize()


def matrix_peak(device):
    """Operations per second of a large matrix product, the best of many: bfloat16 on a GPU,
    float32 elsewhere. A median would be no peak: other programs only ever make it slower."""
    n, kind = (8192, torch.bfloat16) if is_gpu(device) else (2000, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(40):
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def loss_of(name, model, args, audio, inputs, labels):
    """A peer's way from sound to loss."""
    audio = F.pad(audio, (0, args.max_t * HOP_LENGTH - audio.shape[1]))  # their shape is fixed
    mel = log_mel_spectrogram(audio)
    if name == "transformers":
        return model(mel, decoder_input_ids=inputs, labels=labels).loss
    return F.cross_entropy(model(mel, inputs).mT.float(), labels, ignore_index=IGNORE_INDEX)


def their_epoch(name, model, clips, batches, optimizer):
    """A peer's training step on each batch: sound in, weights changed; bf16 autocast on a GPU."""
    args, device = clips.args, clips.args.device
    for batch in batches:
        audio, inputs, labels = (t.to(device) for t in clips.collate(batch))
        with autocast(device):
            loss = loss_of(name, model, args, audio, inputs, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
    synchronise(device)


def our_epoch(run, batches):
    """The training step of chapter 09 on each batch -> the losses, nats per token."""
    run.model.train()
    losses = []
    for batch in batches:
        losses.append(train_step(run, batch))
        run.step = (run.step + 1) % run.total_steps
    synchronise(run.args.device)
    return [float(loss) / tokens for loss, tokens in losses]


def memory_now(kind):
    """`VmRSS`, what this process holds, or `VmHWM`, the most since `forget_peak`: MB (Linux)."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def print_memory_of(run):
    """Print what `run()` adds, at its peak, to what this process holds: MB."""
    forget_peak()
    before = memory_now("VmRSS")
    run()
    print(memory_now("VmHWM") - before)


def needed_by(name):
    """What the training steps of one contestant, in this process, add to its memory: MB."""
    _, _, runs = trainers(default_device())
    print_memory_of(runs[name])


def memory_of(name, run, device):
    """The most memory that the steps of a contestant need on top of weights and data: MB.

    Off the GPU in a process of its own; None where the system does not tell (Linux does).
    """
    if is_gpu(device):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20)
    if not LINUX:
        return None
    command = [sys.executable, __file__, "needed_by", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(float(done.stdout.split()[-1]))


def some_batches(device, every=6):
    """-> clips for the preset `seed`, without anything drawn at random, and some batches."""
    size = 64 if is_gpu(device) else 8
    plain = dict(dropout=0.0, attn_dropout=0.0, augment_strength=0.0)
    args = ModelArgs(device=device, batch_size=size, **plain)
    split = "train" if is_gpu(device) else "validation"
    clips = ClipDataset(load_clips("corpus", split), Tokenizer.gpt2(), args)
    batches = [batch for batch in clips.batches() if len(batch) == size][::every]
    return clips, batches


def our_run(clips, compiled, recorded=True):
    """A run of this project on `clips`; on a GPU its steps are recorded as CUDA graphs."""
    recipe = recipe_for(clips.args, compiled)
    if not recorded:
        plain = {"forward_backward": forward_backward, "optimizer_step": optimizer_step}
        recipe = replace(recipe, **plain)
    return Run(clips.args, clips, clips, "nowhere", recipe)


def trainers(device):
    """-> clips, some batches of them, and each contestant's training steps on these."""
    clips, batches = some_batches(device)
    args, run = clips.args, our_run(clips, compiled=is_gpu(device))
    runs = {"ours": partial(our_epoch, run, batches)}
    for name, model in zip(("openai-whisper", "transformers"), peers(args), strict=True):
        optimizer = torch.optim.AdamW(model.to(device).train().parameters(), fused=True)
        runs[name] = partial(their_epoch, name, model, clips, batches, optimizer)
    return clips, batches, runs


def training(rounds=3):
    """A whole training step of the preset `seed` on real clips."""
    device = default_device()
    clips, batches, runs = trainers(device)
    args, number = clips.args, clips.args.batch_size * len(batches)
    memory = {name: memory_of(name, run, device) for name, run in runs.items()}
    seconds, peak = race(runs, rounds, warm_up=3 if is_gpu(device) else 1), matrix_peak(device)
    done = sum(flops(args, *clips.collate(batch)) for batch in batches)
    rows = [
        {
            "name": name,
            "value": round(number / taken, 1),
            "share_of_peak": round(done / taken / peak, 3),
            "memory_mb": memory[name],
        }
        for name, taken in seconds.items()
    ]
    title = "training step, preset seed" + ", GPU" * is_gpu(device)
    gflops = round(peak / 1e9)
    record(title, "clips/s", rows, device, more_is_better=True, peak_gflops=gflops)


def ladder(rounds=3):
    """On a GPU: what each means saves of a training step of the preset `seed`."""
    if not torch.cuda.is_available():
        print("\nthe ladder: no CUDA GPU here, so its figures are owed")
        return
    device, rows = default_device(), []
    clips, batches = some_batches(device)
    for name, half, recorded, compiled in RUNGS:
        run = our_run(clips, compiled, recorded)
        with mock.patch.object(utils.training, "autocast", half):
            losses = our_epoch(run, batches)
            seconds = race({name: partial(our_epoch, run, batches)}, rounds, warm_up=2)[name]
        value = float(f"{1000 * seconds / len(batches):.3g}")
        rows.append({"name": name, "value": value, "losses": [round(x, 3) for x in losses]})
    record("ladder of a training step, preset seed, GPU", "ms", rows, device)


def published(hours=10, folder="runs/ten-hours", out="runs/published"):
    """On a GPU: ten epochs over ten generated hours, batch 64, validated after every one.

    Ten hours of speech are generated first, where they are not there yet (espeak-ng, flite and
    festival are needed). The curve goes to img/published.jpg, the history beside the table.
    """
    if not torch.cuda.is_available():
        print("\nthe published run: no CUDA GPU here, so its figures are owed")
        return
    root = RESULT.parent.parent
    if not list(Path(folder).glob("train*.parquet")):
        speech = f"--hours {hours} --splits train --out {folder} --seed 1".split()
        subprocess.run([sys.executable, root / "data" / "generate.py", *speech], check=True)
        shutil.copy(root / "data" / "corpus" / "validation.parquet", folder)
    command = f"-m utils train --preset seed --data {folder} --out {out} --compile"
    subprocess.run([sys.executable, *command.split()], check=True)
    history = Path(out) / "history.jsonl"
    curve = root / "img" / "published.jpg"
    subprocess.run([sys.executable, "-m", "utils", "plot", history, curve], check=True)
    shutil.copy(history, RESULT.with_name("published.jsonl"))
    last = json.loads(history.read_text().splitlines()[-1])
    print("ten epochs: {seconds:.0f} s, word error rate {wer:.1%}".format(**last))


def flops(args, audio, inputs, labels):
    """Operations of one training step: three times equation (1) of notebook 22, but for the first
    convolution twice, since the sound needs no gradient."""
    D, V, k, M = args.embeddings_dims, args.tgt_vocab_size, args.kernel_size, args.n_channels
    frames, S = audio.shape[1] // HOP_LENGTH, inputs.shape[1]
    T = frames // args.stride
    first, second = 2 * k * M * D * frames, 2 * k * D * D * T
    encoder = args.encoder_layers * (24 * D * D * T + 4 * D * T * T)
    block = 28 * D * D * S + 4 * D * D * T + 4 * D * S * S + 4 * D * S * T
    clip = first + second + encoder + args.no_of_decoder_layers * block
    scored = 2 * D * V * int((labels != IGNORE_INDEX).sum())
    return 3 * (len(audio) * clip + scored) - len(audio) * first


if __name__ == "__main__":
    races = (mel, tokenizer, training, ladder, published)
    benches = {race.__name__: race for race in races}
    if sys.argv[1:2] == ["needed_by"]:
        needed_by(sys.argv[2])
    else:
        for chosen in sys.argv[1:] or benches:
            benches[chosen]()
