"""The decoder against two references over many shapes, its cache, its causality, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder
from whisper.model import TextDecoder as OpenAIDecoder

from utils.config import ModelArgs
from utils.decoder import TextDecoder

SHAPES = [  # width, heads, layers, vocabulary, context, tokens, audio states, clips
    (12, 3, 2, 23, 9, 5, 7, 2),
    (16, 1, 1, 11, 4, 4, 1, 1),  # one head, one audio state, a full context
    (30, 5, 3, 101, 13, 1, 6, 3),  # a single token
    (64, 2, 4, 57, 21, 20, 33, 2),
]
RENAMED = {
    ".cross_attn_ln": ".encoder_attn_layer_norm",
    ".cross_attn": ".encoder_attn",
    ".attn_ln": ".self_attn_layer_norm",
    ".attn": ".self_attn",
    ".mlp_ln": ".final_layer_norm",
    ".query": ".q_proj",
    ".key": ".k_proj",
    ".value": ".v_proj",
    ".out": ".out_proj",
    ".mlp.0": ".fc1",
    ".mlp.2": ".fc2",
    ".blocks": ".layers",
    ".ln": ".layer_norm",
    ".token_embedding": ".embed_tokens",
    ".positional_embedding": ".embed_positions.weight",
}


def build(shape, dropout=0.0, noise=0.2):
    """-> decoder with disturbed weights, tokens (B, S), audio states (B, T, D)."""
    D, H, layers, V, context, S, T, B = shape
    torch.manual_seed(0)
    args = ModelArgs.preset(
        "tiny",
        embeddings_dims=D,
        no_of_heads=H,
        no_of_decoder_layers=layers,
        tgt_vocab_size=V,
        block_size=context,
        dropout=dropout,
        attn_dropout=dropout,
    )
    decoder = TextDecoder(args).eval()
    with torch.no_grad():
        for weight in decoder.parameters():
            weight += noise * torch.randn_like(weight)
    return decoder, torch.randint(V, (B, S)), torch.randn(B, T, D)


@torch.inference_mode()
def openai_logits(decoder, tokens, states):
    a = decoder.args
    reference = OpenAIDecoder(
        a.tgt_vocab_size, a.block_size, a.embeddings_dims, a.no_of_heads, a.no_of_decoder_layers
    )
    reference.load_state_dict(decoder.state_dict())
    return reference(tokens, states)


@torch.inference_mode()
def transformers_logits(decoder, tokens, states):
    a = decoder.args
    config = WhisperConfig(
        vocab_size=a.tgt_vocab_size,
        max_target_positions=a.block_size,
        d_model=a.embeddings_dims,
        decoder_attention_heads=a.no_of_heads,
        decoder_layers=a.no_of_decoder_layers,
        decoder_ffn_dim=a.hidden_dim,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    state = {}
    for name, weight in decoder.state_dict().items():
        name = "." + name
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        state[name[1:]] = weight
    reference = WhisperDecoder(config).eval()
    reference.load_state_dict(state)
    features = reference(tokens, encoder_hidden_states=states).last_hidden_state
    return features @ decoder.token_embedding.weight.T


@pytest.mark.parametrize("reference", [openai_logits, transformers_logits])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, reference):
    decoder, tokens, states = build(shape)
    with torch.inference_mode():
        ours = decoder(tokens, states)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, reference(decoder, tokens, states), atol=1e-5, rtol=1e-5)


def approximate_gelu(block):
    block.mlp[1] = nn.GELU(approximate="tanh")


def large_epsilon(block):
    block.cross_attn_ln.eps = 1e-3


def swapped_arguments(block):
    attention = block.cross_attn.forward
    block.cross_attn.forward = lambda x, source, cache=None: attention(source[:, : x.shape[1]], x)


def swap_norms(block):
    block.attn_ln, block.mlp_ln = block.mlp_ln, block.attn_ln


def blind(block):
    block.cross_attn.forward = lambda x, *args, **options: torch.zeros_like(x)


def one_head(block):
    block.attn.heads = 1


@pytest.mark.parametrize(
    "error", [approximate_gelu, large_epsilon, swapped_arguments, swap_norms, blind, one_head]
)
def test_seeded_errors_are_noticed(error):
    decoder, tokens, states = build(SHAPES[0])
    expected = openai_logits(decoder, tokens, states)
    error(decoder.blocks[-1])
    assert (decoder(tokens, states) - expected).abs().max() > 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_future_tokens_have_exactly_no_influence(shape):
    decoder, tokens, states = build(shape)
    embedded = []
    decoder.token_embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    logits = decoder(tokens, states)
    for i in range(tokens.shape[1]):
        total = logits[:, i].square().sum()
        (gradient,) = torch.autograd.grad(total, embedded[0], retain_graph=True)
        assert gradient[:, : i + 1].abs().sum(dim=-1).all()
        assert not gradient[:, i + 1 :].any()


@pytest.mark.parametrize("pieces", [[5, 1, 1, 1], [1] * 8, [3, 4, 1], [8]], ids=str)
def test_cache_equals_no_cache(pieces):
    decoder, _, states = build(SHAPES[0])
    tokens = torch.randint(23, (2, 8))
    cache, start, parts = decoder.new_cache(states.shape[1]), 0, []
    with torch.inference_mode():
        for size in pieces:
            parts.append(decoder(tokens[:, start : start + size], states, cache))
            start += size
        expected = decoder(tokens, states)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_text_longer_than_the_context_is_refused():
    decoder, _, states = build(SHAPES[0])
    with pytest.raises(
        ValueError, match="10 tokens and the context 9: shorten the text or raise `block_size`"
    ):
        decoder(torch.zeros(2, 10, dtype=torch.long), states)
    cache = decoder.new_cache(states.shape[1])
    decoder(torch.zeros(2, 9, dtype=torch.long), states, cache)
    with pytest.raises(ValueError, match="10 tokens"):
        decoder(torch.zeros(2, 1, dtype=torch.long), states, cache)


def test_padding_changes_no_loss():
    decoder, tokens, states = build(SHAPES[0])
    lengths, alone = [5, 3], 0.0
    labels = torch.randint(23, (2, 5))
    for b, length in enumerate(lengths):
        logits = decoder(tokens[b : b + 1, :length], states[b : b + 1])[0]
        alone += F.cross_entropy(logits, labels[b, :length], reduction="sum")
        tokens[b, length:], labels[b, length:] = 0, -100
    together = decoder(tokens, states).flatten(0, 1)
    batch = F.cross_entropy(together, labels.flatten(), reduction="sum")
    torch.testing.assert_close(batch, alone)


def test_dropout_only_in_training():
    decoder, tokens, states = build(SHAPES[0], dropout=0.3)
    assert torch.equal(decoder(tokens, states), decoder(tokens, states))
    decoder.train()
    assert not torch.equal(decoder(tokens, states), decoder(tokens, states))


def test_every_weight_receives_a_gradient():
    decoder, tokens, states = build(SHAPES[0])
    decoder(tokens, states).square().sum().backward()
    assert not [name for name, p in decoder.named_parameters() if not p.grad.any()]


def test_the_output_table_is_the_input_table():
    decoder, _, _ = build(SHAPES[0])
    features = torch.eye(12)
    torch.testing.assert_close(decoder.logits(features).T, decoder.token_embedding.weight)
    assert sum(p.numel() == 23 * 12 for p in decoder.parameters()) == 1
