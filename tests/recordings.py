"""Recordings and small random models for the tests of transcription and of the command line."""

import io
import os
from functools import cache
from pathlib import Path

import soundfile
import torch
import whisper

from utils.audio import SAMPLE_RATE, load_audio
from utils.checkpoints import load_official
from utils.config import ModelArgs
from utils.data import load_clips
from utils.model import Whisper
from utils.tokenizer import Tokenizer

TOKENIZER = Tokenizer.small()


def silence(seconds):
    return torch.zeros(int(seconds * SAMPLE_RATE))


def babble(seconds, seed=0):
    """Noise whose loudness changes as that of syllables does, peak about 0.5."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    syllables = 0.3 + 0.7 * torch.sin(2 * torch.pi * 2.5 * time).square()
    return 0.15 * syllables * torch.randn(len(time), generator=generator)


def hiss(audio, level, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return audio + level * torch.randn(len(audio), generator=generator)


TWO = torch.cat([silence(1), babble(2), silence(1), babble(1.5, seed=2), silence(0.8)])


def sound_file(samples, rate=SAMPLE_RATE, subtype="FLOAT"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


TONE = 0.3 * torch.sin(0.1 * torch.arange(96_000))


@cache
def corpus_clips():
    return [
        load_audio(row["audio"]["bytes"]) for row in load_clips("corpus", "validation").take(40)
    ]


def in_a_row(parts, pauses):
    """Recordings with so many seconds of silence after each."""
    pairs = zip(parts, pauses, strict=True)
    return torch.cat([torch.cat([part, silence(pause)]) for part, pause in pairs])


def recording(seed, clips):
    """Clips of the corpus in a row, with pauses."""
    generator = torch.Generator().manual_seed(seed)
    found = corpus_clips()
    order = torch.randint(len(found), (clips,), generator=generator).tolist()
    return in_a_row([found[i] for i in order], [0.3 * (i % 5) for i in order])


SPEECH = Path(os.environ.get("SPEECH_DIR", Path(__file__).parents[2] / "shared" / "speech"))


def spoken_digits(speaker, seed, digits=16):
    """Digits said by a person, in strings of four."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(60, (digits,), generator=generator).tolist()  # digit, one of six takes
    files = [SPEECH / "fsdd" / f"{i // 6}_{speaker}_{i % 6}.wav" for i in chosen]
    return in_a_row(map(load_audio, files), [0.1, 0.1, 0.1, 0.8] * (digits // 4))


@cache
def speech():
    """Recordings of people where these are at hand, and of the corpus' voices: [(samples,)]."""
    people = []
    if SPEECH.is_dir():
        people = [load_audio(SPEECH / name) for name in ("jfk.flac", "LJ050-0131.wav")]
        people += [spoken_digits(speaker, 0) for speaker in ("jackson", "theo")]
    return [*people, recording(3, 5), recording(4, 4)]


@cache
def wild_model():
    """A small model of ours whose text depends on all its sound."""
    torch.manual_seed(0)
    shape = dict(embeddings_dims=16, no_of_heads=2, no_of_encoder_layers=1, no_of_decoder_layers=1)
    model = Whisper(ModelArgs.preset("cpu", block_size=8, device="cpu", **shape)).eval()
    for weight in model.parameters():  # so wild that different sounds have different texts
        torch.nn.init.normal_(weight)
    torch.nn.init.normal_(model.decoder.blocks[0].cross_attn.out.weight, std=10.0)
    return model


@cache
def official(multilingual, seed):
    """openai-whisper's model with official context and vocabulary, tiny, wild weights; and ours."""
    torch.manual_seed(seed)
    vocabulary = 51865 if multilingual else 51864
    dims = whisper.model.ModelDimensions(80, 1500, 32, 2, 1, vocabulary, 448, 32, 2, 1)
    theirs = whisper.model.Whisper(dims).eval()
    for name, weight in theirs.named_parameters():
        if weight.ndim > 1:
            scale = 2.0 if "attn" in name else 1.0
            torch.nn.init.normal_(weight, std=scale * weight[0].numel() ** -0.5)
    embedding = theirs.decoder.token_embedding.weight
    torch.nn.init.normal_(embedding, std=3 * 32**-0.5)
    with torch.no_grad():
        embedding[50256 + multilingual] *= 1.3  # the end, so that it comes now and then
        theirs.decoder.blocks[0].cross_attn.out.weight *= 4  # listen
    return theirs, load_official(theirs)
