"""One entrance for three sources; batches that change no loss; bad data told in one sentence."""

import errno
import io
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from huggingface_hub.errors import GatedRepoError

from utils.audio import (
    BUCKET_SAMPLES,
    bucket_batches,
    load_audio,
    log_mel_spectrogram,
)
from utils.config import ModelArgs
from utils.data import (
    GARBAGE_TAGS,
    IGNORE_INDEX,
    UNKNOWN_SPEAKERS,
    ClipDataset,
    audio_to_gpu,
    clean_text,
    connected_groups,
    draw_rows,
    hold_out,
    load_clips,
    load_gigaspeech,
    load_splits,
    padded_length,
    prepare_clip,
    report_kept,
    teacher_forcing,
)
from utils.model import Whisper, ctc_losses, make_ctc_head
from utils.tokenizer import Tokenizer

SR = 16_000
ARGS = ModelArgs.preset(
    "cpu",
    embeddings_dims=24,
    no_of_heads=2,
    no_of_encoder_layers=1,
    no_of_decoder_layers=1,
    tgt_vocab_size=262,
    block_size=32,
    max_t=200,
    batch_size=4,
)
TOKENIZER = Tokenizer.train(["one two three"], 262)  # bytes and special tokens
GIGASPEECH = {  # the columns of speechcolab/gigaspeech
    **{name: datasets.Value("string") for name in ["segment_id", "speaker", "text"]},
    "audio": datasets.Audio(decode=False),
    **{name: datasets.Value("float32") for name in ["begin_time", "end_time"]},
    **{name: datasets.Value("string") for name in ["audio_id", "title", "url"]},
    "source": datasets.ClassLabel(names=["audiobook", "podcast", "youtube"]),
    "category": datasets.ClassLabel(names=["N/A", "audiobook"]),
    "original_full_path": datasets.Value("string"),
}


def tone(seconds, pitch=440, kind="WAV", rate=SR, channels=1):
    """The bytes of a sound file."""
    times = np.arange(round(seconds * rate)) / rate
    sound = np.stack([0.3 * np.sin(2 * np.pi * pitch * times)] * channels, axis=1)
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format=kind)
    return file.getvalue()


def gigaspeech(clips):
    """A table in GigaSpeech's schema from (seconds, text) pairs."""
    rows = [
        {
            **dict.fromkeys(["audio_id", "title", "url", "original_full_path"], ""),
            "segment_id": f"YOU{i}",
            "speaker": f"voice {i % 3}",
            "text": text,
            "audio": {"bytes": tone(seconds, 200 + 50 * i), "path": f"YOU{i}.wav"},
            "begin_time": 0.0,
            "end_time": seconds,
            "source": "youtube",
            "category": "N/A",
        }
        for i, (seconds, text) in enumerate(clips)
    ]
    sound = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    table = datasets.Dataset.from_list(rows, datasets.Features({**GIGASPEECH, "audio": sound}))
    return table.select_columns([*GIGASPEECH]).cast_column("audio", GIGASPEECH["audio"])


@pytest.fixture(scope="module")
def clips():
    lengths = [0.3, 0.5, 0.6, 0.9, 1.0, 1.01, 1.3, 1.6, 1.9, 2.0, 0.45, 0.2, 0.7]
    words = ["ONE", "TWO <COMMA> THREE <PERIOD>", "SEVEN EIGHT"]
    return ClipDataset(
        gigaspeech([(s, words[i % 3]) for i, s in enumerate(lengths)]), TOKENIZER, ARGS
    )


@pytest.fixture
def recordings(tmp_path):
    (tmp_path / "a.wav").write_bytes(tone(0.5, channels=2))
    (tmp_path / "b.flac").write_bytes(tone(1.0, kind="FLAC", rate=44_100))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,one two\nb.flac,three\n")
    return tmp_path


# --- text ---


