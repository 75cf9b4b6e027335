"""Which value reaches which function during a run: each test fails for one plausible slip."""

import copy
import errno
import io
import itertools
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from importlib import import_module
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.figure import Figure
from recordings import babble, silence
from test_graphs import capture_later
from test_training import TINY, new_run, sentences, tones, weights
from test_words import spoken, words
from torch import nn

from utils import (
    augment,
    ctc,
    data,
    diagnose,
    distributed,
    evaluation,
    files,
    graphs,
    live,
    long_form,
    loss,
    plotting,
    recipes,
    streaming,
    training,
    transcribe,
)
from utils.__main__ import check_outputs, main, tensorboard_logger
from utils.attention import MultiHeadAttention
from utils.audio import HOP_LENGTH, SAMPLE_RATE
from utils.checkpoints import (
    load_checkpoint,
    load_initial_weights,
    load_model,
    processor_files,
    save_checkpoint,
)
from utils.config import default_device
from utils.data import ClipDataset, max_samples, prepare_clip
from utils.decoding import DecodingResult, ctc_rescoring
from utils.graphs import GraphedForwardBackward, GraphedFunction
from utils.long_form import is_silence
from utils.loss import SingleProcess, encode_clips, token_loss, training_log_mel, validate
from utils.model import Whisper
from utils.recipes import recipe_for, run_training
from utils.tokenizer import Tokenizer
from utils.training import Recipe, Run, learning_rate, train, train_epoch, train_step
from utils.transcribe import VAD_FRAME

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = dict(augment_strength=0.0, ctc_weight=0.0, splice_share=0.0, use_muon=False)
SIMPLE = replace(TINY, **PLAIN)  # what the plain recipe honours
TOKENIZER = Tokenizer.for_args(TINY)


@pytest.fixture(scope="module")
def clips():
    return ClipDataset(tones(sentences(24)), TOKENIZER, TINY)


@pytest.fixture(scope="module")
def others():
    """Other clips than `clips`."""
    return ClipDataset(tones(sentences(10, seed=9)), TOKENIZER, TINY)


def spied(function, seen):
    """`function`, which notes its arguments in `seen`."""

    def spy(*inputs, **options):
        seen.append(inputs)
        return function(*inputs, **options)

    return spy


# Modes


def test_validation_is_in_evaluation_mode(clips):
    """With dropout in training mode, two validations would differ, and be worse."""
    torch.manual_seed(0)
    model = Whisper(replace(TINY, dropout=0.3, attn_dropout=0.3)).train()
    scores = validate(model, clips)
    assert scores == validate(model, clips) and model.training
    with torch.inference_mode():
        batches = [encode_clips(model.eval(), clips, indices) for indices in clips.batches()]
        counts = [int((labels != -100).sum()) for *_, labels in batches]
        sums = [n * token_loss(model, *batch) for n, batch in zip(counts, batches, strict=True)]
    assert scores["val_loss"] == pytest.approx(float(sum(sums)) / sum(counts), rel=1e-5)


def test_an_epoch_is_in_training_mode_whoever_used_the_model_before(clips):
    modes = []

    def uses_the_model(run):
        run.model.eval()
        return run.source

    def step(run):
        modes.append(run.model.training)

    run = new_run(TINY, clips, begin_epoch=uses_the_model, optimizer_step=step)
    run.clips = run.recipe.begin_epoch(run)
    train_epoch(run)
    assert len(modes) == len(clips.batches(0)) and all(modes)


def test_every_epoch_trains_in_training_mode_after_the_validation_of_the_one_before(
    clips, tmp_path
):
    modes = []

    def spy(run):
        modes.append(run.model.training)
        training.optimizer_step(run)

    train(SIMPLE, clips, clips, tmp_path, Recipe(optimizer_step=spy, batches=two_batches))
    assert modes == [True] * (2 * SIMPLE.epochs)


def test_every_dropout_of_a_model_has_its_setting_and_takes_part():
    args, calls = replace(TINY, dropout=0.1, attn_dropout=0.2), []
    model = Whisper(args)
    layers = [part for part in model.modules() if isinstance(part, MultiHeadAttention)]
    others = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    assert {part.dropout for part in layers} == {0.2} and {part.p for part in others} == {0.1}
    for part in others:
        part.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(1, 80, 50), torch.zeros(1, 3, dtype=torch.long))
    encoder, decoder = 1 + 2 * args.encoder_layers, 1 + 3 * args.no_of_decoder_layers
    assert len(calls) == encoder + decoder, "one for the embeddings, one for each sublayer"


def two_batches(clips, epoch, args):
    return clips.batches(epoch)[:2]


# The pace: learning rate, augmentation, curriculum, extra loss


def test_each_step_has_the_rate_and_the_progress_of_its_place_in_the_whole_run(clips, tmp_path):
    rates, places = [], []

    def step(run):
        rates.append(float(run.lr))
        training.optimizer_step(run)

    def features(audio, args, progress):
        places.append(progress)
        return training_log_mel(audio, args)

    recipe = Recipe(optimizer_step=step, features=features, batches=two_batches)
    history = train(SIMPLE, clips, clips, tmp_path, recipe)
    steps = 2 * SIMPLE.epochs
    wanted = [learning_rate(i, steps, SIMPLE) for i in range(steps)]
    assert rates == pytest.approx(wanted)
    assert places == pytest.approx([i / steps for i in range(steps)])
    assert [row["lr"] for row in history] == pytest.approx(wanted[1::2])


def test_augmentation_is_ramped_up(monkeypatch):
    args, seen = replace(TINY, augment_strength=0.8), []
    assert [augment.augment_strength(p, args) for p in (0, 0.1, 0.2, 0.3, 0.9)] == pytest.approx(
        [0, 0, 0.4, 0.8, 0.8]
    )
    monkeypatch.setattr(
        augment, "augment_mel", lambda mel, strength, _: seen.append(strength) or mel
    )
    monkeypatch.setattr(augment, "spec_augment", lambda mel, strength: seen.append(strength) or mel)
    for progress in (0.0, 0.2, 1.0):
        augment.augmented_log_mel(torch.randn(2, 8000), args, progress)
    assert seen == pytest.approx([0, 0, 0.4, 0.4, 0.8, 0.8])


def test_validation_hears_no_augmentation(clips, monkeypatch, tmp_path):
    monkeypatch.setattr(augment, "augment_mel", lambda mel, *_: 0 * mel + 1e-3)
    run = new_run(replace(TINY, augment_strength=1.0), clips, tmp_path)
    states, _, _ = encode_clips(run.model.eval(), clips, [0, 1])
    plain = run.model.encoder(training_log_mel(clips.collate([0, 1])[0], TINY))
    assert torch.equal(states, plain)


