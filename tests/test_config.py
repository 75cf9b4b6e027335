"""The specification: the published table, aliases that cannot disagree, values that cannot be."""

import ast
import inspect
import json
import pickle
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
import whisper

import utils.config
from utils.config import PRESETS, ModelArgs, default_device

PUBLISHED = {
    "batch_size": 64,
    "max_lr": 2e-4,
    "dropout": 0.1,
    "epochs": 10,
    "block_size": 64,
    "tgt_vocab_size": 50262,
    "embeddings_dims": 384,
    "attn_dropout": 0.1,
    "no_of_heads": 6,
    "no_of_decoder_layers": 6,
    "weight_decay_optim": 0.01,
    "log_mel_features": 80,
    "N_MELS": 80,
    "n_channels": 80,
    "kernel_size": 3,
    "stride": 2,
    "sr": 16000,
    "SAMPLING_RATE": 16000,
    "device": default_device(),
    "WINDOW_DURATION": 0.025,
    "STRIDE_DURATION": 0.010,
    "max_t": 500,
    "hidden_dim": 1536,
}
# width, heads, encoder layers, decoder layers, vocabulary, bands (paper, table 1, and the cards)
OFFICIAL = {
    "tiny": (384, 6, 4, 4, 51865, 80),
    "base": (512, 8, 6, 6, 51865, 80),
    "small": (768, 12, 12, 12, 51865, 80),
    "medium": (1024, 16, 24, 24, 51865, 80),
    "tiny.en": (384, 6, 4, 4, 51864, 80),
    "base.en": (512, 8, 6, 6, 51864, 80),
    "small.en": (768, 12, 12, 12, 51864, 80),
    "medium.en": (1024, 16, 24, 24, 51864, 80),
    "large-v1": (1280, 20, 32, 32, 51865, 80),
    "large-v2": (1280, 20, 32, 32, 51865, 80),
    "large-v3": (1280, 20, 32, 32, 51866, 128),
    "large": (1280, 20, 32, 32, 51866, 128),
    "turbo": (1280, 20, 32, 4, 51866, 128),
    "large-v3-turbo": (1280, 20, 32, 4, 51866, 128),
}
ALIASES = {
    "N_MELS": ("log_mel_features", 128, 128),
    "n_channels": ("log_mel_features", 128, 128),
    "SAMPLING_RATE": ("sr", 16000, 16000),
    "hidden_dim": ("embeddings_dims", 192, 768),
    "encoder_layers": ("no_of_encoder_layers", 3, 3),
}


@pytest.mark.parametrize("args", [ModelArgs(), ModelArgs.preset("seed")])
def test_published_table(args):
    for name, value in PUBLISHED.items():
        assert getattr(args, name) == value, name
    assert args.encoder_layers == args.no_of_decoder_layers == 6


@pytest.mark.parametrize("alias", ALIASES)
def test_alias_follows_its_field_and_cannot_be_set(alias):
    name, value, expected = ALIASES[alias]
    args = replace(ModelArgs(), **{name: value})
    assert getattr(args, alias) == expected
    with pytest.raises(AttributeError):
        setattr(args, alias, 1)
    with pytest.raises(ValueError, match=alias):
        ModelArgs.preset("seed", **{alias: 1})
    with pytest.raises(TypeError):
        ModelArgs(**{alias: 1})


def test_arguments_are_frozen_equal_by_value_and_hashable():
    args = ModelArgs()
    with pytest.raises(FrozenInstanceError):
        args.epochs = 3
    assert args == ModelArgs() and hash(args) == hash(ModelArgs())
    assert args != replace(args, epochs=3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_pickle(name):
    args = ModelArgs.preset(name)
    assert ModelArgs(**json.loads(json.dumps(asdict(args)))) == args
    assert pickle.loads(pickle.dumps(args)) == args


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name):
    args = ModelArgs.preset(name)
    shape = (args.embeddings_dims, args.no_of_heads, args.encoder_layers)
    shape += (args.no_of_decoder_layers, args.tgt_vocab_size, args.n_channels)
    assert shape == OFFICIAL[name]
    assert (args.max_t, args.block_size, args.dropout) == (3000, 448, 0)


