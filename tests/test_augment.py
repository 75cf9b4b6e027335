"""Augmentation: voices, tempos, channels, rooms, noise, SpecAugment; its ramp; a curriculum."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torchaudio
from test_training import TINY, new_run, sentences, tones
from torch.utils._python_dispatch import TorchDispatchMode

from utils import augment
from utils.audio import SAMPLE_RATE, load_audio, log_compress, log_mel_spectrogram, mel_spectrogram
from utils.augment import (
    CURRICULUM_PASSES,
    add_noise,
    augment_mel,
    augment_strength,
    augmented_log_mel,
    band_centres,
    curriculum_batches,
    curriculum_limit,
    perturb_tempo,
    random_reverb,
    random_warps,
    spec_augment,
    warp_frequency,
)
from utils.data import ClipDataset, load_clips
from utils.loss import training_log_mel
from utils.tokenizer import Tokenizer
from utils.training import prepare_batch


def powers(clips, frames, seed=0):
    torch.manual_seed(seed)
    return mel_spectrogram(torch.randn(clips, 160 * frames) * 0.1)  # (B, M, T)


def test_augmentation_is_seeded_and_differs_between_clips():
    mel = powers(1, 51).expand(3, -1, -1)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(augment_mel(mel, 1.0, 60))
    assert torch.equal(*results) and results[0].isfinite().all() and results[0].min() >= 0
    assert not torch.equal(results[0][0], results[0][1])
    assert augment_mel(mel, 0, 60) is mel
    assert augment_mel(torch.zeros(2, 80, 50), 1.0, 60).isfinite().all()


class SinglePrecision(TorchDispatchMode):
    """Refuses numbers of double precision, as Apple's GPUs do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        double = getattr(result, "dtype", None) == torch.float64
        assert not double, f"{function} gives numbers of double precision"
        return result


def test_augmentation_needs_no_double_precision():
    mel = torch.rand(3, 80, 200)
    with SinglePrecision():
        spec_augment(log_compress(augment_mel(mel, 1.0, 500)), 1.0)
        with pytest.raises(AssertionError, match="double precision"):
            mel.double()


@pytest.mark.parametrize("longest", [50, 53, 75])
def test_augmentation_stays_within_the_context(longest):
    for seed in range(8):
        augmented = augment_mel(powers(2, 50, seed), 1.0, longest)
        assert augmented.shape[:2] == (2, 80) and augmented.shape[2] <= longest


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
@pytest.mark.parametrize("n_mels", [80, 128])
def test_a_shorter_tract_raises_the_resonances(factor, n_mels):
    tone = torch.sin(2 * torch.pi * 1500 * torch.arange(SAMPLE_RATE) / SAMPLE_RATE)
    mel = mel_spectrogram(tone, n_mels)[None].repeat(2, 1, 1)
    moved = warp_frequency(mel, torch.tensor([[factor], [1.0]]))
    torch.testing.assert_close(moved[1], mel[1], rtol=1e-3, atol=1e-6)
    hz = band_centres(n_mels)[moved[0, :, 50].argmax()]
    assert hz == pytest.approx(1500 * factor, rel=0.04)


def test_tempo_shortens_and_moves_no_band():
    mel = powers(2, 100).mean(dim=2, keepdim=True).repeat(1, 1, 100)  # the same in all frames
    fast, slow = perturb_tempo(mel, 1.25, 500), perturb_tempo(mel, 0.8, 110)
    assert fast.shape[2] == 80 and slow.shape[2] == 110, "125 frames do not fit into 110"
    torch.testing.assert_close(fast, mel[:, :, :80])
    assert torch.equal(perturb_tempo(mel, 1.25, 100), fast), "only 30 s stay so long"
    full = perturb_tempo(mel[:, :, :1].repeat(1, 1, 3000), 1.25, 3000)
    assert full.shape[2] == 3000 and full[:, :, :2400].all() and not full[:, :, 2400:].any()


def test_a_room_rings_after_the_sound_and_not_before():
    mel = torch.zeros(64, 80, 100)
    mel[:, :, 40] = 1
    torch.manual_seed(0)
    heard = random_reverb(mel, 1.0)
    assert not heard[:, :, :40].any() and not heard[:, :, 66:].any()
    assert (heard[:, :, 40] == 1).all(), "the sound itself was changed"
    rings = heard[:, 0, 41:].sum(dim=1)  # (B,)
    assert 0.2 < (rings > 0).float().mean() < 0.9 and rings.max() <= 1.0001
    assert (heard[:, 0, 41:66].diff(dim=1) <= 0).all(), "an echo grows"


