"""Speed: padding, captured steps, compiled blocks and recomputed activations change no loss."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_training import TINY, new_run, sentences, step_and_wait, tones, weights

from utils import graphs
from utils.data import IGNORE_INDEX, ClipDataset
from utils.graphs import GraphedForwardBackward, GraphedFunction, checkpoint_activations, pad_batch
from utils.loss import (
    Batch,
    count_targets,
    select_targets,
    summed_cross_entropy,
    training_log_mel,
    validate,
)
from utils.model import Whisper
from utils.recipes import build_training_model, recipe_for
from utils.tokenizer import Tokenizer
from utils.training import (
    forward_backward,
    optimizer_step,
    prepare_batch,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = Tokenizer.for_args(TINY)
STILL = replace(TINY, augment_strength=0.0, dropout=0.0, attn_dropout=0.0)


@pytest.fixture(scope="module")
def clips():
    return ClipDataset(tones(sentences(24)), TOKENIZER, TINY)


# Padded shapes


def small_batch(frames=75, share=0.7):
    """A `Batch` of random numbers: 3 clips, 11 tokens, about `share` of them scored."""
    torch.manual_seed(0)
    labels = torch.randint(500, (3, 11)).where(torch.rand(3, 11) < share, IGNORE_INDEX)
    mel, inputs = torch.randn(3, 80, frames), torch.randint(500, (3, 11))
    return Batch(mel, inputs, *select_targets(labels), ["", "", ""], 9.0, 9.0)


def test_padding_that_is_not_scored_changes_neither_loss_nor_gradient(monkeypatch):
    """What fills up text and targets on a GPU, so that few shapes occur."""
    monkeypatch.setattr(graphs, "PAD_MULTIPLES", (1, 16, 16))
    model, states = Whisper(TINY).eval(), torch.randn(3, 30, 32)
    batch, found = small_batch(), []
    padded = pad_batch(batch, TINY, TOKENIZER.end)
    assert padded.inputs.shape == (3, 16) and len(padded.targets) == 32 > len(batch.targets) > 16
    for shown in (batch, padded):
        model.zero_grad()
        scored = shown.inputs, shown.positions, shown.targets
        loss = summed_cross_entropy(model, states, *scored, smoothing=0.1)[0]
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.decoder.parameters()])
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_targets_stay_at_their_positions_when_text_is_padded(monkeypatch):
    monkeypatch.setattr(graphs, "PAD_MULTIPLES", (1, 16, 1))
    batch = small_batch(share=1.0)
    padded = pad_batch(batch, TINY, TOKENIZER.end)
    before = batch.inputs.flatten()[batch.positions]
    assert torch.equal(padded.inputs.flatten()[padded.positions], before)
    assert (padded.inputs[:, 11:] == TOKENIZER.end).all()


@pytest.mark.parametrize("multiple, frames", [(1, 75), (50, 100), (500, 200)])
def test_silence_fills_up_frames_as_far_as_the_context_goes(clips, monkeypatch, multiple, frames):
    monkeypatch.setattr(graphs, "PAD_MULTIPLES", (multiple, 1, 1))  # max_t is 200
    audio = clips.collate(clips.batches()[-1])[0][:, :12_000]
    batch = small_batch()
    batch.mel = training_log_mel(audio, TINY)
    padded = pad_batch(batch, TINY, TOKENIZER.end).mel
    assert padded.shape[2] == frames
    assert torch.equal(padded[..., :75], batch.mel)
    assert (padded[..., 75:] <= batch.mel.amin(dim=(1, 2), keepdim=True)).all()


def test_nothing_is_cut_off_where_something_is_too_long():
    missing = graphs.padding_to_multiple
    assert [missing(size, 16, 64) for size in (1, 16, 60, 64, 65)] == [15, 0, 4, 0, 0]
    assert missing(7, 1, 5) == 0 and missing(31, 16, 40) == 1 and missing(33, 16, 40) == 7


# Captured steps


def rerun(function):
    """What the driver remembers, played by a function that runs again."""
    return SimpleNamespace(replay=function)


def capture_later(self, tensors):
    """`GraphedForwardBackward.capture` without a GPU: both halves run when they are replayed."""
    run, places = self.run, [tensor.clone() for tensor in tensors]
    states, loss = graphs.encode_half(run, places[0]).detach(), torch.zeros(())
    gradient = torch.zeros_like(states) if run.recipe.extra_loss else None
    first = rerun(lambda: states.copy_(graphs.encode_half(run, places[0]).detach()))

    def replay_second():
        again = graphs.encode_half(run, places[0])
        loss.copy_(graphs.decode_half(run, again, gradient, *places[1:]))

    return first, rerun(replay_second), places, states, gradient, loss


def test_what_moves_the_weights_is_captured_at_the_third_step(clips, monkeypatch):
    """And the learning rate still is that of each step."""
    said = []
    monkeypatch.setattr(
        graphs, "capture_graph", lambda f, run: said.append(1) or (rerun(lambda: f(run)), 0)
    )
    captured = new_run(TINY, clips, optimizer_step=GraphedFunction(optimizer_step))
    plain = new_run(TINY, clips)
    for step, batch in enumerate(clips.batches()[:4]):
        for run in (captured, plain):
            torch.manual_seed(0)
            run.step = 5 * step
            step_and_wait(run, batch)
        assert len(said) == (step >= 2)
    pairs = zip(captured.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_another_run_is_captured_anew(clips, monkeypatch):
    """A recipe may serve several runs; a graph holds the tensors of one."""
    monkeypatch.setattr(graphs, "capture_graph", lambda f, run: (rerun(lambda: f(run)), 0))
    step = GraphedFunction(optimizer_step)
    one, other = (new_run(STILL, clips, optimizer_step=step) for _ in range(2))
    for run in (one, one, one, one, other):
        step_and_wait(run, clips.batches()[0])
    assert step.run is other and step.calls == 1 and step.graph is None


@pytest.mark.parametrize("ctc_weight", [0.0, 0.5])
def test_each_shape_is_captured_when_it_occurs_for_the_third_time(clips, monkeypatch, ctc_weight):
    """And what is replayed adds the same gradients and losses as what is not."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(GraphedForwardBackward, "capture", capture_later)
    monkeypatch.setattr(graphs, "PAD_MULTIPLES", (1, 16, 64))
    args = replace(STILL, ctc_weight=ctc_weight, splice_share=0.0)
    step = GraphedForwardBackward()
    plain, captured = new_run(args, clips), new_run(args, clips, forward_backward=step)
    for run in (plain, captured):
        run.scale.fill_(2.0)  # as in float16: both halves and the extra loss are scaled
    batches = sorted(clips.batches(), key=len)
    for turn in range(4):
        for batch in batches[:2]:
            found = []
            for run in (plain, captured):
                run.flat.zero_()
                part = prepare_batch(run, batch, *count_targets(clips, batch))
                run.flat[-1] += run.recipe.forward_backward(run, part)
                found.append(run.flat.clone())
            torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
        assert len(step.graphs) == (0 if turn < 2 else len(step.calls))
        assert all(calls >= turn + 1 for calls in step.calls.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.5])
