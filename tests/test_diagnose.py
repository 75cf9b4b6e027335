"""`diagnose` catches every planted bug and accuses no correct model."""

import copy
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.attention import MultiHeadAttention
from utils.audio import log_compress, log_mel_spectrogram, mel_filters, mel_spectrogram, pad_or_trim
from utils.checkpoints import load_checkpoint
from utils.config import ModelArgs
from utils.data import IGNORE_INDEX, ClipDataset, load_clips, teacher_forcing
from utils.diagnose import check_frame_timing, diagnose, paired_losses
from utils.loss import token_loss, training_log_mel
from utils.model import Whisper

pytestmark = pytest.mark.usefixtures("one_thread")

SHIPPED = Path(__file__).parent.parent / "data" / "model.safetensors"
PROMPT, END = [12, 13, 14], 15
TINY = ModelArgs.preset(
    "cpu",
    embeddings_dims=32,
    no_of_encoder_layers=1,
    no_of_decoder_layers=1,
    tgt_vocab_size=16,
    max_t=200,
    block_size=12,
    device="cpu",
)
NAMES = "target_shift padding first_label causality dropout batching gradients".split()
NAMES += "loss_level shuffled_audio padding_level".split()


def invent(number, seed):
    """Sentences of 2 to 5 words; seeds that are even and odd have none in common."""
    chosen = random.Random(seed)
    texts = [[chosen.randrange(12) for _ in range(2 + i % 4)] for i in range(number)]
    for words in texts:
        words[-1] ^= (sum(words) + seed) % 2
    return texts


def speak(texts):
    """(B, 1.2 s): every word is a tone of 0.2 s."""
    t = torch.arange(3200) / 16000
    audio = torch.zeros(len(texts), 19200)
    for row, words in zip(audio, texts, strict=True):
        sound = torch.cat([0.3 * torch.sin(2 * math.pi * (300 + 250 * i) * t) for i in words])
        row[: len(sound)] = sound
    return audio


def batches(number=32, seed=1, size=16, targets=teacher_forcing):
    texts = invent(number, seed)
    parts = [texts[i : i + size] for i in range(0, number, size)]
    return [(speak(part), *targets(part, PROMPT, END)) for part in parts]


