"""The tokenizer equals tiktoken, tokenizers and openai-whisper, far beyond the notebook's texts."""

import copy
import json
import pickle
import random
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers.convert_slow_tokenizer import TikTokenConverter
from whisper.tokenizer import TO_LANGUAGE_CODE, get_encoding, get_tokenizer

import utils.tokenizer
from utils.config import PRESETS, ModelArgs
from utils.tokenizer import (
    GPT2_SPLIT_PATTERN,
    LANGUAGES,
    Tokenizer,
    language_code,
    load_mergeable_ranks,
    merge_pair,
    train_bpe,
)

FAMILIES = [("gpt2", 99), ("multilingual", 99), ("multilingual", 100)]
# what Unicode adds later is a letter to one library before it is to the other
ASSIGNED = [i for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
FEW_WORDS = ["one two three", "two three four", "it's   seven,\n\nnine? naïve café 東京"]


def any_unicode(draw):
    """Up to 20 pieces: code points of all planes, half characters, runs, emoji, words."""
    planes = [0x80, 0x800, 0x3000, 0x10000, 0x20000, len(ASSIGNED)]
    pieces = [
        lambda: chr(ASSIGNED[draw.randrange(draw.choice(planes))]),
        lambda: chr(draw.randrange(0xD800, 0xE000)),
        lambda: "\ud83d\ude00",  # two halves that are one character
        lambda: draw.choice(" \n\t\r\v\f\x1c\x85\u00a0\u200b\u2028\u3000") * draw.randint(1, 80),
        lambda: draw.choice(["👩‍💻", "👨‍👩‍👧‍👦", "🇸🇪", "👍🏽", "❤️", "e\u0301\u0327", "\ufeff"]),
        lambda: draw.choice(["'s", "'LL", "don’t", "½", "<|en|>", "ß", "क्षि", "한국", "ﷺ", "x²"]),
        lambda: " " + "".join(draw.choices("etaoinshr", k=draw.randint(1, 15))),
        lambda: "".join(chr(draw.randrange(32, 127)) for _ in range(draw.randint(1, 20))),
    ]
    return "".join(draw.choice(pieces)() for _ in range(draw.randint(0, 20)))


def repair(text):
    """What tiktoken does with half characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize("name", ["gpt2", "multilingual"])
def test_encode_and_decode_equal_tiktoken_and_tokenizers(name):
    ours, theirs = Tokenizer.whisper(name == "multilingual"), get_encoding(name)
    file = Path(find_spec("whisper").origin).parent / "assets" / f"{name}.tiktoken"
    rust = TikTokenConverter(vocab_file=str(file), pattern=GPT2_SPLIT_PATTERN.pattern).converted()
    draw = random.Random(7)
    for _ in range(2000):
        text = any_unicode(draw)
        ids = ours.encode(text)
        assert ids == theirs.encode(text, disallowed_special=()), repr(text)
        assert ids == rust.encode(repair(text), add_special_tokens=False).ids, repr(text)
        assert ours.decode(ids) == repair(text)


def test_every_character_is_a_letter_a_number_a_space_or_a_sign_as_in_tiktoken():
    ours, theirs = Tokenizer.gpt2(), get_encoding("gpt2")
    mark = ours.encode("'s")  # stays a token of its own unless it follows a sign
    for i in ASSIGNED:
        if unicodedata.category(chr(i)) != "Co":  # private use
            word = chr(i) + "'s"
            same = theirs.encode_ordinary(word)[-1:] == mark
            assert (GPT2_SPLIT_PATTERN.findall(word)[-1] == "'s") == same, hex(i)


@pytest.mark.parametrize("text", ["", " ", " " * 5000, "\n" * 3001, "a" * 4000, " \n" * 999 + "x"])
def test_long_runs_equal_tiktoken(text):
    assert Tokenizer.gpt2().encode(text) == get_encoding("gpt2").encode(text)


def test_every_token_of_the_vocabulary_decodes_as_in_tiktoken():
    ours, theirs = Tokenizer.whisper(), get_encoding("multilingual")
    for i in range(ours.vocab_size):
        assert ours.decode([i], keep_special=True) == theirs.decode([i])
    draw = random.Random(0)
    ids = [draw.randrange(len(ours.ranks)) for _ in range(3000)]
    assert ours.decode(torch.tensor(ids)) == theirs.decode(ids)  # broken UTF-8 and all


@pytest.mark.parametrize("name, languages", FAMILIES)
def test_special_tokens_equal_openai_whisper(name, languages):
    multilingual = name == "multilingual"
    theirs = get_tokenizer(multilingual, num_languages=languages, language="en", task="transcribe")
    ours = Tokenizer.whisper(multilingual, num_languages=languages)
    assert ours.special == theirs.special_tokens and ours.vocab_size == theirs.encoding.n_vocab
    assert tuple(ours.prompt) == theirs.sot_sequence_including_notimestamps
    assert ours.end == theirs.eot
    assert ours.special["<|0.00|>"] == theirs.timestamp_begin
    assert ours.special["<|30.00|>"] == theirs.timestamp_begin + 1500 == ours.vocab_size - 1


@pytest.mark.parametrize("languages", [99, 100])
def test_prompt_of_every_language_and_task_equals_openai_whisper(languages):
    for language in utils.tokenizer.LANGUAGES[:languages]:
        for task in ("transcribe", "translate"):
            theirs = get_tokenizer(True, num_languages=languages, language=language, task=task)
            config = utils.tokenizer.whisper_config(True, language, task, languages)
            _, special, prompt = utils.tokenizer.build_vocabulary(config)
            ids = tuple(
                len(load_mergeable_ranks("multilingual")) + special.index(token) for token in prompt
            )
            assert ids == theirs.sot_sequence_including_notimestamps


def reference_ranks(texts, size):
    """Trained by the tokenizers library; Latin-1 makes a character of each byte."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=[chr(b) for b in range(256)], show_progress=False
    )
    words = (
        word.encode().decode("latin-1")
        for text in texts
        for word in GPT2_SPLIT_PATTERN.findall(text)
    )
    model.train_from_iterator(words, trainer)
    return {token.encode("latin-1"): rank for token, rank in model.get_vocab().items()}


