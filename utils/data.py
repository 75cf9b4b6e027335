import math
import re
from collections import Counter
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import torchaudio

from utils.audio import SAMPLE_RATE, load_audio, pad_or_trim

CORPUS = Path(__file__).parent.parent / "data" / "corpus"
BUCKET = SAMPLE_RATE // 2  # samples: clips are padded to whole half seconds
GARBAGE = {"<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"}
IGNORE = -100  # label of a position that is not scored

GIGASPEECH_HELP = (
    "GigaSpeech could not be loaded ({reason}): accept its terms on the hub page "
    "speechcolab/gigaspeech, log in with `hf auth login` and check the network, or train on the "
    "embedded corpus, which needs neither."
)


def clean_text(text):
    """GigaSpeech's upper-case text -> lower-case words, or None for a clip to be discarded.

    Punctuation tags (`<COMMA>`, …) are dropped: nobody pronounces them.
    """
    if set(text.split()) & GARBAGE:
        return None
    words = re.sub(r"<[A-Z]+>", " ", text).lower().split()
    return " ".join(words) or None


def load_gigaspeech(subset="xs", split="train"):
    """GigaSpeech from the hub, in whichever revision serves Parquet. Gated: needs a token.

    Raises `ValueError` that says what to do where the hub refuses or cannot be reached.
    """
    reason = ""
    for revision in (None, "refs/pr/20", "refs/convert/parquet"):
        try:
            return datasets.load_dataset(
                "speechcolab/gigaspeech", subset, split=split, revision=revision
            )
        except (OSError, RuntimeError, ValueError) as problem:
            reason = reason or str(problem).strip().splitlines()[0]
    raise ValueError(GIGASPEECH_HELP.format(reason=reason))


def load_folder(folder):
    """Your own recordings: sound files and a `metadata.csv` with the columns file_name,text."""
    if not (Path(folder) / "metadata.csv").is_file():
        raise ValueError(
            f"{folder} has no metadata.csv: list your recordings in one, "
            "with the columns file_name,text."
        )
    return datasets.load_dataset("audiofolder", data_dir=str(folder), split="train")


def load_clips(source="corpus", split="train"):
    """One table of clips, the audio still encoded, columns `audio` and `text` among others.

    `source`: `corpus` (embedded), `gigaspeech:xs` … `gigaspeech:xl`, a folder of Parquet files
    named after their split, or a folder of recordings with a `metadata.csv`.
    """
    if str(source).startswith("gigaspeech"):
        table = load_gigaspeech(str(source).partition(":")[2] or "xs", split)
    else:
        folder = CORPUS if str(source) == "corpus" else Path(source)
        files = sorted(map(str, folder.glob(f"{split}*.parquet")))
        if files:
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        elif split == "train" and folder != CORPUS:
            table = load_folder(folder)
        else:
            raise ValueError(
                f"{folder} has no file {split}*.parquet: check the name of the split, "
                "or restore the data from the repository."
            )
    return table.cast_column("audio", datasets.Audio(decode=False))


def usable(row, tokenizer, args):
    """One row of the table -> (audio int16 (samples,), tokens, text), or why it is dropped."""
    text = clean_text(row["text"])
    if text is None:
        return "garbage"
    tokens = tokenizer.encode(text)
    if len(tokens) + len(tokenizer.prompt) > args.block_size:
        return "text too long"
    audio = load_audio(row["audio"]["bytes"] or row["audio"]["path"], args.sr)
    longest = round(args.max_t * args.STRIDE_DURATION * args.sr)  # samples
    if not args.sr // 10 <= len(audio) <= longest:
        return "audio too short or too long"
    return (audio * 32767).round().to(torch.int16), tokens, text


def bucketed(lengths, size, generator=None):
    """Indices in lists of at most `size`, each list of equal lengths, shorter lengths first.

    With a generator, which clips meet in a list is random.
    """
    order = range(len(lengths))
    if generator is not None:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    buckets = {}
    for i in order:
        buckets.setdefault(lengths[i], []).append(i)
    return [
        bucket[start : start + size]
        for _, bucket in sorted(buckets.items())
        for start in range(0, len(bucket), size)
    ]


def teacher_forcing(texts, prompt, end):
    """Lists of tokens -> inputs (B, S), labels (B, S): one shift between them.

    The input opens with the prompt; the label of each position is the next token, the last
    one `end`. What the model is told (prompt) and padding are `IGNORE`d.
    """
    rows = [[*prompt, *tokens, end] for tokens in texts]
    width = max(map(len, rows)) - 1
    inputs = torch.full((len(rows), width), end)
    labels = torch.full((len(rows), width), IGNORE)
    for b, row in enumerate(rows):
        inputs[b, : len(row) - 1] = torch.tensor(row[:-1])
        labels[b, len(prompt) - 1 : len(row) - 1] = torch.tensor(row[len(prompt) :])
    return inputs, labels


