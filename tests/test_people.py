"""With OpenAI's real weights, `transcribe` equals openai-whisper's on people and other voices.

Where no recordings of people are at hand (`recordings.SPEECH`), the corpus' voices speak instead.
"""

import pytest
import torch
from recordings import SPEECH, hiss, in_a_row, silence, speech
from references import openai_twin
from whisper.audio import N_SAMPLES

from utils.audio import HOP_LENGTH, SAMPLE_RATE, log_mel_spectrogram, pad_or_trim
from utils.checkpoints import load_official
from utils.transcribe import TARGET_PEAK, transcribe

pytestmark = [pytest.mark.tiny_en, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def models():
    """openai-whisper's tiny.en and ours, the same weights."""
    ours = load_official("tiny.en")
    return openai_twin(ours), ours


def check_same(ours, theirs, frames):
    """The same text, segments, tokens and word times; probabilities to a thousandth.

    The last window of a recording may hold one state of audio alone. There openai-whisper divides
    zero by zero, and times its words 20 ms before the window.
    """
    assert ours["text"] == theirs["text"]
    for mine, right in zip(ours["segments"], theirs["segments"], strict=True):
        seconds = 0.021 if frames - mine["seek"] < 4 else 1e-6
        for key in ("id", "seek", "text", "tokens", "temperature"):
            assert mine[key] == right[key]
        for key in ("avg_logprob", "no_speech_prob", "compression_ratio"):
            assert mine[key] == pytest.approx(right[key], abs=1e-3)
        words = list(zip(mine.get("words", []), right.get("words", []), strict=True))
        for found, expected in [(mine, right), *words]:
            for key in ("start", "end"):
                assert found[key] == pytest.approx(expected[key], abs=seconds)
        for word, other in words:
            assert word["word"] == other["word"]
            assert word["probability"] == pytest.approx(other["probability"], abs=1e-3)


def transcribe_both(models, audio, **options):
    """-> our result, equal to openai-whisper's; what is sampled begins with the same seed."""
    theirs, ours = models
    torch.manual_seed(0)
    result = transcribe(ours, audio, clamp_times=False, **options)
    torch.manual_seed(0)
    frames = len(audio) // HOP_LENGTH
    check_same(result, theirs.transcribe(audio, fp16=False, **options), frames)
    return result


GREEDY = {"temperature": 0.0, "sample_len": 40}  # a model in a loop need not write 224 tokens
WORDS = {**GREEDY, "word_timestamps": True}
NO_CONTEXT = {**GREEDY, "condition_on_previous_text": False}
BEAM = {**WORDS, "beam_size": 5, "hallucination_silence_threshold": 0.5}
CASES = [  # which recording, how
    (1, BEAM), (3, NO_CONTEXT), (0, {**WORDS, "clip_timestamps": "1,5,6"}),
    (1, {**WORDS, "initial_prompt": "Eight, nine, oh!"}),
    (5, {**GREEDY, "without_timestamps": True}),
    (4, {**GREEDY, "beam_size": 2, "patience": 2.0, "length_penalty": 0.6}),
]  # fmt: skip


@pytest.mark.parametrize("number, options", CASES)
def test_speech_equals_openai_whisper(models, number, options):
    audio = speech()[number % len(speech())]
    assert len(transcribe_both(models, audio, **options)["text"]) > 10


def test_silence_before_and_after_equals_openai_whisper(models):
    audio = torch.cat([silence(32), speech()[0], silence(32)])
    options = {**WORDS, "hallucination_silence_threshold": 2.0}
    segments = transcribe_both(models, audio, **options)["segments"]
    assert segments and segments[-1]["end"] < len(audio) / SAMPLE_RATE


def test_noise_equals_openai_whisper(models):
    transcribe_both(models, hiss(silence(35), 0.05), **GREEDY)


def test_four_temperatures_draw_the_same_tokens(models):
    """Both libraries take the same numbers from the generator, so that one seed is one text."""
    options = dict(temperature=(0.0, 0.4, 0.8, 1.2), logprob_threshold=-0.3)
    options |= dict(beam_size=2, best_of=2, sample_len=12, without_timestamps=True)
    segments = transcribe_both(models, hiss(speech()[0], 0.1), **options)["segments"]
    assert max(segment["temperature"] for segment in segments) > 0


def test_windows_in_a_batch_equal_openai_whisper_one_by_one(models):
    theirs, ours = models
    audio = in_a_row([speech()[i % len(speech())] for i in range(3)], [12] * 3)
    segments = transcribe(ours, audio, batch_size=3)["segments"]
    for segment in segments:
        start, stop = (round(segment[edge] * SAMPLE_RATE) for edge in ("start", "end"))
        window = (audio - audio.mean())[start:stop]
        window = pad_or_trim(window * (TARGET_PEAK / window.abs().max()), N_SAMPLES)
        options = dict(language="en", fp16=False, without_timestamps=True)
        assert segment["text"] == theirs.decode(log_mel_spectrogram(window), **options).text
    assert len(segments) > 1


def test_long_recordings_equal_openai_whisper(models):
    """Four minutes of people, where they are at hand, or two of the corpus' voices."""
    minutes, draw = 4 if SPEECH.is_dir() else 2, torch.Generator().manual_seed(0)
    chosen = [speech()[i % len(speech())] for i in (0, 1, -1, -2)]
    order = torch.randint(4, (3 * minutes,), generator=draw).tolist()
    audio = in_a_row([chosen[i] for i in order], [7 * i % 24 for i in range(len(order))])
    audio = audio[: 60 * minutes * SAMPLE_RATE]
    result = transcribe_both(models, audio, **GREEDY)
    assert len(audio) == 60 * minutes * SAMPLE_RATE and len(result["segments"]) > 2 * minutes