def test_every_official_name_is_a_preset():
    own = {"seed", "cpu", "ten-hours"}
    assert set(whisper.available_models()) == set(PRESETS) - own == set(OFFICIAL)


def test_preset_takes_changes():
    args = ModelArgs.preset("tiny", epochs=3, device="cpu")
    assert args == replace(ModelArgs.preset("tiny"), epochs=3, device="cpu")


@pytest.mark.parametrize("name", ["huge", "", "Tiny", None])
def test_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="choose one of seed, cpu, ten-hours, tiny"):
        ModelArgs.preset(name)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(no_of_heads=7), r"`no_of_heads` must divide `embeddings_dims` \(384\), got 7\."),
        (dict(no_of_heads=2.5), "`no_of_heads` must be an integer, got 2.5"),
        (dict(no_of_heads=6.0), "must be an integer"),
        (dict(no_of_heads=0), "above 0"),
        (dict(no_of_heads=True), "must be an integer"),
        (dict(embeddings_dims="384"), "`embeddings_dims` must be an integer, got '384'"),
        (dict(embeddings_dims=9, no_of_heads=3), "must be even"),
        (dict(embeddings_dims=2, no_of_heads=1), "4 or more"),
        (dict(no_of_encoder_layers=0), "`no_of_encoder_layers` must be above 0, got 0"),
        (dict(no_of_encoder_layers=-1), "`no_of_encoder_layers` must be above 0, got -1"),
        (dict(kernel_size=4), "odd"),
        (dict(stream_steps=5, curriculum_epochs=1), "set curriculum_epochs=0 for stream_steps"),
        (
            dict(stream_steps=5, splice_share=0.5, ctc_weight=1),
            "set splice_share=0 for stream_steps",
        ),
        (dict(splice_share=0.5), "the CTC head is missing: set splice_share=0"),
        (dict(max_t=501), r"`stride` must divide `max_t` \(501\), got 2"),
        (dict(seed=2**64), r"`seed` must be below 2\*\*32, got 18446744073709551616\."),
        (dict(max_t=-5), "`max_t` must be above 0, got -5"),
        (dict(block_size=None), "`block_size` must be an integer, got None"),
        (dict(max_lr=NAN), "`max_lr` must be above 0 and finite, got nan"),
        (dict(max_lr=INFINITE), "finite"),
        (dict(max_lr="fast"), "`max_lr` must be a number, got 'fast'"),
        (dict(max_lr=0), "above 0"),
        (dict(weight_decay_optim=-0.1), "0 or more"),
        (dict(dropout=1), "must be 0 or more and below 1, got 1"),
        (dict(dropout=NAN), "below 1, got nan"),
        (dict(warmup_ratio=1.5), "0 or more and below 1"),
        (dict(seed=-1), "0 or more"),
        (dict(sr=8000), r"must stay \(16000, 0.025, 0.01\)"),  # the front end is fixed
        (dict(WINDOW_DURATION=0.05), "must stay"),
        (dict(STRIDE_DURATION=0.02), "must stay"),
        (dict(device=0), "`device` must be a string, got 0"),
        (dict(device="gpu"), "`device` must be .*got 'gpu'"),
        (dict(device="meta"), "`device` must be .*got 'meta'"),
    ],
)
def test_impossible_values_are_refused_in_one_sentence(changes, words):
    for build in (lambda: ModelArgs(**changes), lambda: ModelArgs.preset("seed", **changes)):
        with pytest.raises(ValueError, match=words) as caught:
            build()
        sentence = str(caught.value)
        assert sentence.endswith(".") and "\n" not in sentence
        assert next(iter(changes)) in sentence


@pytest.mark.parametrize("value", [-1, -0.5, NAN, [], b"6"])
def test_no_field_takes_nonsense(value):
    for item in fields(ModelArgs):
        with pytest.raises(ValueError, match=item.name):
            replace(ModelArgs(), **{item.name: value})


@pytest.mark.parametrize("name", ["dropout", "attn_dropout", "label_smoothing", "augment_strength"])
def test_nothing_may_be_nothing(name):
    assert getattr(replace(ModelArgs(), **{name: 0}), name) == 0


def test_the_module_needs_only_torch_and_the_standard_library():
    tree = ast.parse(inspect.getsource(utils.config))
    nodes = list(ast.walk(tree))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"torch"}