@pytest.mark.parametrize(
    "text, words",
    [
        ("HELLO <COMMA> WORLD <PERIOD>", "hello world"),
        ("WHY <QUESTIONMARK> BECAUSE <EXCLAMATIONPOINT>", "why because"),
        ("IT'S  TEN", "it's ten"),
        ("“Hello,” she said: 'Don’t—go!'", "hello she said don't go"),
        ("well-known, isn't it?", "well known isn't it"),
        ("Hi 🙂 there", "hi there"),
        ("हिन्दी, नमस्ते!", "हिन्दी नमस्ते"),
        ("25", "25"),
        ("Cafe\u0301 Gru\u0308n", "café grün"),  # macOS writes an accent as a character of its own
        ("...", None),
        ("🙂 !?", None),
        (None, None),
        ("<COMMA>", None),
        ("", None),
        *((tag, None) for tag in sorted(GARBAGE_TAGS)),
        ("AND THEN <NOISE>", None),
        ("<UNK>", ""),
        ("AND <UNK> THEN", "and then"),
    ],
)
def test_clean_text(text, words):
    assert clean_text(text) == words


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("HELLO <COMMA> I'M LATE <PERIOD>", "Hello, I'm late."),
        ("WHY <QUESTIONMARK> BECAUSE I SAY SO <EXCLAMATIONPOINT>", "Why? Because I say so!"),
        ("AND THEN", "And then"),
        ("NASA", "NASA"),  # one word in capitals says nothing about the table
        ("Dr. Liu's  iPhone, please", "Dr. Liu's iPhone, please"),
        ("turn it off", "turn it off"),
        ("你好", "你好"),
        ("Hi 🙂!", "Hi 🙂!"),
        ("...", None),
        ("<COMMA>", None),
        ("", None),
        *((tag, None) for tag in sorted(GARBAGE_TAGS)),
        ("AND THEN <NOISE>", None),
        ("<UNK>", ""),
    ],
)
def test_text_as_openais_models_write_it(text, sentence):
    assert clean_text(text, "written") == sentence


@pytest.mark.parametrize(
    "preset, style, text",
    [
        ("cpu", "auto", "i'm late nancy"),
        ("cpu", "words", "i'm late nancy"),
        ("cpu", "lower", "i'm late, nancy!"),
        ("cpu", "written", "I'm late, Nancy!"),
        ("tiny.en", "auto", "I'm late, Nancy!"),
        ("tiny.en", "lower", "i'm late, nancy!"),
        ("tiny.en", "words", "i'm late nancy"),
    ],
)
def test_how_much_of_the_writing_stays_is_a_setting(preset, style, text):
    args = ModelArgs.preset(preset, text_style=style, device="cpu")
    rows = [{"text": "I'm late, Nancy!", "audio": {"bytes": tone(1.0), "path": None}}]
    assert ClipDataset(rows, Tokenizer.for_args(args), args).texts == [text]
    with pytest.raises(ValueError, match="`text_style` must be one of auto, words"):
        ModelArgs(device="cpu", text_style="loud")


@pytest.mark.parametrize("name, prompt", [("tiny.en", 2), ("tiny", 4), ("large-v3", 4)])
def test_clips_for_openais_models(name, prompt):
    """Leading space, case, prompt and end of Whisper's own tokenizer, and 30 s of audio."""
    from whisper.tokenizer import get_tokenizer

    args = ModelArgs.preset(name, batch_size=2, device="cpu")
    rows = gigaspeech([(0.5, "TURN IT OFF <COMMA> NANCY <PERIOD>"), (1.0, "Turn it off, Nancy.")])
    clips = ClipDataset(rows, Tokenizer.for_args(args), args)
    theirs = get_tokenizer(name != "tiny.en", num_languages=100 if name == "large-v3" else 99)
    if name != "tiny.en":
        theirs = get_tokenizer(True, num_languages=theirs.num_languages, language="en")
    starts = [*theirs.sot_sequence_including_notimestamps]
    assert clips.texts == ["Turn it off, nancy.", "Turn it off, Nancy."]
    audio, inputs, labels = clips.collate([0, 1])
    assert audio.shape == (2, 480_000) and not audio[0, 8000:].any() and audio[0, :8000].any()
    for row, label, text in zip(inputs.tolist(), labels.tolist(), clips.texts, strict=True):
        whole = [*starts, *theirs.encode(f" {text}"), theirs.eot]
        assert row[: len(whole) - 1] == whole[:-1] and set(row[len(whole) :]) <= {theirs.eot}
        scored = [token for token in label if token != IGNORE_INDEX]
        assert len(starts) == prompt and scored == whole[prompt:]


# --- sources ---