@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
def test_masks_are_silent_and_all_else_is_untouched(strength):
    torch.manual_seed(0)
    mel = torch.rand(5, 80, 101) * 2 - torch.arange(5)[:, None, None]
    masked = spec_augment(mel, strength)
    covered = (masked - mel).abs() > 1e-5
    silence = mel.amin(dim=(1, 2), keepdim=True).expand_as(mel)
    torch.testing.assert_close(masked[covered], silence[covered], atol=1e-5, rtol=0)
    assert covered.float().mean() < 0.7
    assert covered.any() == (strength > 0.1)


# --- what the functions draw ---


@pytest.fixture(scope="module")
def clip():
    """A clip of the corpus, (samples,)."""
    return load_audio(load_clips("corpus", "validation")[1]["audio"]["bytes"])


def test_random_tracts_keep_the_order_of_the_bands():
    torch.manual_seed(0)
    factors = random_warps(torch.zeros(1000, 80, 1), 1.0)  # (B, M)
    assert (band_centres(80) / factors).diff(dim=1).min() > 0, "two bands change places"
    assert 0.48 < factors.min() < 0.58 and 1.74 < factors.max() < 2.08, "exp of 0.55 + 0.18"


def test_noise_has_the_ratio_of_the_equation(clip):
    """SNR of 0 to 40 dB on most copies of a clip, none on the others."""
    copies = mel_spectrogram(clip).expand(64, -1, -1)  # (B, M, T)
    torch.manual_seed(0)
    added = add_noise(copies, 1.0) - copies
    noisy = added.amax(dim=(1, 2)) > 0
    ratio = 10 * (copies.mean(dim=(1, 2)) / added.mean(dim=(1, 2)))[noisy].log10()  # dB
    assert noisy.any() and not noisy.all() and ratio.min() > -0.5, "the noise drowns the speech"
    assert ratio.max() < 40.5, "the noise is too soft to matter"


def test_noise_in_mel_bands_is_as_flat_as_noise_in_the_waveform():
    torch.manual_seed(0)
    real = mel_spectrogram(torch.randn(60 * SAMPLE_RATE)).mean(dim=1)  # one minute, (M,)
    assert real.std() / real.mean() < 0.1, "white noise is not equally strong in all bands"
    drawn = -torch.rand(80, 6000).log().mean(dim=1)  # (M,)
    assert (drawn / drawn.mean() - real / real.mean()).abs().max() < 0.3


def test_each_clip_of_a_batch_is_changed_differently(clip):
    torch.manual_seed(0)
    copies = mel_spectrogram(clip).expand(64, -1, -1)
    augmented = augment_mel(copies, 1.0, 500)
    assert len(augmented) == 64 and augmented.shape[2] <= 500 and augmented.isfinite().all()
    assert len({tuple(copy[40].tolist()) for copy in augmented}) == 64


def test_a_scaled_clip_spans_two_around_zero(clip):
    """So that a mask of zeros would not be silent."""
    mel = log_mel_spectrogram(clip)
    assert mel.amax() - mel.amin() == pytest.approx(2, abs=1e-5) and mel.amin() < 0 < mel.amax()


def test_masks_are_drawn_as_torchaudio_draws_them():
    ones, widest = torch.ones(4000, 80, 3), 16  # (B, M, T), bands
    torch.manual_seed(0)
    masks = torchaudio.functional.mask_along_axis_iid(ones, widest, 0.0, 1)
    torch.manual_seed(0)
    reference = torchaudio.transforms.FrequencyMasking(widest, iid_masks=True)
    assert torch.equal(masks, reference(ones))
    hidden = (masks[:, :, 0] == 0).sum(dim=1).float()  # bands of each clip, (B,)
    assert abs(hidden.mean() - (widest - 1) / 2) < 0.3, "not uniform in [0, W)"


# When


