"""Evaluation: counts equal jiwer's, alignments add up, marks lose nothing, intervals, bad input."""

import html
import random
import re
import shutil

import jiwer
import pytest
import torch

from utils import evaluation
from utils.checkpoints import load_checkpoint
from utils.config import ModelArgs
from utils.data import ClipDataset, load_clips
from utils.decoding import ctc_rescoring
from utils.evaluation import (
    align_words,
    bootstrap_interval,
    bootstrap_rates,
    count_errors,
    edit_distances,
    error_rate,
    format_errors,
    format_errors_html,
    main,
    transcribe_dataset,
    word_error_rate,
)
from utils.tokenizer import DATA_DIR
from utils.training import transcribe_clips

ODD = ["a", "b", "naïve", "don't", "日本", "<b>", "&", '"', "🙂", "x" * 40]


def random_pairs(number, longest, words, seed):
    draw = random.Random(seed)
    for _ in range(number):
        some = words[: draw.randint(2, len(words))]
        sizes = draw.randint(1, longest), draw.randint(0, longest)
        yield tuple(" ".join(draw.choices(some, k=size)) for size in sizes)


@pytest.mark.parametrize(
    ("number", "longest", "words"),
    [(3000, 6, "a b c".split()), (2000, 15, "a b c d e f g h".split()), (500, 30, ODD)],
    ids=["short", "long", "odd words"],
)
def test_counts_equal_jiwer(number, longest, words):
    pairs = list(random_pairs(number, longest, words, seed=number))
    references, hypotheses = map(list, zip(*pairs, strict=True))
    counts = count_errors(references, hypotheses)
    assert counts.shape == (number, 4)
    for row, (reference, hypothesis) in zip(counts.tolist(), pairs, strict=True):
        judge = jiwer.process_words(reference, hypothesis)
        theirs = [judge.hits, judge.substitutions, judge.deletions, judge.insertions]
        assert row == theirs, f"{reference!r} / {hypothesis!r}"
    together = jiwer.wer(references, hypotheses)
    assert word_error_rate(references, hypotheses) == together


def test_an_alignment_holds_both_texts_and_is_cheapest():
    for pair in random_pairs(300, 12, "a b c d".split(), seed=1):
        reference, hypothesis = map(str.split, pair)
        steps = align_words(reference, hypothesis)
        assert [said for kind, said, _ in steps if kind != "I"] == reference
        assert [heard for kind, _, heard in steps if kind != "D"] == hypothesis
        assert all((said == heard) == (kind == "=") for kind, said, heard in steps)
        errors = sum(kind != "=" for kind, _, _ in steps)
        assert errors == edit_distances(reference, hypothesis)[-1][-1]
        back = edit_distances(hypothesis, reference)
        assert [*zip(*back, strict=True)] == [*map(tuple, edit_distances(reference, hypothesis))]


def test_the_rate_is_of_all_words_not_of_clips():
    references, hypotheses = ["a b c d e f g h i", "a"], ["a b c d e f g h i", "b"]
    assert word_error_rate(references, hypotheses) == pytest.approx(0.1)
    assert word_error_rate("a", "b c d") == 3  # above 100 %
    assert word_error_rate("  a   b ", "a b") == 0 and word_error_rate("a b", "") == 1
    assert word_error_rate(["a", ""], ["a", "b"]) == 1  # words where nobody spoke are insertions
    assert word_error_rate("A", "a") == 1, "case counts"
    assert word_error_rate(("a", "b"), (text for text in "ab")) == 0
    assert isinstance(word_error_rate("a", "a"), float)


@pytest.mark.parametrize(
    ("references", "hypotheses", "sentence"),
    [
        (["a", "b"], ["a"], "2 references and 1 hypotheses"),
        ("a", [], "1 references and 0 hypotheses"),
        ([], [], "hold no words"),
        ("", "a", "hold no words"),
        (["", "  "], ["a", "b"], "hold no words"),
        (["a", None], ["a", "b"], "not all of type str"),
        (["a"], [["a"]], "not all of type str"),
    ],
)
def test_texts_that_cannot_be_compared_are_refused(references, hypotheses, sentence):
    with pytest.raises(ValueError, match=sentence):
        word_error_rate(references, hypotheses)


