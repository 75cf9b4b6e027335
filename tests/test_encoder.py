"""The encoder: parity with both references, receptive field, batches, seeded errors, bad input."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.models.whisper.modeling_whisper import sinusoids as transformers_sinusoids
from whisper.model import AudioEncoder as OpenAIEncoder
from whisper.model import sinusoids as openai_sinusoids

from utils.attention import record_attention
from utils.config import ModelArgs
from utils.encoder import AudioEncoder, EncoderBlock, sinusoids

SMALL = ModelArgs(
    log_mel_features=10,
    embeddings_dims=24,
    no_of_heads=4,
    no_of_encoder_layers=3,
    max_t=28,
    dropout=0.5,
    attn_dropout=0.5,
)
NAMES = {
    "blocks": "layers",
    "ln_post": "layer_norm",
    "attn_ln": "self_attn_layer_norm",
    "mlp_ln": "final_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "attn.": "self_attn.",
    ".query": ".q_proj",
    ".key": ".k_proj",
    ".value": ".v_proj",
    ".out": ".out_proj",
}


def close(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def random_encoder(args, Encoder=AudioEncoder):
    """All weights random, norms and biases too: ones and zeros hide errors."""
    torch.manual_seed(0)
    encoder = Encoder(args).eval()
    for name, parameter in encoder.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        nn.init.normal_(parameter, mean=float("ln" in name and "weight" in name), std=fan_in**-0.5)
    return encoder


def openai(args, frames, encoder):
    reference = OpenAIEncoder(
        args.log_mel_features,
        frames // 2,
        args.embeddings_dims,
        args.no_of_heads,
        args.encoder_layers,
    ).eval()
    missing, unexpected = reference.load_state_dict(encoder.state_dict(), strict=False)
    assert missing == ["positional_embedding"] and not unexpected
    return reference


def transformers(args, frames, encoder):
    config = WhisperConfig(
        d_model=args.embeddings_dims,
        encoder_layers=args.encoder_layers,
        encoder_attention_heads=args.no_of_heads,
        encoder_ffn_dim=args.hidden_dim,
        num_mel_bins=args.log_mel_features,
        max_source_positions=frames // 2,
    )
    weights = encoder.state_dict()
    for ours, theirs in NAMES.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    reference = WhisperEncoder(config).eval()
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert missing == ["embed_positions.weight"] and not unexpected
    return lambda mel: reference(mel).last_hidden_state


@pytest.mark.parametrize("frames", [28, 20, 2])
@pytest.mark.parametrize("library", [openai, transformers])
def test_equals_reference_at_any_length(library, frames):
    encoder = random_encoder(SMALL)
    mel = torch.randn(3, 10, frames)
    with torch.inference_mode():
        close(encoder(mel), library(SMALL, frames, encoder)(mel))


class SamePositions(AudioEncoder):
    def __init__(self, args):
        super().__init__(args)
        self.positions[:] = self.positions[1].clone()


class ApproximateGelu(AudioEncoder):
    def embed(self, mel):
        x = F.gelu(self.conv1(mel), approximate="tanh")
        return F.gelu(self.conv2(x), approximate="tanh").mT + self.positions


class Reshaped(AudioEncoder):
    def embed(self, mel):
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel))))  # (B, D, T // 2)
        return x.reshape(len(x), -1, x.shape[1]) + self.positions


@pytest.mark.parametrize("Encoder", [SamePositions, ApproximateGelu, Reshaped])
def test_seeded_errors_are_noticed(Encoder):
    encoder, mel = random_encoder(SMALL, Encoder), torch.randn(2, 10, 28)
    with torch.inference_mode():
        assert (encoder(mel) - openai(SMALL, 28, encoder)(mel)).abs().max() > 1e-5


@pytest.mark.parametrize("name, layers", [("tiny", 2), ("base.en", 1), ("large-v3", 1)])
def test_equals_openai_at_official_widths_and_30_seconds(name, layers):
    args = ModelArgs.preset(name, no_of_encoder_layers=layers, max_t=3000 if layers > 1 else 600)
    encoder = random_encoder(args)
    mel = torch.randn(1, args.log_mel_features, args.max_t)
    with torch.inference_mode():
        close(encoder(mel), openai(args, args.max_t, encoder)(mel))


@pytest.mark.parametrize("positions, width", [(1, 4), (250, 384), (1500, 384), (1500, 1280)])
def test_sinusoids(positions, width):
    close(sinusoids(positions, width), openai_sinusoids(positions, width), atol=1e-6)
    if width > 4:
        close(sinusoids(positions, width), transformers_sinusoids(positions, width), atol=1e-6)
    rates = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2 - 1))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    exact = torch.cat([angles.sin(), angles.cos()], 1).float()
    close(sinusoids(positions, width), exact, atol=2e-7 * max(positions, 1))  # float32 angles


def test_sinusoids_round_as_the_references_do():
    powers = 10000.0 ** -(torch.arange(192) / 191)  # the same formula, written as a power
    sines = (torch.arange(1500)[:, None] * powers).sin()
    assert 1e-5 < (sines - sinusoids(1500, 384)[:, :192]).abs().max() < 1e-3
    toy = [[math.sin(t), math.sin(t / 10000), math.cos(t), math.cos(t / 10000)] for t in range(3)]
    close(sinusoids(3, 4), torch.tensor(toy))


@pytest.mark.parametrize("width", [2, 5])
def test_sinusoids_refuse_a_width_without_two_halves(width):
    with pytest.raises(ValueError, match=f"`width` must be even and at least 4, got {width}"):
        sinusoids(10, width)


@pytest.mark.parametrize("stride, kernel, frames", [(2, 3, 60), (2, 3, 59), (4, 5, 58), (1, 3, 7)])
def test_as_many_states_as_whole_strides(stride, kernel, frames):
    args = replace(SMALL, stride=stride, kernel_size=kernel, max_t=60)
    assert AudioEncoder(args)(torch.randn(2, 10, frames)).shape == (2, frames // stride, 24)


def test_receptive_field_is_five_frames_before_attention_and_all_after():
    torch.manual_seed(0)
    mel = torch.randn(1, 10, 28, requires_grad=True)
    encoder = AudioEncoder(SMALL).eval()
    near = torch.autograd.grad(encoder.embed(mel)[0, 6].sum(), mel)[0]
    assert near[0].abs().sum(0).nonzero().flatten().tolist() == [10, 11, 12, 13, 14]
    far = torch.autograd.grad(encoder(mel)[0, 6].square().sum(), mel)[0]
    assert (far[0].abs().sum(0) > 0).all()


def test_two_passes_in_eval_are_identical_and_training_has_dropout():
    encoder, mel = random_encoder(SMALL), torch.randn(2, 10, 28)
    assert torch.equal(encoder(mel), encoder(mel))
    encoder.train()
    assert not torch.equal(encoder(mel), encoder(mel))


def test_companions_do_not_change_a_clip():
    encoder, mel = random_encoder(SMALL), torch.randn(5, 10, 24)
    with torch.inference_mode():
        together = encoder(mel)
        for clip, states in zip(mel, together, strict=True):
            close(encoder(clip[None])[0], states)


def test_longer_context_gives_the_same_states():
    encoder = random_encoder(SMALL)
    longer = AudioEncoder(replace(SMALL, max_t=400)).eval()
    longer.load_state_dict(encoder.state_dict())  # positions are not among the weights
    mel = torch.randn(1, 10, 28)
    close(longer(mel), encoder(mel), atol=1e-6)


def test_recorded_weights_change_nothing():
    encoder, mel = random_encoder(SMALL), torch.randn(2, 10, 28)
    with torch.inference_mode(), record_attention(encoder) as seen:
        visible = encoder(mel)
    close(visible, encoder(mel))
    assert list(seen) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert all(w[0].shape == (2, 4, 14, 14) for w in seen.values())


def test_block_is_pre_norm():
    block, x = EncoderBlock(SMALL).eval(), torch.randn(2, 7, 24)
    a = x + block.attn(F.layer_norm(x, [24]))
    close(block(x), a + block.mlp(F.layer_norm(a, [24])))


def test_every_weight_learns():
    encoder = AudioEncoder(SMALL)
    encoder(torch.randn(2, 10, 28)).pow(3).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in encoder.parameters()), "a dead weight"


@pytest.mark.parametrize("shape", [(10, 28), (1, 11, 28), (1, 10, 29), (1, 10, 1), (1, 1, 10, 28)])
def test_other_spectrograms_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \(B, 10, T\) with T from 2 to 28 frames, got"):
        AudioEncoder(SMALL)(torch.zeros(shape))


def test_number_of_weights():
    D, M, k, L = 24, 10, 3, 3
    block = 4 * D * D + 3 * D + 8 * D * D + 5 * D + 4 * D
    total = k * M * D + k * D * D + 2 * D + L * block + 2 * D
    assert sum(p.numel() for p in AudioEncoder(SMALL).parameters()) == total
    assert math.prod(AudioEncoder(SMALL).positions.shape) == 14 * D
