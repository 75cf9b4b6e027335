"""Decoding: token for token openai-whisper's, batches, sampling, our own models, bad input."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
import whisper
from references import random_tiny
from whisper.decoding import BeamSearchDecoder, MaximumLikelihoodRanker
from whisper.model import ModelDimensions

from utils import decoding
from utils.attention import KVCache
from utils.audio import HOP_LENGTH, load_audio, log_mel_spectrogram, pad_or_trim
from utils.checkpoints import external_name, full_state_dict, load_official
from utils.config import ModelArgs
from utils.data import clean_text, load_clips, teacher_forcing
from utils.decoding import (
    DecodingOptions,
    HotwordTrie,
    Hypotheses,
    LogitFilters,
    beam_step,
    compact_slots,
    ctc_rescoring,
    ctc_scores,
    decode,
    greedy_step,
    non_speech_tokens,
    rank_hypotheses,
)
from utils.loss import token_loss
from utils.model import CTC_ALPHABET, Whisper, ctc_losses, make_ctc_head
from utils.tokenizer import Tokenizer

ENGLISH, MULTILINGUAL, LARGE_V3 = 51864, 51865, 51866
BANDS, STATES, CONTEXT = 80, 30, 32


@torch.no_grad()
def twins(vocabulary, seed, ending=6):
    """The same random weights in openai-whisper's model and in ours; `ending` makes texts end."""
    torch.manual_seed(seed)
    shape = ModelDimensions(BANDS, STATES, 16, 2, 1, vocabulary, CONTEXT, 16, 2, 1 + seed % 2)
    theirs = whisper.model.Whisper(shape).eval()
    for weight in theirs.parameters():
        if weight.ndim > 1:
            weight.normal_(std=1.6 * weight[0].numel() ** -0.5)
    theirs.decoder.ln.bias.normal_()
    end, bias = vocabulary - 1501 - 99 - 8 - (vocabulary == LARGE_V3), theirs.decoder.ln.bias
    assert Tokenizer.whisper(vocabulary > ENGLISH).end == end
    theirs.decoder.token_embedding.weight[end] += ending * bias / bias.square().sum()
    return theirs, load_official(theirs)


def sound(seed, clips=None):
    shape = (BANDS, 2 * STATES) if clips is None else (clips, BANDS, 2 * STATES)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_options(draw, vocabulary):
    """Options of one case, as a dict that both libraries understand."""
    options = dict(
        without_timestamps=draw.random() < 0.4,
        suppress_blank=draw.random() < 0.8,
        suppress_tokens=draw.choice(["-1", "-1", "", "5,6,7", [1, 2, -1], [11, 12], None]),
        max_initial_timestamp=draw.choice([1.0, 1.0, None, 5.0, 0.5, 0.0]),
        sample_len=draw.choice([None, None, None, 1, 5, 12]),
        length_penalty=draw.choice([None, None, 0.0, 0.4, 1.0]),
        prompt=draw.choice([None, None, "And so it", list(range(300, 345))]),
        prefix=draw.choice([None, None, " well then", [400, 401, 402]]),
        language="en",
    )
    if draw.random() < 0.65:
        options["beam_size"] = draw.choice([1, 2, 3, 5])
        options["patience"] = draw.choice([None, 0.6, 1.0, 2.0, 3.5])
    if vocabulary > ENGLISH:
        options["language"] = draw.choice([None, None, "en", "de", "ja"])
        options["task"] = draw.choice(["transcribe", "translate"])
    return options


def assert_same(ours, theirs):
    assert ours.tokens == theirs.tokens
    assert (ours.text, ours.language) == (theirs.text, theirs.language)
    for name in ("avg_logprob", "no_speech_prob", "compression_ratio", "temperature"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-4), name
    torch.testing.assert_close(ours.audio_features, theirs.audio_features, atol=1e-4, rtol=0)


CASES = 14  # of each model; times 3 vocabularies, times 5 models: 210


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("vocabulary", [ENGLISH, MULTILINGUAL, LARGE_V3])
def test_tokens_are_those_of_openai_whisper(vocabulary, seed):
    theirs, ours = twins(vocabulary, seed)
    draw, lengths = random.Random(seed), set()
    for case in range(CASES):
        options, mel = random_options(draw, vocabulary), sound(100 * seed + case)
        want = whisper.decode(theirs, mel, whisper.DecodingOptions(fp16=False, **options))
        assert_same(decode(ours, mel, DecodingOptions(**options)), want)
        lengths.add(len(want.tokens))
    assert len(lengths) > 2, "the outputs hardly vary: the comparison proves little"


