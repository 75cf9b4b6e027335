"""CTC: the auxiliary loss, word boundaries, splicing, and clips that break off."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from test_training import TINY, WORDS, sentences, tones
from torch import nn

from utils import ctc
from utils.augment import augmented_log_mel, curriculum_batches
from utils.config import ModelArgs
from utils.ctc import (
    ctc_loss,
    cut_clips,
    fading_ctc_loss,
    log_mel_with_silence,
    splice_and_cut,
    splice_clips,
    word_boundaries,
)
from utils.data import (
    ClipDataset,
    clean_text,
    epoch_seed,
    held_out_texts,
    load_clips,
    load_splits,
    padded_length,
)
from utils.loss import training_log_mel
from utils.model import CTC_ALPHABET, Whisper, make_ctc_head
from utils.recipes import recipe_for
from utils.tokenizer import Tokenizer
from utils.training import Recipe, Run

pytestmark = pytest.mark.usefixtures("one_thread")

WORD = 3200  # samples of a tone


@pytest.fixture(scope="module")
def clips():
    return ClipDataset(tones(sentences(60)), Tokenizer.for_args(TINY), TINY)


def word_ends(clips):
    return [[WORD * k for k in range(1, len(text.split()))] for text in clips.texts]


def heard(audio):
    """The words of which the tones are."""
    pieces = audio.float().view(-1, WORD)
    peaks = torch.fft.rfft(pieces).abs().argmax(dim=1) * 16000 / WORD  # Hz
    return [WORDS[round((hz.item() - 300) / 250)].lower() for hz in peaks]


# The auxiliary loss


def test_the_loss_equals_pytorchs_padded_form_and_teaches_the_encoder(clips):
    torch.manual_seed(0)
    model, head = Whisper(TINY), make_ctc_head(TINY)
    states = torch.randn(3, 30, 32, requires_grad=True)
    texts = ["no", "seven two", "don't"]
    ours = ctc_loss(head, states, texts, sum(map(len, texts)))
    letters = [torch.tensor([1 + CTC_ALPHABET.index(c) for c in text]) for text in texts]
    scores = head(states).log_softmax(-1).transpose(0, 1)
    lengths = torch.tensor([len(text) for text in texts])
    padded = nn.utils.rnn.pad_sequence(letters, batch_first=True)
    each = F.ctc_loss(scores, padded, torch.tensor([30] * 3), lengths, reduction="none")
    torch.testing.assert_close(ours, each.sum() / lengths.sum())
    states = model.encoder(training_log_mel(clips.collate([0, 1])[0], TINY))
    ctc_loss(head, states, clips.texts[:2], characters=9).backward()
    assert model.encoder.conv1.weight.grad.any()
    assert not any(p.grad is not None and p.grad.any() for p in model.decoder.parameters())


def test_a_text_without_room_and_a_batch_without_texts_count_nothing():
    head, states = make_ctc_head(TINY), torch.randn(2, 3, 32)
    assert ctc_loss(head, states[:1], ["seven"], 5) == 0, "3 states cannot hold 5 letters"
    alone, both = (ctc_loss(head, states[:n], ["no", "seven"][:n], 7) for n in (1, 2))
    torch.testing.assert_close(alone, both)
    assert ctc_loss(head, states, ["", ""], 0).isfinite()


def test_the_weight_fades_to_a_tenth():
    args, head = replace(TINY, ctc_weight=2.5), make_ctc_head(TINY)
    states, batch = torch.randn(1, 30, 32), SimpleNamespace(texts=["no"], characters=2)
    model, whole = SimpleNamespace(ctc_head=head), ctc_loss(head, states, ["no"], 2)
    for step, weight in ((0, 2.5), (50, 2.5 * 0.55), (100, 0.25)):
        run = SimpleNamespace(args=args, step=step, total_steps=100)
        torch.testing.assert_close(fading_ctc_loss(model, states, batch, run), weight * whole)


# Splicing


def test_the_sound_of_a_new_sentence_says_its_text(clips):
    new = splice_clips(clips, word_ends(clips), 0.9, seed=1)
    changed = [i for i in range(len(clips)) if new.texts[i] != clips.texts[i]]
    assert len(changed) > 20
    for i in changed:
        assert heard(new.audio[i]) == new.texts[i].split()
        assert clips.tokenizer.decode(new.tokens[i]).strip() == new.texts[i]
        assert padded_length(len(new.audio[i]), TINY) == clips.lengths[i]
        head, tail = new.texts[i].split()[0], new.texts[i].split()[-1]
        assert head == clips.texts[i].split()[0]
        assert tail in {text.split()[-1] for text in clips.texts}
    assert new.lengths is clips.lengths and new.speakers is clips.speakers


@pytest.mark.parametrize(
    ("change", "low", "high"), [(splice_clips, 0.2, 0.6), (cut_clips, 0.25, 0.55)]
)
def test_what_is_there_stays_and_the_seed_decides(change, low, high, clips):
    before, boundaries = list(clips.texts), word_ends(clips)
    one, again, other = (change(clips, boundaries, 0.5, seed) for seed in (3, 3, 4))
    assert clips.texts == before and one.texts == again.texts != other.texts
    assert all(map(torch.equal, one.audio, again.audio))
    assert low < sum(map(str.__ne__, one.texts, before)) / len(clips) < high
    assert change(clips, boundaries, 0.0, 3).texts == before
    assert change(clips, [[]] * len(clips), 0.9, 3).texts == before, "no boundaries, no change"


def test_both_pieces_are_equally_loud(clips):
    soft = ClipDataset(tones(["ONE ONE", "TWO TWO"]), clips.tokenizer, TINY)
    soft.audio[1] //= 10
    made = [splice_clips(soft, [[WORD], [WORD]], 0.99, seed) for seed in range(8)]
    new = next(new for new in made if new.texts[0] == "one two")
    first, second = new.audio[0].float().view(2, WORD).square().mean(dim=1)
    assert abs(first / second - 1) < 0.05
    new = next(new for new in made if new.texts[1] == "two one")
    assert new.audio[1].abs().max() < 0.15 * soft.audio[0].abs().max()


def test_only_the_same_speaker_and_nobody_without_a_name(clips):
    mixed = ClipDataset(tones(sentences(60)), clips.tokenizer, TINY)
    mixed.speakers = [("low", "high", "N/A", "")[i % 4] for i in range(60)]
    for i in range(60):
        mixed.audio[i] = torch.full_like(mixed.audio[i], 1000 * (1 + i % 4))
    new = splice_clips(mixed, word_ends(mixed), 0.9, seed=2)
    changed = [i for i in range(60) if new.texts[i] != mixed.texts[i]]
    assert {i % 4 for i in changed} == {0, 1}
    assert all(torch.equal(new.audio[i].unique(), mixed.audio[i].unique()) for i in changed)


def test_a_text_that_is_too_long_is_not_made(clips):
    short = ClipDataset(
        tones(["ONE TWO", "ONE TWO THREE"]), clips.tokenizer, replace(TINY, block_size=7)
    )
    sizes = [
        len(new.tokens[0]) for new in (splice_clips(short, [[WORD]] * 2, 0.99, s) for s in range(9))
    ]
    assert max(sizes) + len(clips.tokenizer.prompt) <= 7


def test_boundaries_are_where_the_spaces_are():
    path = "--oo-ne---  t-wo- t-enn--"
    scores = torch.full((len(path), 1 + len(CTC_ALPHABET)), -9.0)
    for t, sign in enumerate(path):
        scores[t, 0 if sign == "-" else 1 + CTC_ALPHABET.index(sign)] = 0.0
    assert word_boundaries(scores.log_softmax(dim=1), "one two ten") == [10, 17]
    assert word_boundaries(scores.log_softmax(dim=1), "one") == []
    assert word_boundaries(scores[:10].log_softmax(dim=1), "one two ten") == [], (
        "11 signs, 10 states"
    )
    assert word_boundaries(scores[:7].log_softmax(dim=1), "see off") == [], "twins need a blank"
    for text in ("один два", "one 2", "你好 one"):
        assert word_boundaries(scores.log_softmax(dim=1), text) == [], "a word without letters"


def test_boundaries_are_samples_within_the_clip(clips, monkeypatch):
    """States that lie in the padding of a clip have no say; a boundary is the middle of a state."""
    few = ClipDataset(tones(["ONE TWO"]), clips.tokenizer, TINY)
    size = TINY.stride * 160  # samples of one state
    few.audio[0] = few.audio[0][: 12 * size]
    path = "oonnee  twoo" + "-" * 9  # the last ones are padding
    scores = torch.full((1, len(path), 1 + len(CTC_ALPHABET)), -9.0)
    for t, sign in enumerate(path):
        scores[0, t, 0 if sign == "-" else 1 + CTC_ALPHABET.index(sign)] = 0.0
    scores[0, 15, 1] = 9.0  # a space in the padding
    monkeypatch.setattr(ctc, "encode_clips", lambda model, clips, indices: (scores, None, None))
    model = SimpleNamespace(eval=lambda: None, ctc_head=lambda states: states)
    run = SimpleNamespace(source=few, args=TINY, model=model)
    assert ctc.find_boundaries(run) == [[round(6.5 * size)]]


def said_by_everyone():
    """The training split of the corpus, silent: texts, lengths, and even boundaries."""
    args = ModelArgs.preset("cpu", device="cpu")
    table, silence = load_clips("corpus", "train"), torch.ones(80_000, dtype=torch.int16)
    rows = zip(table["text"], table["speaker"], table["begin_time"], table["end_time"], strict=True)
    rows = [(clean_text(text), who, end - begin) for text, who, begin, end in rows]
    rows = [row for row in rows if row[0]]
    clips = SimpleNamespace(args=args, tokenizer=Tokenizer.for_args(args), tokens=[[]] * len(rows))
    clips.texts, clips.speakers, _ = map(list, zip(*rows, strict=True))
    clips.audio = [silence[: math.floor(16000 * seconds)] for *_, seconds in rows]
    clips.lengths = [padded_length(len(audio), args) for audio in clips.audio]
    boundaries = []
    for text, audio in zip(clips.texts, clips.audio, strict=True):
        words = len(text.split())
        boundaries.append([len(audio) * k // words for k in range(1, words)])
    return clips, boundaries


def test_no_held_out_sentence_is_made_up():
    """And without being told what is forbidden it would make some, so this test can fail."""
    forbidden = held_out_texts("corpus")
    for split in ("test_seen_voices", "test_unseen_voices"):
        texts = set(filter(None, map(clean_text, load_clips("corpus", split)["text"])))
        assert texts <= forbidden and len(texts) > 300
    clips, boundaries = said_by_everyone()
    careless, careful = set(), set()
    for epoch in range(6):
        careless |= set(splice_clips(clips, boundaries, 0.6, epoch).texts)
        careful |= set(splice_clips(clips, boundaries, 0.6, epoch, forbidden).texts)
    made = forbidden - set(clips.texts)  # single words are said in training too
    assert careless & made and not careful & made
    assert len(careful) > 5 * len(set(clips.texts)) / 2, "hardly anything new"


# Cutting


def test_a_cut_clip_says_its_words_and_is_then_silent(clips):
    """Of the next word at most `CUT_OVERHANG` samples are left, and the length stays."""
    new, starts = cut_clips(clips, word_ends(clips), 0.99, seed=1), Counter()
    for i, (text, audio) in enumerate(zip(new.texts, new.audio, strict=True)):
        words, old, last = text.split(), clips.texts[i].split(), audio.nonzero().max() + 1
        rows = [clips.audio[i][WORD * k :][:last] for k in range(len(old))]
        start = next(k for k, row in enumerate(rows) if torch.equal(row, audio[:last]))
        starts[start > 0] += 1
        assert words == old[start : start + len(words)]
        assert -9 < last - WORD * len(words) <= ctc.CUT_OVERHANG, "a tone ends near zero"
        assert len(audio) == len(clips.audio[i])
        assert clips.tokenizer.decode(new.tokens[i]).strip() == text
    assert min(starts[False], starts[True]) > 10, "from the first word, and from the middle"
    assert new.lengths is clips.lengths and new.speakers is clips.speakers


def test_no_held_out_sentence_is_cut_out_but_words_may_stand_alone(clips):
    boundaries, made = word_ends(clips), []
    for forbidden in ((), None):
        if forbidden is None:
            forbidden = set(made[0]) - set(clips.texts)
        new = [cut_clips(clips, boundaries, 0.9, seed, forbidden) for seed in range(5)]
        made.append([text for clips_ in new for text in clips_.texts])
    assert {len(text.split()) for text in forbidden} >= {1, 2, 3}
    assert {len(text.split()) for text in set(made[1]) & forbidden} == {1}


def test_a_text_of_too_many_tokens_is_not_cut_out(clips):
    """A word that begins a text may have more tokens than within it."""
    tight = replace(TINY, block_size=len(clips.tokenizer.prompt) + 1)
    short = ClipDataset(tones(["ONE TWO"] * 9), clips.tokenizer, TINY)
    short.args = tight
    new = cut_clips(short, [[WORD]] * 9, 0.99, seed=0)
    changed = [
        tokens for tokens, old in zip(new.tokens, short.tokens, strict=True) if tokens != old
    ]
    assert all(len(tokens) == 1 for tokens in changed)


# In a run


def test_a_clip_is_spliced_or_cut_and_both_occur(clips, monkeypatch):
    monkeypatch.setattr(ctc, "find_boundaries", lambda run: word_ends(clips))
    validation = ClipDataset(tones(sentences(9, seed=5)), clips.tokenizer, TINY)
    args = replace(TINY, curriculum_epochs=0, splice_share=0.4, cut_share=0.5)
    made = {}
    for name, changes in (
        ("both", {}),
        ("spliced", dict(cut_share=0)),
        ("cut", dict(splice_share=0)),
    ):
        run = Run(replace(args, **changes), clips, validation, "nowhere")
        run.epoch = 2
        made[name] = splice_and_cut(run)
    spliced = [made["spliced"].texts[i] != text for i, text in enumerate(clips.texts)]
    for i, text in enumerate(made["both"].texts):
        if spliced[i]:
            assert text == made["spliced"].texts[i]
        else:
            assert text in clips.texts[i]
    whole = [i for i in range(60) if not spliced[i]]
    cut = [i for i in whole if made["both"].texts[i] != clips.texts[i]]
    assert 0.2 < len(cut) / len(whole) < 0.6 and sum(spliced) > 5
    same = cut_clips(clips, word_ends(clips), 0.5, epoch_seed(args.seed, 2))
    assert made["cut"].texts == same.texts


def test_a_run_begins_with_what_was_recorded(clips, monkeypatch):
    """Splicing starts after the curriculum and two epochs; boundaries are looked for once."""
    validation = ClipDataset(tones(sentences(9, seed=5)), clips.tokenizer, TINY)
    args, recipe = replace(TINY, curriculum_epochs=1), Recipe(batches=curriculum_batches)
    run, calls = Run(args, clips, validation, "nowhere", recipe), []
    monkeypatch.setattr(ctc, "find_boundaries", lambda run: calls.append(0) or word_ends(clips))
    texts, planned = [], [run.batches(epoch) for epoch in range(6)]
    for run.epoch in range(6):
        run.clips = splice_and_cut(run)
        texts.append(run.clips.texts)
        assert run.batches(run.epoch) == planned[run.epoch]
    assert texts[0] == texts[1] == texts[2] == clips.texts and len(calls) == 1
    assert len({tuple(said) for said in texts[2:]}) == 4, "other sentences in every epoch"
    assert set().union(*texts[3:]) - set(clips.texts), "nothing is new"


@pytest.mark.parametrize("where", ["validation", "test"])
def test_no_epoch_says_what_is_held_out(clips, monkeypatch, where):
    """What would be made is put into a held-out split, and then is made no more."""
    monkeypatch.setattr(ctc, "find_boundaries", lambda run: word_ends(clips))
    validation = ClipDataset(tones(sentences(9, seed=5)), clips.tokenizer, TINY)
    run = Run(replace(TINY, curriculum_epochs=0), clips, validation, "nowhere")
    run.epoch = 2
    made = sorted(set(splice_and_cut(run).texts) - set(clips.texts))
    assert len(made) > 5
    if where == "validation":
        run.validation = ClipDataset(tones([t.upper() for t in made]), clips.tokenizer, TINY)
    else:
        run.source.forbidden = set(made)
    assert not set(splice_and_cut(run).texts) & set(made)


def test_a_folder_of_recordings_has_no_tests(tmp_path):
    assert held_out_texts(tmp_path) == set() == held_out_texts("gigaspeech:xs")


def test_loaded_data_knows_what_is_forbidden(tmp_path):
    for split, seed in (("train", 1), ("validation", 2), ("test_a", 3)):
        table = datasets.Dataset.from_list(tones(sentences(9, seed)))
        table.to_parquet(tmp_path / f"{split}.parquet")
    clips, _ = load_splits(TINY, tmp_path)
    assert clips.forbidden == {text.lower() for text in sentences(9, 3)}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(splice_share=0.5, ctc_weight=0.0), "set splice_share=0, or a ctc_weight"),
        (dict(cut_share=0.5, ctc_weight=0.0), "set cut_share=0, or a ctc_weight"),
        (
            dict(cut_share=0.5, splice_share=0.5),
            "splice_share=0 and cut_share=0, or a ctc_weight",
        ),
        (
            dict(cut_share=0.5, ctc_weight=1.0, stream_steps=5, curriculum_epochs=0),
            "set cut_share=0 for stream_steps",
        ),
        (dict(cut_share=1, ctc_weight=1.0), "cut_share` must be 0 or more and below 1, got 1"),
        (
            dict(splice_share=0.5, ctc_weight=1.0, stream_steps=5, curriculum_epochs=0),
            "set splice_share=0 for stream_steps",
        ),
        (
            dict(splice_share=1.5, ctc_weight=1.0),
            "splice_share` must be 0 or more and below 1, got 1.5",
        ),
    ],
)
def test_splicing_and_cutting_without_what_they_need(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelArgs(device="cpu", **changes)


def test_silence_follows_every_second_batch_within_the_context():
    """Else a long silence would tell a model that the clip was cut."""
    torch.manual_seed(0)
    args = replace(TINY, augment_strength=0.0, max_t=500)
    audio = torch.randn(2, 16_000)
    frames = [log_mel_with_silence(audio, args, 0.5).shape[2] for _ in range(60)]
    assert min(frames) == 100 and 250 < max(frames) <= 300 and all(n % 10 == 0 for n in frames)
    assert 15 < frames.count(100) < 45
    longest = torch.randn(1, args.max_t * 160)
    assert {log_mel_with_silence(longest, args, 0.5).shape[2] for _ in range(9)} == {args.max_t}
    assert recipe_for(replace(args, cut_share=0.3, ctc_weight=1.0)).features is log_mel_with_silence
    assert recipe_for(replace(args, augment_strength=0.5)).features is augmented_log_mel
