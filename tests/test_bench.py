"""What the benches claim beside their clocks: operations, and equal work for all."""

import contextlib
import io
import json
import math
from functools import partial
from types import SimpleNamespace

import bench
import bench_decoding
import pytest
import torch
from recordings import TWO, official
from torch.utils.flop_counter import FlopCounterMode

from utils.attention import record_attention
from utils.audio import log_compress, mel_spectrogram
from utils.config import ModelArgs
from utils.data import IGNORE_INDEX
from utils.loss import token_loss
from utils.model import Whisper

SMALL = ModelArgs(
    embeddings_dims=48,
    no_of_heads=4,
    no_of_encoder_layers=3,
    no_of_decoder_layers=2,
    tgt_vocab_size=700,
    dropout=0.0,
    attn_dropout=0.0,
    device="cpu",
)


def test_operations_are_those_that_pytorch_counts():
    """Attention takes its visible path, so that its products are counted too."""
    model, audio = Whisper(SMALL), torch.randn(3, 32_000)
    inputs = torch.randint(700, (3, 9))
    labels = inputs.roll(-1, 1).clone()
    labels[0, 5:] = IGNORE_INDEX
    mel = log_compress(mel_spectrogram(audio))
    with FlopCounterMode(display=False) as counter, record_attention(model):
        token_loss(model, model.encoder(mel), inputs, labels).backward()
    assert bench.flops(SMALL, audio, inputs, labels) == counter.get_total_flops()


def test_the_race_of_training_steps_runs(monkeypatch, capsys):
    """Small, so that a change of the training loop cannot break `make bench` unseen."""
    preset = partial(ModelArgs.preset, "seed", embeddings_dims=48, no_of_heads=4)
    small = partial(preset, no_of_encoder_layers=1, no_of_decoder_layers=1)
    monkeypatch.setattr(bench, "ModelArgs", small)
    monkeypatch.setattr(bench, "some_batches", partial(bench.some_batches, every=20))
    clips, batches, runs = bench.trainers("cpu")
    losses = bench.our_epoch(bench.our_run(clips, False, recorded=False), batches[:2])
    assert losses == pytest.approx(bench.our_epoch(bench.our_run(clips, False), batches[:2]))
    assert losses[0] == pytest.approx(math.log(clips.args.tgt_vocab_size), rel=0.05)
    for name in runs.keys() - {"ours"}:
        runs[name]()
    assert list(runs) == ["ours", "openai-whisper", "transformers"]


def test_a_table_is_kept_beside_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "RESULT", tmp_path / "bench.json")
    bench.record("one", "ms", bench.rows_of({"ours": 1.23456, "theirs": 2.46912}))
    bench.record("two", "MB", bench.rows_of({"ours": 3}))
    bench.record("one", "ms", bench.rows_of({"ours": 2.0, "theirs": 5.0}))
    tables = json.loads((tmp_path / "bench.json").read_text())
    assert [row["value"] for row in tables["one"]["rows"]] == [2, 5] and tables["two"]
    assert tables["one"]["torch"] == torch.__version__ and "2.50 × ours" in capsys.readouterr().out


@pytest.mark.skipif(not bench.LINUX, reason="only Linux tells what a process has held")
def test_memory_is_what_was_held_on_top():
    bench.forget_peak()
    before = bench.memory_now("VmRSS")
    held = torch.ones(200 * 2**18)  # 200 MB, touched: more than this process may have kept free
    assert 190 < bench.memory_now("VmHWM") - before < 230 and len(held)


def run_here(command, **options):
    """`subprocess.run` of a bench, within this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if command[1] == "-c":
            exec(command[2], {})
        else:
            bench_decoding.peak(command[-1])
    return SimpleNamespace(stdout=out.getvalue())


@pytest.mark.tiny_en
@pytest.mark.parametrize("name", bench_decoding.BENCHES)
def test_the_benches_of_decoding_run(name, tmp_path, monkeypatch, capsys):
    """With a small model, a few seconds and one round, so that they cannot break unseen."""
    monkeypatch.setattr(bench, "RESULT", tmp_path / "bench.json")
    monkeypatch.setattr(bench_decoding, "models", lambda: official(False, 0))
    monkeypatch.setattr(bench_decoding, "speech", lambda minutes: TWO)
    short = {how: {**options, "sample_len": 5} for how, options in bench_decoding.WAYS.items()}
    monkeypatch.setattr(bench_decoding, "WAYS", short)
    monkeypatch.setitem(bench_decoding.PLAIN, "sample_len", 5)
    monkeypatch.setattr(bench_decoding, "CLIPS", 4)
    monkeypatch.setattr(bench_decoding, "ALONE", 2)
    monkeypatch.setattr(bench_decoding.subprocess, "run", run_here)
    run, small = bench_decoding.BENCHES[name], {"rounds": 1, "tokens": 5}
    run(
        **{
            k: v
            for k, v in small.items()
            if k in run.__code__.co_varnames[: run.__code__.co_argcount]
        }
    )
    for table in json.loads((tmp_path / "bench.json").read_text("utf-8")).values():
        names = [row["name"] for row in table["rows"]]
        assert names[0] == "ours" and any("openai-whisper" in name for name in names)