@pytest.mark.parametrize("options", [{}, {"without_timestamps": True, "prompt": "So"}])
@pytest.mark.parametrize("vocabulary", [ENGLISH, MULTILINGUAL])
def test_a_batch_equals_openai_whisper(vocabulary, options):
    theirs, ours = twins(vocabulary, seed=13, ending=9 if vocabulary == ENGLISH else 6.5)
    language, mels = None if vocabulary > ENGLISH else "en", sound(5, clips=16)
    settings = whisper.DecodingOptions(fp16=False, language=language, **options)
    results = decode(ours, mels, language=language, **options)
    for mine, theirs_one in zip(results, whisper.decode(theirs, mels, settings), strict=True):
        assert_same(mine, theirs_one)
    assert len({len(result.tokens) for result in results}) > 2, "too few different lengths"


KINDS = [(ENGLISH, None), (ENGLISH, 3), (MULTILINGUAL, 2)]


@pytest.mark.parametrize("vocabulary, beam_size", KINDS)
def test_company_changes_no_text(vocabulary, beam_size):
    _, ours = twins(vocabulary, seed=13, ending=9 if vocabulary == ENGLISH else 6.5)
    mels = sound(7, clips=9)
    together = decode(ours, mels, beam_size=beam_size)
    for mel, result in zip(mels, together, strict=True):
        alone = decode(ours, mel, beam_size=beam_size)
        assert (alone.tokens, alone.language) == (result.tokens, result.language)
        assert alone.avg_logprob == pytest.approx(result.avg_logprob, abs=1e-5)


