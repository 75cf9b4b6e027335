"""One entrance for three sources; batches that change no loss; bad data told in one sentence."""

import errno
import io
from collections import Counter
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
    ClipDataset,
    audio_to_gpu,
    clean_text,
    load_clips,
    load_gigaspeech,
    load_splits,
    padded_length,
    prepare_clip,
    teacher_forcing,
)
from utils.model import Whisper
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
        ("<COMMA>", None),
        ("", None),
        *((tag, None) for tag in sorted(GARBAGE_TAGS)),
        ("AND THEN <NOISE>", None),
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
        ("<COMMA>", None),
        ("", None),
        *((tag, None) for tag in sorted(GARBAGE_TAGS)),
        ("AND THEN <NOISE>", None),
    ],
)
def test_text_as_openais_models_write_it(text, sentence):
    assert clean_text(text, written=True) == sentence


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
    assert clips.texts == ["one", "two"] and clips.dropped == {"garbage": 1}
    assert clips.speakers == ["voice 0", "voice 2"]


def hub_error(status):
    gate = "Dataset 'speechcolab/gigaspeech' is a gated dataset on the Hub."
    return datasets.exceptions.DatasetNotFoundError(f"{gate} ({status})")


def behind(cause):
    """What `datasets` raises when `cause` broke its work off."""
    problem = datasets.exceptions.DatasetGenerationError("An error occurred")
    problem.__cause__ = cause
    return problem


REFUSALS = {  # exception, token at hand, attempts, what the reader is told to do
    "no token": (hub_error(401), None, 3, "accept its terms on .*, then log in with `hf auth"),
    "terms": (hub_error(403), "hf_x", 3, "accept its terms .* with the account that your token"),
    "terms while streaming": (
        GatedRepoError("403 Client Error\nmore", response=Mock(status_code=403)),
        "hf_x",
        3,
        "with the account that your token belongs to",
    ),
    "offline": (ConnectionError("Couldn't reach the Hub"), "hf_x", 1, "network.*HF_HUB_OFFLINE"),
    "script": (RuntimeError("Dataset scripts are no longer supported"), None, 3, "@REVISION"),
    "revision": (
        datasets.exceptions.DatasetNotFoundError("Revision 'refs/pr/20' doesn't exist"),
        "hf_x",
        3,
        "look on .* for a revision with Parquet files",
    ),
    "subset": (ValueError("BuilderConfig 'xs' not found"), "hf_x", 3, "@REVISION"),
    "broken": (datasets.exceptions.DatasetGenerationError("An error"), "hf_x", 3, "@REVISION"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "hf_x", 1, "make room"),
    "no room for it": (OSError("Not enough disk space. Needed: 9 GiB"), "hf_x", 1, "HF_HOME"),
    "full disk behind it": (behind(OSError(errno.ENOSPC, "No space left")), "hf_x", 1, "make room"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_of_the_hub_says_what_to_do(monkeypatch, case, stream):
    refusal, token, attempts, advice = REFUSALS[case]
    hub = Mock(side_effect=refusal)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(ValueError, match=advice) as problem:
        load_clips("gigaspeech:xs", stream=stream)
    sentence = str(problem.value)
    assert (
        type(refusal).__name__ in sentence and str(refusal).splitlines()[0].rstrip(".") in sentence
    )
    assert "embedded corpus" in sentence and "\n" not in sentence
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
    reasons = [RuntimeError("first"), OSError("second"), ConnectionError("third")]
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
        (tmp_path / f"{i}.wav").write_bytes(tone(0.3))
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
    assert clips.texts == ["7"] and clips.dropped == {"garbage": 1}


def test_loading_leaves_progress_bars_as_they_were(recordings, capfd):
    for restore in (datasets.disable_progress_bars, datasets.enable_progress_bars):
        restore()
        before = datasets.are_progress_bars_disabled()
        load_clips(recordings)
        assert datasets.are_progress_bars_disabled() == before
    assert "examples" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("content", [b"", b"not a sound", tone(1.0)[:30]])
def test_a_broken_recording_is_named(recordings, content):
    (recordings / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match="a.wav"):
        ClipDataset(load_clips(recordings), TOKENIZER, ARGS)


def test_a_broken_clip_of_a_table_is_named():
    row = {"text": "ONE", "audio": {"bytes": b"broken", "path": "YOU7.opus"}}
    with pytest.raises(ValueError, match="clip YOU7.opus: .*cannot be decoded"):
        prepare_clip(row, TOKENIZER, ARGS)


# --- what is kept ---


def test_what_does_not_fit_is_dropped_and_counted():
    table = gigaspeech(
        [
            (1.0, "ONE"),
            (1.0, "<SIL>"),
            (1.0, "FAR TOO LONG FOR A CONTEXT OF THIRTY TWO"),
            (2.1, "TWO"),  # the context is 2 s
            (0.05, "THREE"),
        ]
    )
    clips = ClipDataset(table, TOKENIZER, ARGS)
    reasons = {"garbage": 1, "text too long": 1, "audio too short or too long": 2}
    assert len(clips) == 1 and clips.dropped == reasons
    with pytest.raises(ValueError, match="no usable clip.*garbage.*check"):
        ClipDataset(table.select([1, 2]), TOKENIZER, ARGS)
    with pytest.raises(ValueError, match="no usable clip"):
        ClipDataset(table.select([]), TOKENIZER, ARGS)


def test_more_rows_make_the_data_set_longer():
    table = gigaspeech([(0.3, "ONE"), (0.9, "TWO"), (0.5, "<SIL>"), (0.6, "THREE")])
    whole = ClipDataset(table, TOKENIZER, ARGS)
    parts = ClipDataset(table.select([0]), TOKENIZER, ARGS)
    assert parts.extend(table.select([1, 2])) is parts and parts.extend(table.select([3])) is parts
    for name in ("tokens", "texts", "speakers", "lengths", "dropped"):
        assert getattr(parts, name) == getattr(whole, name)
    assert all(map(torch.equal, parts.audio, whole.audio))
    assert len(parts.extend(table.select([2]))) == 3 and parts.dropped == {"garbage": 2}


def test_the_longest_text_that_fits_is_kept():
    room = ARGS.block_size - len(TOKENIZER.prompt)
    sound = {"bytes": tone(1.0), "path": "a.wav"}
    _, tokens, *_ = prepare_clip({"text": "A" * room, "audio": sound}, TOKENIZER, ARGS)
    inputs, _ = teacher_forcing([tokens], TOKENIZER.prompt, TOKENIZER.end)
    assert inputs.shape == (1, ARGS.block_size)
    assert (
        prepare_clip({"text": "A" * (room + 1), "audio": sound}, TOKENIZER, ARGS) == "text too long"
    )


def test_a_clip_without_a_transcript_is_garbage():
    assert prepare_clip({"text": None, "audio": None}, TOKENIZER, ARGS) == "garbage"


def test_audio_is_stored_to_half_a_step():
    encoded = tone(0.5)
    row = {"text": "ONE", "audio": {"bytes": encoded, "path": "a.wav"}}
    stored, tokens, text, speaker = prepare_clip(row, TOKENIZER, ARGS)
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