def test_the_strength_rises_from_a_tenth_to_three_tenths_of_a_run():
    args = replace(TINY, augment_strength=0.8)
    found = [augment_strength(p / 20, args) for p in (0, 1, 2, 3, 4, 5, 6, 10, 20)]
    assert found == pytest.approx([0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_features_are_plain_before_it_begins_and_changed_afterwards():
    audio, args = torch.randn(2, 16_000) * 0.1, replace(TINY, augment_strength=1.0)
    torch.testing.assert_close(augmented_log_mel(audio, args, 0.05), training_log_mel(audio, args))
    torch.manual_seed(0)
    strong = augmented_log_mel(audio, args, 0.5)
    assert strong.shape[2] != 100 or not torch.allclose(strong, training_log_mel(audio, args))
    assert strong.shape[2] <= args.max_t
    still = replace(args, augment_strength=0.0)
    torch.testing.assert_close(augmented_log_mel(audio, still, 0.9), training_log_mel(audio, args))


def test_a_step_is_augmented_as_strongly_as_its_place_in_the_run_says(monkeypatch):
    """Both kinds: before and after the logarithm."""
    args = replace(TINY, augment_strength=0.6)
    clips = ClipDataset(tones(sentences(24)), Tokenizer.for_args(args), args)
    run, strengths = new_run(args, clips), []
    for name in ("augment_mel", "spec_augment"):
        monkeypatch.setattr(augment, name, lambda mel, s, *rest: strengths.append(s) or mel)
    steps = [0, run.total_steps // 5, run.total_steps // 2, run.total_steps - 1]
    for step in steps:
        run.step = step
        prepare_batch(run, clips.batches()[0], 1, 1)
    wanted = [augment_strength(step / run.total_steps, args) for step in steps]
    assert strengths == [s for s in wanted for _ in range(2)]
    assert wanted[0] == 0 < wanted[1] < wanted[2] == wanted[3] == 0.6


def test_curriculum_is_passed_over_where_no_clip_is_short():
    args = replace(TINY, curriculum_epochs=3)
    clips = ClipDataset(tones(sentences(24)), Tokenizer.for_args(args), args)
    assert [curriculum_limit(epoch, args) for epoch in range(4)] == [1, 1.5, 2, None]
    long = [i for i, length in enumerate(clips.lengths) if length > 16000]
    only_long = ClipDataset(tones([clips.texts[i].upper() for i in long]), clips.tokenizer, args)
    run = new_run(args, only_long)
    assert sum(map(len, run.batches(0))) == len(long), "no clip is short: all are taken"
    short = new_run(args, clips)
    assert short.batches(0) == curriculum_batches(clips, 0, args)
    early = [i for batch in short.batches(0) for i in batch]
    assert max(clips.lengths[i] for i in early) == 16000
    assert max(Counter(early).values()) == CURRICULUM_PASSES
    assert max(map(len, short.batches(0))) <= args.batch_size // 2
    assert sum(map(len, short.batches(3))) == len(clips)
    assert short.batches(3) == clips.batches(3), "shuffled, not sorted by length"
    assert len({len(short.batches(0)), len(short.batches(3))}) == 2


def test_a_weak_augmentation_changes_hardly_more_than_the_loudness():
    """Voice, tempo, channel, room and noise: each is scaled by the strength."""
    torch.manual_seed(0)
    resonance = 1 + 20 * (-(((torch.arange(80) - 40) / 5) ** 2)).exp()  # (M,)
    mel = resonance[:, None].expand(64, 80, 60)
    changed = augment_mel(mel, 1e-4, 200)
    assert changed.shape == mel.shape
    ratio = (changed / mel)[:, 4:].flatten(1)  # what lies below 100 Hz is always weaker
    assert ratio.mean(dim=1).std() > 0.1, "the loudness is drawn in full"
    assert (ratio.amax(dim=1) / ratio.amin(dim=1)).max() < 1.05


def test_a_clip_as_long_as_the_context_stays_within_it():
    args, audio = replace(TINY, augment_strength=1.0), torch.randn(1, 160 * TINY.max_t)
    torch.manual_seed(0)
    frames = [augmented_log_mel(audio, args, 0.9).shape[2] for _ in range(8)]
    assert min(frames) < max(frames) == args.max_t


def test_each_pass_over_the_short_clips_has_its_own_order():
    args = replace(TINY, curriculum_epochs=2, batch_size=4)
    clips = ClipDataset(tones(["ONE", "TWO", "ONE TWO"] * 6), Tokenizer.for_args(args), args)
    passes = []
    for epoch in (0, 1):
        batches = curriculum_batches(clips, epoch, args)
        size = len(batches) // CURRICULUM_PASSES
        passes += [str(batches[i : i + size]) for i in range(0, len(batches), size)]
    assert len(passes) == len(set(passes)) == 2 * CURRICULUM_PASSES
