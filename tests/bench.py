"""Speed beside the references, in one process: medians and ratios. `make bench` runs it.

    python tests/bench.py            # log-mel and training step
    python tests/bench.py mel        # one of them

Times on shared machines are noisy, so that the contestants take turns and the median is told, and
only the ratio means something. Nothing here is asserted: the tests do that, without a clock.
"""

import statistics
import sys
import time

import librosa
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
import transformers
import whisper
from whisper.model import ModelDimensions

from utils.audio import HOP_LENGTH, N_FFT, SAMPLE_RATE, log_mel_spectrogram, mel_filters
from utils.config import ModelArgs
from utils.data import IGNORE, Clips, load_clips
from utils.model import Whisper, count_parameters
from utils.tokenizer import Tokenizer
from utils.training import token_loss


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


def training():
    """A whole training step of the preset `seed` on real clips: sound in, weights changed."""
    args = ModelArgs(device="cpu", dropout=0.0, attn_dropout=0.0, batch_size=8)
    clips = Clips(load_clips("corpus", "validation"), Tokenizer.gpt2(), args)
    batches = [batch for batch in clips.batches() if len(batch) == 8][::6]
    openai, hugging = peers(args)
    models = {"ours": Whisper(args), "openai-whisper": openai, "transformers": hugging}
    optimizers = {n: torch.optim.AdamW(m.parameters(), fused=True) for n, m in models.items()}

    def loss_of(name, audio, inputs, labels):
        if name == "ours":  # at the clips' own length, real tokens only
            model = models[name]
            return token_loss(model, model.encoder(log_mel_spectrogram(audio)), inputs, labels)
        audio = F.pad(audio, (0, args.max_t * HOP_LENGTH - audio.shape[1]))  # their shape is fixed
        mel = log_mel_spectrogram(audio)
        if name == "transformers":
            return models[name](mel, decoder_input_ids=inputs, labels=labels).loss
        return F.cross_entropy(models[name](mel, inputs).mT, labels, ignore_index=IGNORE)

    def epoch(name):
        for batch in batches:
            loss = loss_of(name, *clips.collate(batch))
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()

    seconds = race({name: lambda name=name: epoch(name) for name in models}, 3)
    show("training step, preset seed", seconds, "clips/s", 8 * len(batches))
    matrices = torch.randn(2, 1500, 1500)
    peak = 2 * 1500**3 / race({"ours": lambda: matrices[0] @ matrices[1]}, 9)["ours"]
    done = sum(flops(args, *clips.collate(batch)) for batch in batches) / seconds["ours"]
    print(f"ours does {done / 1e9:.0f} of the {peak / 1e9:.0f} GFLOP/s of a large matrix product")


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
    benches = {"mel": mel, "training": training}
    for chosen in sys.argv[1:] or benches:
        benches[chosen]()