@pytest.mark.parametrize("seed", range(30))
def test_training_equals_the_tokenizers_library(seed):
    draw = random.Random(seed)
    letters = "ab cdé\n"[: draw.randint(2, 7)]
    words = ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(30)]
    texts = [" ".join(draw.choices(words, k=20)) for _ in range(20)]
    expected = reference_ranks(texts, 256 + draw.randint(1, 60))
    assert train_bpe(texts, len(expected)) == expected
    assert sorted(expected.values()) == list(range(len(expected)))


def test_training_depends_on_counts_alone():
    config = Tokenizer.train(FEW_WORDS, 270).config
    assert Tokenizer.train(FEW_WORDS[::-1] * 2, 270).config == config


def test_merge_replaces_from_left_to_right():
    assert merge_pair([b"a"] * 5, (b"a", b"a")) == [b"aa", b"aa", b"a"]
    assert merge_pair([], (b"a", b"b")) == [] and merge_pair([b"b", b"a"], (b"a", b"b")) == [
        b"b",
        b"a",
    ]


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer.gpt2(),
        Tokenizer.whisper(language="de", task="translate"),
        Tokenizer.whisper(multilingual=False),
        Tokenizer.whisper(language="yue", num_languages=100),
        Tokenizer.train(FEW_WORDS, 270),
        Tokenizer.small(),
    ],
    ids=lambda tokenizer: f"{tokenizer.config['kind']}-{tokenizer.vocab_size}",
)
def test_config_pickle_and_copy_give_the_same_tokenizer(tokenizer):
    text = FEW_WORDS[2]
    ids = tokenizer.prompt + tokenizer.encode(text) + [tokenizer.end]
    again = Tokenizer.from_config(json.loads(json.dumps(tokenizer.config)))
    for other in (again, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert (other.special, other.prompt, other.end) == (
            (tokenizer.special, tokenizer.prompt, tokenizer.end)
        )
        assert other.prompt + other.encode(text) + [other.end] == ids
        assert other.decode(ids) == text and other.config == tokenizer.config
    assert tokenizer.decode(ids, keep_special=True).endswith("<|endoftext|>")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_its_tokenizer(preset):
    args = ModelArgs.preset(preset)
    tokenizer = Tokenizer.for_args(args)
    assert tokenizer.vocab_size == args.tgt_vocab_size
    assert max(tokenizer.special.values()) < args.tgt_vocab_size


def test_multilingual_vocabularies_take_the_language_of_the_settings():
    for preset in ("tiny", "large-v3"):
        args = ModelArgs.preset(preset, language="es")
        assert "<|es|>" in Tokenizer.for_args(args).decode(Tokenizer.for_args(args).prompt, True)
    with pytest.raises(ValueError, match="unknown language 'klingon'"):
        Tokenizer.for_args(ModelArgs.preset("tiny", language="klingon"))


def test_names_of_languages_are_those_of_openai_whisper():
    for name, code in TO_LANGUAGE_CODE.items():
        assert {language_code(word) for word in (name, name.title(), name.upper())} == {code}
    assert all(language_code(code.upper()) == code == language_code(code) for code in LANGUAGES)
    assert Tokenizer.whisper(language="German").config["language"] == "de"
    assert language_code(" Haitian Creole ") == "ht"
    for unknown in (None, "Deutsch", "en-US", "", 7, ["en"]):
        assert language_code(unknown) == unknown


def test_the_memory_of_words_is_bounded_and_changes_nothing():
    tokenizer = Tokenizer.train(FEW_WORDS, 270)
    first = tokenizer.encode("one two")
    tokenizer.encode(" ".join(map(str, range(50_100))))
    assert len(tokenizer.cache) <= 50_000 and tokenizer.encode("one two") == first


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Tokenizer.train(FEW_WORDS, 261), "`vocab_size` must be at least 262, got 261"),
        (lambda: Tokenizer.train(FEW_WORDS, 5000), "give more text"),
        (lambda: Tokenizer.train([], 300), "give more text"),
        (lambda: Tokenizer.whisper(language="Deutsch"), "unknown language 'Deutsch': choose"),
        (lambda: Tokenizer.whisper(language="yue"), "unknown language 'yue'"),
        (lambda: Tokenizer.whisper(task="listen"), "choose transcribe or translate"),
        (lambda: Tokenizer.small().encode(None), "must be a str, got NoneType"),
        (lambda: Tokenizer.small().encode(float("nan")), "must be a str, got float"),
        (lambda: Tokenizer.gpt2().decode([50262]), "not in the vocabulary of 50262"),
        (lambda: Tokenizer.gpt2().decode([-1]), "token -1 is not in the vocabulary"),
        (
            lambda: Tokenizer.from_config({"kind": "words"}),
            "configuration of the tokenizer is broken",
        ),
        (
            lambda: Tokenizer.from_config({"kind": "trained"}),
            "configuration of the tokenizer is broken",
        ),
        (lambda: Tokenizer.from_config(None), "configuration of the tokenizer is broken"),
        (lambda: Tokenizer.for_args(ModelArgs(tgt_vocab_size=777)), "no tokenizer has 777 tokens"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as problem:
        call()
    assert "\n" not in str(problem.value) and str(problem.value).endswith(".")


@pytest.mark.parametrize("content", [None, "{broken"])
def test_a_missing_or_broken_small_tokenizer_says_what_to_do(tmp_path, monkeypatch, content):
    monkeypatch.setattr(utils.tokenizer, "SMALL_TOKENIZER_PATH", tmp_path / "tokenizer.json")
    if content:
        utils.tokenizer.SMALL_TOKENIZER_PATH.write_text(content)
    with pytest.raises(ValueError, match="restore it from the repository"):
        Tokenizer.small()


def test_missing_ranks_say_what_to_install(monkeypatch):
    monkeypatch.setattr(utils.tokenizer, "find_spec", lambda name: None)
    load_mergeable_ranks.cache_clear()
    with pytest.raises(ValueError, match="pip install openai-whisper"):
        load_mergeable_ranks("gpt2")