class Clips:
    """Cleaned clips in memory, ready for batches: audio as 16-bit samples, text as tokens.

    `dropped` counts what was discarded, by reason. Raises `ValueError` where nothing is left.
    """

    def __init__(self, table, tokenizer, args):
        self.tokenizer, self.args, self.dropped = tokenizer, args, Counter()
        self.audio, self.tokens, self.texts, self.speakers = [], [], [], []
        for row in table:
            clip = usable(row, tokenizer, args)
            if isinstance(clip, str):
                self.dropped[clip] += 1
                continue
            for values, value in zip((self.audio, self.tokens, self.texts), clip, strict=True):
                values.append(value)
            self.speakers.append(row.get("speaker", ""))
        if not self.audio:
            raise ValueError(
                f"no usable clip (dropped: {dict(self.dropped)}): check texts and lengths."
            )
        self.lengths = [math.ceil(len(audio) / BUCKET) * BUCKET for audio in self.audio]

    def __len__(self):
        return len(self.audio)

    def batches(self, epoch=None, longest=None):
        """Lists of indices of equal padded length; shuffled by seed and epoch, if one is given.

        `longest` seconds leaves out what is longer: early epochs may learn from short clips.
        """
        args, generator = self.args, None
        if epoch is not None:
            generator = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
        batches = bucketed(self.lengths, args.batch_size, generator)
        if generator is not None:
            order = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[i] for i in order]
        limit = max(self.lengths) if longest is None else longest * args.sr
        return [batch for batch in batches if self.lengths[batch[0]] <= limit]

    def collate(self, indices):
        """-> audio (B, samples) in [-1, 1], inputs (B, S), labels (B, S)."""
        samples = max(self.lengths[i] for i in indices)
        audio = torch.stack([pad_or_trim(self.audio[i], samples) for i in indices]) / 32767
        texts = [self.tokens[i] for i in indices]
        return audio, *teacher_forcing(texts, self.tokenizer.prompt, self.tokenizer.end)


def draw(like, low, high):
    """One uniform random number for each clip: (B, samples) -> (B, 1)."""
    return low + (high - low) * torch.rand(len(like), 1, device=like.device)


def change_speed(audio, factor, longest):
    """Play (B, samples) `factor` times as fast, higher too, like a shorter vocal tract.

    The result is padded to whole 100 ms and has at most `longest` samples.
    """
    samples = min(longest, round(audio.shape[1] / factor))
    audio = F.interpolate(audio[:, None], size=samples, mode="linear")[:, 0]
    return pad_or_trim(audio, math.ceil(samples / 1600) * 1600)


def microphone(audio, strength):
    """Band limits and a tilt of the spectrum, (B, samples) -> same: every device has its own."""
    spectrum = torch.fft.rfft(audio)
    hz = torch.linspace(0, SAMPLE_RATE / 2, spectrum.shape[1], device=audio.device)
    chosen = draw(audio, 0, 1) < 0.5 * strength
    top = torch.where(chosen, draw(audio, 3000, 8000), 9000)  # Hz: telephones end below 4000
    bottom = torch.where(chosen, draw(audio, 0, 300), -100)
    tilt = (hz / 1000).clamp(min=0.125) ** (draw(audio, -0.5, 0.5) * strength)  # ± 9 dB at 125 Hz
    edges = torch.sigmoid((top - hz) / 100) * torch.sigmoid((hz - bottom) / 20)
    return torch.fft.irfft(spectrum * edges * tilt, n=audio.shape[1])


def room(audio, strength):
    """Reverberation, (B, samples) -> same: an echo of decaying noise on half of the clips."""
    seconds = torch.arange(audio.shape[1], device=audio.device) / SAMPLE_RATE
    echo = torch.randn_like(audio) * torch.exp(-seconds / draw(audio, 0.02, 0.12))
    echo = echo / echo.square().sum(dim=1, keepdim=True).sqrt()  # as much energy as the sound
    level = 10 ** (-draw(audio, 3, 20) / 20) * (draw(audio, 0, 1) < 0.5 * strength)
    spectrum = torch.fft.rfft(audio)
    return audio + level * torch.fft.irfft(spectrum * torch.fft.rfft(echo), n=audio.shape[1])


def noise(audio, strength):
    """Hiss or rumble 5 to 40 dB below the speech on most clips, (B, samples) -> same."""
    hiss = torch.fft.rfft(torch.randn_like(audio))
    hz = torch.linspace(0, SAMPLE_RATE / 2, hiss.shape[1], device=audio.device)
    colour = (hz / 100).clamp(min=1) ** -draw(audio, 0, 1)  # white … pink and beyond
    sound = torch.fft.irfft(hiss * colour, n=audio.shape[1])
    sound = sound / sound.square().mean(dim=1, keepdim=True).sqrt()
    speech = audio.square().mean(dim=1, keepdim=True).sqrt()
    level = 10 ** (-draw(audio, 5, 40) / 20) * (draw(audio, 0, 1) < 0.7 * strength)
    return audio + level * speech * sound


def augment_audio(audio, strength, longest):
    """Other speakers, devices, rooms: (B, samples) -> (B, about as many, at most `longest`).

    `strength` in [0, 1] scales how much and how often; 0 changes nothing.
    """
    if strength == 0:
        return audio
    factor = 1 + 0.15 * strength * (2 * torch.rand(()).item() - 1)  # one speed for the batch
    audio = change_speed(audio, factor, longest)
    return noise(room(microphone(audio, strength), strength), strength)


def spec_augment(mel, strength):
    """SpecAugment (Park et al. 2019) by torchaudio: two masks in frequency, two in time.

    (B, M, T) -> same. Masks take the clip's lowest value, silence, at most 20 % of the bands
    and 8 % of the frames each, times `strength`.
    """
    bands, frames = int(0.2 * strength * mel.shape[1]), int(0.08 * strength * mel.shape[2])
    silence = mel.amin(dim=(1, 2), keepdim=True)
    mel = (mel - silence)[:, None]  # torchaudio wants (B, channels, M, T), and masks with zero
    for size, axis in ((bands, 2), (bands, 2), (frames, 3), (frames, 3)):
        if size > 1:
            mel = torchaudio.functional.mask_along_axis_iid(mel, size, 0.0, axis)
    return mel[:, 0] + silence