@pytest.mark.parametrize("beam_size", [None, 3])
def test_finished_rows_leave_and_sound_is_kept_once_per_clip(beam_size, monkeypatch):
    _, ours = twins(ENGLISH, seed=13, ending=9)
    read, heard, once = [], [], ours.decoder.features

    def features(tokens, states, caches):
        result = once(tokens, states, caches)
        read.append(len(tokens))
        heard.append({len(audio.keys) for _, audio in caches})
        return result

    monkeypatch.setattr(ours.decoder, "features", features)
    results = decode(ours, sound(7, clips=9), beam_size=beam_size)
    lengths = [len(result.tokens) for result in results]
    assert read[0] == 9 and heard[0] == {9}
    assert read[1:] == sorted(read[1:], reverse=True) and read[-1] < read[1]
    assert all(rows == {n // (beam_size or 1)} for n, rows in zip(read[1:], heard[1:], strict=True))
    if beam_size is None:  # a clip of n tokens is read at the prompt and after each of the n
        room = CONTEXT // 2
        assert sum(read[1:]) == sum(min(length, room - 1) for length in lengths)


def from_corpus(split, count, frames):
    """Texts of so many clips, and their log-mel (count, 80, frames)."""
    table = load_clips("corpus", split).take(4 * count)
    rows = [row for row in table if clean_text(row["text"])][:count]  # without garbage
    audio = [load_audio(row["audio"]["bytes"]) for row in rows]
    padded = torch.stack([pad_or_trim(sound, frames * HOP_LENGTH) for sound in audio])
    return [clean_text(row["text"]) for row in rows], log_mel_spectrogram(padded)


@pytest.fixture(scope="module")
def tiny():
    return random_tiny(51865)


def test_the_real_shape_of_tiny_equals_openai_whisper(tiny, one_thread):
    (theirs, ours), mels = tiny, from_corpus("validation", 2, 3000)[1]
    texts, languages = set(), set()
    for mel in mels:
        states, mine = (model.encoder(mel[None])[0].detach() for model in (theirs, ours))
        assert (mine - states).abs().max() < 1e-5
        for beam_size in (None, 5):
            for without in (False, True):
                options = dict(beam_size=beam_size, without_timestamps=without, sample_len=20)
                want = whisper.decode(
                    theirs, states, whisper.DecodingOptions(fp16=False, **options)
                )
                assert_same(decode(ours, mine, **options), want)
                texts.add(want.text)
                languages.add(want.language)
    assert len(texts) > 5 and len(languages) > 1, "the texts hardly vary: the test is too weak"


@pytest.fixture(scope="module")
def taught(one_thread):
    """A narrow model that has learnt eight sentences, as openai-whisper's and ours; the texts."""
    torch.manual_seed(0)
    args = ModelArgs(max_t=500, embeddings_dims=64, no_of_heads=2, no_of_encoder_layers=1)
    args = replace(args, no_of_decoder_layers=1, tgt_vocab_size=ENGLISH, block_size=64)
    ours = Whisper(replace(args, dropout=0.0, attn_dropout=0.0, device="cpu"))
    tokenizer, (texts, mels) = Tokenizer.for_args(ours.args), from_corpus("train", 8, 500)
    tokens = [tokenizer.encode(" " + text) for text in texts]
    inputs, labels = teacher_forcing(tokens, tokenizer.prompt, tokenizer.end)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0)
    for _ in range(150):
        loss = token_loss(ours, ours.encoder(mels), inputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    theirs = whisper.model.Whisper(ModelDimensions(80, 250, 64, 2, 1, ENGLISH, 64, 64, 2, 1))
    tensors = full_state_dict(ours.eval()).items()
    theirs.load_state_dict({external_name(name, "openai"): tensor for name, tensor in tensors})
    return theirs.eval(), ours, texts, mels


@pytest.mark.parametrize("beam_size", [None, 5])
def test_a_trained_model_writes_what_openai_whisper_writes(taught, beam_size):
    theirs, ours, texts, mels = taught
    options = dict(beam_size=beam_size, without_timestamps=True, language="en")
    mels = torch.cat([mels, from_corpus("validation", 8, 500)[1]])  # and eight that it never heard
    settings = whisper.DecodingOptions(fp16=False, **options)
    want = [whisper.decode(theirs, mel, settings) for mel in mels]  # its beams take one at a time
    results = decode(ours, mels, **options)
    for mine, right in zip(results, want, strict=True):
        assert_same(mine, right)
    written = [result.text for result in results]
    if beam_size is None:  # beams stop early on so sure a model: see notebook 13
        assert written[:8] == texts, "not taught well: the test is too weak"
    assert len(set(written)) > 7, "the texts hardly vary: the test is too weak"


@pytest.mark.parametrize("best_of", [None, 4])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_samples_are_those_of_openai_whisper_with_the_same_seed(temperature, best_of):
    theirs, ours = twins(ENGLISH, seed=3)
    for seed in range(4):
        options = dict(temperature=temperature, best_of=best_of, language="en")
        torch.manual_seed(seed)
        want = whisper.decode(theirs, sound(seed), whisper.DecodingOptions(fp16=False, **options))
        torch.manual_seed(seed)
        assert_same(decode(ours, sound(seed), **options), want)


def test_sampling_follows_the_softmax_at_the_temperature():
    torch.manual_seed(0)
    logits, draws = torch.tensor([[1.0, 0.0, 2.0, -1.0]]), 20_000
    hypotheses = Hypotheses(1, draws, end=3)
    greedy_step(hypotheses, logits.log_softmax(dim=-1), temperature=0.7)
    tokens, scores = hypotheses.tokens[:, 0], hypotheses.scores
    expected = (logits[0] / 0.7).softmax(0)
    shares = tokens.bincount(minlength=4) / draws
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()
    torch.testing.assert_close(scores, logits[0].log_softmax(0)[tokens])  # scored at T = 1


def test_samples_of_whole_texts_are_as_frequent_as_probable():
    """Several tokens a text, and texts of different lengths that leave the sampling together."""
    torch.manual_seed(0)
    end, draws = 3, 20_000
    table = torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.0, 0.0, 0.6, 0.4], [0.0, 0.0, 0.0, 1.0]])
    table = torch.cat([table, torch.eye(4)[3:]]).log()  # the next token after each token
    hypotheses, logits = Hypotheses(1, draws, end), table[:1]
    while len(hypotheses.clips):
        greedy_step(hypotheses, logits, temperature=1.0)
        logits = table[hypotheses.tokens[:, -1]]
    found = [tuple(text) for text, _ in hypotheses.finished[0]]
    assert len(found) == draws
    for text in [(), (0,), (0, 0), (1,), (1, 2), (0, 1, 2), (0, 0, 0, 1)]:
        steps = zip([0, *text], [*text, end], strict=True)
        p = torch.stack([table[a, b] for a, b in steps]).sum().exp().item()
        assert abs(found.count(text) / draws - p) < 4 * (p * (1 - p) / draws) ** 0.5, text


def test_best_of_keeps_the_best():
    _, ours = twins(ENGLISH, seed=4)
    torch.manual_seed(1)
    single = [decode(ours, sound(1), temperature=1.0).avg_logprob for _ in range(12)]
    torch.manual_seed(1)
    best = decode(ours, sound(1), temperature=1.0, best_of=12).avg_logprob
    assert best > sorted(single)[6]
    texts = [([1], -1.0), ([1, 2, 3, 4], -2.0), ([], -0.9)]
    assert rank_hypotheses(texts) is texts[1]  # -0.5 per token
    assert (
        rank_hypotheses(texts, alpha=0.0) is texts[2]
        and rank_hypotheses(texts, alpha=1.0) is texts[0]
    )


