"""Evaluation: counts equal jiwer's, alignments add up, marks lose nothing, intervals, bad input."""

import html
import math
import random
import re
import time
from functools import partial
from pathlib import Path

import datasets
import jiwer
import nbformat
import numpy as np
import pytest
import scipy.stats
import torch
from rapidfuzz.distance import Levenshtein

from utils import evaluation
from utils.__main__ import main
from utils.checkpoints import load_checkpoint
from utils.config import ModelArgs
from utils.data import ClipDataset, draw_rows, load_clips, load_splits
from utils.decoding import ctc_rescoring
from utils.evaluation import (
    align_words,
    bootstrap_interval,
    bootstrap_rates,
    comparable_texts,
    count_errors,
    error_rate,
    load_test_clips,
    print_report,
    print_wer,
    sum_by_group,
    transcribe_dataset,
    word_error_rate,
)
from utils.loss import encode_clips, greedy_transcripts
from utils.tokenizer import DATA_DIR, Tokenizer

ROOT = Path(__file__).parent.parent

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


def fewest_errors(reference, hypothesis):
    """Wagner and Fischer's table, one row at a time."""
    above = list(range(len(hypothesis) + 1))
    for i, spoken in enumerate(reference, start=1):
        row = [i]
        for j, recognised in enumerate(hypothesis, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (spoken != recognised)))
        above = row
    return above[-1]


def test_an_alignment_holds_both_texts_and_has_the_fewest_errors():
    for pair in random_pairs(300, 12, "a b c d".split(), seed=1):
        reference, hypothesis = map(str.split, pair)
        steps = align_words(*pair)
        assert [a for kind, a, _ in steps if kind != "I"] == reference
        assert [b for kind, _, b in steps if kind != "D"] == hypothesis
        assert all((a == b) == (kind == "=") for kind, a, b in steps)
        assert all(
            (a == "") == (kind == "I") and (b == "") == (kind == "D") for kind, a, b in steps
        )
        errors = sum(kind != "=" for kind, _, _ in steps)
        assert errors == fewest_errors(reference, hypothesis)
        assert errors == sum(kind != "=" for kind, _, _ in align_words(*reversed(pair)))


def test_swapped_texts_swap_deletions_and_insertions():
    assert count_errors("call anna now", "call").tolist() == [[1, 0, 2, 0]]
    assert count_errors("call", "call anna now").tolist() == [[1, 0, 0, 2]]


def test_words_are_what_white_space_separates():
    assert count_errors("a\tb\nc", " a  b c ").tolist() == [[3, 0, 0, 0]]


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


@pytest.fixture(scope="module")
def chapter():
    """What chapter 14 defines to show errors, and does not export."""
    names = {**vars(evaluation), "html": html}
    for cell in nbformat.read(ROOT / "notebooks/14_evaluation.ipynb", 4).cells:
        if cell.cell_type == "code" and "def format_errors" in cell.source:
            exec(cell.source, names)
    return names


def test_marks_in_text(chapter):
    format_errors = chapter["format_errors"]
    steps = align_words("one two three", "zero one four")
    assert format_errors(steps) == "[+zero] one [two→four] [-three]"
    assert format_errors(align_words("one two", "one")) == "one [-two]"
    assert format_errors(align_words("one", "one two")) == "one [+two]"
    assert format_errors(align_words("one", "two")) == "[one→two]"
    assert format_errors([]) == ""


def test_marks_in_colour_say_it_in_words_too_and_escape(chapter):
    steps = align_words("a <b> c", 'a "&" c d')
    page = chapter["format_errors_html"](steps)
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


def test_without_an_error_the_interval_is_by_the_rule_of_three():
    right = torch.tensor([[6, 0, 0, 0]]).repeat(25, 1)
    assert bootstrap_interval(right, [*range(5)] * 5) == (0.0, pytest.approx(3 / 150, rel=2e-3))
    assert bootstrap_interval(right, level=0.99)[1] == pytest.approx(4.605 / 150, rel=1e-3)
    inserted = torch.tensor([[6, 0, 0, 9]]).repeat(25, 1)
    assert bootstrap_interval(inserted) == pytest.approx((1.5, 1.5))


def test_a_draw_of_wordless_clips_is_no_division_by_zero():
    counts = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]])
    assert bootstrap_rates(counts, draws=100).isfinite().all()


