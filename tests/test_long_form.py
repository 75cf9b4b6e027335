"""The long form equals openai-whisper's `transcribe`, rule by rule and on whole recordings."""

import random
from functools import cache, partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
import whisper
from recordings import TONE, TWO, official, recording
from references import random_tiny

from utils.alignment import WordTiming, split_to_word_tokens
from utils.audio import SAMPLE_RATE, log_mel_spectrogram
from utils.decoding import DecodingResult
from utils.long_form import (
    LongFormOptions,
    Transcript,
    is_silence,
    needs_fallback,
    padded_log_mel,
    snap_segment_edges,
    split_at_timestamps,
    transcribe_long_form,
    truncate_after_pause,
)
from utils.tokenizer import Tokenizer
from utils.transcribe import transcribe

MODELS = {name: official(*name) for name in [(False, 0), (True, 1), (True, 3)]}

as_openai = partial(transcribe, clamp_times=False)  # the one option that is not openai-whisper's
KEYS = ("id", "seek", "start", "end", "text", "tokens", "temperature")


def check_same(ours, theirs):
    """The same segments and text; numbers to rounding."""
    assert (ours["text"], ours["language"]) == (theirs["text"], theirs["language"])
    for mine, right in zip(ours["segments"], theirs["segments"], strict=True):
        assert [mine[key] for key in KEYS] == [right[key] for key in KEYS]
        for key in ("avg_logprob", "compression_ratio", "no_speech_prob"):
            assert mine[key] == pytest.approx(right[key], rel=1e-3, abs=1e-5)