def untrained(**changes):
    torch.manual_seed(0)
    return Whisper(replace(TINY, **changes))


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt to attend to the audio, left in training mode."""
    model = untrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    audio, inputs, labels = batches(256, seed=0, size=256)[0]
    mel = training_log_mel(audio, TINY)
    for _ in range(120):
        pick = torch.randint(256, (16,))
        optimizer.zero_grad()
        token_loss(model, model.encoder(mel[pick]), inputs[pick], labels[pick]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def failed_tests(*args, **options):
    return {name for name, (ok, _) in diagnose(*args, **options).items() if not ok}


# --- the innocent ---


def test_nothing_is_said_against_a_trained_model_and_it_is_left_as_it_was(trained, capsys):
    before = {name: p.clone() for name, p in trained.state_dict().items()}
    findings = diagnose(trained, batches(), train=batches(seed=0))
    assert all(ok for ok, _ in findings.values()), findings
    assert list(findings) == [*NAMES, "frame_timing", "splits"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in findings]
    assert trained.training and all(p.grad is None or p.requires_grad for p in trained.parameters())
    assert all(torch.equal(p, before[name]) for name, p in trained.state_dict().items())


def test_a_model_in_half_precision_is_tested_in_float32(trained):
    half = copy.deepcopy(trained).bfloat16()
    assert failed_tests(half, batches()) == set()
    assert next(half.parameters()).dtype == torch.bfloat16


def test_spectrograms_and_iterators_are_batches_too(trained):
    mels = ((training_log_mel(audio, TINY), *rest) for audio, *rest in batches())
    assert failed_tests(trained, mels) == set()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("preset", ["small vocabulary", "published vocabulary"])
def test_an_untrained_model_only_does_not_attend_to_the_audio_yet(dropout, preset):
    size = {"small vocabulary": 16, "published vocabulary": 50262}[preset]
    model = untrained(dropout=dropout, attn_dropout=dropout, tgt_vocab_size=size)
    findings = diagnose(model, batches())
    assert {name for name, (ok, _) in findings.items() if not ok} == {"shuffled_audio"}
    assert "has not learnt to attend to the audio yet" in findings["shuffled_audio"][1]


def test_nothing_is_said_against_the_shipped_model():
    if not SHIPPED.exists():
        pytest.skip("no shipped model yet")
    model, tokenizer, _ = load_checkpoint(SHIPPED)
    clips, known = (
        ClipDataset(load_clips("corpus", split).select(range(number)), tokenizer, model.args)
        for split, number in (("validation", 96), ("train", 200))
    )
    chosen, train = ([c.collate(i) for i in c.batches()] for c in (clips, known))
    assert failed_tests(model, chosen, train=train) == set()


def test_a_frozen_encoder_is_a_choice(trained):
    model = untrained()
    model.load_state_dict(trained.state_dict())
    model.encoder.requires_grad_(False)
    assert failed_tests(model, batches()) == set()


@pytest.mark.parametrize("frozen", ["", "decoder", "decoder.token_embedding"])
def test_whatever_is_frozen_or_at_rest(frozen):
    """All of it, as for inference, the decoder alone; and where the caller takes no gradients."""
    model = untrained()
    model.get_submodule(frozen).requires_grad_(False)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert failed_tests(model, batches()) == {"shuffled_audio"}
    leak(model)
    assert failed_tests(model, batches()) == {"causality", "shuffled_audio"}


# --- labels ---


def unshifted(texts, prompt, end):
    inputs, labels = teacher_forcing(texts, prompt, end)
    return inputs, inputs.where(labels != IGNORE_INDEX, labels)


def shifted_twice(texts, prompt, end):
    inputs, labels = teacher_forcing(texts, prompt, end)
    return inputs[:, :-1], labels[:, 1:]


def padding_scored(texts, prompt, end):
    return teacher_forcing([[*t, *[end] * (7 - len(t))] for t in texts], prompt, end)


def last_label_end(texts, prompt, end):
    """As published: the last position of each row is end-of-text, even over padding."""
    inputs, labels = teacher_forcing(texts, prompt, end)
    labels[:, -1] = end
    return inputs, labels


def prompt_scored(texts, prompt, end):
    inputs, labels = teacher_forcing(texts, prompt, end)
    labels[:, : len(prompt) - 1] = torch.tensor(prompt[1:])
    return inputs, labels


@pytest.mark.parametrize(
    "targets, name",
    [
        (unshifted, "target_shift"),
        (shifted_twice, "target_shift"),
        (padding_scored, "padding"),
        (last_label_end, "padding"),
        (prompt_scored, "first_label"),
    ],
)
def test_wrong_labels(trained, targets, name):
    assert name in failed_tests(trained, batches(targets=targets))
    others = {"shuffled_audio"} | ({"first_label"} if targets is unshifted else set())
    assert failed_tests(untrained(), batches(targets=targets)) - others == {name}


# --- the model ---


class Leaky(MultiHeadAttention):
    def forward(self, x, source=None, causal=False, cache=None):
        return super().forward(x, source)


class LeakyByOne(MultiHeadAttention):
    """The mask is one place too far to the right: the next token can be seen, and no other."""

    def attend(self, query, key, value, mask):
        return super().attend(query, key, value, None if mask is None else mask.roll(1, dims=-1))


class Dropping(MultiHeadAttention):
    def attend(self, query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=0.1)


class NoAudio(MultiHeadAttention):
    def forward(self, x, source=None, causal=False, cache=None):
        return super().forward(x, causal=True)


class NoAudioAndLeaky(MultiHeadAttention):
    """As published: the states do not arrive, and there is no mask either."""

    def forward(self, x, source=None, causal=False, cache=None):
        return super().forward(x)


class Mixing(nn.Module):
    """Normalises over the clips of a batch."""

    def forward(self, x):
        return x - x.mean(dim=0)


def leak(model):
    model.decoder.blocks[0].attn.__class__ = Leaky


def leak_by_one(model):
    model.decoder.blocks[0].attn.__class__ = LeakyByOne


def drop(model):
    model.decoder.blocks[0].cross_attn.__class__ = Dropping


def drop_audio(model):
    model.decoder.blocks[0].cross_attn.__class__ = NoAudio


def drop_audio_and_leak(model):
    model.decoder.blocks[0].cross_attn.__class__ = NoAudioAndLeaky


def mix(model):
    model.decoder.ln = nn.Sequential(Mixing(), model.decoder.ln)


def detach(model):
    model.encoder.ln_post.register_forward_hook(lambda module, x, states: states.detach())


def shout(model):
    nn.init.normal_(model.decoder.token_embedding.weight)
    nn.init.ones_(model.decoder.ln.weight)


@pytest.mark.parametrize(
    "plant, names",
    [
        (leak, {"causality"}),
        (leak_by_one, {"causality"}),
        (drop, {"dropout"}),
        (drop_audio, {"gradients", "shuffled_audio"}),
        (drop_audio_and_leak, {"causality", "gradients", "shuffled_audio"}),
        (mix, {"batching"}),
        (detach, {"gradients"}),
        (shout, {"loss_level"}),
    ],
)
def test_planted_in_the_model(plant, names):
    model = untrained()
    plant(model)
    found = failed_tests(model, batches())
    assert names <= found
    others = {"shuffled_audio"} | {drop: {"batching"}, mix: {"loss_level"}}.get(plant, set())
    assert found - names <= others, "another test fails"


def test_planted_in_a_trained_model(trained):
    for plant, name in ((leak, "causality"), (drop, "dropout"), (drop_audio, "shuffled_audio")):
        model = untrained()
        model.load_state_dict(trained.state_dict())
        plant(model)
        assert name in failed_tests(model, batches())


def test_no_audio_and_not_yet_trained_are_told_apart():
    model = untrained()
    drop_audio(model)
    assert "it ignores the audio" in diagnose(model, batches())["shuffled_audio"][1]


# --- the front end ---


def coarse(audio, window=4000, hop=1600):
    hann = torch.hann_window(window)
    power = torch.stft(audio, window, hop, window=hann, return_complex=True).abs().square()
    return log_compress(mel_filters(80, window) @ power[..., :-1])


def smeared(audio):
    return coarse(audio, hop=160)


def cropped(audio):
    return log_mel_spectrogram(audio)[..., :64]


def loud_padding(audio):
    pictures = []
    for clip in audio:
        power = mel_spectrogram(clip[: max(8000, int(clip.nonzero().max()) + 1)])
        decibels = 10 * (power / power.max()).clamp(min=1e-8).log10() / 80
        pictures.append(pad_or_trim(decibels, 140))
    return torch.stack(pictures)


@pytest.mark.parametrize("front_end", [coarse, smeared, cropped, loud_padding])
def test_wrong_front_ends(front_end):
    found = failed_tests(untrained(), batches(), front_end=front_end)
    assert "frame_timing" in found and found <= {"frame_timing", "shuffled_audio", "padding_level"}
    assert ("padding_level" in found) == (front_end is loud_padding)


def test_a_wall_of_padding_is_seen_in_spectrograms():
    mels = [(loud_padding(audio), *rest) for audio, *rest in batches()]
    assert failed_tests(untrained(), mels) == {"padding_level", "shuffled_audio"}


# --- splits and reports ---


def test_clips_may_be_given_as_they_are():
    model, tokenizer, _ = load_checkpoint(SHIPPED)
    known, others = (
        ClipDataset(load_clips("corpus", split).select(range(48)), tokenizer, model.args)
        for split in ("train", "validation")
    )
    assert failed_tests(model, others, train=known) == set()
    assert "splits" in failed_tests(model, others, train=others)


def test_the_click_is_made_where_the_model_is():
    places = []

    def front_end(audio):
        places.append(audio.device)
        return torch.eye(100).expand(1, 100, 100)

    check_frame_timing(SimpleNamespace(device=torch.device("meta")), front_end)
    assert places == [torch.device("meta")]


def test_clips_that_were_trained_on_are_found_whatever_their_padding(trained):
    train = [(F.pad(audio, (0, 1600)), *rest) for audio, *rest in batches(seed=0)]
    mixed = [*batches(), *batches(16, seed=0)]
    assert failed_tests(trained, mixed, train=train) == {"splits"}
    assert "33% of the clips were trained on" in diagnose(trained, mixed, train=train)["splits"][1]
    assert failed_tests(trained, batches(), train=train) == set()


def test_a_report_is_the_mean_over_all_tokens(trained):
    audio, inputs, labels = batches(40, size=40)[0]
    with torch.no_grad():
        mean = token_loss(
            trained, trained.encoder(training_log_mel(audio, TINY)), inputs, labels
        ).item()
    reals = {int((labels != IGNORE_INDEX).sum()) for _, _, labels in batches(40)}
    assert len(reals) > 1, "batches of one weight prove nothing"
    assert failed_tests(trained, batches(40), reported=mean) == set()
    for wrong in (mean / 2, mean + 0.1):
        assert failed_tests(trained, batches(40), reported=wrong) == {"reported_loss"}


def test_losses_are_means_over_tokens_not_over_batches(trained):
    short, long = batches(2, size=2)[0], batches(40, size=40)[0]
    model = trained.eval()
    parts = [(training_log_mel(audio, TINY), *rest) for audio, *rest in (short, long)]
    with torch.no_grad():
        each = [token_loss(model, model.encoder(mel), *rest).item() for mel, *rest in parts]
    counts = [int((labels != IGNORE_INDEX).sum()) for *_, labels in parts]
    mean = sum(n * loss for n, loss in zip(counts, each, strict=True)) / sum(counts)
    assert abs(mean - sum(each) / 2) > 1e-3 * mean, "this case proves nothing"
    assert paired_losses(model, parts)[0] == pytest.approx(mean, rel=1e-5)
    model.train()


# --- bad input ---


def unscored(*clips):
    """Two batches, some clips of which have no label that is scored."""
    made = batches(32)
    for _, _, labels in made:
        labels[list(clips)] = IGNORE_INDEX
    return made


def test_clips_without_labels_do_not_count():
    assert failed_tests(untrained(), unscored(0, 5)) == {"shuffled_audio"}


@pytest.mark.parametrize("given", [[], batches(2, size=1), unscored(*range(1, 16))])
def test_too_little_to_diagnose_is_told(given):
    model = untrained().train()
    with pytest.raises(ValueError, match="must have two clips of two labels, got none: make"):
        diagnose(model, given)
    assert model.training