def test_beam_search_finds_the_best_text_where_the_beam_is_wide_enough():
    torch.manual_seed(0)
    V, steps, end = 4, 3, 3
    table = torch.randn(V, V).log_softmax(-1)  # the next token depends on the last one alone

    def walk(hypotheses, enough):
        logits = table[:1]
        for _ in range(steps):
            slots, _ = beam_step(hypotheses, logits, enough)
            if len(slots) == 0:
                break
            logits = table[hypotheses.tokens[:, -1]]
        for slot in range(len(hypotheses.clips)):
            hypotheses.leave(slot)
        return rank_hypotheses(hypotheses.finished[0], alpha=0.0)

    def score(tokens):
        return sum(table[a, b].item() for a, b in zip([0, *tokens], tokens, strict=False))

    ended = [(a, b, end) for a in range(3) for b in range(3)]
    ended += [(a, end) for a in range(3)] + [(end,)]
    tokens, found = walk(Hypotheses(1, 3, end), enough=27)
    complete = max(ended, key=score)
    assert found >= score(complete) - 1e-5 and found == pytest.approx(
        score([*tokens, end]) if len(tokens) < steps else score(tokens), abs=1e-5
    )


def test_language_detection_equals_openai_whisper():
    for vocabulary in (MULTILINGUAL, LARGE_V3):
        theirs, ours = twins(vocabulary, seed=5)
        mels = sound(8, clips=3)
        results = decode(ours, mels, task="lang_id")
        _, want = theirs.detect_language(mels)
        for result, shares in zip(results, want, strict=True):
            assert result.language_probs == pytest.approx(shares, abs=1e-5) and not result.tokens
            assert result.language == max(shares, key=shares.get)
        assert decode(ours, mels[0], task="lang_id").language == results[0].language
        transcript = decode(ours, mels[0], beam_size=2)
        assert transcript.language_probs == pytest.approx(want[0], abs=1e-5)


def test_encoded_states_are_taken_as_they_are():
    _, ours = twins(ENGLISH, seed=6)
    result = decode(ours, sound(9))
    ours.encoder.forward = None  # must not be called
    again = decode(ours, result.audio_features)
    assert again.tokens == result.tokens
    assert decode(ours, result.audio_features[None])[0].tokens == result.tokens


@pytest.mark.parametrize("multilingual", [False, True])
def test_what_is_no_speech(multilingual):
    ours = non_speech_tokens(Tokenizer.whisper(multilingual))
    assert ours == list(whisper.tokenizer.get_tokenizer(multilingual).non_speech_tokens)


def small_model(seed=0):
    torch.manual_seed(seed)
    args = ModelArgs.preset("cpu", embeddings_dims=32, no_of_heads=2, max_t=80, device="cpu")
    model = Whisper(args).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model, Tokenizer.small()


def test_a_small_model_decodes_through_the_same_call():
    model, tokenizer = small_model()
    mels = torch.randn(5, 80, 60)
    results = decode(model, mels, suppress_tokens=None, suppress_blank=False)
    rows = model.greedy(mels, tokenizer.prompt, tokenizer.end)
    for row, result in zip(rows, results, strict=True):
        assert result.tokens[: len(row)] == row and len(result.tokens) <= len(row) + 1
        assert result.language == "en" and 0 <= result.no_speech_prob <= 1
    beams = decode(model, mels, tokenizer=tokenizer, beam_size=4)
    alone = [decode(model, mel, tokenizer=tokenizer, beam_size=4) for mel in mels]
    assert [b.tokens for b in beams] == [a.tokens for a in alone]
    forbidden = {*non_speech_tokens(tokenizer), tokenizer.special["<|nospeech|>"]}
    assert not forbidden & {token for result in beams for token in result.tokens}
    assert decode(model, mels[0], prefix="one two").tokens != results[0].tokens


class NoCache:
    def rearrange_kv_cache(self, rows):
        """openai-whisper's beams, on a model that reads everything anew at each step."""


@torch.inference_mode()
def their_beams(model, tokenizer, mel, beam_size, patience):
    begin, states = len(tokenizer.prompt), model.encoder(mel[None]).expand(beam_size, -1, -1)
    decoder = BeamSearchDecoder(beam_size, tokenizer.end, NoCache(), patience)
    rules = LogitFilters(model, tokenizer, DecodingOptions(), timestamps=False)
    tokens, sums = torch.tensor([tokenizer.prompt] * beam_size), torch.zeros(beam_size)
    for _ in range(model.args.block_size + 1 - begin):
        logits = model.decoder(tokens, states)[:, -1]
        rules(logits, tokens[:, begin:])
        tokens, completed = decoder.update(tokens, logits, sums)
        if completed:
            break
    texts, sums = decoder.finalize(tokens[None], sums[None])
    texts = [text.tolist()[begin:] for text in texts[0]]
    texts = [torch.tensor(text[: text.index(tokenizer.end)]) for text in texts]
    return texts[MaximumLikelihoodRanker(None).rank([texts], sums)[0]].tolist()