def test_many_clips_are_drawn_in_little_memory(monkeypatch):
    """A hundred draws at a time: the numbers are those of all draws at once."""
    counts = torch.tensor([[8, 0, 0, 0], [8, 0, 1, 0], [0, 2, 0, 3]]).repeat(14, 1)
    rows = torch.randint(42, (250, 42), generator=torch.Generator().manual_seed(7))
    assert torch.equal(bootstrap_rates(counts, draws=250, seed=7), error_rate(counts[rows]).float())
    drawn, randint = [], torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda n, shape, **how: drawn.append(shape) or randint(n, shape, **how)
    )
    bootstrap_rates(counts.repeat(400, 1), draws=500)
    assert sum(draws for draws, _ in drawn) == 500 and max(map(math.prod, drawn)) < 2_000_000


def summed_over_speakers():
    """Counts of 40 clips of 1 to 9 words by eight speakers who are not alike."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(1, 10, (40,), generator=generator)
    speakers = [f"speaker {i % 8}" for i in range(40)]
    p = torch.tensor([0.05 + 0.1 * (i % 8) for i in range(40)]) / words.sqrt()
    wrong = torch.tensor(
        [
            int((torch.rand(int(n), generator=generator) < q).sum())
            for n, q in zip(words, p, strict=True)
        ]
    )
    zero = 0 * wrong
    return torch.stack([words - wrong, wrong, zero, zero], dim=1), speakers


def by_scipy(counts):
    """The percentile interval of summed errors over summed words, clips drawn in pairs."""
    errors, words = counts[:, 1:].sum(1).numpy(), counts[:, :3].sum(1).numpy()
    result = scipy.stats.bootstrap(
        (errors, words), lambda e, w, axis: e.sum(axis) / w.sum(axis), paired=True,
        vectorized=True, method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    return result.confidence_interval


def test_the_bootstrap_sums_before_it_divides():
    """A bootstrap of the clips' mean rates lies elsewhere: short clips have more errors here."""
    counts, speakers = summed_over_speakers()
    words, errors = counts[:, :3].sum(1), counts[:, 1:].sum(1)
    mean_of_rates, rate = (errors / words).mean().item(), (errors.sum() / words.sum()).item()
    assert abs(mean_of_rates - rate) > 0.02, "this case proves nothing"
    for groups in (None, speakers):
        assert bootstrap_rates(counts, groups).mean().item() == pytest.approx(rate, abs=5e-3)
    np.testing.assert_allclose(bootstrap_interval(counts), by_scipy(counts), atol=4e-3)
    grouped = sum_by_group(counts, speakers)
    np.testing.assert_allclose(bootstrap_interval(counts, speakers), by_scipy(grouped), atol=8e-3)


def test_all_draws_of_three_clips():
    """27 draws by hand: 2 and 8 words, 2 errors in the short clip."""
    counts = torch.tensor([[8, 0, 0, 0], [8, 0, 0, 0], [0, 2, 0, 0]])
    draws = torch.cartesian_prod(*[torch.arange(3)] * 3)
    expected = sorted(set(error_rate(counts[draws]).tolist()))  # 0, 2/18, 4/12, 1
    found = bootstrap_rates(counts, draws=4000)
    assert sorted(set(found.double().round(decimals=6).tolist())) == pytest.approx(
        expected, abs=1e-5
    )
    assert (found == 0).double().mean().item() == pytest.approx(8 / 27, abs=0.03)


def test_speakers_are_drawn_whole():
    counts, speakers = summed_over_speakers()
    grouped = sum_by_group(counts, speakers)
    assert grouped.shape == (8, 4) and torch.equal(grouped.sum(0), counts.sum(0))
    assert torch.equal(grouped[3], counts[3::8].sum(0)), "in the order of appearance"
    assert torch.equal(bootstrap_rates(counts, speakers), bootstrap_rates(grouped))
    assert torch.equal(bootstrap_rates(counts, range(40)), bootstrap_rates(counts))
    alone = bootstrap_interval(counts, ["one speaker"] * 40)
    assert alone == pytest.approx([error_rate(counts).item()] * 2)
    # one speaker makes all errors: twenty clips of his prove no more than one
    wrong = torch.tensor([[0, 5, 0, 0]] * 20 + [[5, 0, 0, 0]] * 20)
    voices = ["bad"] * 20 + [f"good {i % 4}" for i in range(20)]
    clip_width, voice_width = (
        high - low for low, high in map(bootstrap_interval, (wrong, sum_by_group(wrong, voices)))
    )
    assert voice_width > 2 * clip_width