def test_marks_in_text():
    steps = align_words("one two three".split(), "zero one four".split())
    assert format_errors(steps) == "[+zero] one [two→four] [-three]"
    assert format_errors(align_words(["one", "two"], ["one"])) == "one [-two]"
    assert format_errors(align_words(["one"], ["one", "two"])) == "one [+two]"
    assert format_errors(align_words(["one"], ["two"])) == "[one→two]"
    assert format_errors([]) == ""


def test_marks_in_colour_say_it_in_words_too_and_escape():
    steps = align_words(["a", "<b>", "c"], ["a", '"&"', "c", "d"])
    page = format_errors_html(steps)
    assert page.count("<span") == 2 and "<b>&" in page
    assert 'aria-label="substitution: &lt;b&gt;, &quot;&amp;&quot;"' in page
    assert 'aria-label="insertion: nothing, d"' in page
    assert page.count('role="img"') == page.count("title=") == 2
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert text == 'a <b>→"&" c +d'
    colours = set(re.findall("background:(#[0-9A-F]{6})", page))
    assert len(colours) == 2, "two kinds of error in one colour"


def test_bootstrap_is_seeded_and_holds_the_rate():
    generator = torch.Generator().manual_seed(0)
    wrong = torch.randint(0, 3, (50,), generator=generator)
    counts = torch.stack([6 - wrong, wrong, 0 * wrong, 0 * wrong], dim=1)
    rate = error_rate(counts).item()
    low, high = bootstrap_interval(counts)
    assert low < rate < high
    assert (low, high) == bootstrap_interval(counts) != bootstrap_interval(counts, seed=1)
    narrow = bootstrap_interval(counts, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    rates = bootstrap_rates(counts, draws=20_000)
    assert rates.shape == (20_000,) and rates.mean().item() == pytest.approx(rate, abs=2e-3)
    expected = (wrong / 6).std(correction=0).item() / 50**0.5  # all clips have six words
    assert rates.std().item() == pytest.approx(expected, rel=0.03)
    assert bootstrap_interval(counts[:1]) == pytest.approx([error_rate(counts[:1]).item()] * 2)
    assert bootstrap_interval(counts.repeat(4, 1))[1] < high, "more clips, a narrower interval"


def test_a_draw_of_wordless_clips_is_no_division_by_zero():
    counts = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]])
    assert bootstrap_rates(counts, draws=100).isfinite().all()


# The command


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere.safetensors"], "there is no checkpoint nowhere.safetensors"),
        (["nowhere.safetensors", "--device", "toaster"], "device is 'toaster'"),
    ],
)
def test_the_command_says_what_is_wrong(words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and sentence in said and "\n" not in said


def test_recognise_equals_greedy_where_nothing_is_asked():
    """Of the shipped model; and with its CTC head's opinion, the test gets better."""
    model, tokenizer, _ = load_checkpoint(DATA_DIR / "model.safetensors", "cpu")
    table = load_clips("corpus", "test_unseen_voices")
    clips = ClipDataset(table, tokenizer, model.args)
    greedy, asked = (
        transcribe_dataset(model, clips),
        transcribe_dataset(model, clips, **ctc_rescoring(model)),
    )
    assert greedy == transcribe_clips(model, clips)
    assert word_error_rate(*asked) < word_error_rate(*greedy) < 0.03
    model.ctc_head = None
    assert ctc_rescoring(model) == {}


def test_a_generated_folder_is_tested_on_its_unseen_voices(tmp_path):
    """Whatever seed made them; where there are none, on what was held out."""
    args = ModelArgs.preset("cpu", device="cpu")
    for name in ("train", "validation"):
        shutil.copy(DATA_DIR / "corpus" / f"{name}.parquet", tmp_path)
    rows, what = evaluation.test_rows(str(tmp_path), args)
    assert rows["text"] == load_clips("corpus", "validation")["text"] and "held out" in what
    shutil.copy(DATA_DIR / "corpus" / "test_unseen_voices.parquet", tmp_path)
    rows, what = evaluation.test_rows(str(tmp_path), args)
    assert rows["text"] == load_clips("corpus", "test_unseen_voices")["text"]
    assert "unseen voices" in what and evaluation.test_rows("corpus", args)[1] == what