def test_a_captured_run_learns_as_one_that_is_not(compile, dropout, ctc_weight):
    args = replace(TINY, device="cuda:0", epochs=8, splice_share=0.0)
    args = replace(args, dropout=dropout, ctc_weight=ctc_weight)
    clips = ClipDataset(tones(sentences(32)), Tokenizer.for_args(args), args)
    captured = new_run(args, clips, build_model=recipe_for(args, compile).build_model)
    plain = new_run(args, clips, forward_backward=forward_backward, optimizer_step=optimizer_step)
    losses = {"captured": [], "plain": []}
    for epoch in range(args.epochs):
        for name, run in (("captured", captured), ("plain", plain)):
            run.epoch = epoch
            run.model.train()
            for batch in run.batches(epoch):
                loss, tokens = step_and_wait(run, batch)
                losses[name].append(loss / tokens)
                run.step += 1
    assert len(captured.recipe.forward_backward.graphs) > 1, "nothing was captured"
    assert captured.recipe.optimizer_step.graph is not None
    for name in losses:
        losses[name] = torch.tensor(losses[name])
    tolerance = 0.02 if dropout == 0 else 0.3  # augmentation and dropout are drawn apart
    torch.testing.assert_close(losses["captured"][:3], losses["plain"][:3], rtol=0.02, atol=0)
    end = losses["captured"][-8:].mean(), losses["plain"][-8:].mean()
    torch.testing.assert_close(*end, rtol=tolerance, atol=0.1)
    assert end[0] < losses["captured"][0] / 2
    assert set(validate(captured.model, clips)) == {"val_loss", "gap", "wer"}


