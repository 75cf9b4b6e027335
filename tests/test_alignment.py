"""Word times: equal to openai-whisper with the same weights; splits, marks, bad input."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import whisper.model as openai
from whisper import timing
from whisper.tokenizer import get_tokenizer

from utils.alignment import (
    CLOSING,
    OPENING,
    WordTiming,
    alignment_matrix,
    cross_attention_weights,
    default_alignment_heads,
    dtw,
    find_alignment,
    group_words,
    median_filter,
    merge_punctuations,
    split_to_word_tokens,
    split_tokens_on_unicode,
    token_start_times,
    word_timestamps,
)
from utils.checkpoints import load_official
from utils.config import ModelArgs
from utils.model import Whisper
from utils.tokenizer import Tokenizer

SMALL = Tokenizer.small()
TEXTS = [
    " It's ten past nine (or so), isn't it?",
    "Café “Zoë” – naïve 🙂!  Two  spaces\n",
    "今天天气很好，我们去公园吧。",
    " one",
    ".",
]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    shape = dict(embeddings_dims=16, no_of_heads=2, no_of_encoder_layers=1, no_of_decoder_layers=3)
    model = Whisper(ModelArgs.preset("cpu", device="cpu", **shape)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


def brute_force(cost):
    """The smallest sum of a path, by trying them all."""
    N, M = cost.shape
    here, rest = cost[0, 0], []
    for i, j in ((1, 1), (1, 0), (0, 1)):
        if i < N and j < M:
            rest.append(brute_force(cost[i:, j:]))
    return here + min(rest, default=0)


def test_dtw_is_a_path_and_the_cheapest():
    random = np.random.default_rng(0)
    for _ in range(100):
        cost = random.normal(size=random.integers(1, 6, size=2))
        rows, columns = dtw(cost)
        assert (rows[0], columns[0]) == (0, 0)
        assert (rows[-1] + 1, columns[-1] + 1) == cost.shape
        steps = set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True))
        assert steps <= {(0, 1), (1, 0), (1, 1)}
        assert cost[rows, columns].sum() == pytest.approx(brute_force(cost), abs=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_dtw_equals_openai(ties):
    random = np.random.default_rng(1)
    shapes = [*random.integers(1, 40, size=(200, 2)), (1, 1), (1, 30), (30, 1), (100, 700)]
    for shape in shapes:
        cost = random.normal(size=shape)
        cost = cost.round() if ties else cost
        assert np.array_equal(dtw(cost), timing.dtw(torch.from_numpy(cost))), f"{shape}"
        single = torch.from_numpy(cost).float()
        assert np.array_equal(dtw(single), timing.dtw(single)), f"float32 {shape}"


@pytest.mark.parametrize(
    "cost", [np.zeros(3), np.zeros((0, 4)), np.full((2, 2), np.nan), -np.full((2, 3), np.inf)]
)
def test_dtw_refuses_what_is_no_table(cost):
    with pytest.raises(ValueError, match=r"`cost` must be a finite \(tokens, states\) table"):
        dtw(cost)


@pytest.mark.parametrize("shape", [(1, 8), (4, 9), (2, 3, 50), (3, 4, 7), (3, 4), (3, 3), (2, 1)])
@pytest.mark.parametrize("width", [3, 7])
def test_median_equals_openai(shape, width):
    torch.manual_seed(0)
    x = torch.randn(shape)
    assert torch.equal(median_filter(x, width), timing.median_filter(x, width))


def test_the_table_survives_what_would_divide_zero_by_zero():
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 5, 20)
    weights[..., 8:11] = 0  # nobody looks there
    weights[:, :, 2, :12] = 0  # and this token looks only beyond the sound
    table = alignment_matrix(weights, [(0, 1), (1, 2)], 12)
    assert table.shape == (5, 12) and table.isfinite().all()
    dtw(-table)
    alone = alignment_matrix(weights, [(0, 1)], 12), alignment_matrix(weights, [(1, 2)], 12)
    torch.testing.assert_close(table, sum(alone) / 2)


def test_upper_heads_are_openais_default():
    for layers in (1, 2, 3, 4):
        theirs = openai.Whisper(openai.ModelDimensions(80, 4, 8, 2, 1, 20, 8, 8, 2, layers))
        args = ModelArgs.preset("cpu", no_of_decoder_layers=layers, no_of_heads=2)
        assert default_alignment_heads(args) == list(
            map(tuple, theirs.alignment_heads.indices().T.tolist())
        )


@pytest.mark.parametrize(
    ("multilingual", "language", "languages"),
    [(False, "en", 99), (True, "en", 99), (True, "de", 99), (True, "zh", 99), (True, "yue", 100)],
)
def test_words_equal_openais(multilingual, language, languages):
    ours = Tokenizer.whisper(multilingual, language, num_languages=languages)
    theirs = get_tokenizer(multilingual, language=language, num_languages=languages)
    generator = torch.Generator().manual_seed(0)
    rows = [ours.encode(text) for text in TEXTS]
    rows += [torch.randint(50_256, (n % 15,), generator=generator).tolist() for n in range(400)]
    rows += [torch.randint(256, (n % 9,), generator=generator).tolist() for n in range(400)]
    whole = 0
    for number, tokens in enumerate(rows):
        found = split_to_word_tokens(tokens, ours)
        assert sum((part for _, part in found), []) == tokens, "a token was lost"
        words, parts = theirs.split_to_word_tokens([*tokens, theirs.eot])
        if parts and parts[-1] == [theirs.eot]:  # else it lost the rest behind broken bytes
            assert found == list(zip(words, parts, strict=True))[:-1]
            whole += 1
        assert parts[-1:] == [[theirs.eot]] or number >= len(TEXTS), "real text was lost"
    assert whole > 500


def test_words_of_the_other_tokenizers():
    for tokenizer in (SMALL, Tokenizer.gpt2()):
        tokens = tokenizer.encode("turn on the light, it is dark")
        words = [word for word, _ in split_to_word_tokens(tokens, tokenizer)]
        assert words == ["turn", " on", " the", " light", ",", " it", " is", " dark"]
    sign = SMALL.encode("日")
    assert len(sign) == 3 and split_tokens_on_unicode(sign, SMALL) == [("日", sign)]
    assert split_to_word_tokens([], SMALL) == []


def pair(multilingual, languages, seed):
    torch.manual_seed(seed)
    vocabulary = 51864 if not multilingual else 51766 + languages
    shape = 80, 100, 32, 2, 1, vocabulary, 64, 32, 2, 4
    theirs = openai.Whisper(openai.ModelDimensions(*shape)).eval()
    for name, weight in theirs.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.0 if "cross_attn.query" in name else 0.2)
    heads = theirs.alignment_heads.to_dense()
    if seed % 2:
        heads = torch.rand(4, 2) < 0.4
        heads[1, 1] = True
    theirs.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return load_official(theirs), theirs


@pytest.mark.parametrize(
    ("multilingual", "language", "task", "languages"),
    [
        (False, "en", "transcribe", 99),
        (True, "en", "transcribe", 99),
        (True, "fr", "translate", 99),
        (True, "zh", "transcribe", 99),
        (True, "yue", "transcribe", 100),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_times_equal_openais(multilingual, language, task, languages, seed):
    ours, theirs = pair(multilingual, languages, seed)
    mine = Tokenizer.whisper(multilingual, language, task, languages)
    judge = get_tokenizer(multilingual, language=language, task=task, num_languages=languages)
    lengths = set()
    for k, text in enumerate([*TEXTS, ""]):
        tokens, mel, frames = mine.encode(text), torch.randn(80, 200), 200 - 31 * k
        found = find_alignment(ours, mel, tokens, mine, frames)  # with the heads of theirs
        wanted = timing.find_alignment(theirs, judge, tokens, mel, frames)
        names = "word tokens start end".split()
        for a, b in zip(found, wanted, strict=True):
            assert [getattr(a, n) for n in names] == [getattr(b, n) for n in names]
            assert a.probability == pytest.approx(b.probability, abs=1e-5)
            lengths.add(round(a.end - a.start, 2))
        timing.merge_punctuations(wanted, OPENING, CLOSING)
        merged = word_timestamps(ours, mel, tokens, mine, frames)
        assert [(w.word, w.start, w.end) for w in merged] == [
            (w.word, w.start, w.end) for w in wanted if w.word
        ]
    assert len(lengths) > 6, "all words are equally long: the test is too weak"


def one_too_late(ours, mel, tokens, tokenizer, frames):
    """The likeliest error: a row belongs to the token that was read, not to the next one."""
    sequence = [*tokenizer.prompt, *tokens, tokenizer.end]
    weights = cross_attention_weights(ours, mel, sequence)[1]
    matrix = alignment_matrix(weights, ours.alignment_heads, frames // ours.args.stride)
    starts = token_start_times(matrix[len(tokenizer.prompt) :], ours.args).tolist()
    words = split_to_word_tokens(tokens, tokenizer)
    return group_words(words, starts, [0.0] * len(tokens))


def test_rows_taken_one_too_late_are_noticed():
    ours, theirs = pair(True, 99, seed=1)
    mine, reference = Tokenizer.whisper(), get_tokenizer(True, language="en", task="transcribe")
    tokens, mel, frames = mine.encode(TEXTS[0]), torch.randn(80, 200), 163
    wanted = timing.find_alignment(theirs, reference, tokens, mel, frames)
    times = [(word.start, word.end) for word in wanted]
    right = find_alignment(ours, mel, tokens, mine, frames)
    wrong = one_too_late(ours, mel, tokens, mine, frames)
    assert [(word.start, word.end) for word in right] == times
    assert [(word.start, word.end) for word in wrong] != times


def test_marks_equal_openais():
    random = np.random.default_rng(0)
    signs = [" ", " (", ' "', "'", ",", ".", "?!", " -", " ¿", " word", " two", "three", "。", "x "]
    signs += [")", ""]
    for _ in range(2000):
        row = [signs[i] for i in random.integers(len(signs), size=random.integers(0, 9))]
        theirs = [timing.WordTiming(text, [k], k, k + 1, k / 10) for k, text in enumerate(row)]
        timing.merge_punctuations(theirs, OPENING, CLOSING)
        ours = merge_punctuations([WordTiming(t, [k], k, k + 1, k / 10) for k, t in enumerate(row)])
        assert [vars(word) for word in ours if word.word] == [
            vars(word) for word in theirs if word.word
        ]


def test_the_small_model_has_states_of_40_ms(small):
    mel, tokens = torch.randn(80, 203), SMALL.encode("seven zero four")
    words = word_timestamps(small, mel, tokens, SMALL)
    assert [word.word for word in words] == ["seven", " zero", " four"]
    assert words[0].start == 0 and words[-1].end <= 2.0
    for before, after in zip(words[:-1], words[1:], strict=True):
        assert before.end == after.start
        assert before.end / 0.04 == pytest.approx(round(before.end / 0.04))
    assert all(0 < word.probability < 1 for word in words)
    table = -torch.ones(3, 10)
    table[0, :4], table[1, 4:7], table[2, 7:] = 1, 1, 1
    assert token_start_times(table, small.args).tolist() == pytest.approx([0, 0.16, 0.28])


def test_frames_cut_the_padding_away(small):
    mel, tokens = torch.randn(80, 200), SMALL.encode("seven zero four")
    words = word_timestamps(small, mel, tokens, SMALL, frames=80)
    assert words[-1].end < 0.8 + 1e-9
    mixed = mel.clone()
    mixed[:, 150:] = 0  # the padding is heard, but never pointed at
    assert word_timestamps(small, mixed, tokens, SMALL, frames=80)[-1].end < 0.8


def test_listening_leaves_the_model_as_it_was(small):
    mel, tokens = torch.randn(80, 100), [*SMALL.prompt, *SMALL.encode("two"), SMALL.end]
    logits, weights = cross_attention_weights(small.train(), mel, tokens)
    assert small.training and weights.shape == (3, 2, len(tokens), 25)
    assert all(layer.cross_attn.recorded is None for layer in small.decoder.blocks)
    small.eval()
    expected = small(mel[None], torch.tensor([tokens]))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(tokens=[1, SMALL.end]), "`tokens` must be text alone"),
        (dict(tokens=[-1]), "`tokens` must be text alone"),
        (dict(tokens=list(range(40))), "shorten the text"),
        (dict(mel=torch.randn(40, 100)), "`mel` must be"),
    ],
)
def test_what_cannot_be_aligned_is_refused(small, change, sentence):
    given = dict(mel=torch.randn(80, 100), tokens=SMALL.encode("two")) | change
    with pytest.raises(ValueError, match=sentence):
        word_timestamps(small, tokenizer=SMALL, **given)


def test_no_words_no_times(small):
    assert word_timestamps(small, torch.randn(80, 100), [], SMALL) == []


def test_heads_that_a_model_has_lost_are_dropped(small):
    mel, tokens = torch.randn(80, 100), SMALL.encode("seven zero four")
    try:
        for own, used in (
            ([(0, 1), [2, 0], (3, 0), (1, 2), (-1, 0)], [(0, 1), (2, 0)]),
            ([(24, 3)], default_alignment_heads(small.args)),
        ):
            small.alignment_heads = used
            expected = word_timestamps(small, mel, tokens, SMALL)
            small.alignment_heads = own
            assert word_timestamps(small, mel, tokens, SMALL) == expected
    finally:
        small.alignment_heads = None


def test_states_give_the_times_of_their_log_mel(small):
    tokens, mel = SMALL.encode("seven zero four"), torch.randn(80, small.args.max_t)
    states = small.encoder(mel[None])[0].detach()
    for frames in (None, 123):
        expected = word_timestamps(small, mel, tokens, SMALL, frames)
        assert word_timestamps(small, states, tokens, SMALL, frames) == expected
    whole = word_timestamps(small, mel, tokens, SMALL)
    assert word_timestamps(small, states, tokens, SMALL, 501) == whole, "more than there are"
    assert all(word.end == 0 for word in word_timestamps(small, mel, tokens, SMALL, frames=3))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_other_precision_times_the_same_words(small, kind):
    mel, tokens = torch.randn(80, 200), SMALL.encode("seven zero four")
    words = word_timestamps(copy.deepcopy(small).to(kind), mel, tokens, SMALL)
    assert [word.word for word in words] == ["seven", " zero", " four"]
    assert words[0].start == 0 and 0 < words[-1].end <= 2.0


def test_threads_do_not_disturb_each_other(small):
    """Each has its own text and audio; the model trains, with dropout, and goes on to."""
    texts = ["one", "seven zero four", "two two two two two", "nine eight"]
    jobs = [(torch.randn(80, 40 + 20 * i), SMALL.encode(text)) for i, text in enumerate(texts)] * 6
    expected = [word_timestamps(small, mel, tokens, SMALL) for mel, tokens in jobs]
    for module in small.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    small.train()
    small.encoder.eval()  # frozen, say
    modes = [module.training for module in small.modules()]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: word_timestamps(small, *job, SMALL), jobs))
    assert [module.training for module in small.modules()] == modes
    small.eval()
    for mine, right in zip(sum(found, []), sum(expected, []), strict=True):
        assert (mine.word, mine.start, mine.end) == (right.word, right.start, right.end)
        assert mine.probability == pytest.approx(right.probability, abs=1e-5)