@pytest.mark.parametrize("patience", [None, 3.0])
def test_beams_of_a_small_model_are_those_of_openai_whisper(patience):
    model, tokenizer = small_model()
    bias = model.decoder.ln.bias.data
    model.decoder.token_embedding.weight.data[tokenizer.end] += 4 * bias / bias.square().sum()
    mels = torch.randn(6, 80, 60)
    results = decode(model, mels, beam_size=4, patience=patience)
    for mel, result in zip(mels, results, strict=True):
        assert result.tokens == their_beams(model, tokenizer, mel, 4, patience)
    assert min(len(result.tokens) for result in results) < 27, "no text ended"


def test_the_gpt2_vocabulary_decodes_too():
    torch.manual_seed(0)
    args = ModelArgs(embeddings_dims=8, no_of_heads=1, no_of_decoder_layers=1, device="cpu")
    result = decode(Whisper(args), torch.randn(80, 40), beam_size=2, sample_len=4)
    assert len(result.tokens) <= 4 and result.text == result.text.strip()


def test_dropout_is_silent_while_decoding_and_comes_back():
    model, tokenizer = small_model()
    noisy = Whisper(replace(model.args, dropout=0.5))
    noisy.load_state_dict(model.state_dict())
    mel = torch.randn(80, 60)
    assert decode(noisy.train(), mel).tokens == decode(model, mel).tokens
    assert noisy.training
    with pytest.raises(ValueError):
        decode(noisy, mel, prompt="no")
    assert noisy.training and not model.training


def test_gaps_are_filled_from_the_end():
    for pattern in range(64):
        done = torch.tensor([bool(pattern >> i & 1) for i in range(6)])
        slots = compact_slots(done).tolist()
        assert sorted(slots) == (~done).nonzero()[:, 0].tolist()
        assert all(slot == i or done[i] for i, slot in enumerate(slots)), "a row moved needlessly"


def forget_the_cache(monkeypatch):
    right = KVCache.select
    skip = lambda cache, rows: len(rows) != len(cache.keys) and right(cache, rows)  # noqa: E731
    monkeypatch.setattr(KVCache, "select", skip)


def move_up_instead(monkeypatch):
    right = Hypotheses.extend
    extend = lambda self, *new: (lambda s, r: (s.sort().values, r))(*right(self, *new))  # noqa: E731
    monkeypatch.setattr(Hypotheses, "extend", extend)


def forget_the_order(monkeypatch):
    right = decoding.forbid_times

    def wrong(logits, tokens, begin, end, latest):
        if tokens.shape[1] == 0:
            return right(logits, tokens, begin, end, latest)
        text, times = logits[:, :begin], logits[:, begin:]
        text[times.logsumexp(dim=1) > text.amax(dim=1)] = -torch.inf

    monkeypatch.setattr(decoding, "forbid_times", wrong)


@pytest.mark.parametrize("error", [forget_the_cache, move_up_instead, forget_the_order])
def test_seeded_errors_are_noticed(error, monkeypatch):
    _, ours = twins(ENGLISH, seed=13, ending=9)
    mels = sound(7, clips=9)
    options = DecodingOptions(beam_size=3)
    right = [result.tokens for result in decode(ours, mels, options)]
    error(monkeypatch)
    assert [result.tokens for result in decode(ours, mels, options)] != right


# A second opinion, of a model that has a CTC head


@pytest.fixture(scope="module")
def speaking():
    """A random model with a CTC head, its tokenizer, and sound for it."""
    args = ModelArgs.preset("cpu", embeddings_dims=32, device="cpu")
    torch.manual_seed(1)
    model, tokenizer = Whisper(args).eval(), Tokenizer.for_args(args)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.6 * weight[0].numel() ** -0.5)
    model.ctc_head = make_ctc_head(args)
    return model, tokenizer, torch.randn(3, 80, 200)


@pytest.mark.parametrize("text", ["no", "oo", "n", "n on", "", "noon", "n!o"])
def test_the_price_of_a_text_is_that_of_all_its_writings(text):
    """Counted by hand: every path over the signs that occur, merged, and compared."""
    torch.manual_seed(0)
    ctc_head, states = torch.nn.Linear(8, 1 + len(CTC_ALPHABET)), torch.randn(1, 6, 8)
    p = ctc_head(states)[0].softmax(dim=-1)
    signs = {"": 0} | {c: 1 + CTC_ALPHABET.index(c) for c in " no"}
    total = 0
    for path in itertools.product(signs, repeat=6):
        if "".join(c for c, _ in itertools.groupby(path)) == text.replace("!", ""):
            total = total + torch.stack([p[t, signs[c]] for t, c in enumerate(path)]).prod()
    found = ctc_losses(ctc_head, states, [text])
    torch.testing.assert_close(found[0], -total.log())


def test_a_text_with_too_many_letters_costs_infinity_or_nothing():
    ctc_head, states = torch.nn.Linear(8, 1 + len(CTC_ALPHABET)), torch.randn(2, 4, 8)
    assert ctc_losses(ctc_head, states, ["seven", "no"]).isinf().tolist() == [True, False]
    free = ctc_losses(ctc_head, states, ["seven", "no"], zero_infinity=True)
    assert free[0] == 0 < free[1]


