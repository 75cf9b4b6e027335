"""Chapter 18: text while somebody speaks, its command, and its silence while nobody does."""

import signal
import sys
from inspect import signature
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import jiwer
import pytest
import soundfile
import soxr
import torch
from recordings import TOKENIZER, babble, recording, silence, wild_model

from utils import streaming
from utils.__main__ import main, run_live
from utils.audio import HOP_LENGTH, SAMPLE_RATE, load_audio
from utils.checkpoints import load_model
from utils.config import ModelArgs, default_device
from utils.data import clean_text, load_clips
from utils.decoding import DecodingResult
from utils.live import show_live, transcribe_live
from utils.model import Whisper
from utils.streaming import (
    CONTEXT,
    HISTORY,
    StreamingTranscriber,
    agreed_words,
    attended_words,
    replay,
)
from utils.tokenizer import Tokenizer
from utils.transcribe import DEFAULT_MODEL, speech_windows, transcribe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shipped():
    return load_model(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def spoken():
    """A sentence of a voice of the training data with silence around it, and its words."""
    rows = load_clips("corpus", "test_seen_voices")
    row = next(row for row in rows if len((clean_text(row["text"]) or "").split()) == 6)
    audio = load_audio(row["audio"]["bytes"])
    return torch.cat([silence(0.5), audio, silence(1)]), clean_text(row["text"])


def text_of(found):
    return " ".join("".join(text for _, text in found).split())


WHISPER = Tokenizer.whisper(multilingual=False)  # its models have windows of 30 s


def no_time():
    return 0.0


def words(text):
    return [(word, [ord(letter) for letter in word]) for word in text.split()]


def test_agreed_words_stop_at_the_first_difference():
    assert agreed_words(words("set the lamp"), words("set the land at")) == 2
    assert agreed_words(words("seven"), words("seventy")) == 0
    assert agreed_words(words("a b"), []) == agreed_words([], words("a b")) == 0


def test_attended_words_are_whole_and_in_order():
    three, sure = [("a", [1]), ("b", [2, 3]), ("c", [4])], [0.9] * 4
    assert [attended_words(three, [0, 1, k, 2], sure, 4) for k in (3, 4, 9)] == [3, 1, 1]
    assert attended_words(three, [4, 0, 0, 0], sure, 4) == attended_words([], [], [], 4) == 0


def test_an_improbable_token_holds_its_word_and_all_after_it():
    three, early = [("a", [1]), ("b", [2, 3]), ("c", [4])], [0, 1, 2, 3]
    for place, final in enumerate((0, 1, 1, 2)):
        shares = [0.8] * place + [0.6] + [0.9] * (3 - place)
        assert attended_words(three, early, shares, 9) == final
    assert attended_words(three, early, [0.8] * 4, 9) == 3


def test_attention_to_the_phrases_before_does_not_count(monkeypatch):
    table, logits = torch.zeros(4, 12), torch.zeros(4, 5)  # (tokens, states), (tokens, vocabulary)
    table[:, 2], table[:, 9] = 2, 1
    logits[1, 2] = 99  # the position before a token predicts it
    for name in ("cross_attention_weights", "choose_heads"):
        monkeypatch.setattr(streaming, name, lambda *_: (logits, None))
    monkeypatch.setattr(streaming, "alignment_matrix", lambda *_: table)
    asked = None, SimpleNamespace(prompt=[0]), None, [1], [2, 3], 12
    found = [streaming.attended_states(*asked, first) for first in (0, 5)]
    assert [states for states, _ in found] == [[2, 2], [9, 9]]
    assert [shares for _, shares in found] == [pytest.approx([1, 0.2])] * 2


def test_pauses_lose_nothing_against_offline_transcription(shipped):
    audio = recording(3, 5)
    offline = transcribe(shipped[0], audio, shipped[1])
    found = StreamingTranscriber(*shipped, "pause").feed(audio, end=True)
    assert [text.strip() for _, text in found] == [s["text"] for s in offline["segments"]]
    assert [start for start, _ in found] == [segment["start"] for segment in offline["segments"]]


@pytest.mark.parametrize("policy", ["pause", "agreement", "alignment"])
def test_a_sentence_in_chunks(policy, shipped, spoken):
    audio, text = spoken
    live, found = StreamingTranscriber(*shipped, policy), []
    for chunk in audio.split(SAMPLE_RATE // 4):
        found.append(live.feed(chunk))
    assert live.unsure == "" and live.feed(silence(0), end=True) == []  # the pause has ended it
    assert jiwer.wer(text, text_of(sum(found, []))) <= 0.34
    assert text_of(sum(found, [])) and "".join(t for _, t in sum(found, [])).endswith("\n")
    early = [piece for chunk in found for piece in chunk if not piece[1].endswith("\n")]
    assert bool(early) == (policy != "pause")
    assert all(0.2 < start < 1 for start, _ in sum(found, []))


def test_a_larger_margin_waits_longer_and_an_endless_one_for_the_pause(shipped, spoken):
    audio, _ = spoken
    late = []
    for policy, margin in (("alignment", 0.3), ("alignment", 0.7), ("alignment", 99), ("pause", 0)):
        live = StreamingTranscriber(*shipped, policy, margin=margin)
        final, busy = replay(live, audio, clock=no_time)
        assert busy == 0
        late.append(final)
    mean = [sum(second for _, second in final) / len(final) for final in late]
    assert mean[0] < mean[1] < mean[2] and late[2] == late[3]


def test_the_clock_counts_computing_and_chunks_that_wait():
    class Slow:
        """Takes 1 s for whatever it is fed."""

        fed = []

        def feed(self, samples, end=False):
            self.fed.append(len(samples) / SAMPLE_RATE)
            return [(0.0, f" {len(self.fed)}\n")]

    seconds = iter(range(100))
    final, busy = replay(Slow(), silence(3), chunk=0.5, clock=lambda: next(seconds))
    assert Slow.fed == [0.5, 1.0, 1.0, 0.5] and busy == 4
    assert final == [("1", 1.5), ("2", 2.5), ("3", 3.5), ("4", 4.5)]


def noises(seconds):
    """Silence, hiss, mains hum and clicks, so many seconds of each.

    Silence also as a sound card delivers it (the last of 16 bits flickers), and hum also without
    any hiss, once with harmonics up to 250 Hz, where the filter of the detection begins, and once
    with all of them.
    """
    time = torch.arange(seconds * SAMPLE_RATE) / SAMPLE_RATE
    hiss = 0.01 * torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    clicks = torch.zeros(len(time))
    for start in range(0, len(time), 2 * SAMPLE_RATE):
        clicks[start : start + 80] = 0.5
    low, high = (
        sum(0.1 / k * torch.sin(2 * torch.pi * 50 * k * time + k) for k in harmonics)
        for harmonics in ((1, 2, 3, 4, 5), range(1, 20))
    )
    recorded = (hiss * 50).round().clamp(-1, 1) / 2**15
    hums = [low, high, low + hiss / 10, high + hiss / 10]
    return [silence(seconds), recorded, hiss, *hums, clicks + hiss / 10]


def test_ten_minutes_without_speech_have_no_text_and_constant_memory(monkeypatch):
    """The model is not even asked."""
    monkeypatch.setattr(streaming, "decode_rest", lambda *_: pytest.fail("nobody speaks"))
    for noise in noises(75):
        live = StreamingTranscriber(wild_model(), TOKENIZER)
        for chunk in noise.split(3 * SAMPLE_RATE + 800):  # ends at any phase of a hum
            assert live.feed(chunk) == [] and len(live.audio) <= HISTORY + SAMPLE_RATE
        assert live.feed(silence(0), end=True) == [] and live.unsure == ""


@pytest.mark.parametrize("pitch", [150, 220, 250])
def test_a_steady_tone_is_no_phrase_wherever_it_is_cut(pitch):
    """Below 300 Hz it is filtered out; what rings at the ends of the filter is no speech."""
    tone = 0.1 * torch.sin(2 * torch.pi * pitch / SAMPLE_RATE * torch.arange(5 * SAMPLE_RATE))
    for end in (*range(8_000, 12_000, 333), *range(72_000, 76_000, 333)):
        assert speech_windows(tone[:end], len(tone)) == [], f"after {end} samples"


def test_clips_without_words_have_no_more_text_than_offline(shipped):
    """Silence, music and noises of the corpus."""
    rows = [row for row in load_clips("corpus", "test_seen_voices") if row["speaker"] == "none"]
    clips, (model, tokenizer) = [load_audio(row["audio"]["bytes"]) for row in rows], shipped
    live = [StreamingTranscriber(*shipped).feed(clip, end=True) for clip in clips]
    offline = [transcribe(model, clip, tokenizer)["text"] for clip in clips]
    assert len(clips) >= 5 and [text_of(found) for found in live] == offline


@pytest.mark.parametrize(
    ("policy", "frames", "chunk", "tokenizer"),
    [
        ("pause", 500, 4, TOKENIZER),
        ("agreement", 500, 4, TOKENIZER),
        ("agreement", 3000, 10, TOKENIZER),
        ("agreement", 3000, 10, WHISPER),
        ("alignment", 500, 4, TOKENIZER),
        ("alignment", 3000, 10, WHISPER),
    ],
)
def test_ten_minutes_of_speech_take_constant_memory(policy, frames, chunk, tokenizer, monkeypatch):
    """Sentences, then minutes without a pause: what is final is dropped, audio and tokens."""
    two = [(" a", [65]), (" b", [66])]
    monkeypatch.setattr(streaming, "decode_rest", lambda *_: (two, None))
    monkeypatch.setattr(streaming, "attended_states", lambda *_: ([0, 0], [0.9, 0.9]))
    monkeypatch.setattr(streaming, "window_mel", lambda *_: [None])
    monkeypatch.setattr(streaming, "word_timestamps", lambda *_: [SimpleNamespace(end=2.0)])
    model = SimpleNamespace(args=ModelArgs(max_t=frames, block_size=32), modules=list)
    live, sizes = StreamingTranscriber(model, tokenizer, policy), []
    sentence, chunk = torch.cat([babble(3), silence(1)]), chunk * SAMPLE_RATE
    for speech in (sentence.repeat(75), babble(60).repeat(5)):
        for samples in speech.split(chunk):
            live.feed(samples)
            held = len(live.tokens) + len(live.before) + len(live.past)
            sizes.append((len(live.audio), held))
    samples, tokens = torch.tensor(sizes).amax(dim=0)
    assert samples <= HISTORY + frames * HOP_LENGTH + chunk and tokens <= 32


@pytest.mark.parametrize("tokenizer", [WHISPER, TOKENIZER])
def test_a_window_of_30_seconds_keeps_the_phrases_before(tokenizer, monkeypatch):
    """With their text as prefix, as long as all of it is at most 25 s; other windows are short."""
    asked, said = [], [(" a", [65]), (" b", [66])]

    def decode_rest(model, tokenizer, window, prefix, most, over):
        asked.append((len(window) / SAMPLE_RATE, list(prefix), over))
        return said, None

    monkeypatch.setattr(streaming, "decode_rest", decode_rest)
    model = SimpleNamespace(args=ModelArgs(max_t=3000, block_size=448), modules=list)
    live = StreamingTranscriber(model, tokenizer, "pause")
    for samples in torch.cat([babble(3), silence(1)]).repeat(12).split(SAMPLE_RATE):
        live.feed(samples)
    last = [(seconds, len(prefix)) for seconds, prefix, over in asked if over]
    expected = [(3, 0)] * 12  # seconds and final tokens: each phrase alone
    if tokenizer is WHISPER:
        expected = [(3 + 4 * min(i, 5), 2 * min(i, 5)) for i in range(12)]
    assert len(last) == 12 and len(live.audio) <= HISTORY + CONTEXT + SAMPLE_RATE
    for (seconds, tokens), (longest, final) in zip(last, expected, strict=True):
        assert seconds == pytest.approx(longest, abs=0.3) and tokens == final


def test_a_loop_stops():
    """Random weights write without end; Whisper's would then fill its 224 tokens."""
    args = ModelArgs(
        max_t=3000, block_size=448, tgt_vocab_size=WHISPER.vocab_size, embeddings_dims=32,
        no_of_heads=2, no_of_decoder_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    live = StreamingTranscriber(Whisper(args), WHISPER, "pause")
    for seconds in (1, 3):
        live.feed(babble(seconds), end=True)
        assert 5 < len(live.past[-1][1]) <= 7 * (seconds + 1)


@pytest.mark.parametrize("policy", ["pause", "alignment"])
def test_speech_without_a_pause_is_cut(policy):
    """Memory stays constant, and a phrase of more tokens than the context ends."""
    live, found, longest = StreamingTranscriber(wild_model(), TOKENIZER, policy), [], 0
    for chunk in babble(40).split(SAMPLE_RATE):
        found += live.feed(chunk)
        longest = max(longest, len(live.audio))
    assert sum(text.endswith("\n") for _, text in found) >= 6
    assert longest <= HISTORY + 2 * SAMPLE_RATE


def test_a_phrase_that_is_cut_ends_its_line(monkeypatch):
    """Else its last word and the next one would stand side by side without a space."""
    monkeypatch.setattr(streaming, "CONFIDENCE", 0.0)  # random weights are never sure
    live, cuts = StreamingTranscriber(wild_model(), TOKENIZER, "alignment", margin=0.9), []
    find = streaming.word_timestamps  # where the last final word ends
    monkeypatch.setattr(streaming, "word_timestamps", lambda *a: cuts.append(a) or find(*a))
    for chunk in babble(40).split(SAMPLE_RATE):
        before, found = len(cuts), live.feed(chunk)
        assert ("\n" in [text for _, text in found]) >= (len(cuts) > before)
    assert cuts


def test_a_word_that_goes_on_is_one_word():
    """`nine` was final, then `teen` without a space: one word, final at the second pass."""
    passes = iter([[(0.0, "set nine")], [(0.0, "teen\n")], [(2.0, "go")], [(2.0, " on\n")]])
    live = SimpleNamespace(feed=lambda samples, end: next(passes))
    words, _ = replay(live, torch.zeros(4 * SAMPLE_RATE), 1.0, clock=lambda: 0.0)
    assert words == [("set", 1.0), ("nineteen", 2.0), ("go", 3.0), ("on", 4.0)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(policy="guess"), "`policy` must be pause, agreement or alignment, got 'guess'."),
        (dict(pause=0), "`pause` must be above 0 and at most 0.5 s"),
        (dict(margin=-1), "`margin` 0 s or more, got 0.5 and -1."),
        (dict(margin=float("nan")), "got 0.5 and nan."),
    ],
)
def test_impossible_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        StreamingTranscriber(wild_model(), TOKENIZER, **options)


def test_samples_are_what_audio_libraries_give(shipped, spoken):
    """As for `transcribe`; what is no sound would silence the ten seconds after it."""
    audio, _ = spoken
    expected = StreamingTranscriber(*shipped).feed(audio, end=True)
    assert StreamingTranscriber(*shipped).feed(audio.numpy(), end=True) == expected != []
    for wrong, sentence in (
        (torch.full((100,), torch.nan), "not finite"),
        (audio.repeat(2, 1), "must be a float array or tensor"),
        ((32767 * audio).short(), "divide whole numbers by their largest"),
    ):
        live = StreamingTranscriber(*shipped)
        with pytest.raises(ValueError, match=sentence):
            live.feed(wrong)
        assert live.feed(audio, end=True) == expected


# The command


def fake_microphone(audio, monkeypatch, rate=48_000, stops=False):
    """sounddevice, whose stream delivers a recording; then Ctrl-C is pressed, or it stops."""
    module = ModuleType("sounddevice")
    module.query_devices = lambda kind: {"default_samplerate": float(rate)}
    samples = torch.from_numpy(soxr.resample(audio.numpy(), SAMPLE_RATE, rate))

    class InputStream:
        def __init__(self, opened, step, channels, callback):
            assert (opened, channels) == (rate, 1)
            self.step, self.callback = step, callback

        def __enter__(self):
            for chunk in samples.split(self.step):
                self.callback(chunk[:, None].numpy(), len(chunk), None, None)
            if not stops:
                signal.raise_signal(signal.SIGINT)

        def __exit__(self, *_):
            pass

    module.InputStream = InputStream
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return module


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_the_microphone_until_ctrl_c(rate, spoken, monkeypatch, capsys):
    """Most have one rate alone, and refuse 16 kHz."""
    audio, text = spoken
    fake_microphone(audio[: -SAMPLE_RATE // 2], monkeypatch, rate)  # the pause is not over
    with pytest.raises(SystemExit, match="130"):
        main(["live", "--times"])
    out, err = capsys.readouterr()
    assert out.startswith("[0.") and out.endswith("\n") and err == ""
    assert jiwer.wer(text, out.partition("]")[2]) <= 0.34


def test_a_microphone_that_stops_ends_it_with_all_that_was_said(spoken, monkeypatch, capsys):
    """Pulled out, or taken away by the system: no more chunks, and no error."""
    audio, text = spoken
    waited = []

    class Queue(SimpleQueue):
        def get(self, timeout=None):
            waited.append(timeout)
            return super().get(timeout=0.01)

    fake_microphone(audio[: -SAMPLE_RATE // 2], monkeypatch, stops=True)
    monkeypatch.setattr("utils.live.SimpleQueue", Queue)
    with pytest.raises(SystemExit, match="2"):
        main(["live"])
    out, err = capsys.readouterr()
    assert jiwer.wer(text, out) <= 0.34 and waited[-1] < 10
    assert err == "the microphone has stopped: connect it, and begin again.\n"


@pytest.mark.parametrize("kind", ["none", "refused"])
def test_a_microphone_that_cannot_be_used(kind, monkeypatch, capsys):
    module = fake_microphone(silence(1), monkeypatch)
    name = {"none": "query_devices", "refused": "InputStream"}[kind]
    setattr(module, name, Mock(side_effect=RuntimeError("Error querying device -1")))
    assert main_fails(capsys, "live") == (
        "the microphone cannot be used (RuntimeError: Error querying device -1): "
        "connect it, and begin again.\n"
    )


def main_fails(capsys, *words):
    """What a command that is refused prints."""
    with pytest.raises(SystemExit, match="2"):
        main([*words])
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "problem", [ImportError("No module"), OSError("PortAudio library not found")]
)
def test_without_sounddevice_one_sentence_says_what_to_do(problem, monkeypatch, capsys):
    monkeypatch.setattr("utils.live.import_module", Mock(side_effect=problem))
    assert main_fails(capsys, "live") == (
        f"the microphone needs sounddevice ({type(problem).__name__}: {problem}): "
        "`pip install sounddevice`, and on Linux `sudo apt install libportaudio2`.\n"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_a_recording_as_if_it_were_live(terminal, spoken, tmp_path, monkeypatch, capsys):
    audio, text = spoken
    soundfile.write(tmp_path / "spoken.wav", audio.numpy(), SAMPLE_RATE)
    waits = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=lambda: sum(waits))
    monkeypatch.setattr("utils.live.time", clock)  # a recording plays at once
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    main(["live", "--as-if-live", str(tmp_path / "spoken.wav")])
    out = capsys.readouterr().out
    assert sum(waits) == pytest.approx(len(audio) / SAMPLE_RATE, abs=0.01)
    assert ("\033[2m" in out) == terminal
    if not terminal:
        assert jiwer.wer(text, out) <= 0.34 and out.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("live --chunk 0", "`chunk` must be 0.01 to 30 seconds, got 0."),
        ("live --as-if-live no.wav", "no.wav"),
        ("live --as-if-live .", "folder"),
    ],
)
def test_what_cannot_be_played_is_refused(line, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    assert sentence in capsys.readouterr().err


# Which value reaches which function


@pytest.fixture
def two_words(monkeypatch):
    """Every pass finds the same two words, which end after 2 s; nothing is computed."""
    said = [(" a", [65]), (" b", [66])]
    monkeypatch.setattr(streaming, "decode_rest", lambda *_: (said, None))
    monkeypatch.setattr(streaming, "window_mel", lambda *_: [None])
    monkeypatch.setattr(streaming, "word_timestamps", lambda *_: [SimpleNamespace(end=2.0)])
    return SimpleNamespace(args=ModelArgs(max_t=500, block_size=32), modules=list)


def test_phrases_begin_where_they_do_after_the_past_has_been_dropped(two_words):
    live, starts = StreamingTranscriber(two_words, TOKENIZER, "pause"), []
    for samples in torch.cat([babble(3), silence(1)]).repeat(12).split(SAMPLE_RATE):
        starts += [second for second, _ in live.feed(samples)]
    assert starts == pytest.approx([4 * i for i in range(12)], abs=0.3)
    assert live.dropped > 20 * SAMPLE_RATE


def test_lines_of_endless_speech_have_rising_seconds(two_words):
    live, starts = StreamingTranscriber(two_words, TOKENIZER, "agreement"), []
    for fed, samples in enumerate(babble(60).split(SAMPLE_RATE), start=1):
        for second, text in live.feed(samples):
            starts.append(second)
            assert text.strip() or text == "\n" and fed - 6 <= second <= fed
    assert starts == sorted(starts) and starts[-1] > 50


@pytest.mark.parametrize(("pause", "over"), [(0.2, True), (0.5, False)])
def test_the_pause_that_is_asked_for_ends_a_phrase(pause, over, two_words):
    live = StreamingTranscriber(two_words, TOKENIZER, "pause", pause)
    found = live.feed(torch.cat([babble(2), silence(0.4)]))
    assert [text for _, text in found] == [" a b\n"] * over


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Tokenizer.whisper(language="de")])
def test_how_a_phrase_is_decoded(tokenizer, monkeypatch):
    """Rescored as a whole alone; a blank may come first where more is to be said.

    Whisper's own models have five beams at the end of a phrase.
    """
    asked, official = [], tokenizer is not TOKENIZER
    result = DecodingResult(torch.zeros(1, 1), "de", avg_logprob=-0.1, no_speech_prob=0.0)

    def decode(model, mel, tokenizer, **options):
        asked.append(options)
        return [result]

    monkeypatch.setattr(streaming, "decode", decode)
    monkeypatch.setattr(streaming, "ctc_rescoring", lambda model: {"beam_size": 8})
    model = Whisper(ModelArgs(max_t=3000 if official else 500, embeddings_dims=32, no_of_heads=2))
    for prefix, over in ([], False), ([], True), ([7], False), ([7], True):
        streaming.decode_rest(model, tokenizer, babble(1), prefix, 9, over)
    beams = [None, 8, None, 5 if official else None]
    assert [options["beam_size"] for options in asked] == beams
    assert [options["prefix"] for options in asked] == [[], [], [7], [7]]
    assert [o["suppress_blank"] for o in asked] == [official, True, False, False]
    assert {o.get("language") for o in asked} == {"de" if official else None}
    assert {o["sample_len"] for o in asked} == {9 if official else None}


def test_the_margin_is_a_time(monkeypatch):
    """A token that attends to the audio 1 s before its end is final for margins below 1 s."""
    monkeypatch.setattr(streaming, "attended_states", lambda *_: ([0, 75], [0.9, 0.9]))  # of 100
    words = [(" a", [65]), (" b", [66])]
    model = SimpleNamespace(args=ModelArgs(max_t=500, stride=4), modules=list)
    for margin, final in ((0.9, 2), (1.1, 1), (4.1, 0)):
        live = StreamingTranscriber(model, TOKENIZER, "alignment", margin=margin)
        assert streaming.count_final(live, words, None, [], 0, 4 * SAMPLE_RATE) == final


def test_the_command_passes_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr("utils.live.load_audio", lambda path: path)
    monkeypatch.setattr("utils.live.played", lambda audio, step: (audio, step))
    monkeypatch.setattr("utils.live.show_live", lambda live, chunks, times: seen.append(
        (*chunks, times)
    ))  # fmt: skip
    monkeypatch.setattr(
        "utils.live.load_model", lambda *given: seen.append(given) or (None, TOKENIZER)
    )
    monkeypatch.setattr(
        "utils.live.StreamingTranscriber", lambda *given, **options: seen.append(options)
    )
    line = "live --as-if-live a.wav --model tiny.en --device cuda:1"
    main([*line.split(), *"--policy agreement --pause 0.3 --margin 1.5 --times".split()])
    options = {"policy": "agreement", "pause": 0.3, "margin": 1.5}
    assert seen == [("tiny.en", "cuda:1"), options, ("a.wav", SAMPLE_RATE // 2, True)]
    main(["live", "--as-if-live", "a.wav"])
    assert seen[3:] == [
        (DEFAULT_MODEL, default_device()), {}, ("a.wav", SAMPLE_RATE // 2, False),
    ]  # fmt: skip
    main(["live", "--as-if-live", "a.wav", "--chunk", "2"])
    assert seen[-1] == ("a.wav", 2 * SAMPLE_RATE, False)


@pytest.mark.parametrize(
    ("tokenizer", "words", "language"),
    [
        (Tokenizer.whisper(), "", "en"),
        (Tokenizer.whisper(), "--language German", "de"),
        (Tokenizer.whisper(language="es"), "", "es"),  # a model that was trained for it
        (Tokenizer.whisper(language="es"), "--language en", "en"),
        (WHISPER, "--language de", None),
        (TOKENIZER, "--language de", None),
    ],
)
def test_the_language_that_is_spoken(tokenizer, words, language, monkeypatch, capsys):
    """It is not detected: a phrase of a second is too short for that."""
    lives = []
    monkeypatch.setattr("utils.live.load_audio", lambda path: silence(1))
    monkeypatch.setattr("utils.live.load_model", lambda *_: (wild_model(), tokenizer))
    monkeypatch.setattr("utils.live.show_live", lambda live, *_: lives.append(live))
    line = ["live", "--as-if-live", "a.wav", *words.split()]
    if language is None:
        assert "must be en and transcribe for this model, got 'de'" in main_fails(capsys, *line)
        return
    main(line)
    assert lives[0].tokenizer.prompt == Tokenizer.whisper(language=language).prompt


def test_the_help_states_the_defaults():
    given = {**signature(StreamingTranscriber).parameters, **signature(transcribe_live).parameters}
    for name in ("policy", "pause", "margin", "chunk"):
        [line] = [line for line in run_live.__doc__.splitlines() if f"--{name} " in line]
        assert line.endswith(f" ({given[name].default})"), line


def test_unsure_text_stays_in_the_line_of_the_terminal(monkeypatch, capsys):
    """The terminal cuts it, at wide letters too; the cursor could not go back to another line."""
    live = SimpleNamespace(
        feed=lambda *_, **end: [] if end else [(0.0, "seven ")], unsure="東" * 99
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show_live(live, [None], times=False)
    save, no_wrap, dim, plain, wrap, back = "\0337 \033[?7l \033[2m \033[0m \033[?7h \0338".split()
    shown = f"\033[K{save}{no_wrap}{dim}{live.unsure}{plain}{wrap}{back}"
    assert capsys.readouterr().out == "\033[Kseven " + 2 * shown
