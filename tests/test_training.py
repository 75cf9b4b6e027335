"""Training: the loss, the schedule, runs that are killed and resumed, and tests of listening."""

import copy
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

from utils import ctc, files, loss, recipes, training
from utils.__main__ import main, setting
from utils.checkpoints import load_checkpoint
from utils.config import ModelArgs
from utils.data import IGNORE_INDEX, ClipDataset, load_clips
from utils.files import latest_checkpoint, list_checkpoints
from utils.loss import (
    check_finite,
    encode_clips,
    shuffled_audio_losses,
    token_loss,
    training_log_mel,
    validate,
)
from utils.model import Whisper
from utils.recipes import build_training_model, recipe_for, run_training
from utils.tokenizer import Tokenizer
from utils.training import Run, learning_rate, load_state, save_state, train_step

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the subprocesses below

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "data" / "model.safetensors"
TINY = ModelArgs.preset(
    "cpu",
    embeddings_dims=32,
    no_of_encoder_layers=1,
    no_of_decoder_layers=1,
    stride=2,
    max_t=200,
    batch_size=4,
    epochs=3,
    curriculum_epochs=0,
    max_lr=5e-3,
    label_smoothing=0.0,
    device="cpu",
)
WORDS = "one two three four five six seven eight".upper().split()


def tones(texts):
    """A table like `load_clips` gives: every word is a tone of its own, 0.2 s long."""
    table = []
    for text in texts:
        t = torch.arange(3200) / 16000
        hz = [300 + 250 * WORDS.index(word) for word in text.split()]
        sound = io.BytesIO()
        audio = torch.cat([0.3 * torch.sin(2 * math.pi * f * t) for f in hz])
        soundfile.write(sound, audio.numpy(), 16000, format="WAV")
        table.append({"text": text, "audio": {"bytes": sound.getvalue()}, "speaker": "tone"})
    return table


def sentences(number, seed=0):
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=2 + i % 5)) for i in range(number)]


@pytest.fixture(scope="module")
def clips():
    return ClipDataset(tones(sentences(24)), Tokenizer.for_args(TINY), TINY)


@pytest.fixture(scope="module")
def overfitted():
    """A model that knows eight different clips by heart, and the clips."""
    args = replace(TINY, embeddings_dims=64, batch_size=8, max_lr=3e-3, augment_strength=0.0)
    args = replace(args, ctc_weight=0.0, splice_share=0.0)
    texts = [" ".join(random.Random(i).sample(WORDS, k=4)) for i in range(8)]
    clips = ClipDataset(tones(texts), Tokenizer.for_args(args), args)
    run = new_run(args, clips)
    run.total_steps = 150
    for _ in range(run.total_steps):
        loss, tokens = step_and_wait(run, list(range(8)))
        run.step += 1
    assert loss / tokens < 0.05, "it cannot even learn eight clips"
    return run.model.eval(), clips


def new_run(args, clips, out="nowhere", validation=None, **parts):
    """A `Run` with the recipe of its settings, some parts of it replaced."""
    return Run(args, clips, validation or clips, out, replace(recipe_for(args), **parts))


def step_and_wait(run, indices):
    """`train_step` -> the summed loss as a number, the number of tokens."""
    loss, tokens = train_step(run, indices)
    check_finite(loss, run.step)
    return loss.item(), tokens


def weights(folder):
    return load_checkpoint(folder / "model.safetensors")[0].state_dict()


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


# The loss, the optimiser, the schedule


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_loss_equals_that_over_all_positions(smoothing, share):
    torch.manual_seed(0)
    model = Whisper(TINY).eval()
    mel, inputs = torch.randn(3, 80, 60), torch.randint(500, (3, 11))
    labels = torch.randint(500, (3, 11)).where(torch.rand(3, 11) < share, IGNORE_INDEX)
    labels[0, 0] = 7  # one real token at least
    ours = token_loss(model, model.encoder(mel), inputs, labels, smoothing)
    every = F.cross_entropy(model(mel, inputs).mT, labels, label_smoothing=smoothing)
    torch.testing.assert_close(ours, every, rtol=0, atol=1e-5)