def test_gigaspeech_is_one_more_table(monkeypatch):
    """The main branch holds a script, the second attempt finds the Parquet copy, and it fits."""
    asked = []

    def hub(name, subset, split, revision, streaming):
        asked.append((name, subset, split, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found gigaspeech.py")
        return gigaspeech([(1.0, "ONE"), (1.0, "<MUSIC>"), (0.5, "TWO <PERIOD>")])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    table = load_clips("gigaspeech:s", "validation")
    assert [revision for *_, revision in asked] == [None, "refs/pr/20"]
    assert asked[0][:3] == ("speechcolab/gigaspeech", "s", "validation")
    clips = ClipDataset(table, TOKENIZER, ARGS)
    assert clips.texts == ["one", "two"] and clips.dropped == {"without text": 1}
    assert clips.speakers == ["voice 0", "voice 2"]


def hub_error(status):
    gate = "Dataset 'speechcolab/gigaspeech' is a gated dataset on the Hub."
    return datasets.exceptions.DatasetNotFoundError(f"{gate} ({status})")


def behind(cause):
    """What `datasets` raises when `cause` broke its work off."""
    problem = datasets.exceptions.DatasetGenerationError("An error occurred")
    problem.__cause__ = cause
    return problem


ACCEPT = "accept its terms on .*log in .*`hf auth login`"
REFUSALS = {  # exception, attempts, what the reader is told to do
    "gated": (hub_error(401), 3, ACCEPT),
    "gated stream": (
        GatedRepoError("403 Client Error\nm", response=Mock(status_code=403)),
        1,
        ACCEPT,
    ),
    "offline": (ConnectionError("Couldn't reach the Hub"), 1, "network.*HF_HUB_OFFLINE"),
    "script": (RuntimeError("Dataset scripts are no longer supported"), 3, "@REVISION"),
    "revision": (
        datasets.exceptions.DatasetNotFoundError("Revision 'refs/pr/20' doesn't exist"),
        3,
        "name the revision",
    ),
    "subset": (ValueError("BuilderConfig 'xs' not found"), 3, "@REVISION"),
    "broken": (datasets.exceptions.DatasetGenerationError("An error"), 1, "@REVISION"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 1, "make room on the disk"),
    "no room for it": (OSError("Not enough disk space. Needed: 9 GiB"), 1, "make room"),
    "full disk behind it": (behind(OSError(errno.ENOSPC, "No space left")), 1, "make room"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_of_the_hub_says_what_to_do(monkeypatch, case, stream):
    refusal, attempts, advice = REFUSALS[case]
    hub = Mock(side_effect=refusal)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(ValueError, match=f"GigaSpeech could not be loaded .*{advice}") as problem:
        load_clips("gigaspeech:xs", stream=stream)
    sentence, cause = str(problem.value), refusal.__cause__ or refusal
    assert type(cause).__name__ in sentence and "\n" not in sentence
    assert f"{cause}".splitlines()[0].split(". ")[0] in sentence
    assert hub.call_count == attempts and hub.call_args.kwargs["streaming"] is stream


def test_a_full_disk_is_not_taken_for_a_broken_file(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=behind(OSError(28, "full"))))
    with pytest.raises(ValueError, match="cannot be read .*: make room on the disk"):
        load_clips("corpus")


def test_a_gpu_without_room_leaves_the_sound_where_it_is(monkeypatch):
    audio = [torch.ones(1000, dtype=torch.int16)] * 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 3000 - 1, 10**9))
    assert audio_to_gpu(audio, "cuda:0") is audio


def test_sound_that_is_on_the_gpu_stays_there():
    audio = [Mock(is_cuda=True, __len__=lambda self: 1000)]
    assert audio_to_gpu(audio, "cuda:0") is audio


def test_a_named_revision_is_the_only_one_asked_for(monkeypatch):
    hub = Mock(side_effect=RuntimeError("no"))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(ValueError):
        load_clips("gigaspeech:l@refs/pr/99")
    assert hub.call_args.args == ("speechcolab/gigaspeech", "l")
    assert [call.kwargs["revision"] for call in hub.call_args_list] == ["refs/pr/99"]


def test_the_first_reason_is_told_when_later_ones_differ(monkeypatch):
    reasons = [RuntimeError("first"), ValueError("second"), RuntimeError("third")]
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=reasons))
    with pytest.raises(ValueError, match="RuntimeError: first"):
        load_gigaspeech()


def test_folder_of_recordings(recordings):
    clips = ClipDataset(load_clips(recordings), TOKENIZER, ARGS)
    assert clips.texts == ["one two", "three"]
    assert [len(audio) for audio in clips.audio] == [SR // 2, SR]  # 16 kHz, mono
    assert clips.speakers == ["", ""]


def test_a_tenth_of_a_folder_is_set_aside(tmp_path):
    """The two parts share no clip, the same ones each time; nothing is forbidden without tests."""
    texts = [f"text {i}" for i in range(10)]
    for i in range(10):
        (tmp_path / f"{i}.wav").write_bytes(tone(0.3, 300 + i))
    rows = "".join(f"{i}.wav,{text}\n" for i, text in enumerate(texts))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows)
    args = ModelArgs.preset("cpu")
    train, validation = load_splits(args, tmp_path)
    assert (len(train), len(validation)) == (9, 1) and train.forbidden == set()
    assert sorted(train.texts + validation.texts) == texts
    assert load_splits(args, tmp_path)[1].texts == validation.texts
    with pytest.raises(ValueError, match="nowhere is not there"):
        load_splits(args, tmp_path / "nowhere")


