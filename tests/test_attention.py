"""Attention: parity sweeps, causality, the cache, dropout, recorded weights, errors, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperAttention
from whisper.model import MultiHeadAttention as OpenAIAttention
from whisper.model import disable_sdpa

from utils.attention import (
    KVCache,
    MultiHeadAttention,
    attention,
    causal_mask,
    merge_heads,
    record_attention,
    split_heads,
)

SHAPES = [(1, 1, 1, 4, 1), (2, 3, 5, 12, 4), (3, 7, 2, 10, 5), (2, 5, 9, 64, 1)]  # B, S, T, D, H


def close(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def layer_and_inputs(shape, dropout=0.0):
    B, S, T, D, H = shape
    torch.manual_seed(S)
    layer = MultiHeadAttention(D, H, dropout).eval()
    return layer, torch.randn(B, S, D), torch.randn(B, T, D)


def three_uses(layer, x, source):
    return layer(x), layer(x, causal=True), layer(x, source)


@pytest.mark.parametrize("mask", [None, causal_mask(4, 7), causal_mask(1, 7)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_fused_kernel(mask, dropout):
    S = 4 if mask is None else len(mask)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 5, requires_grad=True) for n in (S, 7, 7))
    torch.manual_seed(1)
    mixed, weights = attention(query, key, value, mask, dropout)
    torch.manual_seed(1)
    fused = F.scaled_dot_product_attention(query, key, value, mask, dropout)
    close(mixed, fused)
    close(weights.sum(-1), torch.ones(2, 3, S))
    for mine, theirs in zip(
        torch.autograd.grad(mixed.square().sum(), (query, key, value)),
        torch.autograd.grad(fused.square().sum(), (query, key, value)),
        strict=True,
    ):
        close(mine, theirs, atol=1e-4)


def test_is_causal_of_the_fused_kernel_is_another_mask_on_a_rectangle():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 5) for n in (4, 7, 7))
    upper_left = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert not torch.allclose(attention(query, key, value, causal_mask(4, 7))[0], upper_left, 0.1)
    assert causal_mask(3, 7).sum(dim=1).tolist() == [5, 6, 7]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_openai_whisper(shape):
    layer, x, source = layer_and_inputs(shape)
    reference = OpenAIAttention(shape[3], shape[4])
    reference.load_state_dict(layer.state_dict())
    mask = torch.full((shape[1], shape[1]), float("-inf")).triu(1)
    theirs = reference(x), reference(x, mask=mask), reference(x, source)
    for mine, (their, _) in zip(three_uses(layer, x, source), theirs, strict=True):
        close(mine, their)
    with disable_sdpa():
        theirs = reference(x), reference(x, mask=mask), reference(x, source)
    with record_attention(layer) as seen:
        visible = three_uses(layer, x, source)
    for mine, weights, (their, scores) in zip(visible, seen[""], theirs, strict=True):
        close(mine, their)
        close(weights, scores.softmax(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(shape):
    layer, x, source = layer_and_inputs(shape)
    config = WhisperConfig(attn_implementation="eager")
    reference = WhisperAttention(shape[3], shape[4], config=config).eval()
    for name, mine in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        weights = getattr(layer, mine).state_dict()
        getattr(reference, f"{name}_proj").load_state_dict(weights)
    mask = torch.full((shape[1], shape[1]), float("-inf")).triu(1)
    theirs = (
        reference(x),
        reference(x, attention_mask=mask),
        reference(x, key_value_states=source),
    )
    with record_attention(layer) as seen:
        visible = three_uses(layer, x, source)
    for mine, weights, (their, their_weights) in zip(visible, seen[""], theirs, strict=True):
        close(mine, their)
        close(weights, their_weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_multihead_attention(shape):
    layer, x, source = layer_and_inputs(shape)
    B, S, T, D, H = shape
    reference = nn.MultiheadAttention(D, H, batch_first=True).eval()
    maps = layer.query, layer.key, layer.value
    reference.in_proj_weight.data = torch.cat([m.weight.data for m in maps])
    biases = layer.query.bias.data, torch.zeros(D), layer.value.bias.data
    reference.in_proj_bias.data = torch.cat(biases)
    reference.out_proj.load_state_dict(layer.out.state_dict())
    close(layer(x), reference(x, x, x)[0])
    close(layer(x, source), reference(x, source, source)[0])
    close(layer(x, causal=True), reference(x, x, x, attn_mask=~causal_mask(S, S))[0])
    with record_attention(layer) as seen:
        layer(x, source)
    close(seen[""][0], reference(x, source, source, average_attn_weights=False)[1])


def test_the_future_has_no_gradient():
    layer, x, _ = layer_and_inputs((1, 6, 1, 12, 3))
    x.requires_grad_()
    for i, output in enumerate(layer(x, causal=True)[0]):
        gradient = torch.autograd.grad(output.sum(), x, retain_graph=True)[0][0]
        assert (gradient[i + 1 :] == 0).all(), f"output {i} depends on a later input"
        assert (gradient[: i + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("steps", [[1, 1, 1, 1, 1], [3, 1, 1], [5], [2, 3]])
def test_cached_equals_uncached(steps):
    layer, x, source = layer_and_inputs((2, 5, 4, 12, 3))
    text, audio = KVCache(5), KVCache(4)
    with torch.inference_mode():
        causal = [layer(new, causal=True, cache=text) for new in x.split(steps, dim=1)]
        cross = [layer(new, source, cache=audio) for new in x.split(steps, dim=1)]
        close(torch.cat(causal, 1), layer(x, causal=True))
        close(torch.cat(cross, 1), layer(x, source))
    assert (text.length, audio.length) == (5, 4)


def test_cache_refuses_what_does_not_fit_and_stays_as_it_was():
    cache = KVCache(3)
    key = torch.randn(1, 2, 2, 4)
    keys, _ = cache.append(key, key)
    assert keys.data_ptr() == cache.keys.data_ptr(), "a view, not a copy"
    with pytest.raises(ValueError, match="is 3 positions, got 4"):
        cache.append(key, key)
    assert cache.length == 2 and torch.equal(cache.read()[0], key)


def test_dropout_acts_in_training_and_is_disabled_in_evaluation():
    layer, x, source = layer_and_inputs((2, 5, 7, 12, 3), dropout=0.5)
    plain = three_uses(layer, x, source)
    for first, second in zip(plain, three_uses(layer, x, source), strict=True):
        assert torch.equal(first, second)
    layer.train()
    for first, second in zip(plain, three_uses(layer, x, source), strict=True):
        assert not torch.equal(first, second)
    torch.manual_seed(5)
    fused = layer(x, causal=True)
    torch.manual_seed(5)
    with record_attention(layer):
        close(layer(x, causal=True), fused)


def test_recording_ends_with_its_block_even_after_an_error():
    layer, x, _ = layer_and_inputs((1, 2, 1, 8, 2))
    model = nn.ModuleDict({"a": layer, "b": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError), record_attention(model) as seen:
        layer(x)
        raise RuntimeError("stop")
    assert list(seen) == ["a"] and len(seen["a"]) == 1 and layer.recorded is None
    layer(x)
    assert len(seen["a"]) == 1


def test_weight_names_and_gradients():
    layer, x, source = layer_and_inputs((2, 3, 5, 12, 4))
    names = "query.weight query.bias key.weight value.weight value.bias out.weight out.bias"
    assert list(layer.state_dict()) == names.split()
    layer(x, source).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters()), "a dead weight"


def test_recorded_weights_obey_the_mask():
    layer, x, _ = layer_and_inputs((2, 5, 5, 12, 3))
    with record_attention(layer) as seen:
        layer(x, causal=True)
    assert (seen[""][0][..., ~causal_mask(5, 5)] == 0).all()


class NoProjections(MultiHeadAttention):
    def forward(self, x, source):
        return attention(x, source, source)[0]


class Swapped(MultiHeadAttention):
    def forward(self, x, source):
        return super().forward(source, x)


class CausalCross(MultiHeadAttention):
    def attend(self, query, key, value, mask):
        return super().attend(query, key, value, causal_mask(query.shape[2], key.shape[2]))


class DropsInEvaluation(MultiHeadAttention):
    def attend(self, query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, mask, self.dropout)


class MergedWrongly(MultiHeadAttention):
    def attend(self, query, key, value, mask):
        mixed = super().attend(query, key, value, mask)  # (B, H, S, d)
        flat = mixed.reshape(len(mixed), query.shape[2], -1)  # (B, S, D) without a transposition
        return split_heads(flat, self.heads)


def equals_openai_and_is_deterministic(Layer):
    torch.manual_seed(0)
    layer, reference = Layer(24, 4, dropout=0.5).eval(), OpenAIAttention(24, 4).eval()
    reference.load_state_dict(layer.state_dict())
    x, source = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    got, want = layer(x, source), reference(x, source)[0]
    return (
        got.shape == want.shape
        and torch.equal(got, layer(x, source))
        and (got - want).abs().max() < 1e-5
    )


def test_errors_of_published_code_are_noticed():
    assert equals_openai_and_is_deterministic(MultiHeadAttention)
    for wrong in (NoProjections, Swapped, CausalCross, DropsInEvaluation, MergedWrongly):
        assert not equals_openai_and_is_deterministic(wrong), wrong.__name__


def test_a_bias_on_the_keys_changes_nothing():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 5) for n in (4, 7, 7))
    bias = 3 * torch.randn(3, 1, 5)
    plain = attention(query, key, value)[0]
    close(attention(query, key + bias, value)[0], plain)
    assert not torch.allclose(attention(query, key, value + bias)[0], plain, atol=1)


def test_heads_are_slices_of_the_width():
    x = torch.randn(2, 3, 20)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 5) and torch.equal(heads[:, 1], x[..., 5:10])
    assert torch.equal(merge_heads(heads), x)


def test_bad_input():
    with pytest.raises(ValueError, match=r"`heads` must divide `width` \(10\), got 3"):
        MultiHeadAttention(10, 3)
    layer, x, source = layer_and_inputs((1, 3, 3, 8, 2))
    with pytest.raises(ValueError, match="leave it off with a `source`"):
        layer(x, source, causal=True)


def test_cache_rows_are_selected_moved_and_doubled():
    key = torch.randn(4, 2, 3, 5)  # (B, H, S, d)
    for rows in ([2, 0, 3], [3, 3, 1, 0], [0, 1, 2, 3], [1], [0, 0, 1, 1, 2, 3, 3]):
        cache = KVCache(6)
        cache.append(key, -key)
        room = cache.keys.data_ptr()
        cache.select(torch.tensor(rows))
        assert torch.equal(cache.read()[0], key[rows]) and torch.equal(cache.read()[1], -key[rows])
        assert (cache.keys.data_ptr() == room) == (len(rows) <= 4), "in place where there is room"
        more = torch.randn(len(rows), 2, 1, 5)
        assert torch.equal(cache.append(more, more)[0], torch.cat([key[rows], more], dim=2))


def test_several_texts_ask_one_source():
    layer, x, source = layer_and_inputs((6, 2, 5, 12, 3))
    close(layer(x, source[:2]), layer(x, source[:2].repeat_interleave(3, dim=0)))
    with pytest.raises(RuntimeError):
        layer(x, source[:4])