def test_what_a_run_reports_is_the_loss_without_smoothing(clips):
    """The gradient is that of smoothed labels, the number that of plain ones."""
    batch, found = clips.batches()[0], {}
    for smoothing in (0.0, 0.3):
        args = replace(
            TINY, label_smoothing=smoothing, augment_strength=0.0, ctc_weight=0.0, splice_share=0.0
        )
        run = new_run(args, clips)
        with torch.inference_mode():
            real, loss, _ = shuffled_audio_losses(run.model, *encode_clips(run.model, clips, batch))
        summed, tokens = step_and_wait(run, batch)
        assert tokens == real and summed / tokens == pytest.approx(loss, rel=1e-4)
        found[smoothing] = run.flat[:-1].clone()
    assert not torch.allclose(found[0.0], found[0.3], rtol=0.05)


@pytest.mark.parametrize("longest", [0.01, 1e6])
def test_clipping_equals_pytorchs(clips, longest, monkeypatch):
    args = replace(TINY, max_grad_norm=longest, ctc_weight=0.0, splice_share=0.0)
    args = replace(args, augment_strength=0.0, label_smoothing=0.0)
    run, batch = new_run(args, clips), clips.batches()[0]
    monkeypatch.setattr(run.optimizers[0], "step", lambda: None)
    if len(run.optimizers) > 1:
        monkeypatch.setattr(run.optimizers[1], "step", lambda: None)
    other = build_training_model(args)
    other.load_state_dict(run.model.state_dict())
    step_and_wait(run, batch)
    audio, inputs, labels = clips.collate(batch)
    token_loss(other, other.encoder(training_log_mel(audio, args)), inputs, labels).backward()
    norm = nn.utils.clip_grad_norm_(other.parameters(), longest)
    assert (norm > longest) == (longest < 1)
    for ours, theirs in zip(run.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.to_dense(), rtol=1e-3, atol=1e-7)


def test_rows_that_are_read_give_the_gradient_of_the_whole_table(clips):
    """A `Run` asks for it sparse; a reading with a dense gradient is the reference."""
    torch.manual_seed(0)
    args = replace(TINY, ctc_weight=0.0, splice_share=0.0)
    model = new_run(args, clips).model
    assert model.decoder.token_embedding.sparse
    mel, inputs = torch.randn(3, 80, 100), torch.randint(args.tgt_vocab_size, (3, 9))
    inputs[1] = inputs[0]  # the same rows again
    found = []
    for sparse in (True, False):
        model.decoder.token_embedding.sparse = sparse
        model.zero_grad()
        token_loss(model, model.encoder(mel), inputs, inputs.roll(-1, 1)).backward()
        found.append(model.decoder.token_embedding.weight.grad)
    assert not found[0].is_sparse
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("linear, schedule", [(False, "CosineAnnealingLR"), (True, "PolynomialLR")])
@pytest.mark.parametrize("steps, warmup", [(1, 0.1), (7, 0.0), (100, 0.05), (1000, 0.5)])
def test_learning_rate_equals_pytorch_schedulers(steps, warmup, linear, schedule):
    args = replace(TINY, warmup_ratio=warmup, max_lr=0.5, linear_decay=linear)
    warm = max(1, round(warmup * steps))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / warm))
    falling = getattr(torch.optim.lr_scheduler, schedule)(optimizer, max(1, steps - warm))
    for step in range(steps):
        assert learning_rate(step, steps, args) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-6
        )
        optimizer.step()
        (rising if step < warm - 1 else falling if step >= warm else rising).step()
    assert 0 <= learning_rate(steps - 1, steps, args) <= 0.5


# Invariants 7 and 8


