"""Crossover: new sentences from the beginning of one clip and the end of another."""

import math
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from test_training import TINY, WORDS, sentences, tones

from utils import training
from utils.config import ModelArgs
from utils.data import ClipDataset, clean_text, held_out_texts, load_clips, padded_length
from utils.model import CTC_ALPHABET
from utils.tokenizer import Tokenizer
from utils.training import Run, load_data, splice_clips, splice_epoch, word_boundaries

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


def test_what_is_there_stays_and_the_seed_decides(clips):
    before, cuts = list(clips.texts), word_ends(clips)
    one, again, other = (splice_clips(clips, cuts, 0.5, seed) for seed in (3, 3, 4))
    assert clips.texts == before and one.texts == again.texts != other.texts
    assert all(map(torch.equal, one.audio, again.audio))
    share = sum(map(str.__ne__, one.texts, before)) / len(clips)
    assert 0.2 < share < 0.6
    assert splice_clips(clips, cuts, 0.0, 3).texts == before


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


def test_cuts_are_where_spaces_are_spelt():
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


def said_by_everyone():
    """The training split of the corpus, silent: texts, lengths, and even cuts."""
    args = ModelArgs.preset("cpu", device="cpu")
    table, silence = load_clips("corpus", "train"), torch.ones(80_000, dtype=torch.int16)
    rows = zip(table["text"], table["speaker"], table["begin_time"], table["end_time"], strict=True)
    rows = [(clean_text(text), who, end - begin) for text, who, begin, end in rows]
    rows = [row for row in rows if row[0]]
    clips = SimpleNamespace(args=args, tokenizer=Tokenizer.for_args(args), tokens=[[]] * len(rows))
    clips.texts, clips.speakers, _ = map(list, zip(*rows, strict=True))
    clips.audio = [silence[: math.floor(16000 * seconds)] for *_, seconds in rows]
    clips.lengths = [padded_length(len(audio), args) for audio in clips.audio]
    cuts = []
    for text, audio in zip(clips.texts, clips.audio, strict=True):
        words = len(text.split())
        cuts.append([len(audio) * k // words for k in range(1, words)])
    return clips, cuts


def test_no_held_out_sentence_is_made_up():
    """And without being told what is forbidden it would make some, so this test can fail."""
    forbidden = held_out_texts("corpus")
    for split in ("test_seen_voices", "test_unseen_voices"):
        texts = set(filter(None, map(clean_text, load_clips("corpus", split)["text"])))
        assert texts <= forbidden and len(texts) > 300
    clips, cuts = said_by_everyone()
    careless, careful = set(), set()
    for epoch in range(6):
        careless |= set(splice_clips(clips, cuts, 0.6, epoch).texts)
        careful |= set(splice_clips(clips, cuts, 0.6, epoch, forbidden).texts)
    assert careless & forbidden and not careful & forbidden
    assert len(careful) > 5 * len(set(clips.texts)) / 2, "hardly anything new"


def test_a_run_begins_with_what_was_recorded(clips, monkeypatch):
    """Crossing starts after the curriculum and two epochs; the clips are cut once."""
    validation = ClipDataset(tones(sentences(9, seed=5)), clips.tokenizer, TINY)
    run, calls = Run(replace(TINY, curriculum_epochs=1), clips, validation, "nowhere"), []
    monkeypatch.setattr(
        training, "find_boundaries", lambda run: calls.append(0) or word_ends(clips)
    )
    texts, planned = [], [run.batches(epoch) for epoch in range(6)]
    for run.epoch in range(6):
        splice_epoch(run)
        texts.append(run.clips.texts)
        assert run.batches(run.epoch) == planned[run.epoch]
    assert texts[0] == texts[1] == texts[2] == clips.texts and len(calls) == 1
    assert len({tuple(said) for said in texts[2:]}) == 4, "other sentences in every epoch"
    made = set().union(*texts[3:]) - set(clips.texts)
    assert made and not made & set(validation.texts)
    plain = Run(replace(TINY, splice_share=0.0), clips, validation, "nowhere")
    plain.epoch = 5
    splice_epoch(plain)
    assert plain.clips is clips


def test_a_folder_of_recordings_has_no_tests(tmp_path):
    assert held_out_texts(tmp_path) == set() == held_out_texts("gigaspeech:xs")


def test_loaded_data_knows_what_is_forbidden(tmp_path):
    for split, seed in (("train", 1), ("validation", 2), ("test_a", 3)):
        table = datasets.Dataset.from_list(tones(sentences(9, seed)))
        table.to_parquet(tmp_path / f"{split}.parquet")
    clips, _ = load_data(TINY, tmp_path)
    assert clips.forbidden == {text.lower() for text in sentences(9, 3)}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(splice_share=0.5, ctc_weight=0.0), "set splice_share=0, or ctc_weight"),
        (
            dict(splice_share=0.5, ctc_weight=1.0, stream_steps=5, curriculum_epochs=0),
            "set splice_share=0 for stream_steps",
        ),
        (dict(splice_share=1.5, ctc_weight=1.0), "splice_share is 1.5"),
    ],
)
def test_crossover_without_what_it_needs(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelArgs(device="cpu", **changes)