def test_splits_of_a_folder_of_parquet_files(tmp_path):
    """Its own validation split is used, and the words of its tests are forbidden."""
    for split, text in (("train", "ONE"), ("validation", "TWO"), ("test_a", "THREE <PERIOD>")):
        gigaspeech([(1.0, text)]).to_parquet(tmp_path / f"{split}.parquet")
    train, validation = load_splits(ModelArgs.preset("cpu"), tmp_path)
    assert (train.texts, validation.texts, train.forbidden) == (["one"], ["two"], {"three"})


def test_numbers_as_texts_stay_text(recordings):
    (recordings / "metadata.csv").write_text("file_name,text\na.wav,7\nb.flac,\n")
    clips = ClipDataset(load_clips(recordings), TOKENIZER, ARGS)
    assert clips.texts == ["7"] and clips.dropped == {"without text": 1}


def test_loading_leaves_progress_bars_as_they_were(recordings, capfd):
    for restore in (datasets.disable_progress_bars, datasets.enable_progress_bars):
        restore()
        before = datasets.are_progress_bars_disabled()
        load_clips(recordings)
        assert datasets.are_progress_bars_disabled() == before
    assert "examples" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("content", [b"", b"not a sound", tone(1.0)[:30]])
def test_broken_recordings_are_named_all_at_once(recordings, content):
    """Or left out and counted, if that is wanted."""
    (recordings / "a.wav").write_bytes(content)
    (recordings / "b.flac").write_bytes(content)
    (recordings / "c.wav").write_bytes(tone(1.0))
    rows = [
        {"text": "one", "audio": {"bytes": None, "path": f"{recordings / name}"}}
        for name in ("a.wav", "c.wav", "b.flac")
    ]
    rows.append({"text": "two", "audio": {"bytes": b"broken", "path": None}})
    rows.append({"text": "two", "audio": {"bytes": None, "path": f"{recordings / 'lost.wav'}"}})
    with pytest.raises(
        ValueError,
        match="^4 of 5 recordings cannot be decoded: a.wav, b.flac, row 4, lost.wav.*skip_broken",
    ) as problem:
        ClipDataset(rows, TOKENIZER, ARGS)
    assert "\n" not in f"{problem.value}"
    clips = ClipDataset(rows, TOKENIZER, replace(ARGS, skip_broken=True))
    assert clips.texts == ["one"] and clips.dropped == {"broken": 4} and clips.seconds == 1


def test_many_broken_recordings_are_counted():
    rows = [{"text": "one", "audio": {"bytes": b"broken", "path": f"{i}.wav"}} for i in range(99)]
    with pytest.raises(
        ValueError, match="^99 of 99 .*: 0.wav, 1.wav.* 19.wav and 79 more; the first"
    ):
        ClipDataset(rows, TOKENIZER, ARGS)


# --- what is kept ---


FITS_NOT = [  # seconds, text; the context is 2 s and 32 tokens of one byte
    (1.0, "ONE"),
    (1.0, "<SIL>"),
    (1.0, "FAR TOO LONG FOR A CONTEXT OF THIRTY TWO"),
    (2.1, "TWO"),
    (2.2, "FOUR"),
    (0.05, "THREE"),
]


def test_speech_outside_the_vocabulary_is_learnt_as_an_empty_transcript():
    """The first token of such a clip is its last; a CTC head learns nothing but blanks."""
    table = gigaspeech([(0.5, "<UNK>"), (0.5, "ONE TWO"), (0.5, "<OTHER>")])
    clips = ClipDataset(table, TOKENIZER, ARGS)
    assert clips.texts == ["", "one two"] and clips.tokens[0] == []
    _, inputs, labels = clips.collate([0, 1])
    assert inputs[0, : len(TOKENIZER.prompt)].tolist() == TOKENIZER.prompt
    assert labels[0][labels[0] != IGNORE_INDEX].tolist() == [TOKENIZER.end]
    model = Whisper(ARGS)
    model.ctc_head = make_ctc_head(ARGS)
    states = model.encoder(torch.randn(2, ARGS.log_mel_features, 50))
    loss = ctc_losses(model.ctc_head, states, clips.texts)
    blanks = -model.ctc_head(states[0]).log_softmax(dim=-1)[:, 0].sum()
    torch.testing.assert_close(loss[0], blanks)
    assert ctc_losses(model.ctc_head, states, ["", ""]).isfinite().all()


