"""Sound: parity with four references, and every way in which a recording can be wrong."""

import io
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
import whisper
from transformers import WhisperFeatureExtractor

from utils.audio import (
    N_FFT,
    bucket_batches,
    hz_to_mel,
    load_audio,
    log_mel_spectrogram,
    mel_filters,
    mel_to_hz,
    pad_or_trim,
)
from utils.data import load_clips

SPEECH = Path(__file__).resolve().parents[2] / "shared" / "speech"


def voice(samples, seed=0):
    """Something with pitch, noise and pauses, (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / 16000
    buzz = sum(torch.sin(2 * torch.pi * 120 * k * time) / k for k in range(1, 40))
    loudness = (torch.sin(2 * torch.pi * 3 * time) > 0) * 0.2
    return buzz * loudness + torch.randn(samples, generator=generator) * 0.003


def encode(samples, rate=16000, **options):
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples), rate, **options)
    return file.getvalue()


# The log-mel spectrogram


@pytest.mark.parametrize("bands", [80, 128])
@pytest.mark.parametrize("samples", [201, 400, 1599, 1600, 16000, 48123, 480000])
def test_log_mel_equals_whisper_and_transformers(samples, bands):
    sound = voice(samples)
    ours = log_mel_spectrogram(sound, bands)
    assert ours.shape == (bands, samples // 160) and ours.dtype == torch.float32
    theirs = whisper.log_mel_spectrogram(sound, bands)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    extractor = WhisperFeatureExtractor(bands)
    options = dict(sampling_rate=16000, return_tensors="pt", padding=False)
    theirs = extractor(sound.numpy(), **options).input_features[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_log_mel_equals_torchaudio():
    sound = voice(48123)
    settings = dict(n_fft=400, hop_length=160, n_mels=80, norm="slaney", mel_scale="slaney")
    mel = torchaudio.transforms.MelSpectrogram(16000, **settings)(sound)[:, :-1]
    log = mel.clamp(min=1e-10).log10()
    theirs = (torch.maximum(log, log.max() - 8) + 4) / 4
    torch.testing.assert_close(log_mel_spectrogram(sound), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gain", [1e-6, 1e-3, 1.0, 100.0])
def test_log_mel_at_every_loudness(gain):
    sound = voice(16000) * gain
    theirs = whisper.log_mel_spectrogram(sound)
    torch.testing.assert_close(log_mel_spectrogram(sound), theirs, atol=1e-5, rtol=0)


def test_log_mel_of_silence():
    mel = log_mel_spectrogram(torch.zeros(16000))
    assert torch.equal(mel, torch.full((80, 100), -1.5))


def test_log_mel_of_a_batch_is_clip_by_clip():
    sounds = torch.stack([voice(16000, seed) * 10.0**-seed for seed in range(5)])
    batch = log_mel_spectrogram(sounds)
    assert batch.shape == (5, 80, 100)
    for sound, mel in zip(sounds, batch, strict=True):
        torch.testing.assert_close(mel, log_mel_spectrogram(sound), atol=1e-6, rtol=0)
        theirs = whisper.log_mel_spectrogram(sound)
        torch.testing.assert_close(mel, theirs, atol=1e-5, rtol=0)


def test_log_mel_in_other_precisions():
    sound = voice(16000)
    torch.testing.assert_close(log_mel_spectrogram(sound.double()), log_mel_spectrogram(sound))
    assert log_mel_spectrogram(sound.half()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_log_mel_whatever_the_default_precision(dtype):
    """Libraries of language models change it."""
    sound = voice(16000)
    ours = log_mel_spectrogram(sound)
    mel_filters.cache_clear()
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(log_mel_spectrogram(sound), ours)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_reach_the_sound_after_inference():
    mel_filters.cache_clear()
    with torch.inference_mode():
        log_mel_spectrogram(voice(16000))
    sound = voice(16000).requires_grad_()
    log_mel_spectrogram(sound).sum().backward()
    assert sound.grad.isfinite().all() and sound.grad.abs().max() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_log_mel_on_a_gpu():
    sound = voice(480000)
    ours = log_mel_spectrogram(sound.cuda())
    assert ours.is_cuda
    torch.testing.assert_close(ours.cpu(), log_mel_spectrogram(sound), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("sound", "word"),
    [
        (torch.zeros(0), "0 samples"),
        (torch.zeros(200), "200 samples"),
        (torch.zeros(3, 10), "10 samples"),
        (torch.tensor([0.0, float("nan")] * 400), "not finite"),
        (torch.tensor([0.0, float("inf")] * 400), "not finite"),
        (torch.zeros(1600, dtype=torch.int16), "torch.int16"),
        (torch.zeros(1, 1, 1600), r"\(1, 1, 1600\)"),
        (np.zeros(1600, np.float32), "ndarray"),
        ("clip.wav", "str"),
        (None, "NoneType"),
    ],
)
def test_log_mel_refuses(sound, word):
    with pytest.raises(ValueError, match=word):
        log_mel_spectrogram(sound)


def test_one_broken_clip_spoils_no_batch_silently():
    sounds = torch.stack([voice(1600), voice(1600)])
    sounds[1, 700] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        log_mel_spectrogram(sounds)


# Mel filters


@pytest.mark.parametrize("bands", [40, 80, 128])
@pytest.mark.parametrize(("n_fft", "sr"), [(400, 16000), (1024, 16000), (2048, 44100)])
def test_filters_equal_librosa_and_torchaudio(bands, n_fft, sr):
    ours = mel_filters(bands, n_fft, sr)
    theirs = librosa.filters.mel(sr=sr, n_fft=n_fft, n_mels=bands)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-7, rtol=1e-5)
    fbanks = torchaudio.functional.melscale_fbanks
    theirs = fbanks(n_fft // 2 + 1, 0.0, sr / 2, bands, sr, "slaney", "slaney").T
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bands", [80, 128])
def test_filters_equal_whisper_and_transformers(bands):
    ours = mel_filters(bands)
    torch.testing.assert_close(ours, whisper.audio.mel_filters("cpu", bands), atol=1e-7, rtol=0)
    theirs = torch.from_numpy(WhisperFeatureExtractor(bands).mel_filters.T).float()
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)


def test_filters_are_neither_those_of_htk_nor_of_height_one():
    fbanks, options = torchaudio.functional.melscale_fbanks, (201, 0.0, 8000.0, 80, 16000)
    ours = mel_filters()
    for norm, scale in (("slaney", "htk"), (None, "slaney"), (None, "htk")):
        assert (ours - fbanks(*options, norm, scale).T).abs().max() > 1e-3


def test_mel_scale_equals_librosa_and_inverts():
    hz = torch.linspace(0, 20000, 997, dtype=torch.float64)
    torch.testing.assert_close(hz_to_mel(hz), torch.from_numpy(librosa.hz_to_mel(hz.numpy())))
    torch.testing.assert_close(mel_to_hz(hz_to_mel(hz)), hz)


# Padding


@pytest.mark.parametrize("samples", [0, 1, 999, 1000, 1001, 5000])
def test_pad_or_trim_equals_whisper(samples):
    sound = voice(1000)
    ours = pad_or_trim(sound, samples)
    assert torch.equal(ours, whisper.pad_or_trim(sound, samples))
    assert torch.equal(pad_or_trim(torch.stack([sound, sound]), samples)[1], ours)


def test_padding_is_the_quietest_thing():
    mel = log_mel_spectrogram(pad_or_trim(voice(16000), 48000))
    assert mel[:, 102:].max() <= mel[:, :100].mean(dim=0).min()


def test_buckets_hold_equal_lengths_shorter_first():
    assert bucket_batches([4, 8, 4, 8, 4], size=2) == [[0, 2], [4], [1, 3]]


# Recordings


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (dict(format="WAV", subtype="PCM_16"), 1e-4),
        (dict(format="WAV", subtype="PCM_24"), 1e-6),
        (dict(format="WAV", subtype="PCM_U8"), 1e-2),
        (dict(format="WAV", subtype="FLOAT"), 1e-7),
        (dict(format="FLAC", subtype="PCM_16"), 1e-4),
        (dict(format="OGG", subtype="VORBIS"), 0.1),
        (dict(format="OGG", subtype="OPUS"), 0.1),
        (dict(format="MP3"), 0.1),
    ],
)
def test_load_audio_formats(options, tolerance, tmp_path):
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    data = encode(tone, **options)
    ours = load_audio(data)
    assert ours.dtype == torch.float32 and ours.ndim == 1 and ours.abs().max() <= 1
    assert abs(len(ours) - 16000) < 2500  # MP3 adds a little silence
    spectrum = torch.fft.rfft(pad_or_trim(ours, 16000)).abs()
    assert abs(spectrum.argmax().item() - 440) <= 1
    if tolerance < 0.1:
        torch.testing.assert_close(ours, tone, atol=tolerance, rtol=0)
    path = tmp_path / "clip.sound"
    path.write_bytes(data)
    with path.open("rb") as file:
        for source in (path, str(path), bytearray(data), io.BytesIO(data), file):
            assert torch.equal(load_audio(source), ours)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_load_audio_resamples(rate):
    time = torch.arange(rate) / rate
    ours = load_audio(encode(0.5 * torch.sin(2 * torch.pi * 1000 * time), rate, format="WAV"))
    theirs = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)
    assert ours.shape == (16000,)
    torch.testing.assert_close(ours[200:-200], theirs[200:-200], atol=5e-3, rtol=0)


def test_load_audio_removes_what_does_not_fit():
    time = torch.arange(48000) / 48000
    ours = load_audio(encode(0.5 * torch.sin(2 * torch.pi * 10000 * time), 48000, format="WAV"))
    assert ours[200:-200].abs().max() < 0.01, "a tone above 8 kHz came back as another one"


def test_load_audio_averages_channels():
    channels = torch.stack([voice(1600, 1), voice(1600, 2), voice(1600, 3)], dim=1)
    ours = load_audio(encode(channels, format="WAV", subtype="FLOAT"))
    torch.testing.assert_close(ours, channels.mean(dim=1))


def test_load_audio_stays_within_one():
    ours = load_audio(encode(3 * voice(1600), format="WAV", subtype="FLOAT"))
    assert ours.abs().max() == 1


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (b"", "the recording cannot be decoded"),
        (b"these bytes are no sound", "the recording cannot be decoded"),
        (encode(torch.zeros(160), format="WAV")[:20], "the recording cannot be decoded"),
        (encode(torch.zeros(1600), format="FLAC")[:30], "the recording"),
        (encode(torch.zeros(0), format="WAV"), "no samples"),
        (encode(torch.full((9,), float("nan")), format="WAV", subtype="FLOAT"), "not finite"),
        (encode(torch.full((9,), float("inf")), format="WAV", subtype="FLOAT"), "not finite"),
        (encode(torch.full((9,), 2e4), format="WAV", subtype="FLOAT"), "up to 20000 instead of 1"),
        ("no/such/file.wav", "no/such/file.wav is not a file"),
        (Path("no/such/file.wav"), "is not a file"),
        (".", "is not a file"),
        (None, "cannot be decoded"),
        (3, "cannot be decoded"),
        (io.StringIO("text"), "cannot be decoded"),
    ],
    ids="empty text wav flac no-samples nan inf int path Path folder None 3 StringIO".split(),
)  # names of their own: the header of a float WAV holds the time at which it was made
def test_load_audio_refuses_in_one_sentence(source, word):
    with pytest.raises(ValueError, match=word) as caught:
        load_audio(source)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and " at 0x" not in sentence


def test_speech_equals_the_references(tmp_path):
    """A recording of a person where there is one, else a clip of the corpus."""
    path = SPEECH / "jfk.flac"
    if not path.is_file():
        path = tmp_path / "clip"
        path.write_bytes(load_clips("corpus", "validation")[0]["audio"]["bytes"])
    sound = load_audio(path)
    theirs, _ = librosa.load(path, sr=16000)
    assert len(sound) == len(theirs) > 8000 and 0.05 < sound.abs().max() <= 1
    torch.testing.assert_close(sound, torch.from_numpy(theirs), atol=0.02, rtol=0)
    mel = log_mel_spectrogram(sound, 128)
    torch.testing.assert_close(mel, whisper.log_mel_spectrogram(sound, 128), atol=1e-5, rtol=0)


def test_window_and_hop_are_those_of_the_specification():
    from utils.audio import HOP_LENGTH, SAMPLE_RATE
    from utils.config import ModelArgs

    args = ModelArgs()
    assert args.sr == SAMPLE_RATE
    assert round(args.WINDOW_DURATION * args.sr) == N_FFT
    assert round(args.STRIDE_DURATION * args.sr) == HOP_LENGTH
