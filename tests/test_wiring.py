"""Which value reaches which function during a run: each test fails for one plausible slip."""

import copy
import io
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.figure import Figure
from test_training import TINY, new_run, sentences, tones, weights

from utils import (
    augment,
    ctc,
    diagnose,
    distributed,
    evaluation,
    live,
    loss,
    plotting,
    recipes,
    streaming,
    training,
    transcribe,
)
from utils.__main__ import main
from utils.audio import SAMPLE_RATE
from utils.checkpoints import load_checkpoint, load_model
from utils.data import ClipDataset, max_samples, prepare_clip
from utils.decoding import DecodingResult
from utils.graphs import GraphedForwardBackward, GraphedFunction
from utils.long_form import is_silence
from utils.loss import SingleProcess, encode_clips, token_loss, training_log_mel, validate
from utils.model import Whisper
from utils.recipes import recipe_for, run_training
from utils.tokenizer import Tokenizer
from utils.training import Recipe, Run, learning_rate, train, train_epoch, train_step

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
    boundaries = [[7]] * len(source)
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
    rates, asked = iter([0.5, 0.2, 0.3]), []

    def validated(*inputs):
        asked.append(inputs[1:])
        return {"val_loss": 1.0, "gap": 0.0, "wer": next(rates)}

    monkeypatch.setattr(training, "validate", validated)
    recipe = Recipe(batches=two_batches)
    history = train(SIMPLE, clips, others, tmp_path, recipe)
    for name, epochs in (("best", 2), ("model", 3)):
        *_, extra = load_checkpoint(tmp_path / f"{name}.safetensors")
        assert extra["history"] == history[:epochs]
    assert asked == [(others, recipe.processes)] * 3, "every process validates its own share"


def test_the_first_process_alone_writes(clips, tmp_path):
    told = []
    recipe = Recipe(batches=two_batches, processes=Second())
    train(replace(SIMPLE, epochs=1, save_minutes=0), clips, clips, tmp_path, recipe,
          watch=told.append)  # fmt: skip
    assert not list(tmp_path.iterdir()) and not told


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


def test_augmented_features_have_the_bands_of_the_model():
    args = replace(TINY, augment_strength=1.0, log_mel_features=128)
    assert augment.augmented_log_mel(torch.randn(2, 8000), args, 0.9).shape[1] == 128


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


def test_of_several_processes_the_first_one_talks_and_writes(monkeypatch, tmp_path, capsys):
    seen = []

    def trains(args, data, watch, **named):
        seen.append(watch)
        return [{}] * args.epochs

    monkeypatch.setattr(recipes, "run_training", trains)
    monkeypatch.setattr("utils.__main__.tensorboard_logger", lambda folder: "a watch")
    line = f"train --tensorboard --out {tmp_path} --set device=cpu epochs=1".split()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        main(line)
        assert bool(capsys.readouterr().out) == (rank == "0")
    assert seen == ["a watch", None]


def test_a_model_is_loaded_to_the_device_that_is_named(monkeypatch):
    moved = []
    monkeypatch.setattr(Whisper, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr("utils.checkpoints.check_device_works", lambda device: None)
    load_model(transcribe.DEFAULT_MODEL, "cuda:1")
    assert moved[-1] == "cuda:1"


# Live


def test_each_line_of_live_text_begins_with_its_time(capsys):
    said = iter([[(0.5, " seven"), (0.5, " two\n")], [(3.0, " nine\n")], []])
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
    module.InputStream, module.PortAudioError = InputStream, RuntimeError
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    monkeypatch.setattr(live, "find_spec", lambda name: name)
    assert next(live.microphone(4)).tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4


def test_after_a_slow_pass_comes_all_that_was_said_meanwhile(monkeypatch):
    """A recording that is played keeps pace, as a microphone does."""
    now, sizes = [0.0], []

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    for samples in live.played(torch.zeros(10 * SAMPLE_RATE), SAMPLE_RATE):
        sizes.append(len(samples) / SAMPLE_RATE)
        now[0] += 3 * (len(sizes) == 2)
    assert sizes == [1, 1, 3, 1, 1, 1, 1, 1] and now[0] == 10


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