@pytest.mark.parametrize("weight", [0.1, 1.0, 50.0])
def test_the_ctc_head_takes_part_in_rescoring(speaking, weight, monkeypatch):
    """What `decode` chooses is the best of the search's texts by equation 4, computed anew."""
    model, tokenizer, mels = speaking
    seen, init = [], Hypotheses.__init__
    note = lambda self, *given: seen.append(self) or init(self, *given)  # noqa: E731
    monkeypatch.setattr(Hypotheses, "__init__", note)
    short = dict(sample_len=6, ctc_weight=weight)  # 50 states have room for it
    results = decode(model, mels, tokenizer=tokenizer, **ctc_rescoring(model), **short)
    for result, texts in zip(results, seen[0].finished, strict=True):
        with torch.no_grad():
            scores = model.ctc_head(result.audio_features).log_softmax(dim=-1)  # (T, 29)
        best = -float("inf")
        for tokens, score in texts:
            spelt = [
                1 + CTC_ALPHABET.index(c)
                for c in tokenizer.decode(tokens).strip().lower()
                if c in CTC_ALPHABET
            ]
            loss = torch.nn.CTCLoss(reduction="sum", zero_infinity=False)
            sizes = torch.tensor([len(scores)]), torch.tensor([len(spelt)])
            price = loss(scores[:, None], torch.tensor([spelt], dtype=int), *sizes).item()
            assert price < float("inf")
            value = (score - weight * price) / ((5 + len(tokens)) / 6)
            if value > best:
                best, wanted, logprob = value, tokens, score / (len(tokens) + 1)
        assert result.tokens == wanted
        assert result.avg_logprob == pytest.approx(logprob), "the decoder's own number"


def test_the_ctc_head_abstains_where_states_are_too_few(speaking):
    """A fast speaker is not answered with the shortest of the texts."""
    model, tokenizer, _ = speaking
    texts = [(tokenizer.encode(text), -1.0) for text in ("stop", "turn on the light")]
    for room, votes in ((25, 2), (15, 0), (3, 0)):
        given = ctc_scores(model.ctc_head, torch.randn(room, 32), texts, tokenizer, 0.1)
        assert len(given or []) == votes


def test_rescoring_scores_the_prefix_with_the_rest(speaking, monkeypatch):
    """The CTC head sees all the audio, so it is asked about all that was said in it."""
    model, tokenizer, mels = speaking
    asked = []

    def record(ctc_head, states, texts):
        asked.extend(texts)
        return torch.zeros(len(texts))

    monkeypatch.setattr("utils.decoding.ctc_losses", record)
    decode(model, mels[0], tokenizer=tokenizer, prefix="stop", beam_size=3)
    assert len(asked) == 3 and all(text.startswith("stop") for text in asked)


def test_without_a_ctc_head_nothing_changes(speaking):
    model, tokenizer, mels = speaking
    texts = lambda **more: [r.tokens for r in decode(model, mels, tokenizer=tokenizer, **more)]  # noqa: E731
    beams = dict(beam_size=8, patience=2.0)
    loud, silent, greedy = texts(**beams, ctc_weight=50.0), texts(**beams, ctc_weight=0.0), texts()
    ctc_head, model.ctc_head = model.ctc_head, None
    try:
        assert ctc_rescoring(model) == {} and texts(**beams, ctc_weight=50.0) == silent != loud
        assert texts() == greedy, "one text needs no second opinion"
    finally:
        model.ctc_head = ctc_head
    assert ctc_scores(ctc_head, mels[0], [([1], -1.0)], tokenizer, 0.1) is None


# Hotwords


class Letters:
    """A tokenizer of digits: "12" -> [1, 2]."""

    encode = staticmethod(lambda text: [int(c) for c in text.strip()])


@pytest.mark.parametrize("seed", range(8))
def test_a_bonus_stays_with_complete_hotwords_alone(seed):
    """The sum of a text's bonuses, by the definition: whole phrases, from left to right."""
    draw, bonus = random.Random(seed), 0.7
    phrases = ["".join(draw.choices("0123", k=draw.choice([1, 2, 3]))) for _ in range(3)]
    trie = HotwordTrie(phrases, bonus, Letters, capacity=9)
    for _ in range(60):
        text, rewarded, place = "".join(draw.choices("0123", k=7)), 0, 0
        while place < len(text):
            begun = [p for p in phrases if text.startswith(p, place)]
            longest = max(map(len, begun), default=0)
            partial = next(  # how far the text follows any phrase: that far, no other one begins
                n for n in range(len(text) - place, -1, -1)
                if any(p.startswith(text[place : place + n]) for p in phrases)
            )  # fmt: skip
            rewarded, place = rewarded + longest, place + max(1, partial)
        _, total = trie.follow([*Letters.encode(text), 9])  # 9 leaves every phrase
        assert total == pytest.approx(bonus * rewarded), (phrases, text)