def test_the_interval_covers_the_truth_where_speakers_differ():
    """If voices differ, drawing clips covers the true rate too rarely; drawing voices does not."""
    generator, inside = torch.Generator().manual_seed(1), torch.zeros(2)
    voices = [voice for voice in range(30) for _ in range(10)]
    for _ in range(200):
        p = 0.2 * torch.rand(30, 1, generator=generator)
        wrong = (torch.rand(30, 50, generator=generator) < p).view(300, 5).sum(-1)
        counts = torch.stack([5 - wrong, wrong, 0 * wrong, 0 * wrong], dim=-1)
        for k, groups in enumerate((None, voices)):
            low, high = bootstrap_interval(counts, groups, draws=500)
            inside[k] += low <= 0.1 <= high
    assert inside[0] / 200 < 0.88 < inside[1] / 200


# The report


@pytest.fixture(scope="module")
def unseen():
    """What `load_test_clips` finds in the corpus."""
    return load_test_clips("corpus", Tokenizer.small(), ModelArgs.preset("cpu", device="cpu"))


def intervals_of(line):
    return re.findall(r"[\d.]+% to [\d.]+%", line)


def test_the_report_draws_speakers_where_they_are_known(capsys):
    references = ["one two three"] * 12
    hypotheses = ["one two three"] * 8 + ["one four"] * 4
    counts = count_errors(references, hypotheses)

    def line(speakers):
        print_wer("greedy", references, hypotheses, speakers)
        return capsys.readouterr().out

    def percent(groups):
        return "{:.1%} to {:.1%}".format(*bootstrap_interval(counts, groups))

    speakers = ["a", "b", "c"] * 2 + ["a", "b"] + ["d"] * 4
    assert percent(speakers) != percent(None), "this case proves nothing"
    assert "22.2%" in line(speakers)
    assert intervals_of(line(speakers)) == [percent(None), percent(speakers)]
    for unknown in ([None] * 12, ["N/A"] * 12, ["", None, "N/A"] * 4):
        assert intervals_of(line(unknown)) == [percent(None)] and "unknown" in line(unknown)
    for few in (["a"] * 12, ["a", "b"] * 6, ["a", "b", "N/A"] * 4):
        assert intervals_of(line(few)) == [percent(None)] and "too few speakers" in line(few)
    mixed = [*"aaabbbcc"] + ["N/A"] * 4  # who is unknown stands for himself
    alone = [*"aaabbbcc"] + list("5678")
    assert intervals_of(line(mixed)) == [percent(None), percent(alone)]
    references, hypotheses, speakers = (x[:9] for x in (references, hypotheses, speakers))
    assert not intervals_of(line(["a"] * 9)) and "too few clips" in line(["a"] * 9)
    assert len(intervals_of(line(speakers))) == 1, "nine clips of four speakers"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere.safetensors"], "nowhere.safetensors"),
        (["nowhere.safetensors", "--device", "toaster"], "toaster"),
    ],
)
def test_the_command_says_what_is_wrong(words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *words])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and sentence in said and "\n" not in said