def test_padding_and_batching_change_no_loss_and_no_transcript(overfitted):
    model, clips = overfitted
    with torch.inference_mode():
        audio, inputs, labels = clips.collate(list(range(8)))
        states = model.encoder(training_log_mel(audio, model.args))
        together, real = token_loss(model, states, inputs, labels), labels != IGNORE_INDEX
        wide = F.pad(inputs, (0, 5), value=3), F.pad(labels, (0, 5), value=IGNORE_INDEX)
        torch.testing.assert_close(token_loss(model, states, *wide), together, rtol=0, atol=1e-5)
        alone = 0
        for i in range(8):
            one = clips.collate([i])
            states = model.encoder(training_log_mel(one[0], model.args))
            alone += token_loss(model, states, *one[1:]) * (one[2] != IGNORE_INDEX).sum()
        torch.testing.assert_close(alone / real.sum(), together, rtol=0, atol=1e-5)
        mel, end = training_log_mel(audio, model.args), clips.tokenizer.end
        batched = model.greedy(mel, clips.tokenizer.prompt, end)
        single = [model.greedy(m[None], clips.tokenizer.prompt, end)[0] for m in mel]
    assert batched == single == [clips.tokens[i] for i in range(8)]


def test_the_overfitted_model_listens(overfitted):
    model, clips = overfitted
    scores = validate(model, clips)
    deaf = 8 * math.log(8) / sum(len(tokens) + 1 for tokens in clips.tokens)
    assert scores["val_loss"] < 0.1 < deaf, "below what a deaf model can reach"
    assert scores["gap"] > 1 and scores["wer"] == 0


def test_the_shipped_model_listens():
    if not SHIPPED.exists():
        pytest.skip("no shipped model yet")
    model, tokenizer, _ = load_checkpoint(SHIPPED)
    table = load_clips("corpus", "test_unseen_voices").select(range(64))
    clips = ClipDataset(table, tokenizer, model.args)
    batch = max(clips.batches(), key=len)
    with torch.inference_mode():
        _, right, wrong = shuffled_audio_losses(model, *encode_clips(model, clips, batch))
    assert len(batch) > 3 and right < 0.5 and wrong - right > 1


def test_validation_goes_back_to_training_and_weighs_by_tokens(clips, monkeypatch):
    model = Whisper(TINY).train()
    scores = validate(model, clips)
    assert model.training, "validate left the model in eval mode"
    with torch.inference_mode():
        heard = [encode_clips(model.eval(), clips, batch) for batch in clips.batches()]
        sums = [shuffled_audio_losses(model, *batch) for batch in heard]
    mean = sum(n * loss for n, loss, _ in sums) / sum(n for n, _, _ in sums)
    assert scores["val_loss"] == pytest.approx(mean, abs=1e-6)
    met = []
    monkeypatch.setattr(loss.jiwer, "wer", lambda said, found: met.extend(said) or 0.0)
    validate(model, clips)
    assert sorted(met) == sorted(clips.texts)


# Stop and go: invariant 10

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_training import *
torch.set_num_threads(1)
clips = ClipDataset(tones(sentences(24)), Tokenizer.for_args(TINY), TINY)
step = training.train_step
def slow(run, indices):
    time.sleep(0.02)  # so that there is time to be killed
    print("step", run.step, flush=True)
    return step(run, indices)
