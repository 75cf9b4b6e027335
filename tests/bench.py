"""Speed beside the references, in one process: medians and ratios. `make bench` runs it.

    python tests/bench.py            # all; on a GPU the published run too
    python tests/bench.py mel        # one of them

Times on shared machines are noisy, so that the contestants take turns and the median is told, and
only the ratio means something. Nothing here is asserted: the tests do that, without a clock.
"""

import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import librosa
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
import transformers
import whisper
from whisper.model import ModelDimensions

from utils.audio import HOP_LENGTH, N_FFT, SAMPLE_RATE, log_mel_spectrogram, mel_filters
from utils.checkpoints import write_safely
from utils.config import ModelArgs, default_device
from utils.data import IGNORE, Clips, load_clips
from utils.model import count_parameters
from utils.tokenizer import Tokenizer
from utils.training import make_network, token_loss

RESULT = Path(__file__).parent.parent / "data" / "bench.json"


def race(contestants, rounds):
    """{name: function} -> {name: median seconds}; they take turns, after one warm-up each."""
    times = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name] += [time.perf_counter() - start] if turn else []
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def show(title, seconds, unit, amount):
    """One line for each contestant: its median, its speed, and how many times as fast ours is."""
    print(f"\n{title} (medians; torch {torch.__version__}, {torch.get_num_threads()} threads)")
    for name, median in seconds.items():
        speed, ratio = f"{amount / median:10.1f} {unit}", median / seconds["ours"]
        print(f"{name:16}{1000 * median:10.1f} ms{speed}   ours is {ratio:.2f} times as fast")