def test_bonuses_of_single_tokens_add_up_to_that_of_the_text():
    trie = HotwordTrie("12, 123, 31", 0.5, Letters, capacity=9)
    for text in itertools.product(range(5), repeat=4):
        total = 0
        for n in range(4):
            scores = torch.zeros(1, 5)
            trie(scores, torch.tensor([text[:n]], dtype=torch.long))
            total += scores[0, text[n]].item()
        assert total == pytest.approx(trie.follow(text)[1], abs=1e-6)


@pytest.mark.parametrize("beam_size", [None, 3])
def test_hotwords_are_written_and_leave_the_log_probability_alone(beam_size):
    _, ours = twins(ENGLISH, seed=3)
    english = Tokenizer.for_args(ours.args)
    free = dict(beam_size=beam_size, suppress_tokens=None, suppress_blank=False, sample_len=8)
    free |= dict(without_timestamps=True, hotwords="Teltow,Kowalski", language="English")
    plain = decode(ours, sound(3), hotword_bonus=0, **free)
    assert plain.tokens == decode(ours, sound(3), **free | dict(hotwords=None)).tokens
    result = decode(ours, sound(3), hotword_bonus=30, **free)
    assert "Teltow" in result.text or "Kowalski" in result.text
    tokens = torch.tensor([[*english.prompt, *result.tokens, english.end]])
    scores = ours(sound(3)[None], tokens[:, :-1]).log_softmax(dim=-1)  # (1, S, V)
    scores = scores.gather(2, tokens[:, 1:, None])[0, len(english.prompt) - 1 :, 0]
    if len(result.tokens) == 8:  # cut off: no end was scored
        scores = scores[:-1]
    assert result.avg_logprob == pytest.approx(scores.sum().item() / (len(result.tokens) + 1))


def test_a_hotword_is_known_at_the_beginning_of_a_sentence_and_within_it():
    english = Tokenizer.whisper(multilingual=False)
    trie = HotwordTrie(["tomato soup"], 1.0, english, capacity=9)
    for text in (" tomato soup", "tomato soup", " Tomato soup", "Tomato soup"):
        assert trie.follow(english.encode(text)) == ({"held": 0.0}, len(english.encode(text)))
    assert trie.follow(english.encode(" tomato juice"))[1] == 0


def test_no_hotwords_are_an_empty_string_too():
    english = Tokenizer.whisper(multilingual=False)
    for none in ("", [], None):
        assert HotwordTrie(none, 1.0, english, capacity=9).root == {"held": 0.0}


def test_languages_have_names_as_in_openai_whisper():
    _, ours = twins(MULTILINGUAL, seed=5)
    for name in ("German", "GERMAN", "de"):
        assert decode(ours, sound(1), language=name, sample_len=1).language == "de"


BAD = {
    "`task` must be transcribe, translate or lang_id, got 'sing'": dict(task="sing"),
    "`temperature` must be a number ≥ 0, got -1": dict(temperature=-1),
    "`temperature` must be a number ≥ 0, got 'hot'": dict(temperature="hot"),
    "`temperature` must be a number ≥ 0, got None": dict(temperature=None),
    "`temperature` must be a number ≥ 0, got nan": dict(temperature=float("nan")),
    "`temperature` must be a number ≥ 0, got inf": dict(temperature=float("inf")),
    "`suppress_tokens` must be a string, a list, or None, got 5": dict(suppress_tokens=5),
    "`suppress_tokens` must be a string, a list, or None, got 0": dict(suppress_tokens=0),
    "`prompt` must be a string, a list, or None, got 5": dict(prompt=5),
    "`prefix` must be a string, a list, or None, got 5": dict(prefix=5),
    "`length_penalty` must be a number from 0 to 1, or None, got 'x'": dict(length_penalty="x"),
    "`length_penalty` must be a number from 0 to 1, or None, got 1.5": dict(length_penalty=1.5),
    "`patience` must be a number ≥ 0, or None, got 'x'": dict(patience="x", beam_size=3),
    "`patience` must be a number ≥ 0, or None, got nan": dict(patience=float("nan"), beam_size=3),
    "`patience` multiplies a `beam_size`": dict(patience=2.0),
    "to at least 1: give both": dict(patience=0.1, beam_size=3),
    "`max_initial_timestamp` must be .*, got 'x'": dict(max_initial_timestamp="x"),
    "`max_initial_timestamp` must be .*, got -1": dict(max_initial_timestamp=-1),
    "`max_initial_timestamp` must be .*, got inf": dict(max_initial_timestamp=float("inf")),
    "`beam_size` must be a whole number > 0, or None, got 0": dict(beam_size=0),
    "`beam_size` must be a whole number > 0, or None, got 2.5": dict(beam_size=2.5),
    "`sample_len` must be a whole number > 0, or None, got -3": dict(sample_len=-3),
    "`best_of` samples: it needs a `temperature` above 0": dict(best_of=5),
    "no `beam_size`": dict(best_of=5, temperature=1.0, beam_size=5),
    "`ctc_weight` must be a number ≥ 0, or None, got 'x'": dict(ctc_weight="x"),
    "`ctc_weight` must be a number ≥ 0, or None, got -1": dict(ctc_weight=-1),
    "`ctc_weight` must be a number ≥ 0, or None, got inf": dict(ctc_weight=float("inf")),
    "`language` must be one of en zh .*, got 'xx'": dict(language="xx"),
    "`hotword_bonus` must be a number ≥ 0, got -1": dict(hotword_bonus=-1),
    "`hotwords` must be a string, a list, or None, got 5": dict(hotwords=5),
    "`hotwords` have 1 to 16 tokens each, got ' '": dict(hotwords="Teltow, ,Kowalski"),
    "`hotwords` have 1 to 16 tokens each, got 5": dict(hotwords=[5]),
    "`hotwords` have 1 to 16 tokens each, got 'so so": dict(hotwords=["so " * 17]),
    "unknown option 'beams'": dict(beams=5),
    "token 'x' is not in the vocabulary": dict(suppress_tokens="5,x"),
    "token 99999 is not in the vocabulary": dict(prompt=[99999]),
    "shorten the prefix": dict(prefix=list(range(100))),
}