# Recomputed activations, compiled blocks


def test_blocks_that_are_recomputed_have_the_same_gradients():
    """With dropout too: the second pass draws what the first one drew."""
    args = replace(TINY, dropout=0.3, attn_dropout=0.2, no_of_encoder_layers=2)
    mel, tokens, gradients, kept = torch.randn(3, 80, 100), torch.randint(400, (3, 9)), [], []
    for again in (False, True):
        torch.manual_seed(0)
        model, sizes = Whisper(args).train(), {}
        if again:
            checkpoint_activations(model)
        torch.manual_seed(1)

        def note(t, sizes=sizes):
            sizes[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model(mel, tokens).square().mean()
        loss.backward()
        kept.append(sum(sizes.values()))
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.6 * kept[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    with torch.inference_mode():
        rows = model.eval().greedy(mel, TOKENIZER.prompt, TOKENIZER.end, 4)
    assert len(rows) == 3


def history_of(args, clips, out, compile=False):
    """Train -> the numbers of each epoch."""
    rows = train(args, clips, clips, out=out, recipe=recipe_for(args, compile))
    return [[row[name] for name in ("step", "train_loss", "val_loss", "wer")] for row in rows]


def test_a_run_with_recomputation_is_the_same_run(clips, tmp_path):
    args = replace(TINY, augment_strength=0.0, epochs=1)
    history_of(args, clips, tmp_path / "plain")
    history_of(replace(args, gradient_checkpointing=True), clips, tmp_path / "again")
    one, other = (weights(tmp_path / name) for name in ("plain", "again"))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("again", [False, True])
def test_a_compiled_run_is_the_same_run(clips, tmp_path, monkeypatch, again):
    """Traced and differentiated by the compiler; only the writing of kernels is left out."""
    compiler, used = partial(torch.compile, backend="aot_eager"), []
    monkeypatch.setattr(torch, "compile", lambda *a, **k: used.append(1) or compiler(*a, **k))
    args = replace(TINY, augment_strength=0.0, epochs=1, gradient_checkpointing=again)
    one = history_of(args, clips, tmp_path / "plain")
    assert not used
    other = history_of(args, clips, tmp_path / "compiled", compile=True)
    assert used
    torch.testing.assert_close(torch.tensor(other), torch.tensor(one), rtol=1e-3, atol=1e-6)


def test_only_training_runs_the_translation(monkeypatch):
    used = []

    def translate(function, dynamic):
        return lambda *inputs: used.append(function) or function(*inputs)

    monkeypatch.setattr(torch, "compile", translate)
    model = build_training_model(TINY, compile=True)
    mel, tokens = torch.randn(2, 80, 100), torch.randint(400, (2, 9))
    model.train()(mel, tokens).mean().backward()
    assert len(used) == len(model.encoder.blocks) + len(model.decoder.blocks)
    model.eval().greedy(mel, TOKENIZER.prompt, TOKENIZER.end, 4)
    assert len(used) == len(model.encoder.blocks) + len(model.decoder.blocks)
