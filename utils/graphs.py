"""Speed: compiled blocks, recomputed activations, and a training step captured as CUDA graphs."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from utils.data import IGNORE_INDEX
from utils.loss import autocast, summed_cross_entropy


def checkpoint_activations(model):
    """From now on each block keeps its input alone, and the backward pass computes the rest again."""
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model):
    """From now on `torch.compile` translates the blocks; the result is used in training alone."""
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        compiled = torch.compile(block.forward, dynamic=True)
        block.forward = partial(compiled_in_training, block, compiled, block.forward)


def compiled_in_training(block, compiled, plain, *inputs):
    """`compiled(*inputs)` while `block` is in training mode, else `plain(*inputs)`."""
    return compiled(*inputs) if block.training else plain(*inputs)


PAD_MULTIPLES = 50, 16, 512  # frames, text positions, targets: few shapes, few graphs


def padding_to_multiple(size, multiple, most):
    """How many more make `size` a multiple of `multiple`, as far as `most` allows."""
    return max(0, min(-size % multiple, most - size))


def pad_batch(batch, args, end):
    """A `Batch` padded to multiples of `PAD_MULTIPLES`; its loss stays the same.

    Frames are padded with the lowest value of their clip, text with `end`, and targets that do not
    count are appended.
    """
    frames, text, targets = PAD_MULTIPLES
    (B, S), (_, M, T) = batch.inputs.shape, batch.mel.shape
    lowest = batch.mel.amin(dim=(1, 2), keepdim=True)  # (B, 1, 1)
    silence = lowest.expand(B, M, padding_to_multiple(T, frames, args.max_t))
    more = padding_to_multiple(S, text, args.block_size)
    positions = batch.positions // S * (S + more) + batch.positions % S
    fill = (0, -len(positions) % targets)
    return replace(
        batch,
        mel=torch.cat([batch.mel, silence], dim=2),
        inputs=F.pad(batch.inputs, (0, more), value=end),
        positions=F.pad(positions, fill),
        targets=F.pad(batch.targets, fill, value=IGNORE_INDEX),
    )


def encode_half(run, mel):
    """The first half of a step: (B, M, T) -> encoder states (B, T, D)."""
    with autocast(run.args.device):
        return run.model.encoder(mel)


def extra_gradient(run, states, batch):
    """What the recipe's extra loss adds to the gradient of states (B, T, D), which CUDA cannot record."""
    states = states.detach().requires_grad_()
    with autocast(run.args.device):
        loss = run.recipe.extra_loss(run.model, states, batch, run)
    loss.backward()
    return states.grad


def decode_half(run, states, gradient, inputs, positions, targets, tokens):
    """The second half: cross-entropy, and backward from it and from `gradient` -> summed loss."""
    with autocast(run.args.device):
        scored = inputs, positions, targets
        smoothed, loss = summed_cross_entropy(run.model, states, *scored, run.args.label_smoothing)
        objective = smoothed / tokens
        if gradient is not None:
            objective = objective + (states * gradient).sum()  # has just this gradient
    objective.backward()
    return loss.detach()


def capture_graph(function, *inputs, pool=None):
    """-> a CUDA graph of `function(*inputs)`, and its result to be. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function(*inputs)
    return graph, result


class GraphedForwardBackward:
    """`forward_backward` in two halves, each captured as a CUDA graph at the third call of its shapes.

    Between the halves comes the recipe's extra loss, if there is one.
    """

    def __init__(self):
        self.run, self.calls, self.graphs, self.pool = None, {}, {}, None

    def __call__(self, run, batch):
        if run is not self.run:  # graphs hold the tensors of one run
            self.run, self.calls, self.graphs = run, {}, {}
            self.pool = torch.cuda.graph_pool_handle()
        batch = pad_batch(batch, run.args, run.tokenizer.end)
        tokens = torch.tensor(batch.tokens, dtype=torch.float32).to(batch.mel.device)
        tensors = batch.mel, batch.inputs, batch.positions, batch.targets, tokens
        shapes = tuple(tensor.shape for tensor in tensors)
        self.calls[shapes] = self.calls.get(shapes, 0) + 1
        if self.calls[shapes] < 3:
            states = encode_half(run, batch.mel)
            gradient = extra_gradient(run, states, batch) if run.recipe.extra_loss else None
            return decode_half(run, states, gradient, *tensors[1:])
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(tensors)
        first, second, places, states, gradient, loss = self.graphs[shapes]
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor)
        first.replay()
        if gradient is not None:
            gradient.copy_(extra_gradient(run, states, batch))
        second.replay()
        return loss

    def capture(self, tensors):
        """-> both graphs, and the tensors that they read and write."""
        places = [tensor.clone() for tensor in tensors]
        first, states = capture_graph(encode_half, self.run, places[0], pool=self.pool)
        gradient = torch.zeros_like(states) if self.run.recipe.extra_loss else None
        rest = self.run, states, gradient, *places[1:]
        second, loss = capture_graph(decode_half, *rest, pool=self.pool)
        return first, second, places, states.detach(), gradient, loss


class GraphedFunction:
    """A function of a run alone, captured as a CUDA graph when it is called for the third time."""

    def __init__(self, function):
        self.function, self.run, self.calls, self.graph = function, None, 0, None

    def __call__(self, run):
        if run is not self.run:
            self.run, self.calls, self.graph = run, 0, None
        self.calls += 1
        if self.calls < 3:
            return self.function(run)
        if self.graph is None:
            self.graph, _ = capture_graph(self.function, run)
        self.graph.replay()
