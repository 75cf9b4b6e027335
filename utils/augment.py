"""Augmentation on the GPU or CPU, batch by batch: other speakers, devices, rooms; SpecAugment."""

import math

import torch
import torch.nn.functional as F
import torchaudio

from utils.audio import SAMPLE_RATE, hz_to_mel, log_compress, mel_spectrogram, mel_to_hz


def uniform_per_clip(mel, low, high):
    """One uniform random number for each clip: (B, M, T) -> (B, 1)."""
    return low + (high - low) * torch.rand(len(mel), 1, device=mel.device)


def band_centres(n_mels):
    """The centre of each mel band in Hz, (M,)."""
    top = hz_to_mel(SAMPLE_RATE / 2).item()
    return mel_to_hz(torch.linspace(0, top, n_mels + 2)[1:-1])


def warp_frequency(mel, factor):
    """Raise the resonances by `factor`, (B, 1) or one a band (B, M): (B, M, T) -> same."""
    M = mel.shape[1]
    mels_per_band = hz_to_mel(SAMPLE_RATE / 2).item() / (M + 1)
    wanted = hz_to_mel(band_centres(M).to(mel.device) / factor)  # (B, M)
    source = (wanted / mels_per_band - 1).clamp(0, M - 1)  # which band to read
    away = (source[..., None] - torch.arange(M, device=mel.device)).abs()  # (B, M, M)
    return (1 - away).clamp(min=0) @ mel  # from the two bands around it


def random_warps(mel, strength):
    """Random vocal tracts: a factor for each clip and band, (B, M, T) -> (B, M)."""
    bands = torch.arange(mel.shape[1], device=mel.device)
    length = uniform_per_clip(mel, -0.55, 0.55)
    shape = (
        0.18
        * (bands * uniform_per_clip(mel, 0.04, 0.12) + uniform_per_clip(mel, 0, 2 * math.pi)).cos()
    )
    return (strength * (length + shape)).exp()


def perturb_tempo(mel, factor, longest):
    """Speak `factor` times as fast: (B, M, T) -> (B, M, T / factor), at most `longest` frames."""
    frames = min(longest, round(mel.shape[2] / factor))
    return F.interpolate(mel, size=frames, mode="linear")


def random_channel(mel, strength):
    """Gain, tilt, bumps and, often, a telephone's band limits: (B, M, T) -> same."""
    hz, bands = band_centres(mel.shape[1]).to(mel.device), torch.arange(mel.shape[1])
    telephone = uniform_per_clip(mel, 0, 1) < 0.6 * strength
    top = torch.where(
        telephone, uniform_per_clip(mel, 3000, 8000), 9000
    )  # Hz: telephones end below 4000
    bottom = torch.where(telephone, uniform_per_clip(mel, 0, 300), -100)
    limits = 40 * (torch.sigmoid((hz - top) / 150) + torch.sigmoid((bottom - hz) / 30))
    tilt = uniform_per_clip(mel, -3, 3) * (hz / 1000).log2()  # up to 3 dB an octave
    waves = bands.to(mel.device) * uniform_per_clip(mel, 0.02, 0.25) + uniform_per_clip(
        mel, 0, 2 * math.pi
    )
    decibels = uniform_per_clip(mel, -6, 6) + strength * (tilt + 4 * waves.cos()) - limits  # (B, M)
    return mel * 10 ** (decibels / 10)[..., None]


def random_reverb(mel, strength):
    """Reverberation, (B, M, T) -> same: often each frame rings on for 250 ms."""
    k = torch.arange(26, device=mel.device)  # frames of 10 ms
    echo = (-2 * k / uniform_per_clip(mel, 2, 15)).exp() * (k > 0)  # (B, 26)
    level = 10 ** (-uniform_per_clip(mel, 0, 20) / 10) * (
        uniform_per_clip(mel, 0, 1) < 0.6 * strength
    )
    answer = (k == 0) + level * echo / echo.sum(dim=1, keepdim=True)
    padded = F.pad(mel, (25, 0)).transpose(0, 1)  # (M, B, 25 + T): silence before the clip
    return F.conv1d(padded, answer.flip(1)[:, None], groups=len(mel)).transpose(0, 1)


def add_noise(mel, strength):
    """Hiss or rumble 0 to 40 dB below the speech on most clips, (B, M, T) -> same."""
    hz = band_centres(mel.shape[1]).to(mel.device)
    colour = (hz / 100).clamp(min=1) ** -uniform_per_clip(mel, 0, 2)  # white … brown, (B, M)
    level = 10 ** (-uniform_per_clip(mel, 0, 40) / 10) * (
        uniform_per_clip(mel, 0, 1) < 0.8 * strength
    )
    level = level * mel.mean(dim=(1, 2))[:, None]
    profile = level * colour / colour.mean(dim=1, keepdim=True)
    return mel - profile[..., None] * torch.rand_like(mel).clamp(min=1e-9).log()  # exponential


def augment_mel(mel, strength, longest):
    """Other speakers, devices, rooms: power (B, M, T) -> (B, M, about T, at most `longest`).

    `strength` in [0, 1] scales how much and how often; 0 changes nothing.
    """
    if strength == 0:
        return mel
    tempo = 1 + strength * (0.6 * torch.rand(()).item() - 0.4)  # one for the batch
    mel = perturb_tempo(mel, tempo, longest)
    mel = warp_frequency(mel, random_warps(mel, strength))
    return add_noise(random_reverb(random_channel(mel, strength), strength), strength)


def spec_augment(mel, strength):
    """SpecAugment (Park et al. 2019) by torchaudio: two masks in frequency, two in time.

    (B, M, T) -> same. Masks take the clip's lowest value, silence, at most 20 % of the bands
    and 8 % of the frames each, times `strength`.
    """
    if strength == 0:
        return mel
    bands, frames = int(0.2 * strength * mel.shape[1]), int(0.08 * strength * mel.shape[2])
    silence = mel.amin(dim=(1, 2), keepdim=True)
    mel = mel - silence  # torchaudio masks with zero
    for size, axis in ((bands, 1), (bands, 1), (frames, 2), (frames, 2)):
        if size > 1:
            mel = torchaudio.functional.mask_along_axis_iid(mel, size, 0.0, axis)
    return mel + silence


def augment_strength(progress, args):
    """Nothing in the first tenth of the run, then rising to `args.augment_strength` at three tenths."""
    return args.augment_strength * min(1.0, max(0.0, (progress - 0.1) / 0.2))


def augmented_log_mel(audio, args, progress):
    """(B, samples) -> log-mel (B, M, T), augmented as strongly as `progress` (0 to 1) allows."""
    strength = augment_strength(progress, args)
    mel = augment_mel(mel_spectrogram(audio, args.log_mel_features), strength, args.max_t)
    return spec_augment(log_compress(mel), strength)