@pytest.mark.parametrize("sentence", BAD)
def test_impossible_options_are_refused(sentence):
    _, ours = twins(MULTILINGUAL, seed=0)
    with pytest.raises(ValueError, match=sentence):
        decode(ours, sound(0), **BAD[sentence])


def test_what_a_model_cannot_do_is_refused():
    english, (small, _) = twins(ENGLISH, seed=0)[1], small_model()
    for model, sentence, options in [
        (english, "needs a multilingual model", dict(task="translate")),
        (english, "`language` must be one of en, got 'de'", dict(language="de")),
        (small, "this model has no timestamp tokens", dict(without_timestamps=False)),
        (small, "trained without the text before", dict(prompt="before")),
        (small, "needs a multilingual model", dict(task="lang_id")),
    ]:
        with pytest.raises(ValueError, match=sentence):
            decode(model, torch.randn(80, 60), **options)
    with pytest.raises(ValueError, match="use the model's own"):
        decode(small, torch.randn(80, 60), tokenizer=Tokenizer.whisper())


@pytest.mark.parametrize(
    "mel",
    [torch.randn(60), torch.randn(0, 80, 60), torch.full((80, 60), torch.nan), torch.randn(81, 60)]
    + [torch.randn(80, 1), torch.randn(80, 0)],
    ids=["one axis", "no clips", "NaN", "81 bands", "one frame", "no frames"],
)
def test_impossible_sounds_are_refused(mel):
    with pytest.raises(ValueError, match="`mel` must be"):
        decode(small_model()[0], mel)


def test_a_number_is_what_a_blank_loses(speaking):
    """At the beginning alone: the end, and a space."""
    model, tokenizer, _ = speaking
    first = [*tokenizer.encode(" "), tokenizer.end]
    for blank, lost in ((3.0, 3.0), (True, float("inf")), (False, 0.0)):
        options = DecodingOptions(suppress_blank=blank, suppress_tokens=None)
        rules = LogitFilters(model, tokenizer, options, timestamps=False)
        for written, wanted in ((0, lost), (1, 0.0)):
            logits = torch.zeros(2, tokenizer.vocab_size)
            rules(logits, torch.zeros(2, written, dtype=torch.long))
            assert (-logits[:, first] == wanted).all()
            assert not logits[:, [i for i in range(300) if i not in first]].any()


def test_a_hotword_that_only_begins_leaves_the_log_probability_alone(speaking):
    """Its bonus is taken back by whatever follows, the end too, unless the text was cut off."""
    model, tokenizer, mels = speaking
    begun, options = tokenizer.encode("turn on"), DecodingOptions(hotwords="turn on the light")
    task = decoding.DecodingTask(model.args, tokenizer, replace(options, sample_len=20))
    whole = tokenizer.encode("x") * (20 - len(begun)) + begun
    for tokens, kept in ((begun, 0), (whole, 2.0 * len(begun))):
        found = decoding.finish_result(
            model, task, mels[0], "en", None, [(tokens, -5.0 + kept)], silence=0.0
        )
        assert found.avg_logprob == pytest.approx(-5.0 / (len(tokens) + 1))
