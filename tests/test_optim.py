"""Muon: singular values of one, PyTorch's steps, and the weights that it moves."""

import math

import pytest
import torch
from test_training import TINY
from torch import nn

from utils.model import Whisper
from utils.optim import Muon, muon_and_adamw, newton_schulz

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rows, columns", [(16, 16), (16, 48), (48, 16), (1, 8)])
def test_newton_schulz_keeps_the_singular_vectors(rows, columns):
    torch.manual_seed(0)
    matrix = torch.randn(rows, columns)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    turned = U.T @ newton_schulz(matrix[None])[0] @ Vh.T
    values = turned.diagonal()
    torch.testing.assert_close(turned, values.diag(), rtol=0, atol=1e-5)
    large = S > 0.05 * S.max()
    assert values[large].min() > 0.6 and values.max() < 1.25
    assert not newton_schulz(torch.zeros(1, rows, columns)).any(), "no gradient, no step"


@pytest.mark.parametrize("weight_decay, momentum", [(0.0, 0.95), (0.3, 0.5)])
def test_muon_equals_pytorchs(weight_decay, momentum):
    torch.manual_seed(0)
    start = [torch.randn(24, 24), torch.randn(24, 24), torch.randn(96, 24), torch.randn(24, 96)]
    ours, theirs = ([nn.Parameter(m.clone()) for m in start] for _ in range(2))
    settings = dict(lr=0.01, weight_decay=weight_decay, momentum=momentum)
    muon = Muon(ours, **settings)
    library = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn_like(mine)
        muon.step()
        library.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() < 0.02 * moved, "more than bfloat16 can explain"


def test_muon_does_nothing_where_the_gradient_is_broken():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8))
    muon = Muon([weight], lr=0.1, weight_decay=0.1)
    weight.grad = torch.randn(8, 8)
    muon.step()
    before, average = weight.detach().clone(), muon.state[weight]["average"].clone()
    weight.grad, muon.found_inf = torch.full((8, 8), math.nan), torch.ones(())
    muon.step()
    assert torch.equal(weight, before) and torch.equal(muon.state[weight]["average"], average)
    weight.grad, muon.found_inf = torch.randn(8, 8), torch.zeros(())
    muon.step()
    assert weight.isfinite().all() and not torch.equal(weight, before)


def test_decay_is_for_matrices_alone():
    model = Whisper(TINY)
    adamw, muon = muon_and_adamw(model, TINY)
    decayed, kept = adamw.param_groups
    groups = [decayed, *muon.param_groups]
    assert all(group["weight_decay"] == TINY.weight_decay_optim for group in groups)
    assert kept["weight_decay"] == 0 < TINY.weight_decay_optim
    vectors = {id(p) for name, p in model.named_parameters() if "bias" in name or "ln" in name}
    assert {id(p) for p in kept["params"]} == vectors
    moved = [p for group in [*groups, kept] for p in group["params"]]
    assert len(moved) == len({id(p) for p in moved}) == len(list(model.parameters()))


def test_muon_moves_the_matrices_of_the_blocks():
    model = Whisper(TINY)
    matrices = {id(p) for p in muon_and_adamw(model, TINY)[1].param_groups[0]["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in matrices}
    assert "encoder.blocks.0.mlp.0.weight" in named and "decoder.blocks.0.attn.key.weight" in named
    assert not any("embedding" in name or "conv" in name or "bias" in name for name in named)
    assert len(named) == (4 + 2) + (8 + 2)  # attention and feed-forward, once or twice


def test_a_frozen_encoder_is_in_no_optimizer():
    model = Whisper(TINY)
    model.encoder.requires_grad_(False)
    groups = [g for optimizer in muon_and_adamw(model, TINY) for g in optimizer.param_groups]
    moved = {id(p) for group in groups for p in group["params"]}
    assert moved == {id(p) for p in model.decoder.parameters()}


def test_each_weight_is_moved_by_one_optimizer_alone():
    """And state saved by both goes back to where it was."""
    model = Whisper(TINY)
    optimizers = muon_and_adamw(model, TINY)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers[0].step()
    by_adamw = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    optimizers[1].step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys() and 0 < len(by_adamw) < len(moved)
    for optimizer, again in zip(optimizers, muon_and_adamw(model, TINY), strict=True):
        again.load_state_dict(optimizer.state_dict())
        for ours, theirs in zip(again.state.values(), optimizer.state.values(), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