def test_transcripts_are_greedy_in_the_order_of_the_clips(capsys, monkeypatch):
    """Of the shipped model; rescoring chooses other texts, and the report says the same of both."""
    path = DATA_DIR / "model.safetensors"
    model, tokenizer, _ = load_checkpoint(path, "cpu")
    clips, what = load_test_clips("corpus", tokenizer, model.args)
    references, greedy = transcribe_dataset(model, clips)
    assert references == clips.texts
    table = load_clips("corpus", "test_single_words").select(range(60, 160))
    some = ClipDataset(table, tokenizer, model.args)
    _, plain = transcribe_dataset(model, some, suppress_blank=False)  # as in validation
    assert plain != transcribe_dataset(model, some)[1], "this case proves nothing"
    for indices in some.batches():
        with torch.inference_mode():
            states, inputs, _ = encode_clips(model, some, indices)
            texts = greedy_transcripts(model, tokenizer, states, inputs.shape[1])
        assert [plain[i] for i in indices] == texts
    _, rescored = transcribe_dataset(model, clips, **ctc_rescoring(model))
    rates = [word_error_rate(references, texts) for texts in (rescored, greedy)]
    assert rates[0] < rates[1] < 0.02
    monkeypatch.setattr(evaluation, "load_test_clips", lambda *a, **o: (clips, what))
    monkeypatch.setattr(  # decoding once is enough
        evaluation,
        "transcribe_dataset",
        lambda model, clips, **o: (clips.texts, rescored if o else greedy),
    )
    print_report(path, "corpus", "cpu", examples=2)
    lines = capsys.readouterr().out.splitlines()
    for name, texts in {"joint CTC/attention rescoring": rescored, "greedy": greedy}.items():
        (line,) = [line for line in lines if line.startswith(f"  {name}")]
        counts = count_errors(references, texts)
        assert f"{error_rate(counts):.1%}" in line
        expected = [bootstrap_interval(counts, groups) for groups in (None, clips.speakers)]
        assert intervals_of(line) == [f"{low:.1%} to {high:.1%}" for low, high in expected]
    shown = [line.split(": ")[1] for line in lines if line.startswith("  hypothesis")]
    assert shown == [rescored[0], rescored[(len(clips) + 1) // 2]]
    assert lines[0] == "evaluation: kept 357 of 365 clips (0.2 of 0.2 h): 8 without text"
    model.ctc_head = None
    assert ctc_rescoring(model) == {}


def test_what_is_tested(unseen, tmp_path, capsys):
    """Unseen voices, else a test split, else a validation split, else what is held out."""
    args = ModelArgs.preset("cpu", device="cpu", min_kept=0.0)
    tokenizer = Tokenizer.small()

    def tested(**options):
        clips, what = load_test_clips(tmp_path, tokenizer, args, **options)
        return sorted(set(clips.texts)), what

    def add(split, *texts):
        rows = load_clips("corpus", "validation").select(range(len(texts))).to_list()
        rows = [{**row, "text": text} for row, text in zip(rows, texts, strict=True)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{split}.parquet")

    add("train", "one", "two")
    assert len(tested()[0]) == 1 and "held out" in tested()[1]
    assert tested(all=True) == (["one", "two"], "clips, all there are")
    add("validation", "three", "four")
    assert tested() == (["four", "three"], "clips of the validation split")
    assert tested(all=True)[0] == ["four", "one", "three", "two"]
    add("test", "five")
    assert tested() == tested(all=True) == (["five"], "clips of the test split")
    add("test_unseen_voices", "six")
    assert tested() == tested(all=True) == (["six"], "unseen sentences by unseen voices")
    assert unseen[1] == tested()[1]


def test_of_a_large_test_split_a_sample_is_tested(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "draw_rows", partial(draw_rows, most=3))
    args, tokenizer = ModelArgs.preset("cpu", device="cpu"), Tokenizer.small()
    rows = [
        row for row in load_clips("corpus", "validation").select(range(9)) if row["text"][0] != "<"
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    assert len(load_test_clips(tmp_path, tokenizer, args)[0]) == 3
    assert f"evaluation: 3 of {len(rows)} clips, drawn at random" in capsys.readouterr().out
    assert len(load_test_clips(tmp_path, tokenizer, args, all=True)[0]) == len(rows)
    assert capsys.readouterr().out == ""


def test_the_hub_is_tested_on_its_test_split(monkeypatch, capsys):
    """However much of it does not fit: that is known, and only said."""
    asked, rows = [], load_clips("corpus", "test_unseen_voices").select(range(8)).to_list()
    rows = [{**row, "text": row["text"] + " SEVEN" * 30 * (i > 1)} for i, row in enumerate(rows)]

    def hub(source, split="train", stream=False):
        asked.append((source, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(evaluation, "load_clips", hub)
    args = ModelArgs.preset("cpu", device="cpu")
    clips, what = load_test_clips("gigaspeech:xs", Tokenizer.small(), args)
    assert asked == [("gigaspeech:xs", "test")] and what == "clips of the test split"
    assert len(clips) == 2 and "evaluation: kept 2 of 8 clips" in capsys.readouterr().out


def test_strings_of_digits_are_counted_apart_too():
    """Whisper's normaliser makes one word of them; it is a choice for every model."""
    english, ours = Tokenizer.whisper(multilingual=False), Tokenizer.small()
    forms = comparable_texts(english)
    said, heard = "Call four seven two, please!", "call 473 please"
    assert [word_error_rate(f(said), f(heard)) for f in forms.values()] == [1 / 3, 1 / 5]
    assert [form("$20,000 in 1999") for form in forms.values()] == [
        "$20000 in 1999",
        "$2 0 0 0 0 in 1 9 9 9",
    ]
    assert list(comparable_texts(ours)) == [""] and comparable_texts(ours)[""]("A, b") == "A, b"
    assert comparable_texts(ours, True)[""]("It's COLOUR!") == "it is color"
    assert comparable_texts(english, False)[""]("A, b") == "A, b"


def test_the_report_of_other_words_counts_clips_with_text(monkeypatch, capsys):
    texts = lambda m, clips, **o: (clips.texts, ["one two"] * 90 + [""] * (len(clips) - 90))  # noqa: E731
    monkeypatch.setattr(evaluation, "transcribe_dataset", texts)
    print_report(DATA_DIR / "model.safetensors", "corpus", "cpu", 0, split="test_other_words")
    heads, _, *rows = capsys.readouterr().out.splitlines()[-4:]
    assert heads.startswith("Share of clips with text on 357 clips of test_other_words")
    assert all(" 25.2%   " in row for row in rows), "90 of 357"


def test_a_split_that_is_not_there_is_named():
    args = ModelArgs.preset("cpu", device="cpu")
    with pytest.raises(ValueError, match="test_absent"):
        load_test_clips("corpus", Tokenizer.small(), args, split="test_absent")


def test_the_report_takes_its_options(unseen, monkeypatch, capsys):
    """All clips, the normaliser, no examples, and limits of its own."""
    seen = []

    def load(source, tokenizer, args, all, split):
        seen.append((source, args.min_kept, args.skip_broken, all, split))
        return unseen

    monkeypatch.setattr(evaluation, "load_test_clips", load)
    monkeypatch.setattr(
        evaluation, "transcribe_dataset", lambda m, clips, **o: (clips.texts, clips.texts)
    )
    path = DATA_DIR / "model.safetensors"
    options = dict(all=True, normalise=True, split="test_a", min_kept=0, skip_broken=True)
    print_report(path, "mine", "cpu", 0, **options)
    assert seen == [("mine", 0, True, True, "test_a")]
    said = capsys.readouterr().out
    assert "reference:" not in said and said.count("    digits apart  ") == 2
    print_report(path, "mine", "cpu")
    assert seen[1] == ("mine", 0.5, False, False, None)
    said = capsys.readouterr().out
    assert said.count("reference:") == 5 and "digits apart" not in said


def test_the_rate_of_an_hours_text_takes_milliseconds():
    """A table of 9,000 by 9,000 words would take minutes and hundreds of megabytes."""
    draw = random.Random(0)
    said = [f"w{draw.randrange(2000)}" for _ in range(9000)]
    heard = [word for word in said if draw.random() > 0.05]
    heard = [word if draw.random() > 0.05 else "x" for word in heard]
    start = time.process_time()
    hits, *errors = count_errors(" ".join(said), " ".join(heard))[0].tolist()
    assert time.process_time() - start < 2
    assert hits + errors[0] + errors[1] == 9000 and sum(errors) == Levenshtein.distance(said, heard)


def test_a_tenth_that_was_not_trained_on_is_tested(tmp_path, capsys):
    """Of a folder without splits: the clips that training holds out."""
    rows = load_clips("corpus", "validation").select(range(20)).to_list()
    rows = [{**row, "text": f"word {chr(97 + i)}"} for i, row in enumerate(rows)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    args, tokenizer = ModelArgs.preset("cpu", device="cpu"), Tokenizer.small()
    tested, _ = load_test_clips(tmp_path, tokenizer, args)
    train, validation = load_splits(args, tmp_path)
    assert tested.texts == validation.texts and len(tested) <= 4 and len(train) >= 16


def test_references_are_normalised_as_transcripts_are(unseen, monkeypatch, capsys):
    """What is equal before is equal afterwards, in every form of the texts."""
    same = lambda m, clips, **o: (clips.texts, clips.texts)  # noqa: E731
    monkeypatch.setattr(evaluation, "transcribe_dataset", same)
    monkeypatch.setattr(evaluation, "load_test_clips", lambda *a, **o: unseen)
    print_report(DATA_DIR / "model.safetensors", "corpus", "cpu", 0, normalise=True)
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert all(re.match(r"  .{30}  0.0%   0.0% to 0.2% ", row) for row in rows)