CASES = [((False, 0), 7, {}), ((True, 1), 7, {}), ((True, 3), 7, {}), ((False, 0), 1, {})]
CASES += [((True, 3), 60, {"sample_len": 6}), ((False, 0), 25, {}), ((True, 1), 16, {})]
CASES += [((True, 3), clips, {}) for clips in (9, 10, 11, 12, 13, 14)]
CASES += [((False, 0), 230, {"sample_len": 8}), ((True, 3), 230, {"sample_len": 8})]  # 10 min
CASES += [
    ((False, 0), 8, {"condition_on_previous_text": False}),
    ((True, 3), 8, {"condition_on_previous_text": False, "language": "de"}),
    ((True, 1), 8, {"language": "ja", "task": "translate"}),
    ((True, 3), 8, {"initial_prompt": "Digits and names, said slowly: "}),
    ((False, 0), 8, {"initial_prompt": "one two", "suppress_tokens": ""}),
    ((True, 1), 8, {"initial_prompt": ""}),
    ((True, 1), 8, {"beam_size": 2, "sample_len": 6}),
    ((True, 3), 8, {"without_timestamps": True}),
    ((False, 0), 9, {"no_speech_threshold": 1e-5, "logprob_threshold": -2.7}),
    ((True, 3), 9, {"no_speech_threshold": 1e-9, "logprob_threshold": None}),
    ((True, 1), 9, {"no_speech_threshold": None, "compression_ratio_threshold": None}),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_long_recordings_equal_openai_whisper(case):
    name, clips, options = CASES[case]
    theirs, ours = MODELS[name]
    audio, options = recording(case, clips), {"temperature": 0.0, "sample_len": 14, **options}
    check_same(as_openai(ours, audio, **options), theirs.transcribe(audio, fp16=False, **options))


@pytest.fixture(scope="module")
def tiny_en():
    return random_tiny(51864)


REAL = [(1, {}), (4, {}), (10, {}), (5, {"without_timestamps": True}), (7, {"sample_len": 20})]
REAL += [(4, {"beam_size": 2, "patience": 2.0, "length_penalty": 0.5})]
REAL += [(40, {"sample_len": 6, "condition_on_previous_text": False})]


def test_the_real_shape_equals_openai_whisper(tiny_en, one_thread):
    theirs, ours = tiny_en
    heard, ways, seconds = [], set(), []
    for case, (clips, options) in enumerate(REAL):
        audio, options = recording(case, clips), {"temperature": 0.0, "sample_len": 9, **options}
        result = as_openai(ours, audio, **options)
        check_same(result, theirs.transcribe(audio, fp16=False, **options))
        seeks = sorted({segment["seek"] for segment in result["segments"]})
        ways |= {b - a == 3000 for a, b in zip(seeks[:-1], seeks[1:], strict=True)}
        heard.append(result)
        seconds.append(len(audio) / SAMPLE_RATE)
    assert max(seconds) > 90  # ten minutes, and more options: the small models above
    texts = [result["text"] for result in heard]
    assert len(set(texts)) == len(texts), "the texts hardly vary: the comparison is too weak"
    lengths = {len(s["tokens"]) for result in heard for s in result["segments"]}
    assert len(lengths) > 3 and ways == {True, False}, "no times, or no windows that go on by them"


def said(result):
    """What a result says of its words; of segments that were emptied only that they are there."""
    return [
        (s["seek"], s["text"], (s["start"], s["end"]) if s["words"] else None)
        + tuple((word["word"], word["start"], word["end"]) for word in s["words"])
        for s in result["segments"]
    ]


@pytest.mark.parametrize("silence", [None, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_word_times_of_long_recordings_equal_openai_whisper(name, silence):
    (theirs, ours), audio = MODELS[name], recording(6, 20)
    options = dict(temperature=0.0, sample_len=14, word_timestamps=True, no_speech_threshold=None)
    options |= dict(language="en", hallucination_silence_threshold=silence)
    mine = as_openai(ours, audio, **options)
    right = theirs.transcribe(audio, fp16=False, **options)
    assert said(mine) == said(right) and mine["text"] == right["text"]
    found, wanted = ([w for s in r["segments"] for w in s["words"]] for r in (mine, right))
    assert len(found) > 3, "too weak"
    for word, other in zip(found, wanted, strict=True):
        assert word["probability"] == pytest.approx(other["probability"], abs=1e-4)


ENGLISH = Tokenizer.whisper(multilingual=False)
HUM = TONE.repeat(14)[: 80 * SAMPLE_RATE]
TEXTS = " yes| no.| (well),| 7| thank| you.| is| it?|.|!| über".split("|")


class Script:
    """Decoders and aligners that say the same in both libraries, call by call, at random."""

    def __init__(self, seed):
        self.seed, self.calls, self.prompts = seed, 0, []

    def draw(self):
        self.calls += 1
        return random.Random(f"{self.seed} {self.calls}")

    def written(self):
        """Tokens of a window, and numbers: words, and times in pairs, singly, or none."""
        chance, begin, tokens = self.draw(), ENGLISH.special["<|0.00|>"], []
        times = sorted(chance.sample(range(0, 1501, 10), 6))
        for i in range(chance.randint(0, 3)):
            words = [chance.choice(TEXTS) for _ in range(chance.randint(0, 5))]
            tokens += [begin + times[2 * i], *ENGLISH.encode("".join(words))]
            tokens += [begin + times[2 * i + 1]]
        tokens = tokens[: len(tokens) - chance.randint(0, 1)]
        nobody, sure = chance.choice([0.1, 0.1, 0.9]), chance.choice([-0.5, -0.5, -1.5])
        return dict(tokens=tokens, avg_logprob=sure, no_speech_prob=nobody, temperature=0.0)

    def aligned(self, tokens, frames):
        """[(word, tokens, start, end, probability)] within so many frames of 10 ms."""
        chance, now, rows = self.draw(), 0, []
        strange = chance.random() < 0.5
        for word, part in split_to_word_tokens(tokens, ENGLISH):
            long = chance.choice([0, 1, 1, 2, 120] if strange else [10, 20, 30, 80])
            stop = min(now + long + chance.choice([0, 0, 0, 40]), frames // 2)
            sure = chance.random() * (0.2 if strange else 1)
            rows.append((word, part, now * 2 / 100, stop * 2 / 100, sure))
            now = stop
        return rows


@pytest.mark.parametrize("first", range(0, 150, 30))
def test_rules_for_words_equal_openai_whisper_whatever_was_decoded(first, monkeypatch):
    module = import_module("whisper.transcribe")
    monkeypatch.setattr(module, "log_mel_spectrogram", cache(module.log_mel_spectrogram))
    for seed in range(first, first + 30):
        check_rules_for_words(seed, monkeypatch)


def check_rules_for_words(seed, monkeypatch):
    chance, (theirs, ours) = random.Random(seed), MODELS[False, 0]
    options = dict(temperature=0.0, word_timestamps=True, logprob_threshold=-1.0)
    options["hallucination_silence_threshold"] = chance.choice([None, 0.0, 0.5, 2.0, 8.0])
    options["clip_timestamps"] = chance.choice(["0", "0", "", "3.5", "1,20,31,75.5", [5, 80]])
    options["condition_on_previous_text"] = chance.random() < 0.7
    options["initial_prompt"] = chance.choice([None, "Ada, Zoë", "", "  "])
    options["carry_initial_prompt"] = chance.random() < 0.5
    mine, other = Script(seed), Script(seed)

    def our_decode(model, states, asked, tokenizer):
        mine.prompts.append(asked.prompt)
        return DecodingResult(None, "en", compression_ratio=1.0, **mine.written())

    def their_decode(mel, asked):
        other.prompts.append(asked.prompt)
        result = whisper.DecodingResult(None, "en", compression_ratio=1.0, **other.written())
        return result

    monkeypatch.setattr("utils.long_form.encode_audio", lambda model, mel: mel)
    monkeypatch.setattr("utils.long_form.decode", our_decode)
    monkeypatch.setattr(
        "utils.long_form.find_alignment",
        lambda model, states, tokens, tokenizer, frames: [
            WordTiming(*row) for row in mine.aligned(tokens, frames)
        ],
    )
    monkeypatch.setattr(theirs, "decode", their_decode)
    monkeypatch.setattr(
        whisper.timing,
        "find_alignment",
        lambda model, tokenizer, tokens, mel, frames: [
            whisper.timing.WordTiming(*row) for row in other.aligned(tokens, frames)
        ],
    )
    found = as_openai(ours, HUM, **options)
    wanted = theirs.transcribe(HUM, fp16=False, **options)
    assert found == wanted and mine.prompts == other.prompts, f"seed {seed}"


def test_the_cases_reach_every_way_on():
    ends = set()
    for case in (0, 2, 5, 6):
        name, clips, _ = CASES[case]
        audio = recording(case, clips)
        result = transcribe(MODELS[name][1], audio, temperature=0.0, sample_len=14)
        seeks = sorted({segment["seek"] for segment in result["segments"]})
        ends |= {(b - a) == 3000 for a, b in zip(seeks[:-1], seeks[1:], strict=True)}
    assert ends == {True, False}, "no window went on by a timestamp, or all did"


def tokens_of(text):
    return [1000 + int(word[1:]) if word[0] == "<" else int(word) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "segments", "on"),
    [
        ("", [(0, 30)], 30),
        ("7 8", [(0, 30)], 30),
        ("<0 7 8", [(0, 30)], 30),
        ("<5 7 8 <50", [(0, 1)], 30),
        ("<0 7 <50 <60 8", [(0, 1)], 1),
        ("<0 7 <50 <60 8 <100", [(0, 1), (1.2, 2)], 30),
        ("<0 7 <50 <60 8 <100 <100", [(0, 1), (1.2, 2)], 2),
        ("<0 7 <50 <50 <60 8", [(0, 1), (1, 1)], 1),
    ],
)
def test_windows_are_cut_at_pairs_of_times(text, segments, on):
    found, further = split_at_timestamps(tokens_of(text), 1000, 30)
    assert [(round(start, 2), round(end, 2)) for start, end, _ in found] == segments
    assert further == pytest.approx(on)
    kept = [token for _, _, tokens in found for token in tokens]
    assert kept == tokens_of(text)[: len(kept)]


def words_after_a_pause():
    """Nobody speaks for two seconds, then three words; alignment gave the silence to the first."""
    edges = {" turn": (0.0, 2.4), " it": (2.4, 2.7), " off": (2.7, 3.0)}
    words = [{"word": word, "start": a, "end": b} for word, (a, b) in edges.items()]
    return {"start": 2.1, "end": 3.0, "words": words}


def test_rules_for_the_first_word_after_a_pause():
    by_pause, by_edge = words_after_a_pause(), words_after_a_pause()
    truncate_after_pause(by_pause["words"], typical=0.3, last_speech=-5.0)
    assert by_pause["words"][0]["start"] == pytest.approx(1.8)
    snap_segment_edges(by_edge, typical=0.3)
    assert by_edge["words"][0]["start"] == 2.1 and by_edge["start"] == 2.1


@pytest.mark.parametrize(
    ("ratio", "logprob", "nobody", "failed", "silent"),
    [
        (1.0, -0.5, 0.1, False, False),
        (2.5, -0.5, 0.1, True, False),
        (1.0, -1.5, 0.1, True, False),
        (1.0, -1.5, 0.9, False, True),
        (2.5, -1.5, 0.9, False, True),
        (2.5, -0.5, 0.9, True, False),
    ],
)
def test_what_is_tried_again_and_what_is_silence(ratio, logprob, nobody, failed, silent):
    numbers = dict(compression_ratio=ratio, avg_logprob=logprob, no_speech_prob=nobody)
    result = DecodingResult(None, "en", **numbers)
    assert (needs_fallback(result, LongFormOptions()), is_silence(result, LongFormOptions())) == (
        failed,
        silent,
    )
    off = LongFormOptions(
        compression_ratio_threshold=None, logprob_threshold=None, no_speech_threshold=None
    )
    assert not needs_fallback(result, off) and not is_silence(result, off)


def test_a_failure_is_tried_at_every_temperature():
    _, ours = MODELS[True, 1]
    options = dict(sample_len=4, logprob_threshold=-0.001, no_speech_threshold=None)
    result = transcribe(ours, recording(0, 2), temperature=(0.0, 0.7), language="en", **options)
    assert {segment["temperature"] for segment in result["segments"]} == {0.7}
    again = transcribe(ours, recording(0, 2), temperature=0.0, language="en", **options)
    assert {segment["temperature"] for segment in again["segments"]} == {0.0}


def test_what_a_failure_alone_would_use_is_checked_before_any_work(monkeypatch):
    """Samples are drawn above temperature 0 alone: perhaps never, perhaps after an hour."""
    monkeypatch.setattr("utils.long_form.encode_audio", None)
    for options in (dict(best_of=0), dict(best_of="5"), dict(temperature=(0.5, 0.0), patience=2.0)):
        with pytest.raises(ValueError, match="`best_of` must be a whole|`patience` multiplies"):
            transcribe(MODELS[False, 0][1], TWO, **options)


ODD = {
    "temperature": [(), [], "hot", None, -0.1, float("nan"), (0.0, "hot"), [0.2, None], ((),)],
    "initial_prompt": [["Ada"], 5, b"Ada"],
    "compression_ratio_threshold": ["2.4", [2.4]],
    "logprob_threshold": ["low"],
    "no_speech_threshold": [(0.6,)],
    "hallucination_silence_threshold": ["long", [2.0], float("nan")],
    "clip_timestamps": [5, None],
    "condition_on_previous_text": ["False", None, 2],
    "carry_initial_prompt": ["no"],
    "word_timestamps": ["False", None],
    "clamp_times": [0.5],
    "without_timestamps": ["False", 2],
    "suppress_tokens": [5, 0, 2.5, {5}],
    "prefix": [7],
    "length_penalty": ["short"],
    "sample_len": ["x"],
    "beam_size": ["x"],
}


@pytest.mark.parametrize("name", ODD)
def test_options_of_the_wrong_kind_are_refused(name):
    for value in ODD[name]:
        with pytest.raises(ValueError, match=f"`{name}` must be .*, got .*[.]$") as caught:
            options = {"temperature": 0.0, "word_timestamps": True, name: value}
            transcribe(MODELS[False, 0][1], TWO, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("samples", [1, 159, 160, 1600, 480_000, 480_001])
def test_official_models_take_any_length(samples):
    theirs, ours = MODELS[True, 1]
    audio, options = recording(5, 15)[:samples], dict(temperature=0.0, sample_len=5)
    check_same(as_openai(ours, audio, **options), theirs.transcribe(audio, fp16=False, **options))


@pytest.mark.parametrize("times", ["3,1", "-1", "nan", "inf", "a,b", [None], "1e999", [5, 2]])
def test_clips_that_do_not_rise_are_refused(times):
    with pytest.raises(ValueError, match="`clip_timestamps` must be rising seconds"):
        transcribe(MODELS[False, 0][1], TWO, clip_timestamps=times)


@pytest.mark.parametrize("times", ["7,9", [0, 2, 100, 200], "6.31"])
def test_clips_behind_the_recording_are_refused(times):
    (_, ours), asked = MODELS[False, 0], dict(temperature=0.0, sample_len=4)
    with pytest.raises(ValueError, match="`clip_timestamps` must be .* 6.3 s of audio, got"):
        transcribe(ours, TWO, clip_timestamps=times, **asked)
    transcribe(ours, TWO, clip_timestamps="6.2,100", **asked)


@pytest.mark.parametrize("options", [{}, {"word_timestamps": False}, {"word_timestamps": True}])
def test_a_silence_that_no_words_can_tell_is_refused(options):
    silence = -1.0 if options.get("word_timestamps") else 2.0
    with pytest.raises(ValueError, match="`hallucination_silence_threshold` must be"):
        transcribe(MODELS[False, 0][1], TWO, hallucination_silence_threshold=silence, **options)


@pytest.mark.parametrize("samples", [1, 100, 7999, 8000, 8161, 40_050, 48_000])
def test_log_mel_in_blocks_is_that_of_the_whole(samples, monkeypatch):
    args, audio = MODELS[False, 0][1].args, recording(1, 3)[:samples]
    whole = log_mel_spectrogram(F.pad(audio, (0, 480_000)), args.log_mel_features)
    for block in (50, 1499, 6000):
        monkeypatch.setattr("utils.long_form.BLOCK", block)
        torch.testing.assert_close(padded_log_mel(audio, args), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("words", "kept"), [(2, 2), (5, 5), (6, 5), (40, 5)])
def test_a_carried_prompt_that_is_too_long_keeps_its_end(words, kept):
    """In openai-whisper, the text that follows pushes it out."""
    tokenizer = Tokenizer.whisper(multilingual=False)
    options = LongFormOptions(initial_prompt=" Ada" * words, carry_initial_prompt=True)
    transcript = Transcript(tokenizer, options, capacity=5)
    ada, one = tokenizer.encode(" Ada"), tokenizer.encode(" one")
    assert transcript.prompt() == ada * kept
    for _ in range(4):
        transcript.add([{"start": 0.0, "end": 1.0, "text": " one", "tokens": one}], 0.0)
    assert transcript.prompt() == ada * kept + one * min(4, 5 - kept)
    assert transcript.text() == " one" * 4


def one_segment(tokenizer, start, end):
    """A decoder that finds one word from `start` to `end`, in states of 20 ms."""
    begin = tokenizer.special["<|0.00|>"]
    tokens = [begin + start, *tokenizer.encode(" one"), begin + end, begin + end]
    numbers = dict(avg_logprob=-0.1, no_speech_prob=0.0, compression_ratio=1.0, temperature=0.0)
    return lambda model, states, *_: DecodingResult(states, "en", tokens=tokens, **numbers)


@pytest.mark.parametrize("words", [False, True])
def test_the_last_segment_ends_within_the_recording(words, monkeypatch):
    (_, ours), tokenizer = MODELS[False, 0], Tokenizer.whisper(multilingual=False)
    audio, options = TWO[: 5 * SAMPLE_RATE], {"word_timestamps": words}
    for start, end in ((0, 1500), (300, 400), (0, 100)):
        monkeypatch.setattr("utils.long_form.decode", one_segment(tokenizer, start, end))
        free, result = as_openai(ours, audio, **options), transcribe(ours, audio, **options)
        assert result["text"] == free["text"] and "one" in result["text"]
        for segment, other in zip(result["segments"], free["segments"], strict=True):
            both = ([span, *span.get("words", [])] for span in (segment, other))
            for mine, right in zip(*both, strict=True):
                assert mine["start"] == min(5.0, right["start"])
                assert mine["end"] == min(5.0, right["end"])
    assert words or free["segments"][-1]["end"] > 5


def test_segments_are_reported_as_they_come():
    (_, ours), heard = MODELS[True, 1], []
    asked = dict(temperature=0.0, sample_len=14, language="de")
    result = transcribe(ours, recording(3, 20), on_segment=lambda *new: heard.append(new), **asked)
    assert [segment for segment, _ in heard] == result["segments"] and len(heard) > 1
    assert {language for _, language in heard} == {"de"}
    assert result == transcribe(ours, recording(3, 20), **asked)


def test_who_is_told_of_a_segment_may_take_it_apart():
    (_, ours), asked = MODELS[False, 0], dict(temperature=0.0, sample_len=9)
    result = transcribe(ours, TWO, on_segment=lambda segment, language: segment.clear(), **asked)
    assert result["text"] and result["text"] == transcribe(ours, TWO, **asked)["text"]


def test_the_encoder_runs_once_for_each_window():
    (_, ours), passes = MODELS[False, 0], []
    hook = ours.encoder.register_forward_hook(lambda *_: passes.append(1))
    mel, tokenizer = padded_log_mel(recording(6, 12), ours.args), Tokenizer.for_args(ours.args)
    asked = dict(temperature=(0.0, 0.2), sample_len=9, word_timestamps=True)
    result = transcribe_long_form(ours, mel, tokenizer, condition_on_previous_text=False, **asked)
    hook.remove()
    assert len({s["seek"] for s in result["segments"]}) <= len(passes) <= len(mel[0]) / 1000


def test_each_temperature_has_its_search_and_a_hot_window_gives_no_prompt(monkeypatch):
    """Beams at zero, samples above; a text that was drawn above 0.5 does not lead the next one."""
    tokenizer, asked = Tokenizer.whisper(multilingual=False), []
    begin, text = tokenizer.special["<|0.00|>"], tokenizer.encode(" one")
    tokens = [begin, *text, begin + 1500, begin + 1500]

    def written(model, states, options, tokenizer):
        asked.append(options)
        sure = -0.1 if options.temperature >= last else -5.0
        numbers = dict(avg_logprob=sure, no_speech_prob=0.0, compression_ratio=1.0)
        return DecodingResult(
            states, "en", tokens=tokens, temperature=options.temperature, **numbers
        )

    monkeypatch.setattr("utils.long_form.encode_audio", lambda model, mel: mel)
    monkeypatch.setattr("utils.long_form.decode", written)
    search = dict(beam_size=3, patience=2.0, best_of=4)
    for last, prompt in ((0.4, tokens[:-1]), (0.6, [])):
        asked.clear()
        steps = (0.0, 0.4) if last == 0.4 else (0.0, 0.4, 0.6)
        transcribe(MODELS[False, 0][1], TONE.repeat(10), temperature=steps, **search)
        found = [(o.temperature, o.beam_size, o.patience, o.best_of) for o in asked]
        window = [(0.0, 3, 2.0, None), *((t, None, None, 4) for t in steps[1:])]
        assert found == window * 2, "two windows"
        assert [o.prompt for o in asked] == [[]] * len(steps) + [prompt] * len(steps)