def test_the_weight_of_the_ctc_loss_fades_to_a_tenth(clips):
    run, batch = new_run(replace(TINY, ctc_weight=2.0), clips), clips.batches()[0]
    states = encode_clips(run.model, clips, batch)[0].detach()
    texts = [clips.texts[i] for i in batch]
    characters = sum(map(len, texts))
    ready = loss.Batch(None, None, None, None, texts, 1, characters)
    unit = ctc.ctc_loss(run.model.ctc_head, states, texts, characters).item()
    found = []
    for step in (0, run.total_steps // 2, run.total_steps):
        run.step = step
        found.append(ctc.fading_ctc_loss(run.model, states, ready, run).item() / unit)
    middle = 2 * (1 - 0.9 * (run.total_steps // 2) / run.total_steps)
    assert found == pytest.approx([2.0, middle, 0.2], rel=1e-4)


def test_the_curriculum_counts_epochs_from_the_first(clips, tmp_path):
    args, longest = replace(SIMPLE, curriculum_epochs=2, epochs=3, batch_size=2), []
    parts = replace(recipe_for(args), optimizer_step=lambda run: None)
    seen = []
    spy = spied(parts.batches, seen)
    run = Run(args, clips, clips, tmp_path, replace(parts, batches=spy))
    for epoch in range(3):
        longest.append(max(clips.lengths[i] for batch in run.batches(epoch) for i in batch))
    assert longest == [16_000, 24_000, 24_000]
    assert [epoch for _, epoch, _ in seen] == [0, 1, 2, 0, 1, 2]


# Batches


def test_batches_are_shuffled_and_others_in_each_epoch(clips):
    run = new_run(SIMPLE, clips)
    first, second = run.batches(0), run.batches(1)
    lengths = [clips.lengths[batch[0]] for batch in first]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, []))
    assert run.batches(0) == first, "an epoch's order is a property of its number"
    elsewhere = ClipDataset(tones(sentences(24)), TOKENIZER, replace(TINY, seed=1))
    assert elsewhere.batches(0) != first


def test_the_settings_of_the_run_count_not_those_its_clips_were_made_with(clips, others):
    run = new_run(replace(SIMPLE, batch_size=3, seed=5), clips, validation=others)
    assert max(map(len, run.batches(0))) == 3 < TINY.batch_size
    reseeded = new_run(replace(SIMPLE, batch_size=3, seed=6), clips)
    assert run.batches(0) != reseeded.batches(0)
    assert run.validation.args is run.args and clips.args is TINY, "the caller's clips stay"


def test_other_clips_meet_in_a_batch_in_each_epoch(clips):
    first, second = ({frozenset(batch) for batch in clips.batches(epoch)} for epoch in (0, 1))
    assert first != second


def test_a_clip_that_becomes_slower_becomes_longer():
    torch.manual_seed(0)
    args, audio = replace(TINY, augment_strength=1.0), torch.randn(1, 8000)
    frames = [augment.augmented_log_mel(audio, args, 0.9).shape[2] for _ in range(20)]
    assert min(frames) < 50 < 60 < max(frames)


def test_a_batch_holds_the_sound_the_tokens_and_the_text_of_its_own_clips(clips):
    run, batch = new_run(SIMPLE, clips), max(clips.batches(0), key=len)
    ready = training.prepare_batch(run, batch, 1, 1)
    audio, inputs, labels = clips.collate(batch)
    assert ready.texts == [clips.texts[i] for i in batch]
    assert torch.equal(ready.inputs, inputs)
    assert torch.equal(ready.mel, training_log_mel(audio, SIMPLE))
    assert torch.equal(labels.flatten()[ready.positions], ready.targets)
    assert (labels != -100).sum() == len(ready.targets)


def test_the_clips_of_an_epoch_are_those_that_its_beginning_gives(clips, others, tmp_path):
    texts = []

    def extra(model, states, batch, run):
        texts.extend(batch.texts)
        return 0 * states.sum()

    recipe = Recipe(begin_epoch=lambda run: others, extra_loss=extra)
    train(replace(SIMPLE, epochs=1), clips, clips, tmp_path, recipe)
    assert set(texts) <= set(others.texts) and len(texts) > len(others.texts) / 2


def test_the_extra_loss_is_added_to_the_objective_alone(clips):
    """Its gradient arrives, the loss that is reported stays that of the tokens."""
    batch, found = clips.batches()[0], []
    for extra in (None, lambda model, states, batch, run: 100 * states.square().mean()):
        run = new_run(SIMPLE, clips, extra_loss=extra, optimizer_step=lambda run: None)
        value, _ = train_step(run, batch)
        found.append((float(value), run.flat[:-1].clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert not torch.allclose(found[0][1], found[1][1], rtol=0.1)


def test_the_gradient_is_cleared_before_each_step_and_divided_by_the_tokens(clips):
    batch = clips.batches()[0]
    run = new_run(replace(SIMPLE, max_grad_norm=1e9), clips, optimizer_step=lambda run: None)
    train_step(run, batch)
    once = run.flat.clone()
    train_step(run, batch)
    torch.testing.assert_close(run.flat, once)
    other = Run(SIMPLE, clips, clips, "nowhere").model
    audio, inputs, labels = clips.collate(batch)
    token_loss(other, other.encoder(training_log_mel(audio, SIMPLE)), inputs, labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in other.parameters()])
    torch.testing.assert_close(once[:-1], gradient, rtol=1e-3, atol=1e-6)


def test_label_smoothing_reaches_the_objective(clips):
    batch, found = clips.batches()[0], []
    for smoothing in (0.0, 0.4):
        run = new_run(
            replace(SIMPLE, label_smoothing=smoothing), clips, optimizer_step=lambda run: None
        )
        train_step(run, batch)
        found.append(run.flat[:-1].clone())
    assert not torch.allclose(found[0], found[1], rtol=0.05)


def test_every_optimiser_steps(clips):
    run = new_run(replace(TINY, splice_share=0.0), clips)
    before = [p.clone() for p in run.model.parameters()]
    train_step(run, clips.batches()[0])
    assert len(run.optimizers) == 2
    for old, (name, new) in zip(before, run.model.named_parameters(), strict=True):
        assert not torch.equal(old, new), f"{name} was not moved"


# Several processes


class Second(SingleProcess):
    rank, size = 1, 2


def test_each_process_draws_its_own_augmentation(clips):
    drawn = []
    for processes in (SingleProcess(), Second()):
        run = new_run(SIMPLE, clips, processes=processes)
        drawn.append(torch.rand(4))
    assert not torch.equal(*drawn), "the same augmentation in all processes"
    same = new_run(SIMPLE, clips), torch.rand(4)
    assert torch.equal(same[1], drawn[0]) and run.model is not same[0].model


def test_each_process_starts_with_the_same_weights(clips):
    models = [
        new_run(SIMPLE, clips, processes=processes).model
        for processes in (SingleProcess(), Second())
    ]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_validation_shares_batches_and_adds_up_what_all_found(clips):
    torch.manual_seed(0)
    model, whole, sums = Whisper(TINY), None, []

    class Half(SingleProcess):
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def sum(self, *numbers):
            sums.append(numbers)
            return numbers

    whole = validate(model, clips)
    for rank in range(2):
        validate(model, clips, Half(rank))
    tokens, right, wrong = map(sum, zip(*sums, strict=True))
    assert tokens == sum(len(t) + 1 for t in clips.tokens), "a batch twice, or not at all"
    assert right / tokens == pytest.approx(whole["val_loss"], rel=1e-6)
    assert (wrong - right) / tokens == pytest.approx(whole["gap"], abs=1e-5)


# Splicing and cutting


def test_no_held_out_sentence_is_spliced_together_or_cut_out(clips, others, monkeypatch):
    args, spliced, cut = replace(TINY, curriculum_epochs=1, cut_share=0.3), [], []
    source = ClipDataset(tones(sentences(24)), TOKENIZER, args)
    source.forbidden = {"said in the test"}
    run = Run(args, source, others, "nowhere", recipe_for(args))
    source, boundaries = run.source, [[7]] * len(source)
    monkeypatch.setattr(ctc, "splice_clips", lambda *inputs: spliced.append(inputs) or source)
    monkeypatch.setattr(ctc, "cut_clips", lambda *inputs: cut.append(inputs) or "made")
    monkeypatch.setattr(ctc, "find_boundaries", lambda run: boundaries)
    given = []
    for epoch in range(6):
        run.epoch = epoch
        given.append(ctc.splice_and_cut(run))
    early = args.curriculum_epochs + ctc.CTC_WARMUP_EPOCHS
    assert given == [source] * early + ["made"] * (6 - early)
    for seen, wanted in ((spliced, args.splice_share), (cut, args.cut_share)):
        for clips_, found, share, _seed, forbidden in seen:
            assert clips_ is source and found == boundaries and share == wanted
            assert forbidden == {"said in the test"} | set(others.texts)
        seeds = [inputs[3] for inputs in seen]
        assert len(seeds) == 6 - early and all(a != b for a, b in pairwise(seeds)), "no new ones"


@pytest.mark.parametrize("share", ["splice_share", "cut_share"])
def test_either_share_alone_reaches_the_run(share):
    recipe = recipe_for(replace(TINY, **{"splice_share": 0.0, share: 0.3}))
    assert recipe.begin_epoch is ctc.splice_and_cut


# Data


def test_a_clip_of_exactly_the_context_is_kept_and_one_sample_more_is_not():
    def outcome(samples, words=2):
        sound = torch.zeros(samples)
        return prepare_clip(row_of(sound, "ONE " * words), TOKENIZER, TINY)[1]

    most = max_samples(TINY)
    assert not isinstance(outcome(most), str) and isinstance(outcome(most + 1), str)
    assert not isinstance(outcome(TINY.sr // 10), str)
    assert isinstance(outcome(TINY.sr // 10 - 1), str)
    space = TINY.block_size - len(TOKENIZER.prompt)
    texts = ["ONE " * n for n in range(1, 99)]
    sizes = [len(TOKENIZER.encode(text.lower().strip())) for text in texts]
    assert space in sizes, "no text of just this length: choose another word"
    for text, size in zip(texts, sizes, strict=True):
        row = row_of(torch.zeros(most), text.strip())
        assert isinstance(prepare_clip(row, TOKENIZER, TINY)[1], str) == (size > space)


def row_of(sound, text):
    file = io.BytesIO()
    soundfile.write(file, sound.numpy(), 16_000, format="WAV")
    return {"text": text, "audio": {"bytes": file.getvalue(), "path": "x.wav"}}


# What a run writes down


def test_the_history_and_the_model_are_those_of_the_run(clips, others, tmp_path):
    sums, runs = [], []

    def step(run):
        training.optimizer_step(run)
        sums.append((run.epoch, float(run.flat[-1])))
        runs.append(run)

    watched = []
    recipe = Recipe(optimizer_step=step)
    args = replace(SIMPLE, epochs=2)
    history = train(
        args, clips, others, tmp_path, recipe, watch=lambda rows: watched.append(len(rows))
    )
    tokens = sum(len(t) + 1 for t in clips.tokens)
    for row in history:
        total = sum(value for epoch, value in sums if epoch == row["epoch"] - 1)
        assert row["train_loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert row["uniform_loss"] == pytest.approx(math.log(args.tgt_vocab_size))
    assert watched == [1, 2] and [row["epoch"] for row in history] == [1, 2]
    assert history[-1]["step"] == len(sums) == runs[0].total_steps
    saved = weights(tmp_path)
    assert all(torch.equal(saved[n], w) for n, w in runs[0].model.state_dict().items())
    scores = validate(runs[0].model, others)
    assert {name: history[-1][name] for name in scores} == pytest.approx(scores)


def test_the_plain_loop_refuses_settings_that_it_would_ignore(clips, tmp_path):
    for setting in ("augment_strength", "ctc_weight", "use_muon"):
        value = True if setting == "use_muon" else 0.5
        args = replace(SIMPLE, **{setting: value})
        with pytest.raises(ValueError, match=f"plain recipe ignores {setting}: set them to zero"):
            train(args, clips, clips, tmp_path)
    for setting in ("splice_share", "cut_share"):
        args = replace(SIMPLE, ctc_weight=0.5, **{setting: 0.5})
        with pytest.raises(ValueError, match=f"plain recipe ignores ctc_weight, {setting}: set"):
            train(args, clips, clips, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_recipe_holds_what_the_settings_ask_for():
    quiet = replace(SIMPLE, curriculum_epochs=0)
    plain = recipe_for(quiet)
    assert plain.optimizers is training.adamw and plain.extra_loss is None
    assert plain.features is training_log_mel and plain.begin_epoch is training.same_clips
    full = recipe_for(replace(TINY, augment_strength=0.5))
    assert full.features is augment.augmented_log_mel
    assert full.extra_loss is ctc.fading_ctc_loss and full.begin_epoch is ctc.splice_and_cut
    assert len(full.optimizers(Whisper(TINY), TINY)) == 2


def test_a_run_by_its_settings_is_the_run_of_its_recipe(clips, tmp_path):
    args = replace(TINY, epochs=1)
    run_training(args, clips, clips, tmp_path / "one")
    train(args, clips, clips, tmp_path / "other", recipe_for(args))
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_compiling_and_recomputing_reach_the_model_of_a_run(monkeypatch):
    """Neither changes a number, so no result would show that they are left out."""
    done, built = [], []
    monkeypatch.setattr(recipes, "compile_blocks", lambda model: done.append("compiled"))
    monkeypatch.setattr(recipes, "checkpoint_activations", lambda model: done.append("recomputed"))
    monkeypatch.setattr(
        recipes, "train", lambda args, data, held_out, out, recipe: built.append(recipe.build_model)
    )
    for args, compiled, wanted in (
        (TINY, False, []),
        (TINY, True, ["compiled"]),
        (replace(TINY, gradient_checkpointing=True), False, ["recomputed"]),
    ):
        run_training(args, compile=compiled)
        done.clear()
        built.pop()(args)
        assert done == wanted


def test_steps_on_a_gpu_are_recorded_but_not_those_that_recompute():
    args = replace(TINY, device="cuda:0")
    recipe = recipe_for(args)
    assert isinstance(recipe.optimizer_step, GraphedFunction)
    assert recipe.optimizer_step.function is training.optimizer_step
    assert isinstance(recipe.forward_backward, GraphedForwardBackward)
    again = recipe_for(replace(args, gradient_checkpointing=True))
    assert again.forward_backward is training.forward_backward
    assert recipe_for(TINY).optimizer_step is training.optimizer_step


def test_a_process_trains_on_the_device_that_its_launcher_gives(monkeypatch):
    seen = []
    monkeypatch.setattr(
        recipes, "process_group", lambda args: nullcontext(replace(args, device="cuda:3"))
    )
    monkeypatch.setattr(recipes, "train", lambda args, *_: seen.append(args.device))
    run_training(TINY)
    assert seen == ["cuda:3"]


def test_cutting_and_augmentation_are_both_in_the_recipe(monkeypatch):
    """And what follows a silence is augmented as strongly as the place in the run says."""
    args, seen = replace(TINY, cut_share=0.3, augment_strength=0.5), []
    features = recipe_for(args).features
    assert features is ctc.log_mel_with_silence
    monkeypatch.setattr(ctc, "augmented_log_mel", lambda *inputs: seen.append(inputs[1:]))
    for progress in (0.0, 0.4):
        features(torch.randn(1, 8000), args, progress)
    assert seen == [(args, 0.0), (args, 0.4)]


@pytest.mark.parametrize("name", ["curriculum_epochs", "stream_steps", "gradient_checkpointing"])
def test_the_plain_loop_refuses_what_costs_nothing_to_forget(name, clips, tmp_path):
    args = replace(SIMPLE, **{name: name == "gradient_checkpointing" or 2})
    with pytest.raises(ValueError, match=f"plain recipe ignores {name}: set"):
        train(args, clips, clips, tmp_path)


# The clock, and what is kept


def six_batches(clips, epoch, args):
    return clips.batches(epoch)[:6]


def test_a_resumed_run_counts_seconds_and_losses_as_if_it_had_not_stopped(
    clips, tmp_path, monkeypatch
):
    """A step takes 10 s: every fourth is saved after half a minute, and nothing counts twice."""
    now, saved, save, args = (
        [0.0],
        [],
        training.save_state,
        replace(SIMPLE, epochs=2, save_minutes=0.5),
    )
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(training, "save_state", lambda run: saved.append(run.step) or save(run))

    def step(run):
        if run.step == 11 and run.out.name == "cut" and not resumed:
            raise SystemError("power cut")
        now[0] += 10
        training.optimizer_step(run)

    recipe, resumed = Recipe(optimizer_step=step, batches=six_batches), []
    whole = train(args, clips, clips, tmp_path / "whole", recipe)
    assert saved == [4, 6, 10, 12]
    assert [row["seconds"] for row in whole] == [60, 120]
    with pytest.raises(SystemError):
        train(args, clips, clips, tmp_path / "cut", recipe)
    resumed.append(True)
    assert train(args, clips, clips, tmp_path / "cut", recipe) == whole


def test_the_best_model_is_that_of_the_lowest_error_rate(clips, others, tmp_path, monkeypatch):
    rates, asked = iter([0.5, 0.2, 0.3, 0.25]), []  # the last one is better than the one before

    def validated(model, clips, processes):
        asked.append((clips.texts, processes))
        return {"val_loss": 1.0, "gap": 0.0, "wer": next(rates)}

    monkeypatch.setattr(training, "validate", validated)
    recipe = Recipe(batches=two_batches)
    history = train(replace(SIMPLE, epochs=4), clips, others, tmp_path, recipe)
    for name, epochs in (("best", 2), ("model", 4)):
        *_, extra = load_checkpoint(tmp_path / f"{name}.safetensors")
        assert extra["history"] == history[:epochs]
    assert asked == [(others.texts, recipe.processes)] * 4, "every process validates its own share"


def test_the_first_process_alone_writes(clips, tmp_path):
    told = []
    recipe = Recipe(batches=two_batches, processes=Second())
    train(replace(SIMPLE, epochs=1, save_minutes=0), clips, clips, tmp_path, recipe,
          watch=told.append)  # fmt: skip
    assert not list(tmp_path.iterdir()) and not told


@pytest.mark.parametrize(("processes", "left"), [(SingleProcess(), 0), (Second(), 2)])
def test_the_first_process_alone_clears_a_folder(processes, left, clips, tmp_path):
    """Another one might come late, and delete what the first has written since."""
    for name in ("state-00000007.pt", "model.safetensors.part"):
        (tmp_path / name).touch()
    training.start_or_resume(new_run(SIMPLE, clips, tmp_path, processes=processes), False)
    assert len(list(tmp_path.iterdir())) == left


# Seeds and places


def test_the_seed_decides_the_first_weights_and_the_augmentation(clips):
    begun = []
    for seed in (0, 0, 1):
        run = new_run(replace(SIMPLE, seed=seed), clips)
        begun.append((run.model.decoder.positional_embedding.detach(), torch.rand(4)))
    for one, same, other in zip(*begun, strict=True):
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_adamw_has_whispers_betas():
    [optimizer] = training.adamw(Whisper(TINY), TINY)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}


def test_the_rate_of_a_step_reaches_every_optimiser(clips):
    run, batch = new_run(replace(TINY, splice_share=0.0), clips), clips.batches()[0]
    for step in (0, run.total_steps // 2):
        run.step = step
        train_step(run, batch)
        wanted = learning_rate(step, run.total_steps, run.args)
        for optimizer in run.optimizers:
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            assert rates == pytest.approx([wanted] * len(rates))
    assert len(run.optimizers) == 2 and wanted < 0.9 * TINY.max_lr


@pytest.mark.parametrize(("length", "wanted"), [(0.25, 0.25), (2.0, 0.5)])
def test_a_gradient_is_unscaled_before_it_is_clipped(clips, length, wanted):
    """Which the weights do not show: Adam's steps are as long for shorter gradients."""
    run = new_run(replace(SIMPLE, max_grad_norm=0.5), clips)
    run.scale.fill_(1024)
    run.flat[0] = 1024 * length
    training.optimizer_step(run)
    assert float(run.flat[:-1].norm()) == pytest.approx(wanted, rel=1e-4)


def test_a_batch_in_parts_has_the_same_gradient_of_the_ctc_loss_too(clips):
    """Each part is divided by the characters of the whole batch."""
    batch, found = max(clips.batches(0), key=len), []
    for size in (None, 1):
        args = replace(SIMPLE, ctc_weight=3.0, micro_batch_size=size)
        run = new_run(args, clips, optimizer_step=lambda run: None)
        train_step(run, batch)
        found.append(run.flat)
    assert len({len(clips.texts[i]) for i in batch}) > 1, "this case proves nothing"
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


class Bar(list):
    """Stands in for `tqdm`: what it was made with, and what it shows."""

    made = []

    def __init__(self, batches, **options):
        super().__init__(batches)
        self.options, self.shown = options, []
        Bar.made.append(self)

    def set_postfix(self, loss, refresh):
        self.shown.append(float(loss))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_the_bar_shows_where_a_run_stands_and_its_loss_per_token(clips, monkeypatch):
    monkeypatch.setattr(training, "tqdm", Bar)
    monkeypatch.setattr(training, "text_bar", Bar)
    Bar.made.clear()
    for processes in (SingleProcess(), Second()):
        recipe = Recipe(batches=six_batches, processes=processes)
        run = Run(replace(SIMPLE, save_minutes=99), clips, clips, "nowhere", recipe)
        run.epoch, run.batch, run.step = 1, 4, 10
        train_epoch(run)
        assert Bar.made[-1].shown[-1] == pytest.approx(float(run.loss_sum / run.tokens), abs=6e-4)
    for bar, rank in zip(Bar.made, (0, 1), strict=True):
        assert len(bar) == 2 and bar.options["initial"] == 4 and bar.options["total"] == 6
        assert bar.options["desc"] == "epoch 2/3" and bar.options["disable"] == bool(rank)


def test_the_history_of_an_epoch_is_on_the_disk_before_the_next_one(clips, tmp_path):
    """So that a run can be plotted while it goes on."""
    written = []

    def watch(history):
        lines = (tmp_path / "history.jsonl").read_text().splitlines()
        written.append([json.loads(line) for line in lines] == history)

    train(SIMPLE, clips, clips, tmp_path, Recipe(batches=two_batches), watch=watch)
    assert written == [True] * SIMPLE.epochs


def test_a_process_of_a_launcher_takes_the_gpu_of_its_place_on_its_machine(monkeypatch):
    """The sixth of eight processes on two machines is the second on its own."""
    asked = []
    for name, value in {"WORLD_SIZE": 8, "RANK": 5, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed.torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", asked.append)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: asked.append("end"))
    with distributed.process_group(replace(TINY, device="cuda")) as args:
        asked.append(args.device)
    assert asked == ["cuda:1", "cpu:gloo,cuda:nccl", "cuda:1", "end"]


def test_sums_over_processes_lose_no_token(monkeypatch):
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda total: total.mul_(2))
    assert distributed.Processes().sum(2**24 + 1, 0.25) == [2**25 + 2, 0.5]


def test_the_clips_of_a_stream_are_shuffled_and_go_to_the_device_of_the_run(clips, monkeypatch):
    args, moved = replace(SIMPLE, stream_steps=5, device="cuda:0"), []
    first, second = (distributed.stream_batches(clips, epoch, args) for epoch in (0, 1))
    assert first == clips.batches(0)[:5] and len(second) == 5 and first != second
    monkeypatch.setattr(distributed, "read_epoch", lambda *_, more: (clips, "behind"))
    monkeypatch.setattr(ClipDataset, "to", lambda self, device: moved.append(device) or self)
    run = SimpleNamespace(source=None, memory={}, epoch=0, args=args)
    assert distributed.begin_stream_epoch(run) is clips and moved == ["cuda:0"]


def test_of_the_validation_of_a_stream_it_is_only_said_what_fits(monkeypatch, capsys):
    class Table(list):
        num_shards = 1

    rows = Table(tones(["ONE TWO", *["ONE TWO SIX FOUR TWO ONE SIX FIVE TWO ONE TWO"] * 3]))
    monkeypatch.setattr(distributed, "load_clips", lambda source, split, stream: rows)
    monkeypatch.setattr(distributed, "has_split", lambda source, split: True)
    _, validation = distributed.load_stream(replace(SIMPLE, stream_steps=2), "mine")
    assert validation.texts == ["one two"]
    assert "validation: kept 1 of 4 clips" in capsys.readouterr().out


def test_every_front_end_has_the_bands_of_the_model():
    args = replace(TINY, augment_strength=1.0, log_mel_features=128)
    audio, model = torch.randn(2, 8000), Whisper(args)
    assert augment.augmented_log_mel(audio, args, 0.9).shape[1] == 128
    assert training_log_mel(audio, args).shape[1] == 128
    assert transcribe.window_mel(model, [*audio], 8000).shape[1] == 128
    assert long_form.padded_log_mel(audio[0], args).shape[0] == 128


def test_a_clip_that_is_alone_in_its_batch_has_no_neighbour(monkeypatch):
    """Its own audio in the place of the neighbour's would hide what a model attends to."""
    seen = []
    monkeypatch.setattr(diagnose, "paired_losses", lambda _, given: seen.extend(given) or (1, 2))
    batches = [(torch.zeros(size, 80, 9), None, None) for size in (1, 2, 1, 3)]
    assert diagnose.check_shuffled_audio(None, batches)[0]
    assert [len(mel) for mel, *_ in seen] == [2, 3]


def test_a_test_set_is_decoded_with_its_own_vocabulary_and_the_given_options(clips, monkeypatch):
    """And the transcripts come in the order of the clips, though batches do not."""
    seen = []

    def decode(model, mel, tokenizer=None, **options):
        seen.append((tokenizer, options))
        return [SimpleNamespace(text=f"{len(seen)}") for _ in mel]

    monkeypatch.setattr(evaluation, "decode", decode)
    texts, said = evaluation.transcribe_dataset(Whisper(TINY), clips, beam_size=3)
    assert seen == [(TOKENIZER, {"beam_size": 3})] * len(clips.batches())
    batches = enumerate(clips.batches(), start=1)
    assert texts == clips.texts and all(said[i] == f"{n}" for n, batch in batches for i in batch)


# Transcription


def test_as_many_windows_are_decoded_together_as_asked_for(clips, monkeypatch):
    sizes, decode = [], transcribe.decode

    def spy(model, mels, options, tokenizer):
        sizes.append(len(mels))
        return decode(model, mels, options, tokenizer)

    monkeypatch.setattr(transcribe, "decode", spy)
    windows = [(start, start + 8000) for start in range(0, 40_000, 8000)]
    audio = 0.1 * torch.randn(40_000)
    transcribe.transcribe_batched(Whisper(TINY), audio, TOKENIZER, windows, batch_size=2)
    assert sizes == [2, 2, 1]


def test_the_bar_counts_windows_to_the_last(monkeypatch):
    bars = []

    class Counted(Bar):
        def update(self, number):
            self.shown.append(number)

    def bar(total, unit, shown):
        bars.append((Counted([]), total, unit, shown))
        return bars[-1][0]

    monkeypatch.setattr(transcribe, "progress_bar", bar)
    windows, audio = (
        [(start, start + 8000) for start in range(0, 80_000, 8000)],
        torch.randn(80_000),
    )
    asked = dict(batch_size=1, progress=True)
    transcribe.transcribe_batched(Whisper(TINY), audio, TOKENIZER, windows, **asked)
    [(found, *given)] = bars
    assert found.shown == [8, 2] and given == [10, "windows", True]


def test_a_tokenizer_that_is_given_is_used(monkeypatch):
    given, own = [], copy.copy(TOKENIZER)
    monkeypatch.setattr(transcribe, "transcribe_batched", lambda *inputs, **_: given.append(inputs))
    transcribe.transcribe(Whisper(TINY), torch.zeros(8000), own)
    assert given[0][2] is own


@pytest.mark.parametrize(
    ("logprob", "nobody", "silent"),
    [(-0.7, 0.95, True), (-0.5, 0.95, False), (-0.95, 0.7, False), (-0.7, 0.85, False)],
)
def test_silence_of_a_model_with_a_ctc_head_is_beyond_both_limits(logprob, nobody, silent):
    limits = transcribe.silence_limits(SimpleNamespace(ctc_head="one"))
    found = SimpleNamespace(avg_logprob=logprob, no_speech_prob=nobody)
    assert is_silence(found, limits) == silent


def test_the_language_is_that_of_the_start_of_the_first_phrase(monkeypatch):
    """Of a phrase from 40 to 41 s, and another one: frame 4000 is the first that is asked for."""
    asked, model = [], SimpleNamespace(args=replace(TINY, max_t=3000))

    def decode(model, mel, **options):
        asked.append(mel)
        return SimpleNamespace(language="de")

    monkeypatch.setattr(transcribe, "decode", decode)
    windows = [(40 * SAMPLE_RATE, 41 * SAMPLE_RATE), (50 * SAMPLE_RATE, 52 * SAMPLE_RATE)]
    german = transcribe.detect_spoken(
        model, Tokenizer.whisper(), "transcribe", None, windows, torch.arange(9000)[None]
    )
    assert asked[0].tolist() == [[*range(4000, 7000)]] and german.config["language"] == "de"


def test_live_text_stays_within_the_context_of_the_model(monkeypatch):
    """Final words, new ones, prompt and end together, or their times could not be found."""
    model, space = Whisper(TINY), TINY.block_size - len(TOKENIZER.prompt) - 1
    long = DecodingResult(torch.zeros(1, 1), "en", tokens=TOKENIZER.encode("one " * 40))
    monkeypatch.setattr(streaming, "decode", lambda *_, **options: [long])
    assert len(long.tokens) > space
    found, _ = streaming.decode_rest(model, TOKENIZER, torch.randn(8000), [7] * 9, 9, False)
    assert sum(len(tokens) for _, tokens in found) == space - 9


def test_unsure_text_of_a_sound_that_turns_out_to_be_none_goes_away():
    speaker = streaming.StreamingTranscriber(Whisper(TINY), TOKENIZER)
    speaker.unsure = " perhaps"
    assert speaker.feed(torch.zeros(8000)) == [] and speaker.unsure == ""


# The command line


@pytest.fixture
def heard(monkeypatch):
    """What the command asks for: models and threads; every recording says hello in German."""
    asked = SimpleNamespace(models=[], threads=[], stop=None)

    def transcribed(model, audio, tokenizer, on_segment, **options):
        segment = {"start": 0.0, "end": 1.0, "text": " hallo"}
        on_segment(segment, "de")
        if asked.stop:
            raise asked.stop
        return {"text": " hallo", "segments": [segment], "language": "de"}

    def load(*given):
        asked.models.append(given)
        return "a model", SimpleNamespace(config={"multilingual": True})

    monkeypatch.setattr("utils.sound.check_recording", lambda file: None)
    monkeypatch.setattr("utils.audio.load_audio", lambda file: file)
    monkeypatch.setattr("utils.checkpoints.load_model", load)
    monkeypatch.setattr(transcribe, "transcribe", transcribed)
    monkeypatch.setattr(torch, "set_num_threads", asked.threads.append)
    return asked


def test_a_recording_in_the_output_folder_is_never_replaced(tmp_path):
    with pytest.raises(ValueError, match="is a recording itself"):
        check_outputs(["a.wav", str(tmp_path / "a.srt")], "srt", tmp_path)
    check_outputs(["a.wav", str(tmp_path / "b.srt")], "vtt", tmp_path)


def test_several_recordings_load_one_model_and_take_the_threads_asked_for(heard, capsys):
    main("transcribe a.wav b.wav --model mine --device cpu --threads 2".split())
    assert heard.models == [("mine", "cpu")] and heard.threads == [2]
    assert capsys.readouterr().out == "hallo\nhallo\n"


def test_only_a_language_that_was_detected_is_said_to_be(heard, capsys):
    for options, lines in ("", ["Detected language: German"]), ("--language de", []):
        main(["transcribe", "a.wav", "--verbose", *options.split()])
        segment = "[00:00.000 --> 00:01.000]  hallo"
        assert capsys.readouterr().out.splitlines() == [*lines, segment]


def test_what_there_was_of_a_stopped_recording_keeps_its_language(heard, monkeypatch, tmp_path):
    heard.stop = KeyboardInterrupt()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="130"):
        main("transcribe a.wav --output-format json".split())
    kept = json.loads((tmp_path / "a.partial.json").read_text())
    assert (kept["text"], kept["language"]) == ("hallo", "de")


@pytest.mark.parametrize("load", [load_model, load_checkpoint])
def test_a_model_is_loaded_to_the_device_that_is_named(load, monkeypatch):
    moved = []
    monkeypatch.setattr(Whisper, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr("utils.checkpoints.check_device_works", lambda device: None)
    load(transcribe.DEFAULT_MODEL, "cuda:1")
    assert moved[-1] == "cuda:1"


def test_a_checkpoint_does_not_name_the_device_on_which_it_was_trained(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", Whisper(replace(TINY, device="cuda:7")))
    assert load_checkpoint(tmp_path / "a.safetensors")[0].args.device == default_device()


# Live


def test_each_line_of_live_text_begins_with_its_time(capsys):
    said = iter([[(0.5, " seven")], [(0.5, " two\n"), (3.0, " nine\n")], []])
    speaker = SimpleNamespace(feed=lambda *_, **end: next(said), unsure="")
    assert not live.show_live(speaker, [None, None], times=True)
    assert capsys.readouterr().out == "[0.5] seven two\n[3.0] nine\n"


def test_the_last_chunk_of_a_replay_is_the_end():
    class Waits:
        """Says its word when nothing follows."""

        def feed(self, samples, end=False):
            return [(0.0, " late\n")] if end else []

    found, _ = streaming.replay(Waits(), torch.zeros(3000), 0.1, clock=lambda: 0.0)
    assert found == [("late", 3000 / SAMPLE_RATE)]


def test_the_place_of_a_phrase_is_counted_from_the_start_of_its_window(monkeypatch):
    """Before it, the window holds the phrase of before: both from the sample 1000 on."""
    asked = []
    monkeypatch.setattr(streaming, "decode_rest", lambda *_: ([(" a", [65])], "encoded"))
    monkeypatch.setattr(streaming, "count_final", lambda *given: asked.append(given[3:]) or 0)
    speaker = streaming.StreamingTranscriber(Whisper(TINY), TOKENIZER, "alignment")
    speaker.context, speaker.dropped, speaker.past = 9000, 500, [(1500, [7])]
    speaker.audio, speaker.tokens = torch.zeros(8000), [8]
    assert streaming.advance(speaker, 5000, 8000, False) == [] and speaker.unsure == " a"
    assert asked == [([7, 8], 4000, 7000)]


def test_the_microphone_loses_nothing_where_its_buffer_is_used_again(monkeypatch):
    """PortAudio gives the same buffer at each call, and calls while a pass computes."""
    buffer = np.zeros((4, 1), np.float32)

    class InputStream:
        def __init__(self, rate, step, channels, callback):
            self.callback = callback

        def __enter__(self):
            for value in (1, 2, 3):
                buffer.fill(value)
                self.callback(buffer, 4, None, None)

        def __exit__(self, *_):
            pass

    module = ModuleType("sounddevice")
    module.InputStream = InputStream
    module.query_devices = lambda kind: {"default_samplerate": SAMPLE_RATE}
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert next(live.microphone(0.01)).tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4


def test_after_a_slow_pass_comes_all_that_was_said_meanwhile(monkeypatch):
    """A recording that is played keeps pace, as a microphone does."""
    now, sizes = [100.0], []

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    for samples in live.played(torch.zeros(10 * SAMPLE_RATE), SAMPLE_RATE):
        sizes.append(len(samples) / SAMPLE_RATE)
        now[0] += 3 * (len(sizes) == 2)
    assert sizes == [1, 1, 3, 1, 1, 1, 1, 1] and now[0] == 110


def test_speech_becomes_slower_and_faster_and_nothing_of_it_is_cut_off():
    """Tempos from 0.6 to 1.2: 300 frames become 500 to 250; the last one stays the loudest."""
    torch.manual_seed(0)
    mel, frames = torch.ones(1, 80, 300), []
    mel[..., -1] = 1e6
    for _ in range(60):
        made = augment.augment_mel(mel, 1.0, 1000)[0].sum(dim=0)  # (T,)
        assert made.argmax() >= len(made) - 2
        frames.append(len(made))
    assert 250 <= min(frames) < 260 and 480 < max(frames) <= 500


# What validation says


def test_validation_compares_each_clip_with_its_own_text_and_smooths_nothing(clips, monkeypatch):
    args = replace(TINY, label_smoothing=0.4)
    plain, smoothed = (Whisper(a).eval() for a in (TINY, args))
    smoothed.load_state_dict(plain.state_dict())
    batches = clips.batches(size=4 * TINY.batch_size)  # shorter ones first
    assert sum(batches, []) != sorted(sum(batches, [])), "this case proves nothing"
    scores = []
    for model in (plain, smoothed):
        said = iter([[clips.texts[i] for i in batch] for batch in batches])
        monkeypatch.setattr(loss, "greedy_transcripts", lambda *_, said=said: next(said))
        scores.append(validate(model, clips))
    assert scores[0] == scores[1] and scores[0]["wer"] == 0


def test_a_text_that_is_made_leaves_room_for_the_prompt(clips):
    space = TINY.block_size - len(TOKENIZER.prompt)
    texts = {
        len(TOKENIZER.encode(text)): text for text in (" ".join(["one"] * n) for n in range(1, 99))
    }
    for size in (space, space + 1):
        made = ctc.replace_clip(ctc.copy_clips(clips), 0, clips.audio[0], texts[size], ())
        assert made == (size == space)


def test_the_error_rate_in_the_picture_is_that_of_the_last_epoch():
    history = [{"epoch": epoch, "wer": wer} for epoch, wer in enumerate((0.9, 0.3, 0.125), 1)]
    axes = Figure().subplots()
    plotting.plot_errors(history, axes)
    [note] = axes.texts
    assert note.get_text() == "12.5 %" and note.xy == (3, 12.5)


# The clips of an epoch


def test_a_step_reads_the_sound_and_the_tokens_of_the_clips_of_its_epoch(clips):
    """Those that its beginning made, not those that were recorded."""
    run, batch = new_run(SIMPLE, clips), [0, 1]
    run.clips = made = ClipDataset(tones(["ONE TWO THREE FOUR FIVE SIX"] * 2), TOKENIZER, TINY)
    ready, (audio, inputs, labels) = training.prepare_batch(run, batch, 1, 1), made.collate(batch)
    assert torch.equal(ready.mel, training_log_mel(audio, SIMPLE))
    assert torch.equal(ready.inputs, inputs)
    assert train_step(run, batch)[1] == (labels != -100).sum()


def test_both_data_sets_go_to_the_device_of_the_run(clips, others, monkeypatch):
    moved = []
    monkeypatch.setattr(ClipDataset, "to", lambda self, name: moved.append((self, name)) or self)
    new_run(SIMPLE, clips, validation=others)
    assert moved == [(clips, "cpu"), (others, "cpu")]


@pytest.mark.parametrize(("device", "times"), [("cpu", 0), ("cuda", 1), ("cuda:3", 1)])
def test_the_sound_of_clips_goes_to_a_gpu(device, times, clips, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "audio_to_gpu", lambda audio, name: asked.append(name) or audio)
    copy.copy(clips).to(device)
    assert asked == [device] * times


def test_the_seconds_of_more_rows_are_added():
    both = ClipDataset(tones(["ONE TWO"]), TOKENIZER, TINY).extend(tones(["ONE", "TWO SIX TWO"]))
    assert both.seconds == pytest.approx(6 * 0.2)


def test_word_boundaries_are_found_in_evaluation_mode(clips, monkeypatch):
    modes, encode = [], ctc.encode_clips

    def spy(model, *given):
        modes.append(model.training)
        return encode(model, *given)

    monkeypatch.setattr(ctc, "encode_clips", spy)
    run = new_run(TINY, clips)
    run.model.train()
    ctc.find_boundaries(run)
    assert modes and not any(modes)


@pytest.mark.parametrize("stride", [2, 4])
def test_a_word_boundary_is_the_middle_of_a_state_of_the_model(stride, clips, monkeypatch):
    """And is looked for where the clip is, not in its padding."""
    size, rows = stride * HOP_LENGTH, {}  # samples of a state
    monkeypatch.setattr(
        ctc, "word_boundaries", lambda found, text: rows.update({text: len(found)}) or [3]
    )
    run = new_run(replace(TINY, stride=stride), clips)
    assert ctc.find_boundaries(run) == [[round(3.5 * size)]] * len(clips)
    assert rows == {
        text: len(audio) // size for text, audio in zip(clips.texts, clips.audio, strict=True)
    }


def test_sentences_are_spliced_from_what_was_recorded(clips, monkeypatch):
    """Not from other splices: nobody knows where their words meet."""
    seen, splice = [], ctc.splice_pair
    monkeypatch.setattr(ctc, "splice_pair", spied(splice, seen))
    cuts = [[3200 * k for k in range(1, len(text.split()))] for text in clips.texts]
    new = ctc.splice_clips(clips, cuts, 0.9, 0)
    assert new.texts != clips.texts and all(given[0] is clips for given in seen)


# What a run may change, and what a graph must not keep


def test_a_run_goes_on_with_other_settings_only_where_no_weight_depends_on_them():
    free = "device epochs micro_batch_size gradient_checkpointing save_minutes min_kept skip_broken"
    run, found = SimpleNamespace(args=SIMPLE, recipe=Recipe(), digests={}), set()
    before = training.identity(run)
    for item in fields(SIMPLE):
        run.args = copy.copy(SIMPLE)
        object.__setattr__(run.args, item.name, "another")
        found |= {item.name} if training.identity(run) == before else set()
    assert found == set(free.split())


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_that_was_begun_cannot_be_left_out(epochs, clips, tmp_path):
    run = new_run(SIMPLE, clips, tmp_path)
    run.epoch, run.batch, run.step = 1, 2, 9
    training.save_state(run)
    refused = pytest.raises(ValueError, match="`epochs` must be 2 or more for .*, got 1")
    with refused if epochs == 1 else nullcontext():
        training.load_state(new_run(replace(SIMPLE, epochs=epochs), clips, tmp_path))


def test_a_run_that_goes_on_in_float16_has_a_scale_of_its_own(clips, tmp_path, monkeypatch):
    """Where it comes from a processor with bfloat16, its scale was 1."""
    training.save_state(new_run(SIMPLE, clips, tmp_path))
    monkeypatch.setattr(training, "matmul_type", lambda device: torch.float16)
    run = new_run(SIMPLE, clips, tmp_path)
    training.load_state(run)
    assert run.scale == 65536


@pytest.mark.parametrize("minutes", [0, 99])
def test_ctrl_c_ends_an_epoch_whether_or_not_a_checkpoint_is_due(minutes, clips, tmp_path):
    args, recipe = replace(SIMPLE, save_minutes=minutes), Recipe(batches=six_batches)
    run = Run(args, clips, clips, tmp_path, recipe)
    assert not train_epoch(run, interrupted=["Ctrl-C"]) and (run.batch, run.step) == (1, 1)


@pytest.mark.parametrize(("micro", "advice"), [(None, 8), (4, 2), (1, 1)])
def test_a_full_gpu_asks_for_half_of_the_clips_that_it_was_given(micro, advice, tmp_path):
    args = replace(TINY, batch_size=16, micro_batch_size=micro)
    with (
        pytest.raises(ValueError, match=f"set micro_batch_size={advice} or gradient"),
        files.explain_failures(args, tmp_path),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_so_does_any_other_memory(problem, tmp_path):
    sentence = "the memory of cpu is full: set micro_batch_size=2 or gradient"
    with pytest.raises(ValueError, match=sentence), files.explain_failures(TINY, tmp_path):
        raise problem


def test_what_a_disk_refuses_comes_with_advice(tmp_path):
    """Too large a file for its format (FAT32), a folder where a file belongs: no number of ours."""
    sentence = "Errno 27. File too large: check the path and the disk, then run again"
    with pytest.raises(ValueError, match=sentence), files.explain_failures(TINY, tmp_path):
        raise OSError(errno.EFBIG, "File too large")


def test_a_start_of_another_length_leaves_the_positions_of_the_encoder(tmp_path):
    model = Whisper(TINY)
    before = model.encoder.positions.clone()
    load_initial_weights(model, Whisper(replace(TINY, max_t=400)))
    assert torch.equal(model.encoder.positions, before)


def test_an_exported_front_end_has_the_bands_of_the_model():
    written = processor_files(TOKENIZER, replace(TINY, log_mel_features=128))
    assert json.loads(written["preprocessor_config.json"])["feature_size"] == 128


def test_what_a_gpu_does_not_compute_in_bfloat16_keeps_all_its_digits(clips, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    new_run(SIMPLE, clips)
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_steps_of_adamw_can_be_captured_on_a_gpu(device):
    [optimizer] = training.adamw(Whisper(TINY), replace(TINY, device=device))
    assert {group["capturable"] for group in optimizer.param_groups} == {device != "cpu"}


@pytest.fixture
def no_gpu(monkeypatch):
    """A step in two halves needs none until its third call."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "PAD_MULTIPLES", (1, 16, 64))


def test_a_step_in_two_halves_smooths_labels_too(clips, no_gpu):
    args, found = replace(SIMPLE, label_smoothing=0.4), []
    for halves in (training.forward_backward, GraphedForwardBackward()):
        parts = dict(forward_backward=halves, optimizer_step=lambda run: None)
        run = new_run(args, clips, **parts)
        train_step(run, clips.batches()[0])
        found.append(run.flat)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_graphs_of_one_run_do_not_serve_another(clips, no_gpu):
    halves = GraphedForwardBackward()
    one, other = (new_run(SIMPLE, clips, forward_backward=halves) for _ in range(2))
    for run in (one, one, other):
        train_step(run, clips.batches()[0])
    assert halves.run is other and [*halves.calls.values()] == [1]


def test_a_replayed_step_reads_the_batch_that_it_is_given(no_gpu, monkeypatch):
    """Not the one that was captured: four batches of one shape, of which the third is."""
    monkeypatch.setattr(GraphedForwardBackward, "capture", capture_later)
    pairs = ClipDataset(tones(["ONE TWO", "SIX ONE", "TWO SIX", "TWO ONE"]), TOKENIZER, TINY)
    found = []
    for halves in (training.forward_backward, GraphedForwardBackward()):
        parts, steps = dict(forward_backward=halves, optimizer_step=lambda run: None), []
        run = new_run(replace(TINY, splice_share=0.0, augment_strength=0.0), pairs, **parts)
        for i in range(4):
            train_step(run, [i])
            steps.append(run.flat.clone())
        found.append(torch.stack(steps))
    assert len(halves.graphs) == 1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_batches_of_longer_texts_have_graphs_of_their_own(no_gpu, monkeypatch):
    """A tensor of another shape could be stretched into that of a graph."""
    monkeypatch.setattr(graphs, "PAD_MULTIPLES", (1, 1, 1))
    two, halves = ClipDataset(tones(["ONE", "ONE TWO"]), TOKENIZER, TINY), GraphedForwardBackward()
    run = new_run(SIMPLE, two, forward_backward=halves)
    for i in (0, 1):
        train_step(run, [i])
    assert len({shapes[0] for shapes in halves.calls}) == 1 and len(halves.calls) == 2


def test_each_clip_is_padded_with_its_own_silence():
    mel = torch.ones(2, 80, 30) * torch.tensor([1.0, -5.0])[:, None, None]
    nothing = torch.zeros(2, 3), torch.arange(3), torch.arange(3), ["a", "b"], 3, 2
    padded = graphs.pad_batch(loss.Batch(mel, *nothing), TINY, 0).mel
    assert padded.shape[2] == 50 and torch.equal(padded, mel[..., :1].expand(-1, -1, 50))


def test_text_is_padded_within_its_own_context():
    ready = loss.Batch(torch.zeros(1, 80, 50), torch.zeros(1, 17), torch.arange(3),
                       torch.arange(3), ["a"], 3, 1)  # fmt: skip
    padded = graphs.pad_batch(ready, replace(TINY, block_size=20, max_t=200), 0)
    assert padded.inputs.shape == (1, 20)


# Each clip has its own augmentation


def bands_of(made):
    """(B, M, T) of power -> dB of each band, (B, M)."""
    return 10 * made.mean(dim=2).log10()


def test_each_clip_of_a_batch_has_its_own_channel_echo_and_noise(monkeypatch):
    """Each part alone: what is drawn once for the batch changes all clips alike."""
    torch.manual_seed(0)
    flat = torch.ones(64, 80, 500)
    waves = augment.random_wave(flat, 0.04, 0.12)
    assert waves.shape == (64, 80) and len(waves[:, :3].unique(dim=0)) == 64
    click = torch.zeros(64, 80, 500)
    click[..., 0] = 1
    noise = augment.add_noise(click, 1.0)[..., 1:]
    colour = bands_of(noise[noise.amax(dim=(1, 2)) > 0])
    assert (colour[:, 9] - colour[:, 70]).std() > 2, "one colour for all"
    rings = augment.random_reverb(click, 1.0)[:, 0, 1:3]
    decay = (rings[:, 1] / rings[:, 0])[rings[:, 0] > 0]
    assert len(decay) > 9 and decay.std() > 0.05, "one echo for all"
    monkeypatch.setattr(augment, "random_wave", lambda mel, *_: torch.zeros(mel.shape[:2]))
    sound = bands_of(augment.random_channel(flat, 1.0))
    telephone, low = sound[:, 79] < sound[:, 40] - 15, sound[:, 0] < sound[:, 20] - 25
    assert 20 < telephone.sum() < 48, "a telephone for all, or for none"
    assert (low & telephone).sum() > 10 and (low & ~telephone).sum() < 6, "it has a lower limit too"
    assert len((sound[:, 30] - sound[:, 20]).round(decimals=3).unique()) > 60, "one tilt for all"


def test_as_many_clips_are_changed_as_the_strength_says():
    torch.manual_seed(0)
    click = torch.zeros(1000, 80, 9)
    click[..., 0] = 1
    for strength in (0.5, 1.0):
        rings = augment.random_reverb(click, strength)[:, 0, 1] > 0
        noisy = augment.add_noise(click, strength)[:, 0, 5] > 0
        found = [changed.float().mean().item() for changed in (rings, noisy)]
        assert found == pytest.approx([0.6 * strength, 0.8 * strength], abs=0.06)


@pytest.mark.parametrize("quietest", [20, 40])
def test_a_level_is_that_many_decibels_below_the_sound_at_most(quietest):
    torch.manual_seed(0)
    below = -10 * augment.random_level(torch.zeros(2000, 1, 1), quietest, 1.0).log10()
    assert 0 <= below.min() < 0.5 and quietest - 0.5 < below.max() <= quietest + 1e-3


def test_noise_is_as_loud_as_its_own_clip_allows():
    torch.manual_seed(0)
    loudness = torch.tensor([1.0, 1e6]).repeat(50)[:, None, None]
    clips_ = loudness.expand(-1, 80, 200)
    noise = augment.add_noise(clips_, 1.0) - clips_
    assert (noise.mean(dim=(1, 2)) / loudness[:, 0, 0]).max() < 1.2, "0 dB at least"


def test_masks_are_two_of_bands_and_two_of_frames_for_each_clip():
    """Widths: at most 16 bands and 32 frames at full strength, half of that at half of it."""
    torch.manual_seed(0)
    mel = 1 + torch.rand(200, 80, 400)
    mel[:, 40, 200] = 0  # silence
    for strength in (0.5, 1.0):
        hidden = augment.spec_augment(mel, strength) < 1e-6
        bands, frames = (hidden.all(dim=axis).sum(dim=1) for axis in (2, 1))  # of each clip
        for found, widest in ((bands, 16 * strength), (frames, 32 * strength)):
            assert widest < found.max() <= 2 * widest and len(found.unique()) > widest / 2


def test_a_clip_is_changed_at_its_source_first_and_by_noise_last(monkeypatch):
    """Tempo and voice, the channel, the room, and noise that none of them has changed."""
    parts = ("perturb_tempo", "warp_frequency", "random_channel", "random_reverb", "add_noise")
    order = []
    for name in parts:
        spy = lambda mel, *given, name=name: order.append((name, given[0])) or mel  # noqa: E731
        monkeypatch.setattr(augment, name, spy)
    augment.augment_mel(torch.ones(1, 80, 50), 0.4, 99)
    assert [name for name, _ in order] == [*parts]
    assert [strength for _, strength in order[2:]] == [0.4] * 3


# Validation's batches


@pytest.mark.parametrize(("micro", "largest"), [(None, 8), (1, 4)])
def test_batches_of_validation_are_four_times_what_memory_has_room_for(micro, largest, monkeypatch):
    args, seen = replace(TINY, batch_size=2, micro_batch_size=micro), []
    few = ClipDataset(tones(["ONE TWO"] * 9), TOKENIZER, args)
    monkeypatch.setattr(loss, "encode_clips", spied(loss.encode_clips, seen))
    validate(Whisper(TINY), few)
    assert max(len(indices) for _, _, indices in seen) == largest


def test_transcripts_of_validation_have_room_for_the_longest_text(clips, monkeypatch):
    found = []

    def transcripts(model, tokenizer, states, longest):
        found.append(longest)
        return [""] * len(states)

    monkeypatch.setattr(loss, "greedy_transcripts", transcripts)
    validate(Whisper(TINY), clips)
    batches = clips.batches(size=4 * TINY.batch_size)
    assert found == [clips.collate(batch)[1].shape[1] for batch in batches]


def test_a_multilingual_model_of_english_has_the_english_normaliser():
    assert loss.normalizer_for(Tokenizer.whisper(language="en"))("Colour") == "color"


# Silence, and bars over frames


@pytest.mark.parametrize(("second", "found"), [(55, [(6, 34), (51, 68)]), (54, [(6, 68)])])
def test_a_phrase_has_margins_and_ends_before_more_than_half_a_second(second, found):
    """Frames of 20 ms: 20 with speech, then 9 or 10 more, then 8, which are no word."""
    mask = torch.zeros(100, dtype=torch.bool)
    mask[10:30] = mask[second:64] = mask[90:98] = True
    assert transcribe.speech_segments(mask) == found


@pytest.mark.parametrize(("nats", "nobody"), [(6.0, 1 - math.exp(-2)), (math.inf, 0.0)])
def test_a_ctc_head_knows_silence_by_its_loss_per_letter(nats, nobody, monkeypatch):
    result = DecodingResult(torch.zeros(5, 2), "en", tokens=[7], text="one", no_speech_prob=0.3)

    def losses(head, states, texts):
        assert (head, states.shape, texts) == ("a head", (1, 5, 2), ["one"])
        return torch.tensor([nats])

    monkeypatch.setattr(transcribe, "ctc_losses", losses)
    found = [
        transcribe.no_speech_prob(SimpleNamespace(ctc_head=head), result)
        for head in ("a head", None)
    ]
    assert found == pytest.approx([nobody, 0.3])


def test_the_bar_over_frames_ends_with_the_recording(monkeypatch):
    bars = []

    class Frames(Bar):
        n = 0

        def update(self, number):
            self.n += number
            self.shown.append(number)

    class Decoder:
        """Windows of 300 frames, of which the last one reaches beyond the end."""

        frames, seek = 700, 0
        transcript = SimpleNamespace(text=lambda: "", result=lambda text: {})

        def __init__(self, *_):
            pass

        def step(self, stop):
            self.seek += 300

    def bar(*given):
        bars.append((Frames([]), *given))
        return bars[-1][0]

    monkeypatch.setattr(long_form, "progress_bar", bar)
    monkeypatch.setattr(long_form, "LongFormDecoder", Decoder)
    long_form.transcribe_long_form(Whisper(TINY).eval(), None, TOKENIZER, progress=True)
    [(found, *given)] = bars
    assert found.shown == [300, 300, 100] and given == [700, "frames", True]


# Live text


def test_attention_is_that_of_the_whole_text_to_the_states_so_far(monkeypatch):
    asked, table = [], torch.zeros(5, 12)
    logits = torch.zeros(5, 9)
    monkeypatch.setattr(streaming, "choose_heads", lambda model: "heads")
    monkeypatch.setattr(
        streaming, "cross_attention_weights", lambda *given: asked.append(given) or (logits, "w")
    )
    monkeypatch.setattr(streaming, "alignment_matrix", lambda *given: asked.append(given) or table)
    prompt = SimpleNamespace(prompt=[0])
    streaming.attended_states("model", prompt, "mel", [1], [2, 3], 12, 4)
    assert asked == [("model", "mel", [0, 1, 2, 3]), ("w", "heads", 12)]


@pytest.fixture
def speaker():
    return streaming.StreamingTranscriber(Whisper(TINY), TOKENIZER)


def test_a_phrase_has_room_for_seven_tokens_a_second_final_ones_included(speaker, monkeypatch):
    """Of 2 s, and one more; before it, the window holds another phrase of 2 s."""
    asked = []

    def decode_rest(model, tokenizer, window, prefix, most, over):
        asked.append((len(window), most))
        return [], None

    monkeypatch.setattr(streaming, "decode_rest", decode_rest)
    speaker.context, speaker.past = 10 * SAMPLE_RATE, [(0, [7] * 9)]
    speaker.audio, speaker.tokens = torch.zeros(4 * SAMPLE_RATE), [8] * 4
    streaming.advance(speaker, 2 * SAMPLE_RATE, 4 * SAMPLE_RATE, False)
    assert asked == [(4 * SAMPLE_RATE, 7 * 3 - 4)]


def test_words_that_are_final_are_not_compared_again(speaker, monkeypatch):
    passes = iter(["a b c", "a b d", "d e"])  # what follows the final words
    monkeypatch.setattr(
        streaming, "decode_rest", lambda *_: ([(f" {w}", [65]) for w in next(passes).split()], None)
    )
    speaker.audio, speaker.policy, found = torch.zeros(8000), "agreement", []
    for _ in range(3):
        found.append("".join(text for _, text in streaming.advance(speaker, 0, 8000, False)))
    assert found == ["", " a b", " d"]


@pytest.mark.parametrize(("prefix", "words_"), [([], 0), ([7], 1)])
def test_a_guess_in_silence_is_no_text_unless_it_follows_final_words(prefix, words_, monkeypatch):
    guess = DecodingResult(
        torch.zeros(1, 1), "en", tokens=TOKENIZER.encode("one"), text="one", avg_logprob=-5.0
    )
    monkeypatch.setattr(streaming, "decode", lambda *_, **options: [guess])
    monkeypatch.setattr(streaming, "no_speech_prob", lambda model, result: 0.99)
    given = Whisper(TINY), TOKENIZER, torch.randn(8000), prefix, 9, False
    assert len(streaming.decode_rest(*given)[0]) == words_


def test_a_phrase_of_as_many_tokens_as_fit_is_over(speaker, monkeypatch):
    monkeypatch.setattr(streaming, "decode_rest", lambda *_: ([], None))
    speaker.audio = torch.zeros(8000)
    speaker.tokens = [8] * (TINY.block_size - len(TOKENIZER.prompt) - 1)
    assert streaming.advance(speaker, 0, 8000, False) == [(0.0, "\n")]
    assert speaker.tokens == []


def test_after_a_cut_two_passes_have_to_agree_again(speaker, monkeypatch):
    """Of 3 s in a context of 2 s, from half a second on; the first second is the final word."""
    seen, ends = [], [SimpleNamespace(end=1.0)]

    def window_mel(model, windows, samples):
        seen.append((windows[0][0].item(), len(windows[0]), samples))
        return [None]

    monkeypatch.setattr(streaming, "window_mel", window_mel)
    monkeypatch.setattr(streaming, "word_timestamps", lambda *_: ends)
    monkeypatch.setattr(
        streaming, "advance", lambda live, *_: seen.append((live.tokens, live.before)) or []
    )
    speaker.audio = torch.arange(4 * SAMPLE_RATE).float()
    speaker.tokens, speaker.before = [8], [(" a", [65])]
    found = list(streaming.grow_phrase(speaker, torch.zeros(200), 25, 175, False))
    assert found == [(1.5, "\n")]
    assert seen == [(SAMPLE_RATE // 2, 2 * SAMPLE_RATE, 2 * SAMPLE_RATE), ([], [])]


def test_a_phrase_that_is_over_is_remembered_where_it_began(speaker, monkeypatch):
    """In the whole recording, of which the first 1000 samples have been dropped."""
    monkeypatch.setattr(streaming, "decode_rest", lambda *_: ([(" a", [65])], None))
    speaker.dropped, speaker.audio = 1000, torch.zeros(8000)
    assert streaming.advance(speaker, 600, 8000, True) == [(1600 / SAMPLE_RATE, " a\n")]
    assert speaker.past == [(1600, [65])] and speaker.begin == 8000


@pytest.mark.parametrize(
    ("tokenizer", "samples"), [(TOKENIZER, SAMPLE_RATE), (Tokenizer.whisper(), 5 * SAMPLE_RATE)]
)
def test_a_window_of_live_text_is_as_long_as_offline(tokenizer, samples, monkeypatch):
    """Whole half seconds or, for Whisper's own models, the context."""
    asked, nothing = [], DecodingResult(torch.zeros(1, 1), "en", no_speech_prob=0.0)
    monkeypatch.setattr(
        streaming, "window_mel", lambda model, windows, size: asked.append(size) or [None]
    )
    monkeypatch.setattr(streaming, "decode", lambda *_, **options: [nothing])
    model = SimpleNamespace(args=replace(TINY, max_t=500), ctc_head=None)
    streaming.decode_rest(model, tokenizer, torch.zeros(8100), [7], 9, False)
    assert asked == [samples]


@pytest.mark.parametrize("pause", [0.2, 0.5])
def test_the_last_half_second_of_silence_may_be_the_beginning_of_a_phrase(pause):
    speaking = streaming.StreamingTranscriber(Whisper(TINY), TOKENIZER, pause=pause)
    speaking.feed(torch.zeros(2 * SAMPLE_RATE))
    assert speaking.begin == 1.5 * SAMPLE_RATE


def test_the_margin_is_counted_from_the_end_of_the_window(speaker, monkeypatch):
    """Of a phrase from 4 to 8 s; a state lasts 20 ms, so that 0.9 s are 45 states."""
    asked = []

    def attended(*given):
        asked.append(given[-2:])
        return [200, 354, 356], [0.9] * 3

    monkeypatch.setattr(streaming, "attended_states", attended)
    speaker.margin, found = 0.9, [(" a", [65]), (" b", [66]), (" c", [67])]
    span = 4 * SAMPLE_RATE, 8 * SAMPLE_RATE
    assert streaming.count_final(speaker, found, None, [], *span) == 2
    assert asked == [(400, 200)]


def test_what_is_dropped_are_whole_frames_of_the_detection(speaker):
    """Else those of the rest would lie elsewhere than before."""
    for _ in range(13):
        speaker.feed(torch.zeros(16_001))
        assert speaker.dropped % VAD_FRAME == 0
    assert speaker.dropped > 2 * SAMPLE_RATE


def test_a_replay_feeds_whole_chunks_that_have_arrived():
    """A pass takes 0.7 s: half seconds, or as many of them as fit."""
    fed, seconds = [], iter(0.35 * i for i in itertools.count())
    live_ = SimpleNamespace(feed=lambda samples, end: fed.append(len(samples) / SAMPLE_RATE) or [])
    streaming.replay(live_, torch.zeros(4 * SAMPLE_RATE), 0.5, clock=lambda: 2 * next(seconds))
    assert sum(fed) == 4 and {0.5, 1.0} == set(fed)


@pytest.mark.parametrize(("pause", "over"), [(0.3, False), (1.0, True)])
def test_a_phrase_that_may_go_on_reaches_to_the_end_of_the_audio(pause, over, speaker, monkeypatch):
    seen = []

    def grow_phrase(live, decibels, start, stop, over):
        seen.append((stop == len(decibels), over))
        return []

    monkeypatch.setattr(streaming, "grow_phrase", grow_phrase)
    speaker.feed(torch.cat([babble(2), silence(pause)]))
    assert seen == [(not over, over)]


def test_a_diagnosis_compares_more_clips_alone_and_in_their_batch_than_the_first():
    """Here each clip depends on those before it."""
    batches = [(torch.ones(3, 2, 2), torch.zeros(3, 2), torch.zeros(3, 2))]
    assert not diagnose.check_batching(lambda mel, _: mel.cumsum(dim=0), batches)[0]
    assert diagnose.check_batching(lambda mel, _: 2 * mel, batches)[0]


def test_padding_is_loud_by_the_measure_of_its_own_clip():
    """Each of two clips is loudest in a flat frame, though one of them is softer."""
    mel = torch.rand(2, 80, 9)
    mel[0, :, 8], mel[1, :, 8] = 1, 2
    assert "100%" in diagnose.check_padding_level(None, [(mel, None, None)])[1]


def test_a_diagnosis_moves_its_batches_to_the_model(monkeypatch):
    moved, part = [], SimpleNamespace(shape=(2, 2), ndim=3)
    part.to = lambda device: moved.append(device) or part
    monkeypatch.setattr(diagnose, "CHECKS", ())
    monkeypatch.setattr(diagnose, "scored_labels", lambda batches: [[1, 2]] * 2)
    model = SimpleNamespace(device="cuda:1")
    assert diagnose.run_checks(model, [(part, part, part)], None, None, None) == {}
    assert moved == ["cuda:1"] * 3


# What is written about a run


def test_tensorboard_gets_the_numbers_of_the_last_epoch(monkeypatch, tmp_path):
    written, module = [], ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: SimpleNamespace(
        add_scalar=lambda *what: written.append(what), flush=lambda: None
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    history = [{"epoch": n, "step": 10 * n, "wer": 1 / n} for n in (1, 2)]
    tensorboard_logger(tmp_path)(history)
    assert written == [("wer", 0.5, 20)]


def test_the_picture_of_a_run_shows_every_epoch(monkeypatch, tmp_path):
    drawn, lines = [], []
    for epoch in (1, 2, 3):
        row = dict.fromkeys(plotting.HISTORY_COLUMNS, 0.5) | {"epoch": epoch}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "history.jsonl").write_text("".join(lines))
    monkeypatch.setattr(plotting, "save_picture", lambda *given: drawn.append(given))
    main(["plot", str(tmp_path / "history.jsonl"), "loss.png"])
    [(figure, path)] = drawn
    plotting.plt.close(figure)
    assert path == "loss.png"
    for axes, line in zip(figure.axes, (-1, 0, 0, 0), strict=True):  # the first is ln V alone
        assert list(axes.lines[line].get_xdata()) == [1, 2, 3]


# data/words.py and data/ship.py


def test_another_seed_draws_other_voices_texts_and_sounds(monkeypatch):
    for split in words.SPLITS:
        jobs = [spoken(monkeypatch, split, seed)[0] for seed in (0, 1)]
        texts, voices, seeds = (
            [str([take(job) for job in of]) for of in jobs]
            for take in (
                lambda job: [clip.sentence for clip in job[1] if job[0]],
                lambda job: job[0] and job[0].id,
                lambda job: job[2],
            )
        )
        for one, other in (texts, voices, seeds):
            assert one != other
        drawn = [{str(job[2]) for job in of} for of in jobs]
        assert not drawn[0] & drawn[1]
    assert words.unseen_speakers(["flite"], 0) != words.unseen_speakers(["flite"], 1)


def test_noise_is_among_what_a_recogniser_of_phrases_learns_to_reject(monkeypatch):
    jobs, table = spoken(monkeypatch, "train")
    [noises] = [clips for speaker, clips, *_ in jobs if speaker is None]
    assert len(noises) == words.NOISE_CLIPS and all(clip.unknown for clip in noises)


def test_other_words_of_the_training_alone_are_those_that_the_shipped_model_knows():
    """It has to forget them, unless they are in a phrase."""
    ours = {word.lower() for word in words.VOCABULARY}
    for split in ("train", "test_other_words"):
        common = [word.lower() for word in words.other_words(split)[:9]]
        phrases = [["turn on", "seven", "fans"], [f"{word}s" for word in common]]
        made = words.other_clips(phrases, 900, split, np.random.default_rng(0))
        said = {word for clip in made for word in clip.sentence[:-1].split()}
        assert len(said & ours) > 30 if split == "train" else not said & ours
        assert not said & {"turn", "on", "seven", "fan", *common}, "a singular too"


def test_each_line_of_phrases_is_said_as_often_as_each_word():
    """Three lines of two words: what counts is the larger number."""
    phrases = [["go"], ["go now"], ["now go"]]
    said = words.clips_of("train", phrases, np.random.default_rng(0))
    assert sum(not clip.unknown for clip in said) == 3 * words.CLIPS_PER_WORD


def test_errors_of_a_recogniser_are_counted_per_word_of_the_phrases(monkeypatch):
    class Clips(SimpleNamespace):
        def __len__(self):
            return len(self.texts)

    phrases = Clips(texts=["mute it", "mute it"], speakers=["a", "b"], name="test_unseen_voices")
    others = Clips(texts=[""], speakers=["a"], name="test_other_words")
    sets, heard = iter([phrases, others]), iter([["mute", "mute it"], [""]])
    monkeypatch.setattr(words, "load_model", lambda path: (SimpleNamespace(args=None), None))
    monkeypatch.setattr(words, "load_clips", lambda source, split: split)
    monkeypatch.setattr(words, "ClipDataset", lambda *_: next(sets))
    monkeypatch.setattr(words, "recognise", lambda model, clips: next(heard))
    assert words.scores("model", "speech")["wer"] == 0.25


@pytest.mark.parametrize("finished", [True, False])
def test_a_recogniser_of_phrases_is_tested_if_its_training_was_not_stopped(
    finished, monkeypatch, tmp_path
):
    """And its phrases have as many tokens as the context has room for, without the prompt."""
    clock = iter([0, 60, 180, 360])  # s: the start, the speech, the training, the test
    monkeypatch.setattr(words, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    limits, pool = [], SimpleNamespace(Pool=lambda *_: nullcontext())
    monkeypatch.setattr(
        words, "read_phrases", lambda path, tokenizer, most: limits.append(most) or [["on"]]
    )
    monkeypatch.setattr(words, "multiprocessing", SimpleNamespace(get_context=lambda kind: pool))
    monkeypatch.setattr(words, "engines_at_hand", lambda: ["flite"])
    for name in ("speak", "write", "load_clips", "ClipDataset"):
        monkeypatch.setattr(words, name, lambda *_: None)
    monkeypatch.setattr(words, "run_training", lambda *_, **named: [{}] * (3 if finished else 2))
    monkeypatch.setattr(words, "scores", lambda *_: {"wer": 0.5})
    results = words.teach("mine.txt", tmp_path, epochs=3)
    assert bool(results) == finished
    assert not finished or (results["wer"], results["minutes"]) == (0.5, [1, 2, 3])
    assert limits == [TINY.block_size - len(TOKENIZER.prompt)]


def test_what_is_shipped_is_the_mean_of_the_last_two_runs_and_is_measured(
    monkeypatch, tmp_path, capsys
):
    ship = import_module("ship")  # beside words.py
    history = [
        {"epoch": 1, "step": 9, "wer": 0.5, "seconds": 3.0},
        {"epoch": 2, "step": 18, "wer": 0.25, "seconds": 61.4},
    ]
    runs, place, rescored = [tmp_path / f"run{n}" for n in range(4)], tmp_path / "data", []
    models = [recipes.build_training_model(TINY) for _ in runs]  # with a CTC head
    for run, model, epochs in zip(runs, models, (1, 1, 1, 2), strict=True):
        save_checkpoint(run / "model.safetensors", model, TOKENIZER, history=history[:epochs])
    clips_ = {"audio": [{"bytes": text} for text in ("", "", "on", "")]}

    def transcribed(model, split, **options):
        rescored.append((split, options))
        return ["one two"], ["one three"]

    monkeypatch.setattr(ship, "DATA", place)
    monkeypatch.setattr(
        ship, "load_clips", lambda source, split: clips_ if split == "test_other_words" else split
    )
    monkeypatch.setattr(ship, "ClipDataset", lambda split, *_: split)
    monkeypatch.setattr(ship, "validate", lambda model, split: {"val_loss": 1 / len(split)})
    monkeypatch.setattr(ship, "transcribe_dataset", transcribed)
    monkeypatch.setattr(ship, "transcribe", lambda model, text, tokenizer: {"text": text})
    assert ship.main([str(run) for run in runs]) == 0
    shipped, tokenizer, extra = load_checkpoint(place / "model.safetensors")
    first = [history[0] | {"epoch": n, "step": 9 * n, "seconds": 3.0 * n} for n in range(1, 5)]
    last = {"epoch": 5, "step": 45, "wer": 0.25, "seconds": 70.4}
    assert extra == {"history": [*first, last]}
    assert tokenizer.config == TOKENIZER.config
    states = [model.state_dict() for model in models]
    for name, weight in shipped.state_dict().items():
        mean = sum(state[name] for state in states[2:]) / 2
        assert torch.equal(weight, mean.half().float())
    lines = (place / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == extra["history"]
    results = json.loads((place / "results.json").read_text())
    assert (results["epochs"], results["training_seconds"]) == (5, 70)
    assert results["test_other_words"] == {"written": 0.25}
    splits = ["validation", "test_seen_voices", "test_unseen_voices", "test_single_words"]
    assert rescored == [(split, ctc_rescoring(model)) for split in splits]
    for split in splits:
        assert results[split] == {"val_loss": round(1 / len(split), 5), "ctc_rescoring_wer": 0.5}


def test_a_deeper_encoder_computes_what_the_mean_of_the_runs_does(tmp_path):
    grow, runs = import_module("grow"), [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        model = recipes.build_training_model(TINY)
        save_checkpoint(run / "model.safetensors", model, TOKENIZER, history=[])
    assert grow.main([tmp_path / "start.safetensors", *runs]) == 0
    deeper, _, _ = load_checkpoint(tmp_path / "start.safetensors")
    model, _, _ = import_module("ship").load_mean(runs)
    assert deeper.args.no_of_encoder_layers == 2 * TINY.no_of_encoder_layers
    mel = torch.randn(2, TINY.log_mel_features, TINY.max_t)
    assert torch.equal(deeper.encoder(mel), model.eval().encoder(mel))
    deeper.encoder(mel).square().sum().backward()
    outputs = [block.mlp[2].weight for block in deeper.encoder.blocks]
    assert all(weight.grad.abs().sum() > 0 for weight in outputs)  # the copies learn
