"""Fine-tuning OpenAI's models by one command: from a folder of recordings to other libraries."""

import csv
import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from recordings import babble, corpus_clips, official, sound_file

from utils.__main__ import main
from utils.checkpoints import load_checkpoint, load_model, save_checkpoint
from utils.config import OFFICIAL_SIZES, ModelArgs
from utils.data import ClipDataset, clean_text, load_clips
from utils.loss import normalizer_for, validate
from utils.model import Whisper
from utils.recipes import fine_tuning_settings
from utils.tokenizer import Tokenizer
from utils.training import Recipe, train

TEXTS = ["Turn it off, Nancy.", "Is it 12 o'clock?", "Good night!", "Bring me the NAS."]


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A small model of OpenAI's shape with random weights, and recordings of four texts."""
    folder = tmp_path_factory.mktemp("nano")
    start = load_model(official(False, 0)[0])[0]
    start.alignment_heads = [[0, 1]]
    save_checkpoint(folder / "start.safetensors", start, Tokenizer.for_args(start.args))
    (folder / "mine").mkdir()
    with (folder / "mine" / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for i in range(10):
            (folder / "mine" / f"{i}.wav").write_bytes(sound_file(babble(1, seed=i)))
            table.writerow([f"{i}.wav", TEXTS[i % 4]])
    return folder, start


@pytest.fixture(scope="module")
def tuned(nano):
    """The folder of a run of the command."""
    folder, start = nano
    shape = ("embeddings_dims", "no_of_heads", "no_of_decoder_layers", "no_of_encoder_layers")
    shape = [f"{name}={getattr(start.args, name)}" for name in shape]
    words = ["--start", folder / "start.safetensors", "--data", folder / "mine"]
    words += ["--out", folder / "run", "--set", *shape, "epochs=2", "batch_size=4", "device=cpu"]
    main(["train", "--preset", "tiny.en", *map(str, words)])
    return folder / "run"


def test_the_command_fine_tunes(tuned, nano, capsys):
    model, tokenizer, extra = load_checkpoint(tuned / "best.safetensors")
    assert model.args.max_t == 3000 and model.args.max_lr == 4e-5 and model.args.epochs == 2
    assert model.alignment_heads == [[0, 1]], "word times were lost"
    assert tokenizer.config == Tokenizer.whisper(multilingual=False).config
    assert 1 <= len(extra["history"]) <= 2
    moved = (model.decoder.ln.weight - nano[1].decoder.ln.weight).abs().max()
    assert 0 < moved < 1e-2
    rates = [json.loads(line)["wer"] for line in (tuned / "history.jsonl").read_text().splitlines()]
    assert extra["history"][-1]["wer"] == min(rates)


@pytest.mark.tiny_en
def test_the_real_tiny_en_is_fine_tuned(tmp_path, capsys):
    """The command of the README on three recordings: two steps, and the model has improved."""
    rows = load_clips("corpus", "validation").select(range(3))
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for i, (text, clip) in enumerate(zip(rows["text"], corpus_clips(), strict=False)):
            (tmp_path / f"{i}.wav").write_bytes(sound_file(clip))
            table.writerow([f"{i}.wav", clean_text(text, "written")])
    words = ["--preset", "tiny.en", "--start", "tiny.en", "--data", tmp_path]
    words += ["--out", tmp_path / "out", "--set", "epochs=1", "batch_size=1"]
    words += ["augment_strength=0", "warmup_ratio=0", "device=cpu"]
    main(["train", *map(str, words)])
    model, tokenizer, extra = load_checkpoint(tmp_path / "out" / "best.safetensors")
    start = load_model("tiny.en")[0]
    assert model.alignment_heads == start.alignment_heads and tokenizer.vocab_size == 51864
    args = replace(start.args, batch_size=2, device="cpu")
    clips = ClipDataset(load_clips(tmp_path), tokenizer, args)
    before, after = (validate(m, clips)["val_loss"] for m in (start, model))
    assert extra["history"][-1]["step"] == 2 and after < before < 2


def test_the_result_opens_in_other_libraries(tuned, tmp_path, capsys):
    main(["export", str(tuned / "best.safetensors"), str(tmp_path / "hf")])
    assert "ct2-transformers-converter" in capsys.readouterr().out
    model, tokenizer = load_model(tuned / "best.safetensors")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    mel, tokens = torch.randn(1, 80, 3000), torch.tensor([[*tokenizer.prompt, 500, 600]])
    with torch.no_grad():
        logits = theirs(mel, decoder_input_ids=tokens).logits
        torch.testing.assert_close(model(mel, tokens), logits, rtol=1e-3, atol=1e-4)
    processor = transformers.WhisperProcessor.from_pretrained(tmp_path / "hf")
    assert processor.tokenizer(TEXTS[0], add_special_tokens=False).input_ids == tokenizer.encode(
        TEXTS[0]
    )
    if find_spec("ctranslate2"):  # faster-whisper's library; the course does not need it
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        files = ["tokenizer.json", "preprocessor_config.json"]
        TransformersConverter(str(tmp_path / "hf"), copy_files=files).convert(tmp_path / "ct2")
        again = load_model(tmp_path / "ct2")[0]
        for ours, others in zip(model.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(ours, others)
        assert again.alignment_heads == [[0, 1]]
        fast = ctranslate2.models.Whisper(str(tmp_path / "ct2"))
        states = fast.encode(ctranslate2.StorageView.from_array(mel.numpy()), to_cpu=True)
        found = torch.tensor(np.array(states))
        torch.testing.assert_close(found, model.encoder(mel).detach(), rtol=1e-2, atol=1e-3)


def test_a_frozen_encoder_stays(nano, tmp_path):
    folder, start = nano
    args = replace(start.args, batch_size=5, epochs=1, augment_strength=0.0, device="cpu")
    clips = ClipDataset(load_clips(folder / "mine"), Tokenizer.for_args(args), args)

    def frozen_encoder(args):
        model = Whisper(args)
        model.encoder.requires_grad_(False)
        return model

    recipe = Recipe(build_model=frozen_encoder)
    train(args, clips, clips, tmp_path, recipe, start=folder / "start.safetensors")
    after = load_checkpoint(tmp_path / "model.safetensors")[0]
    for name, weight in after.named_parameters():
        same = torch.equal(weight, start.get_parameter(name))
        assert same or not name.startswith("encoder."), f"{name} has moved"
    assert not torch.equal(after.decoder.ln.bias, start.decoder.ln.bias)


def test_words_are_counted_after_whispers_normaliser(nano, monkeypatch):
    folder, start = nano
    args = replace(start.args, batch_size=1)
    table = load_clips(folder / "mine").select(range(4))
    clips = ClipDataset(table, Tokenizer.for_args(args), args)
    said = ["turn it off nancy", "is it twelve o'clock", "good night", "bring me the NAS!"]
    monkeypatch.setattr("utils.loss.greedy_transcripts", lambda *_: said)  # of one batch of four
    assert validate(start, clips)["wer"] == 0
    spanish = normalizer_for(Tokenizer.whisper(language="es"))
    assert spanish("¡Hola, Señor!").split() == ["hola", "señor"]
    assert normalizer_for(Tokenizer.small())("Hello, you.") == "Hello, you."


@pytest.mark.parametrize("name", OFFICIAL_SIZES)
def test_settings_of_official_sizes(name):
    args = ModelArgs.preset(name, **fine_tuning_settings(name))
    assert args.max_lr == (4e-5 if "tiny" in name else 2e-5 if "base" in name else 1e-5)
    assert args.batch_size == 16 and not args.use_muon and not args.ctc_weight
    assert (args.epochs, args.linear_decay, args.augment_strength) == (3, True, 0.2)
    assert fine_tuning_settings("cpu") == {} == fine_tuning_settings("seed")