def mel():
    """Log-mel spectrogram of 30 s, as the five libraries make it."""
    audio = torch.randn(30 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    samples, extract = audio.numpy(), transformers.WhisperFeatureExtractor()
    spectrogram = torchaudio.transforms.Spectrogram(N_FFT, hop_length=HOP_LENGTH)

    def by_librosa():
        shape = dict(sr=SAMPLE_RATE, n_fft=N_FFT, hop_length=HOP_LENGTH, n_mels=80)
        log = np.log10(np.maximum(librosa.feature.melspectrogram(y=samples, **shape), 1e-10))
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
    show("log-mel spectrogram of 30 s", race(contestants, 15), "s of sound/s", 30)


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


def synchronise(device):
    """Wait until the GPU has done what was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matrix_peak(device):
    """Operations per second of a large matrix product, the best of many: bfloat16 on a GPU,
    float32 elsewhere. A median would be no peak: other programs only ever make it slower."""
    gpu = device.startswith("cuda")
    n, kind = (8192, torch.bfloat16) if gpu else (2000, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(40):
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def loss_of(name, model, args, audio, inputs, labels):
    """Each contestant's own way from sound to loss."""
    if name == "ours":  # at the clips' own length, real tokens only
        return token_loss(model, model.encoder(log_mel_spectrogram(audio)), inputs, labels)
    audio = F.pad(audio, (0, args.max_t * HOP_LENGTH - audio.shape[1]))  # their shape is fixed
    mel = log_mel_spectrogram(audio)
    if name == "transformers":
        return model(mel, decoder_input_ids=inputs, labels=labels).loss
    return F.cross_entropy(model(mel, inputs).mT.float(), labels, ignore_index=IGNORE)


def epoch(name, model, optimizer, clips, batches):
    """A training step on each batch: sound in, weights changed; bf16 autocast on a GPU for all."""
    device = clips.args.device
    for batch in batches:
        audio, inputs, labels = (t.to(device) for t in clips.collate(batch))
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            loss = loss_of(name, model, clips.args, audio, inputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    synchronise(device)


def high_water():
    """The most memory this process has held: MB (Linux; `ru_maxrss` would count the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def needed_by(name):
    """What the training steps of one contestant, in this process, add to its memory: MB."""
    _, _, runs = trainers(default_device())
    before = high_water()
    runs[name]()
    print(high_water() - before)


def memory_of(name, run, device):
    """The most memory that the steps of a contestant need on top of weights and data: MB.

    Off the GPU in a process of its own; None where the system does not tell (Linux does).
    """
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20)
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, __file__, "needed_by", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(float(done.stdout.split()[-1]))


def machine(device):
    """What the figures were measured on."""
    gpu = device.startswith("cuda")
    versions = {lib.__name__: lib.__version__ for lib in (torch, transformers, whisper)}
    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()} processor"
    return {"device": name, "threads": torch.get_num_threads(), **versions}


def trainers(device, every=6):
    """-> clips, some batches of them, and each contestant's training steps on these."""
    size = 64 if device.startswith("cuda") else 8
    args = ModelArgs(device=device, dropout=0.0, attn_dropout=0.0, batch_size=size)
    split = "train" if device.startswith("cuda") else "validation"
    clips = Clips(load_clips("corpus", split), Tokenizer.gpt2(), args)
    batches = [batch for batch in clips.batches() if len(batch) == size][::every]
    openai, hugging = peers(args)
    models = {
        "ours": make_network(args)["model"],
        "openai-whisper": openai,
        "transformers": hugging,
    }
    runs = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.to(device).parameters(), fused=True)
        runs[name] = partial(epoch, name, model, optimizer, clips, batches)
    return clips, batches, runs


def training(rounds=3):
    """A whole training step of the preset `seed` on real clips, written to data/bench.json."""
    device = default_device()
    clips, batches, runs = trainers(device)
    args, number = clips.args, clips.args.batch_size * len(batches)
    memory = {name: memory_of(name, run, device) for name, run in runs.items()}
    seconds = race(runs, rounds)
    show("training step, preset seed", seconds, "clips/s", number)
    done, peak = sum(flops(args, *clips.collate(batch)) for batch in batches), matrix_peak(device)
    rows = [
        {
            "name": name,
            "clips_per_second": round(number / taken, 1),
            "share_of_peak": round(done / taken / peak, 3),
            "memory_mb": memory[name],
        }
        for name, taken in seconds.items()
    ]
    result = {**machine(device), "peak_gflops": round(peak / 1e9), "rows": rows}
    write_safely(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    for row in rows:
        print("{name:16}{share_of_peak:6.0%} of peak, memory in MB: {memory_mb}".format(**row))
    print(f"peak {peak / 1e9:.0f} GFLOP/s; the table is in {RESULT.name}")


def table():
    """The table as a picture: clips per second of each contestant."""
    result = json.loads(RESULT.read_text())
    names = [row["name"] for row in result["rows"]]
    figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
    bars = axis.barh(names, [row["clips_per_second"] for row in result["rows"]], color="#0072B2")
    axis.bar_label(
        bars, [f"{row['share_of_peak']:.0%} of peak" for row in result["rows"]], padding=3
    )
    axis.set(xlabel="clips per second", title=f"{result['device']}, torch {result['torch']}")
    axis.margins(x=0.2)
    axis.invert_yaxis()
    figure.savefig(RESULT.parent.parent / "img" / "bench.png", dpi=120)


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
        speech = f"--hours {hours} --splits train --out {folder} --seed 1 --codec flac".split()
        subprocess.run([sys.executable, root / "data" / "generate.py", *speech], check=True)
        shutil.copy(root / "data" / "corpus" / "validation.parquet", folder)
    command = f"-m utils.training --preset seed --data {folder} --out {out} --compile"
    subprocess.run([sys.executable, *command.split()], check=True)
    history = Path(out) / "history.jsonl"
    curve = root / "img" / "published.jpg"
    subprocess.run([sys.executable, "-m", "utils.plotting", history, curve], check=True)
    shutil.copy(history, RESULT.with_name("published.jsonl"))
    last = json.loads(history.read_text().splitlines()[-1])
    print("ten epochs: {seconds:.0f} s, word error rate {wer:.1%}".format(**last))


def flops(args, audio, inputs, labels):
    """Of one step: a product and a sum for each weight and position, forward and twice backward."""
    D, layers = args.embeddings_dims, args.no_of_decoder_layers
    states, scored = audio.shape[0] * audio.shape[1] // 320, int((labels != IGNORE).sum())
    stem = 2 * args.n_channels * args.kernel_size * D + args.kernel_size * D * D  # a state has two
    encoder, cross = 12 * D * D * args.encoder_layers + stem, 2 * D * D * layers
    decoder = 14 * D * D * layers
    assert encoder + decoder + cross < count_parameters(args)
    each = (encoder + cross) * states + decoder * inputs.numel()
    return 3 * 2 * (each + args.tgt_vocab_size * D * scored)


if __name__ == "__main__":
    benches = {"mel": mel, "training": training, "table": table, "published": published}
    if sys.argv[1:2] == ["needed_by"]:
        needed_by(sys.argv[2])
    else:
        for chosen in sys.argv[1:] or benches:
            benches[chosen]()