def test_what_does_not_fit_is_dropped_and_counted(capsys):
    """Each reason apart, in clips and in the time of those that have words."""
    clips = ClipDataset(gigaspeech(FITS_NOT), TOKENIZER, ARGS, "validation")
    longest = ARGS.block_size - len(TOKENIZER.prompt)
    reasons = {"without text": 1, f"texts longer than {longest} tokens": 1}
    reasons |= {"longer than 2.0 s": 2, "shorter than 0.1 s": 1}
    assert len(clips) == 1 and clips.dropped == reasons
    sentence = "validation: kept 1 of 6 clips (1.0 of 6.3 s): 1 without text, "
    sentence += f"1 text longer than {longest} tokens, 2 longer than 2.0 s, 1 shorter than 0.1 s"
    report_kept(clips)
    assert capsys.readouterr().out == f"{sentence}\n"
    with pytest.raises(ValueError) as problem:
        report_kept(clips, ARGS.min_kept)
    assert f"{problem.value}".startswith(f"{sentence}; check the texts, cut the recordings")
    assert (
        "--preset tiny.en --start tiny.en" in f"{problem.value}"
        and "--min-kept 0" in f"{problem.value}"
    )
    report_kept(clips, 1 / 6)
    for rows, why in (([1, 2], "1 without text"), ([], "the table is empty")):
        with pytest.raises(
            ValueError, match=f"clips: kept 0 of {len(rows)} clips .*{why}.*check the texts"
        ):
            ClipDataset(gigaspeech(FITS_NOT).select(rows), TOKENIZER, ARGS)


def test_where_nothing_is_dropped_nothing_is_said(clips, capsys, monkeypatch):
    """Nor by the second process of a run; hours where there are some."""
    report_kept(clips, 1.0)
    some = ClipDataset(gigaspeech(FITS_NOT[:2]), TOKENIZER, ARGS)
    monkeypatch.setenv("RANK", "1")
    report_kept(some)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    some.seconds = 5400.0
    report_kept(some)
    assert capsys.readouterr().out == "clips: kept 1 of 2 clips (0.0 of 1.5 h): 1 without text\n"