training.train_step = slow
run_training(TINY, clips, clips, out=sys.argv[1])
print("complete", flush=True)
"""


def start(folder):
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, number):
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1]) >= number:
            return
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_training(TINY, clips, clips, out=folder)
    return folder


@pytest.mark.posix
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_weights(clips, whole, tmp_path):
    per_epoch = len(clips.batches(0))
    moment = random.SystemRandom()
    process = start(tmp_path)
    wait_for_step(process, moment.randrange(per_epoch, 3 * per_epoch))
    time.sleep(moment.random() * 0.05)
    process.kill()  # kill -9: nothing can be tidied up
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    history = run_training(TINY, clips, clips, out=tmp_path)
    assert len(history) == TINY.epochs and same_weights(weights(tmp_path), weights(whole))
    timeless = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        for lines in ((f / "history.jsonl").read_text().splitlines() for f in (tmp_path, whole))
    ]
    assert timeless[0] == timeless[1]
    cuts = latest_checkpoint(whole)[1]["processes"][0]["memory"]["boundaries"]
    assert sum(map(bool, cuts)) > len(clips) / 3, "no clip was crossed: this proves too little"


@pytest.mark.posix
def test_ctrl_c_saves_and_the_rest_ends_with_the_same_weights(clips, whole, tmp_path):
    process = start(tmp_path)
    wait_for_step(process, 2)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "saved: run again to continue" in out and "Traceback" not in errors
    assert all(re.fullmatch(r"history.jsonl|state-.*", p.name) for p in tmp_path.iterdir())
    steps = latest_checkpoint(tmp_path)[1]["progress"]["step"]
    assert 2 < steps < sum(len(clips.batches(epoch)) for epoch in range(3))
    run_training(TINY, clips, clips, out=tmp_path)
    assert same_weights(weights(tmp_path), weights(whole))
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in whole.iterdir()}
    assert len(list_checkpoints(whole)) == 2


def test_ctrl_c_in_the_last_batch_of_an_epoch_or_in_validation_stops_too(clips, whole, tmp_path):
    class Pressed(ClipDataset):
        def __init__(self, number):
            self.__dict__.update(clips.__dict__, left=number)

        def collate(self, indices):
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
            return super().collate(indices)

    last = Pressed(len(clips.batches(0)))
    assert len(run_training(TINY, last, clips, out=tmp_path)) == 1
    assert len(run_training(TINY, clips, Pressed(2), out=tmp_path)) == 2
    assert len(run_training(TINY, clips, clips, out=tmp_path)) == 3
    assert same_weights(weights(tmp_path), weights(whole))


def test_the_second_ctrl_c_interrupts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup
    with pytest.raises(KeyboardInterrupt), files.graceful_interrupt() as pressed:
        signal.raise_signal(signal.SIGINT)
        assert pressed
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_a_complete_run_says_so_and_is_not_trained_again(clips, whole, capsys):
    before = weights(whole)
    (whole / "history.jsonl").unlink()  # as if killed between the state and the history
    assert len(run_training(TINY, clips, clips, out=whole)) == 3
    assert same_weights(before, weights(whole))
    assert len((whole / "history.jsonl").read_text().splitlines()) == 3
    assert f"{whole}/model.safetensors is complete: set more epochs" in capsys.readouterr().out


def changed(clips, **lists):
    """The same clips, some of their lists replaced."""
    other = copy.copy(clips)
    other.__dict__.update(lists)
    return other


OTHER_DATA = {
    "a text": lambda c: changed(c, texts=["corrected", *c.texts[1:]]),
    "a length": lambda c: changed(c, audio=[c.audio[0][1:], *c.audio[1:]]),
    "a speaker": lambda c: changed(c, speakers=["somebody", *c.speakers[1:]]),
    "one clip fewer": lambda c: changed(c, texts=c.texts[:-1], audio=c.audio[:-1]),
    "another order": lambda c: changed(c, texts=c.texts[::-1], audio=c.audio[::-1]),
}


@pytest.mark.parametrize("where", ["training", "validation"])
@pytest.mark.parametrize("what", OTHER_DATA)
def test_a_run_with_other_data_is_refused(clips, whole, what, where):
    data = OTHER_DATA[what](clips)
    data = (data, clips) if where == "training" else (clips, data)
    kept = {path: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(ValueError, match="differs from this run in data: continue with"):
        run_training(TINY, *data, out=whole)
    assert kept == {path: path.read_bytes() for path in whole.iterdir()}


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(max_lr=1e-3), "max_lr"),
        (dict(seed=7, label_smoothing=0.2), "label_smoothing, seed"),
        (ModelArgs.preset("cpu", device="cpu").__dict__, "max_t, embeddings_dims, .*"),
    ],
)
def test_a_run_with_other_settings_is_refused(clips, whole, changes, named):
    with pytest.raises(ValueError, match=f"differs from this run in {named}: .*another folder"):
        run_training(replace(TINY, **changes), clips, clips, out=whole)
    elsewhere = replace(TINY, device="cpu:0", save_minutes=1)  # another device is no other run
    assert len(run_training(elsewhere, clips, clips, out=whole)) == 3


def test_a_complete_run_is_trained_further_by_more_epochs(clips, whole, tmp_path, monkeypatch):
    """On the schedule of the longer run, from where it stands; and again bit for bit."""
    further, step = replace(TINY, epochs=5), training.train_step
    for name in ("one", "other"):
        shutil.copytree(whole, tmp_path / name)
    history = run_training(further, clips, clips, out=tmp_path / "one")
    steps = sum(len(clips.batches(epoch)) for epoch in range(5))
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5] and history[-1]["step"] == steps
    assert history[3]["lr"] == learning_rate(history[3]["step"] - 1, steps, further)
    assert not same_weights(weights(whole), weights(tmp_path / "one"))

    def power_cut(run, indices):
        if run.epoch == 4:
            raise SystemError("power cut")
        return step(run, indices)

    monkeypatch.setattr(training, "train_step", power_cut)
    with pytest.raises(SystemError):
        run_training(further, clips, clips, out=tmp_path / "other")
    monkeypatch.setattr(training, "train_step", step)
    run_training(further, clips, clips, out=tmp_path / "other")
    assert same_weights(weights(tmp_path / "one"), weights(tmp_path / "other"))


@pytest.mark.parametrize("epochs", [1, 2])
def test_epochs_that_are_behind_are_not_taken_back(clips, whole, epochs):
    with pytest.raises(ValueError, match=f"`epochs` must be 3 or more for .*, got {epochs}"):
        run_training(replace(TINY, epochs=epochs), clips, clips, out=whole)


def test_a_run_that_is_not_resumed_begins_anew(clips, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    other = changed(clips, texts=["other", *clips.texts[1:]])
    short = replace(TINY, epochs=1)
    assert len(run_training(short, other, clips, out=tmp_path / "run", resume=False)) == 1
    assert "complete" not in capsys.readouterr().out
    steps = len(clips.batches(0))
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == [f"state-{steps:08}.pt"]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    clips, whole, tmp_path, monkeypatch
):
    fsync, written = os.fsync, []

    def killed(file):
        written.append(file)
        if len(written) == 5:
            raise SystemError("killed")
        fsync(file)

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(SystemError):
        run_training(replace(TINY, save_minutes=0), clips, clips, out=tmp_path)
    monkeypatch.undo()
    [*_, last] = list_checkpoints(tmp_path)
    (tmp_path / "state-00000099.pt.part").write_bytes(last.read_bytes()[:999])
    run_training(replace(TINY, save_minutes=0), clips, clips, out=tmp_path)
    assert same_weights(weights(tmp_path), weights(whole))
    assert not list(tmp_path.glob("*.part"))


def test_a_run_begins_with_the_weights_of_another(clips, whole, tmp_path):
    start, still = whole / "model.safetensors", replace(TINY, max_lr=1e-12, epochs=1)
    run_training(still, clips, clips, out=tmp_path / "with", start=start)
    for name, weight in weights(tmp_path / "with").items():
        torch.testing.assert_close(weight, weights(whole)[name])
    for other in (None, SHIPPED, tmp_path / "with" / "model.safetensors"):
        with pytest.raises(ValueError, match="differs from this run in start|to start with has"):
            run_training(still, clips, clips, out=tmp_path / "with", start=other)
    moved = shutil.copy(start, tmp_path / "moved.safetensors")  # what counts are the weights
    assert len(run_training(still, clips, clips, out=tmp_path / "with", start=moved)) == 1
    quiet = replace(still, ctc_weight=0.0, splice_share=0.0)  # without a CTC head
    run_training(quiet, clips, clips, out=tmp_path / "quiet", start=start)
    assert not any("CTC head" in name for name in weights(tmp_path / "quiet"))


def test_only_a_run_with_a_trained_ctc_head_splices_from_its_first_epoch(
    clips, whole, tmp_path, monkeypatch
):
    once, spliced = replace(TINY, epochs=1), []
    found = ctc.find_boundaries
    monkeypatch.setattr(ctc, "find_boundaries", lambda run: spliced.append(run.out) or found(run))
    no_head = replace(once, ctc_weight=0.0, splice_share=0.0)
    run_training(no_head, clips, clips, out=tmp_path / "no head")
    starts = {"from nothing": None, "from the Transformer": tmp_path / "no head"}
    for name, folder in (starts | {"from all": whole}).items():
        start = folder and folder / "model.safetensors"
        run_training(once, clips, clips, out=tmp_path / name, start=start)
    assert spliced == [tmp_path / "from all"]


@pytest.mark.parametrize(
    "changes, start, sentence",
    [
        ({"embeddings_dims": 64}, None, "to start with has embeddings_dims=32: set that here too"),
        (
            {"no_of_encoder_layers": 2, "kernel_size": 5, "stride": 4},
            None,
            "no_of_encoder_layers=1, kernel_size=3, stride=2: set",
        ),
        ({}, "gone.safetensors", "there is no checkpoint gone.safetensors"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(clips, whole, tmp_path, changes, start, sentence):
    start = start or whole / "model.safetensors"
    with pytest.raises(ValueError, match=sentence):
        run_training(replace(TINY, **changes), clips, clips, out=tmp_path / "run", start=start)
    assert not (tmp_path / "run").exists()


def test_a_run_of_a_version_that_kept_less_is_refused(clips, tmp_path, monkeypatch):
    fewer = [name for name in training.PROGRESS_FIELDS if name != "seconds"]
    monkeypatch.setattr(training, "PROGRESS_FIELDS", fewer)
    save_state(new_run(TINY, clips, tmp_path))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="give this run another folder"):
        run_training(TINY, clips, clips, out=tmp_path)


def test_a_broken_state_is_refused(clips, whole, tmp_path):
    state = tmp_path / "state-00000007.pt"
    for data in (list_checkpoints(whole)[-1].read_bytes()[:5000], b"", b"no checkpoint"):
        state.write_bytes(data)
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            run_training(TINY, clips, clips, out=tmp_path)


def test_saved_before_the_first_step(clips, tmp_path):
    run = new_run(TINY, clips, tmp_path)
    save_state(run)
    again = new_run(TINY, clips, tmp_path)
    load_state(again)
    for other in (run, again):
        torch.manual_seed(1)
        other.loss = step_and_wait(other, clips.batches(0)[0])
    assert run.loss == again.loss


def test_a_resumed_run_keeps_the_options_of_its_own_optimisers(clips, tmp_path):
    """What a GPU needs (`capturable`) must not reach a CPU on which the run goes on."""
    run = new_run(TINY, clips, tmp_path)
    step_and_wait(run, clips.batches(0)[0])
    run.batch = run.step = 1  # as train_epoch counts
    save_state(run)
    again = new_run(TINY, clips, tmp_path)
    for optimizer in again.optimizers:
        optimizer.param_groups[0]["of this machine"] = True
    load_state(again)
    for before, after in zip(run.optimizers, again.optimizers, strict=True):
        assert after.param_groups[0]["of this machine"] is True
        pairs = zip(before.state.values(), after.state.values(), strict=True)
        for saved, loaded in pairs:
            assert all(torch.equal(saved[name], loaded[name]) for name in saved) and saved


# What goes wrong ends with a sentence


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_ends_with_a_sentence_and_touches_no_weight(clips, tmp_path, where):
    run = new_run(TINY, clips, tmp_path)
    before = [p.clone() for p in run.model.parameters()]
    if where == "loss":
        run.model.encoder.register_forward_hook(lambda module, mel, states: states * math.nan)
    else:
        run.model.decoder.ln.bias.register_hook(lambda g: g * math.inf)
    with pytest.raises(ValueError, match="at step 0: train again with a lower max_lr"):
        step_and_wait(run, clips.batches(0)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert not list(tmp_path.iterdir())


def test_a_model_that_the_last_step_broke_is_not_saved(clips, tmp_path):
    """Every loss of the epoch is finite; that of the validation is not."""
    args = replace(TINY, epochs=1, max_lr=1e30)
    recipe = replace(recipe_for(args), batches=lambda clips, epoch, args: clips.batches(epoch)[:1])
    with pytest.raises(ValueError, match="no longer finite at step 1: train again with a lower"):
        training.train(args, clips, clips, tmp_path, recipe)
    assert not list(tmp_path.iterdir())


def test_settings_from_the_command_line():
    pairs = ["epochs=20", "max_lr=1e-3", "device=cpu", "no_of_encoder_layers=null", "seed=many"]
    assert dict(map(setting, pairs)) == {
        "epochs": 20,
        "max_lr": 0.001,
        "device": "cpu",
        "no_of_encoder_layers": None,
        "seed": "many",
    }


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("--preset sed", "unknown preset 'sed': choose one of seed, cpu"),
        ("--set epoch=2", "unknown setting 'epoch': choose from"),
        ("--set epochs", "`epochs` must be an integer, got ''"),
        ("--set epochs=many", "`epochs` must be an integer, got 'many'"),
        ("--set epochs=0", "`epochs` must be above 0, got 0"),
        ("--set embeddings_dims=30", "must divide"),
        ("--set device=banana", "got 'banana'"),
        ("--set device=cuda:99", "no device 'cuda:99' here"),
        ("--set device=cpu tgt_vocab_size=300", "no tokenizer has 300 tokens"),
        ("--set device=cpu --data nowhere", "nowhere is not there: check the folder's name"),
        ("--set device=cpu --data EMPTY", "EMPTY has no table of the split train: found nothing"),
    ],
)
def test_command_line_refuses_with_one_sentence(line, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["train", *line.split()])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and sentence in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["EMPTY"], "something was written"


def test_missing_corpus_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.data.CORPUS_DIR", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["train", "--set", "device=cpu"])
    assert end.value.code == 2 and "has no table of the split train" in capsys.readouterr().err


def test_own_recordings_in_one_line(tmp_path, capsys, monkeypatch):
    """A folder of recordings, trained and shown; then again, which resumes a finished run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = ["file_name,text"]
    for i, row in enumerate(tones(sentences(12))):
        (folder / f"{i}.wav").write_bytes(row["audio"]["bytes"])
        lines.append(f"{i}.wav,{row['text'].lower()}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    words = "--data mine --out run --set device=cpu epochs=2 embeddings_dims=16".split()
    words += "no_of_encoder_layers=1 no_of_decoder_layers=1".split()
    for _ in range(2):
        main(["train", *words])
        shown = capsys.readouterr().out
        assert "python -m utils evaluate run/model.safetensors --data mine" in shown
        main(["evaluate", "run/model.safetensors", "--data", "mine", "--device", "cpu"])
        shown = capsys.readouterr().out
        assert "reference:" in shown and "Word error rate on 1 clips that were held out" in shown
        assert "joint CTC/attention rescoring" in shown and "greedy" in shown
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert len(names) == 5 and {"model.safetensors", "best.safetensors", "history.jsonl"} < names
    monkeypatch.setattr(recipes, "train", lambda *a, **k: [])  # as after Ctrl-C
    with pytest.raises(SystemExit) as end:
        main(["train", *words])
    assert end.value.code == 130
