"""The whole model: size of every preset, first loss, two references, greedy decoding, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
import whisper.model as openai
from transformers import WhisperConfig, WhisperForConditionalGeneration

from utils.config import PRESETS, ModelArgs
from utils.model import Whisper, count_parameters

FAMILIES = {  # the official families, small: bands, encoder and decoder layers, vocabulary
    "multilingual": dict(no_of_encoder_layers=2, no_of_decoder_layers=2, tgt_vocab_size=65),
    "english": dict(no_of_encoder_layers=2, no_of_decoder_layers=2, tgt_vocab_size=64),
    "large-v3": dict(
        log_mel_features=128, no_of_encoder_layers=3, no_of_decoder_layers=3, tgt_vocab_size=66
    ),
    "turbo": dict(
        log_mel_features=128, no_of_encoder_layers=4, no_of_decoder_layers=1, tgt_vocab_size=66
    ),
}
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
    ".ln_post": ".layer_norm",
    ".ln": ".layer_norm",
    ".token_embedding": ".embed_tokens",
    ".positional_embedding": ".embed_positions.weight",
}


def small(**changes):
    shape = dict(embeddings_dims=24, no_of_heads=3, max_t=26, block_size=11, tgt_vocab_size=50)
    return ModelArgs.preset("tiny", **{**shape, **changes})


def disturbed(args, scale=0.2):
    torch.manual_seed(0)
    model = Whisper(args).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn_like(weight)
    return model


def dimensions(a):
    audio = a.log_mel_features, a.max_t // a.stride, a.embeddings_dims, a.no_of_heads
    text = a.tgt_vocab_size, a.block_size, a.embeddings_dims, a.no_of_heads
    return openai.ModelDimensions(*audio, a.encoder_layers, *text, a.no_of_decoder_layers)


def openai_model(model):
    reference = openai.Whisper(dimensions(model.args)).eval()
    positions = {"encoder.positional_embedding": model.encoder.positions}
    reference.load_state_dict({**model.state_dict(), **positions})
    return reference


def transformers_model(model):
    a = model.args
    config = WhisperConfig(
        num_mel_bins=a.log_mel_features,
        max_source_positions=a.max_t // a.stride,
        vocab_size=a.tgt_vocab_size,
        max_target_positions=a.block_size,
        d_model=a.embeddings_dims,
        encoder_attention_heads=a.no_of_heads,
        decoder_attention_heads=a.no_of_heads,
        encoder_layers=a.encoder_layers,
        decoder_layers=a.no_of_decoder_layers,
        encoder_ffn_dim=a.hidden_dim,
        decoder_ffn_dim=a.hidden_dim,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    state = {
        "model.encoder.embed_positions.weight": model.encoder.positions,
        "proj_out.weight": model.decoder.token_embedding.weight,
    }
    for name, weight in model.state_dict().items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        state[f"model.{name}"] = weight
    reference = WhisperForConditionalGeneration(config).eval()
    reference.load_state_dict(state)
    return reference


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_of_every_preset(name):
    args = ModelArgs.preset(name)
    shape = dimensions(args)
    with torch.device("meta"):
        model = Whisper(args)
        encoder = openai.AudioEncoder(
            shape.n_mels, shape.n_audio_ctx, shape.n_audio_state, shape.n_audio_head,
            shape.n_audio_layer,
        )  # fmt: skip
        decoder = openai.TextDecoder(
            shape.n_vocab, shape.n_text_ctx, shape.n_text_state, shape.n_text_head,
            shape.n_text_layer,
        )  # fmt: skip
    assert count_parameters(args) == sum(p.numel() for p in model.parameters())
    parts = [*encoder.parameters(), *decoder.parameters()]
    assert count_parameters(args) == sum(p.numel() for p in parts)
    theirs = {f"encoder.{k}": v.shape for k, v in encoder.state_dict().items()}
    theirs |= {f"decoder.{k}": v.shape for k, v in decoder.state_dict().items()}
    assert theirs.pop("encoder.positional_embedding") == model.encoder.positions.shape
    assert {k: v.shape for k, v in model.state_dict().items()} == theirs


@pytest.mark.parametrize(
    ("name", "seed"), [("cpu", 0), ("cpu", 1), ("cpu", 2), ("seed", 0), ("tiny.en", 1)]
)
def test_first_loss_is_ln_v(name, seed):
    args = ModelArgs.preset(name, no_of_encoder_layers=2)
    torch.manual_seed(seed)
    model = Whisper(args).eval()
    mel = torch.randn(2, args.log_mel_features, 60)
    text = torch.randint(args.tgt_vocab_size, (2, 31))
    with torch.inference_mode():
        logits = model(mel, text[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(args.tgt_vocab_size), rel=0.02)


CASES = [(small(**changes), 0.2, 2) for changes in FAMILIES.values()]
CASES.append((ModelArgs.preset("tiny"), 0.02, 1))  # its real shape, 30 s of audio


@pytest.mark.parametrize(("args", "scale", "clips"), CASES, ids=[*FAMILIES, "tiny"])
def test_equals_both_references(args, scale, clips):
    model = disturbed(args, scale)
    mel = torch.randn(clips, args.log_mel_features, args.max_t)
    text = torch.randint(args.tgt_vocab_size, (clips, 9))
    with torch.inference_mode():
        states, logits = model.encoder(mel), model(mel, text)
        theirs = openai_model(model)
        hub = transformers_model(model)(input_features=mel, decoder_input_ids=text)
        assert logits.std() > 0.1
        close = dict(atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(states, theirs.encoder(mel), **close)
        torch.testing.assert_close(states, hub.encoder_last_hidden_state, **close)
        torch.testing.assert_close(logits, theirs(mel, text), **close)
        torch.testing.assert_close(logits, hub.logits, **close)


def test_an_epsilon_of_one_norm_is_noticed():
    model = disturbed(small(), scale=0.1)
    model.decoder.ln.eps = 1e-3
    mel, text = torch.randn(2, 80, 26), torch.randint(50, (2, 9))
    with torch.inference_mode():
        assert (model(mel, text) - openai_model(model)(mel, text)).abs().max() > 1e-4


def test_causal_attends_to_all_audio_and_no_weight_is_dead():
    model = disturbed(small(**FAMILIES["turbo"]))
    embedded = []
    model.decoder.token_embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    mel = torch.randn(2, 128, 26, requires_grad=True)
    logits = model(mel, torch.randint(66, (2, 7)))
    embedded[0].retain_grad()
    logits[:, 3].square().sum().backward()
    reach = embedded[0].grad.abs().sum(dim=-1)
    assert reach[:, :4].all() and not reach[:, 4:].any()
    assert mel.grad.abs().sum(dim=1).all()
    assert not [name for name, p in model.named_parameters() if not p.grad.any()]


def test_dropout_only_in_training():
    model = Whisper(small(dropout=0.3, attn_dropout=0.3))
    mel, text = torch.randn(2, 80, 26), torch.randint(50, (2, 5))
    assert not torch.equal(model(mel, text), model(mel, text))
    model.eval()
    assert torch.equal(model(mel, text), model(mel, text))


@pytest.fixture(scope="module")
def talker():
    model = disturbed(small(tgt_vocab_size=23), scale=0.8)
    return model, torch.randn(4, 80, 26)


def test_greedy_equals_stepping_without_a_cache(talker):
    model, mel = talker
    text = torch.tensor([[4, 5]] * 4)
    with torch.inference_mode():
        while text.shape[1] < model.args.block_size:
            new = model(mel, text)[:, -1:].argmax(dim=-1)
            text = torch.cat([text, new], dim=1)
    rows = text[:, 2:].tolist()
    assert len({tuple(row) for row in rows}) > 1
    assert model.greedy(mel, [4, 5], end=-1) == rows


def test_greedy_alone_equals_greedy_in_a_batch(talker):
    model, mel = talker
    for end in (-1, model.greedy(mel[:1], [4, 5], end=-1)[0][1]):
        together = model.greedy(mel, [4, 5], end)
        assert together == [model.greedy(mel[b : b + 1], [4, 5], end)[0] for b in range(4)]
        assert not any(end in row for row in together)


def test_greedy_stops(talker):
    model, mel = talker
    full = model.greedy(mel, [4], end=-1)
    assert [len(row) for row in full] == [model.args.block_size - 1] * 4
    assert model.greedy(mel, [4], end=-1, max_tokens=3) == [row[:3] for row in full]
    assert model.greedy(mel[:1], [4], end=full[0][0]) == [[]]


@pytest.mark.parametrize("prompt", [[], [1] * 11, [1] * 12])
def test_greedy_refuses_an_empty_or_too_long_prompt(talker, prompt):
    model, mel = talker
    with pytest.raises(ValueError, match=f"`prompt` must have 1 to 10 tokens, got {len(prompt)}"):
        model.greedy(mel, prompt, end=0)


def test_bad_shapes_are_refused(talker):
    model, mel = talker
    with pytest.raises(ValueError, match=r"`mel` must be \(B, 80, T\) .* got"):
        model(mel[:, :40], torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="12 tokens and the context 11"):
        model(mel, torch.zeros(4, 12, dtype=torch.long))