def test_a_recording_with_several_texts_is_said(tmp_path, capsys):
    """A table of segments, with start and end, gives each of them the whole recording."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.wav").write_bytes(tone(0.5, 440 + ord(name)))
    table = "file_name,start,end,text\na.wav,0,1,one\na.wav,1,2,two\n{}b.wav,0,1,one\n"
    for more, said in (("", "1 sounds"), ("a.wav,2,3,three\n", "2 sounds")):
        (tmp_path / "metadata.csv").write_text(table.format(more + "b.wav,0,1,one\n"))
        report_kept(ClipDataset(load_clips(tmp_path), TOKENIZER, ARGS, "training"))
        sentence = f"training: {said} have another text too: cut a file for each text\n"
        assert capsys.readouterr().out == sentence


def test_digits_are_said_where_only_words_are_known(capsys):
    rows = gigaspeech([(1.0, "ROOM 25"), (1.0, "ROOM TWO")])
    report_kept(ClipDataset(rows, TOKENIZER, ARGS, "training"))
    assert capsys.readouterr().out == "training: 1 of 2 texts hold digits: write them as words\n"
    report_kept(ClipDataset(rows, TOKENIZER, replace(ARGS, text_style="written")))
    assert capsys.readouterr().out == ""


def test_more_rows_make_the_data_set_longer():
    table = gigaspeech([(0.3, "ONE"), (0.9, "TWO"), (0.5, "<SIL>"), (0.6, "THREE")])
    whole = ClipDataset(table, TOKENIZER, ARGS)
    parts = ClipDataset(table.select([0]), TOKENIZER, ARGS)
    assert parts.extend(table.select([1, 2])) is parts and parts.extend(table.select([3])) is parts
    for name in ("tokens", "texts", "speakers", "lengths", "dropped"):
        assert getattr(parts, name) == getattr(whole, name)
    assert all(map(torch.equal, parts.audio, whole.audio))
    assert len(parts.extend(table.select([2]))) == 3 and parts.dropped == {"without text": 2}


def test_the_longest_text_that_fits_is_kept():
    room = ARGS.block_size - len(TOKENIZER.prompt)
    sound = {"bytes": tone(1.0), "path": "a.wav"}
    _, (_, tokens, *_) = prepare_clip({"text": "A" * room, "audio": sound}, TOKENIZER, ARGS)
    inputs, _ = teacher_forcing([tokens], TOKENIZER.prompt, TOKENIZER.end)
    assert inputs.shape == (1, ARGS.block_size)
    outcome = prepare_clip({"text": "A" * (room + 1), "audio": sound}, TOKENIZER, ARGS)
    assert outcome == (1.0, f"texts longer than {room} tokens")


@pytest.mark.parametrize(
    "text, audio, reason",
    [
        (None, None, "without text"),
        ("ONE", None, "without audio"),
        ("ONE", {"bytes": None, "path": None}, "without audio"),
    ],
)
def test_a_clip_without_text_or_audio_is_dropped(text, audio, reason):
    assert prepare_clip({"text": text, "audio": audio}, TOKENIZER, ARGS) == (0.0, reason)


def test_audio_is_stored_to_half_a_step():
    encoded = tone(0.5)
    row = {"text": "ONE", "audio": {"bytes": encoded, "path": "a.wav"}}
    _, (stored, tokens, text, speaker) = prepare_clip(row, TOKENIZER, ARGS)
    audio = load_audio(encoded)
    assert stored.dtype == torch.int16 and stored.shape == audio.shape
    assert (text, speaker) == ("one", "")
    assert (stored / 32767 - audio).abs().max() <= 0.5 / 32767 + 1e-7


def test_order_and_threads_are_as_before(clips):
    threads = torch.get_num_threads()
    table = gigaspeech([(0.2 + i / 100, f"N{i}") for i in range(50)])
    many = ClipDataset(table, TOKENIZER, ARGS)
    assert torch.get_num_threads() == threads
    assert many.texts == [f"n{i}" for i in range(50)]
    assert [len(audio) for audio in many.audio] == [round((0.2 + i / 100) * SR) for i in range(50)]


# --- batches ---


@pytest.mark.parametrize("epoch", [None, 0, 1, 7])
def test_every_clip_exactly_once_and_reproducibly(clips, epoch):
    batches = clips.batches(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(clips)))
    assert max(map(len, batches)) <= ARGS.batch_size
    assert all(len({clips.lengths[i] for i in batch}) == 1 for batch in batches)
    torch.manual_seed(epoch or 5)  # the global generator has no say
    assert clips.batches(epoch) == batches


def test_short_clips_first(clips):
    short = clips.batches(0, longest=1)
    assert short == [b for b in clips.batches(0) if clips.lengths[b[0]] <= SR]
    assert sorted(i for b in short for i in b) == [
        i for i, audio in enumerate(clips.audio) if len(audio) <= SR
    ]


def test_epochs_and_seeds_shuffle_differently(clips):
    orders = [clips.batches(epoch) for epoch in range(5)]
    clips.args, args = ModelArgs.preset("cpu", batch_size=4, max_t=200, seed=1), clips.args
    orders.append(clips.batches(0))
    clips.args = args
    assert len({str(order) for order in orders}) == len(orders)


def test_buckets_hold_every_index_once():
    lengths = torch.randint(1, 5, (97,), generator=torch.Generator().manual_seed(0)).tolist()
    for generator in (None, torch.Generator().manual_seed(1)):
        batches = bucket_batches(lengths, 8, generator)
        assert Counter(i for batch in batches for i in batch) == Counter(range(97))
        assert sum(len(batch) < 8 for batch in batches) <= len(set(lengths))


def test_padding_is_a_property_of_the_clip():
    assert padded_length(1, ARGS) == padded_length(BUCKET_SAMPLES, ARGS) == BUCKET_SAMPLES
    assert padded_length(BUCKET_SAMPLES + 1, ARGS) == 2 * BUCKET_SAMPLES
    odd = ModelArgs.preset("cpu", max_t=132)  # a context that is no multiple of half a second
    assert padded_length(132 * 160, odd) == 132 * 160


def test_collate_keeps_the_sound_and_fills_with_silence(clips):
    for batch in clips.batches(epoch=0):
        audio, inputs, labels = clips.collate(batch)
        assert audio.shape == (len(batch), clips.lengths[batch[0]]) and audio.dtype == torch.float32
        assert inputs.shape == labels.shape
        for i, sound in zip(batch, audio, strict=True):
            n = len(clips.audio[i])
            assert torch.equal((sound[:n] * 32767).round().to(torch.int16), clips.audio[i])
            assert not sound[n:].any()


def test_neither_batching_nor_padding_changes_a_loss(clips):
    """Invariant 7, with weights so large that the sound matters."""
    torch.manual_seed(0)
    model = Whisper(ARGS).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)

    @torch.inference_mode()
    def losses(audio, inputs, labels):
        logits = model(log_mel_spectrogram(audio), inputs)
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return each.sum(dim=1) / (labels != IGNORE_INDEX).sum(dim=1)

    sizes = set()
    for batch in clips.batches(epoch=0):
        alone = torch.cat([losses(*clips.collate([i])) for i in batch])
        torch.testing.assert_close(losses(*clips.collate(batch)), alone, atol=1e-5, rtol=0)
        sizes.add(len(batch))
    assert max(sizes) > 1
    i = clips.batches()[0][0]
    audio, inputs, labels = clips.collate([i])
    longer = losses(F.pad(audio, (0, 2 * BUCKET_SAMPLES)), inputs, labels)
    assert (longer - losses(audio, inputs, labels)).abs() > 1e-3, "this model is deaf"


# --- labels ---


def test_teacher_forcing_is_one_shift():
    texts = [[5, 6, 7], [], [8]]
    inputs, labels = teacher_forcing(texts, [1, 2], 0)
    assert inputs.tolist() == [[1, 2, 5, 6, 7], [1, 2, 0, 0, 0], [1, 2, 8, 0, 0]]
    rest = [IGNORE_INDEX] * 2
    assert labels.tolist() == [
        [IGNORE_INDEX, 5, 6, 7, 0],
        [IGNORE_INDEX, 0, IGNORE_INDEX, *rest],
        [IGNORE_INDEX, 8, 0, *rest],
    ]
    assert inputs.dtype == labels.dtype == torch.long


def test_labels_equal_those_of_transformers(clips):
    modeling = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    prompt, end = TOKENIZER.prompt, TOKENIZER.end
    inputs, labels = teacher_forcing(clips.tokens, prompt, end)
    labels[:, : len(prompt) - 1] = torch.tensor(prompt[1:])
    assert torch.equal(modeling.shift_tokens_right(labels, end, prompt[0]), inputs)


# --- splits ---


def parts_of(texts, speakers=None, sounds=None, **changes):
    """Clips of these texts, held out by `hold_out`: two lists of (text, speaker, sound)."""
    clips = ClipDataset(gigaspeech([(0.2, "ONE")]), TOKENIZER, replace(ARGS, **changes))
    clips.texts, total = texts, len(texts)
    clips.speakers = speakers or [""] * total
    clips.audio = [torch.tensor([n], dtype=torch.int16) for n in sounds or range(total)]
    clips.tokens, clips.lengths = [[0]] * total, [SR] * total
    parts = hold_out(clips)
    assert [part.name for part in parts] == ["training", "validation"]
    rows = [list(zip(p.texts, p.speakers, map(int, p.audio), strict=True)) for p in parts]
    assert sum(map(len, rows)) == total and all(rows)
    return rows


class Key(int):
    """A key that counts how often any of its kind is looked up."""

    lookups = 0

    def __hash__(self):
        Key.lookups += 1
        return int(self)


def test_a_long_chain_of_clips_is_one_group_and_found_in_linear_time():
    """Each clip shares a sound with the one before and a sentence with the one behind."""
    order = random.Random(0).sample(range(2000), 2000)
    columns = [[Key((i + shift) // 2) for i in order] for shift in (0, 1)]
    assert connected_groups(columns) == [0] * 2000 and Key.lookups <= 10_000
    chained = connected_groups([*columns, [None] * 2000])
    assert connected_groups([[None] * 3, [None, 1, 1]]) == [0, 1, 1] and chained == [0] * 2000


NAMES = ["texts", "speakers", "sounds"]


def crossing(parts, column):
    a, b = ({row[column] for row in part} for part in parts)
    return a & b


@pytest.mark.parametrize("seed", range(3))
def test_no_sentence_file_or_speaker_crosses_the_split(seed):
    """Punctuation makes no other sentence; a file that is listed twice stays on one side."""
    draw = random.Random(seed)
    sentences = [f"sentence {i}" for i in range(200)]
    texts = [draw.choice(sentences) + draw.choice(["", ".", "!"]) for _ in range(400)]
    sounds = [draw.randrange(300) for _ in range(400)]
    parts = parts_of(texts, None, sounds, seed=seed)
    bare = [[(clean_text(text), *rest) for text, *rest in part] for part in parts]
    assert not crossing(bare, 0) and not crossing(parts, 2)
    assert 30 <= len(parts[1]) <= 40
    own = [f"{i // 10} says {i % 10}" for i in range(400)]  # forty speakers, ten sentences each
    parts = parts_of(own, [f"voice {i // 10}" for i in range(400)], seed=seed)
    assert len(parts[1]) == 40 and len({who for _, who, _ in parts[1]}) == 4
    assert not crossing(parts, 1)
    assert parts_of(own, seed=seed) == parts_of(own, seed=seed) != parts_of(own, seed=seed + 1)


@pytest.mark.parametrize(
    "texts, speakers, sounds, held_out, shared",
    [
        (["a", "b"], None, None, 1, []),
        (["a", "a"], None, None, 1, ["texts"]),
        (["a", "b", "c"], None, [7] * 3, 1, ["sounds"]),
        ([f"s{i}" for i in range(20)], ["ann"] * 20, None, 2, ["speakers"]),
        (
            [f"s{i % 4}" for i in range(40)],
            [f"v{i % 9}" for i in range(40)],
            None,
            10,
            ["speakers"],
        ),
        ([f"s{i}" for i in range(40)], ["ann", "", None, "N/A"] * 10, None, 4, []),
        (["one"] * 30, [f"v{i % 9}" for i in range(30)], None, 3, ["texts", "speakers"]),
    ],
)
def test_what_the_parts_must_share(texts, speakers, sounds, held_out, shared):
    """Too few speakers, then too few sentences; a clip of an unknown speaker stands for itself."""
    parts = parts_of(texts, speakers, sounds)
    assert len(parts[1]) == held_out
    assert [name for k, name in enumerate(NAMES) if crossing(parts, k) - UNKNOWN_SPEAKERS] == shared


def test_one_clip_cannot_be_split():
    with pytest.raises(ValueError, match="no clip can be held out of a single one"):
        parts_of(["a"])


def test_a_validation_split_is_sampled_and_compared(tmp_path, capsys, monkeypatch):
    """At most so many clips of it, the same ones each time; those of the training are counted."""
    rows = [(0.2, f"TEXT {n}") for n in ("ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX")]
    for split in ("train", "validation"):
        gigaspeech(rows).to_parquet(tmp_path / f"{split}.parquet")
    monkeypatch.setattr("utils.data.draw_rows", partial(draw_rows, most=4))
    validation = load_splits(ModelArgs.preset("cpu", device="cpu"), tmp_path)[1]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "validation: 4 of 6 clips, drawn at random"
    assert said[1:] == [
        f"validation: 4 of its {name} are in the training too" for name in NAMES[::2]
    ]
    order = [text.lower() for _, text in rows]
    assert validation.texts == sorted(validation.texts, key=order.index) != order[:4]
    assert validation.texts == load_splits(ModelArgs.preset("cpu", seed=5), tmp_path)[1].texts


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_of_which_little_fits_is_refused(tmp_path, split):
    """Of a folder; the validation split of the hub is known to be long, and is only counted."""
    long = "FAR TOO LONG FOR A CONTEXT " * 9
    for name in ("train", "validation"):
        rows = [(0.2, long if i and name == split else f"N {i}") for i in range(4)]
        gigaspeech(rows).to_parquet(tmp_path / f"{name}.parquet")
    args = ModelArgs.preset("cpu", device="cpu")
    name = {"train": "training"}.get(split, split)
    with pytest.raises(ValueError, match=f"{name}: kept 1 of 4 clips .* 3 texts longer than"):
        load_splits(args, tmp_path)
    assert [len(part) for part in load_splits(replace(args, min_kept=0.2), tmp_path)][0] > 0


def test_of_the_hubs_validation_it_is_only_said_what_fits(monkeypatch, capsys):
    """A third of it lasts 5 s at most, and that is known. Its test split is left where it is."""
    long = "FAR TOO LONG FOR A CONTEXT " * 9
    tables = {
        "train": gigaspeech([(0.2, f"N {i}") for i in range(4)]),
        "validation": gigaspeech([(0.2, long if i else "TWO") for i in range(4)]),
    }
    monkeypatch.setattr("utils.data.load_clips", lambda source, split: tables[split])
    train, validation = load_splits(ModelArgs.preset("cpu", device="cpu"), "gigaspeech:xs")
    assert (len(train), validation.texts, train.forbidden) == (4, ["two"], set())
    assert "validation: kept 1 of 4 clips" in capsys.readouterr().out
    tables["train"] = tables["validation"]
    with pytest.raises(ValueError, match="training: kept 1 of 4 clips"):
        load_splits(ModelArgs.preset("cpu", device="cpu"), "gigaspeech:xs")


def test_what_is_forbidden_is_spelt_as_the_training_texts_are(tmp_path):
    for split, text in (("train", "One, TWO."), ("validation", "Three."), ("test", "Four, FIVE.")):
        gigaspeech([(1.0, text)]).to_parquet(tmp_path / f"{split}.parquet")
    args = ModelArgs.preset("cpu", device="cpu", text_style="lower")
    train, _ = load_splits(args, tmp_path)
    assert (train.texts, train.forbidden) == (["one, two."], {"four, five."})
