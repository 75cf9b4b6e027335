"""More than one memory holds: batches in parts, several processes, streams, blocks recomputed."""

import itertools
import json
import os
import socket
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from test_training import TINY, same_weights, sentences, tones, weights

from utils import data, training
from utils.checkpoints import load_checkpoint
from utils.config import ModelArgs
from utils.data import ClipDataset, ClipStream, load_clips, read_rows, stream_windows
from utils.model import Whisper
from utils.tokenizer import Tokenizer
from utils.training import (
    Run,
    build_model,
    checkpoint_activations,
    list_checkpoints,
    main,
    micro_batches,
    parse_settings,
    rank_and_size,
    tensorboard_logger,
    train,
    train_step_and_wait,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
TOKENIZER = Tokenizer.for_args(TINY)
PLAIN = replace(TINY, augment_strength=0.0, epochs=2)
START = [0, 0, 0, 0]


@pytest.fixture(scope="module")
def clips():
    return ClipDataset(tones(sentences(24)), TOKENIZER, PLAIN)


@pytest.fixture
def parquet(tmp_path):
    """Twenty clips in three files to train on, eight to validate on, all texts different."""
    table = datasets.Dataset.from_list(tones(sentences(28)))
    for part in range(3):
        rows = range(part, 20, 3)
        table.select(rows).to_parquet(tmp_path / f"train-{part}.parquet")
    table.select(range(20, 28)).to_parquet(tmp_path / "validation-0.parquet")
    return tmp_path


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_processes(work, size=2):
    """Run `work()` in `size` forked processes that a launcher might have started."""
    port, children = free_port(), []
    for rank in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size}
                where |= {"RANK": rank, "LOCAL_RANK": rank, "GLOO_SOCKET_IFNAME": "lo"}
                os.environ.update({name: str(value) for name, value in where.items()})
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * size


def history(folder):
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("step", "train_loss", "val_loss", "wer")} for row in rows]


def assert_close(one, other, tolerance=1e-3):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=tolerance)


# A batch in parts


@pytest.mark.parametrize("size", [1, 3, 5, 64])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(clips, size):
    indices = max(clips.batches(0), key=lambda b: len({len(clips.tokens[i]) for i in b}))
    assert len({len(clips.tokens[i]) for i in indices}) > 1, "all texts are equally long"
    runs = [Run(replace(PLAIN, micro_batch_size=s), clips, clips, "nowhere") for s in (None, size)]
    (whole, n), (parts, m) = (train_step_and_wait(run, indices) for run in runs)
    assert n == m and whole == pytest.approx(parts, rel=1e-5)
    torch.testing.assert_close(runs[0].shared, runs[1].shared, rtol=1e-3, atol=1e-5)


def test_parts_cover_the_batch_once():
    for number, size in itertools.product(range(8), (None, 1, 3, 9)):
        parts = micro_batches(list(range(number)), replace(TINY, micro_batch_size=size))
        assert sum(parts, []) == list(range(number))
        assert all(0 < len(part) <= (size or number) for part in parts)


def test_blocks_that_are_recomputed_have_the_same_gradients():
    """With dropout too: the second pass draws what the first one drew."""
    args = replace(TINY, dropout=0.3, attn_dropout=0.2, no_of_encoder_layers=2)
    mel, tokens, gradients, kept = torch.randn(3, 80, 100), torch.randint(400, (3, 9)), [], []
    for again in (False, True):
        torch.manual_seed(0)
        model, sizes = Whisper(args).train(), {}
        if again:
            checkpoint_activations(model)
        torch.manual_seed(1)

        def note(t, sizes=sizes):
            sizes[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model(mel, tokens).square().mean()
        loss.backward()
        kept.append(sum(sizes.values()))
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.6 * kept[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    with torch.inference_mode():
        rows = model.eval().greedy(mel, TOKENIZER.prompt, TOKENIZER.end, 4)
    assert len(rows) == 3


def test_a_run_with_recomputation_is_the_same_run(clips, tmp_path):
    for name in ("plain", "again"):
        train(
            replace(PLAIN, epochs=1, gradient_checkpointing=name == "again"),
            clips,
            clips,
            tmp_path / name,
        )
    one, other = (weights(tmp_path / name) for name in ("plain", "again"))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


# Several processes


@pytest.mark.parametrize("size, micro", [(2, None), (3, 1)])
def test_several_processes_are_one_run(clips, tmp_path, size, micro):
    """The same losses, up to rounding: batches of 4 and less on 2 or 3 processes."""
    args = replace(PLAIN, micro_batch_size=micro)
    in_processes(lambda: train(args, clips, clips, out=tmp_path / "many"), size)
    train(PLAIN, clips, clips, out=tmp_path / "one")
    assert_close(history(tmp_path / "many"), history(tmp_path / "one"))
    assert {p.name for p in (tmp_path / "many").iterdir()} == {
        p.name for p in (tmp_path / "one").iterdir()
    }
    with pytest.raises(ValueError, match="another number of processes"):
        train(args, clips, clips, out=tmp_path / "many")


def test_several_processes_stop_together_and_go_on(clips, tmp_path, monkeypatch):
    args, send = replace(TINY, epochs=2), training.train_step

    def stop_one(run, indices):
        if run.step == 3 and rank_and_size()[0] == 1:
            os.kill(os.getpid(), training.signal.SIGTERM)  # one of them is told to end
        return send(run, indices)

    in_processes(lambda: train(args, clips, clips, out=tmp_path / "whole"))
    monkeypatch.setattr(training, "train_step", stop_one)
    in_processes(lambda: train(args, clips, clips, out=tmp_path / "stopped"))
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == [
        "state-00000004.safetensors"
    ]
    monkeypatch.setattr(training, "train_step", send)
    in_processes(lambda: train(args, clips, clips, out=tmp_path / "stopped"))
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


def test_accelerate_launches_the_command_line(parquet, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        f"--data {parquet} --set device=cpu epochs=1 augment_strength=0 embeddings_dims=16".split()
    )
    words += "no_of_encoder_layers=1 no_of_decoder_layers=1 curriculum_epochs=0".split()
    words += "ctc_weight=0 splice_share=0".split()
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1".split()
    launch += "--mixed_precision no --dynamo_backend no --main_process_port 0 -m".split()
    lines = subprocess.run(
        [sys.executable, "-m", *launch, "utils.training", *words, "--out", f"{tmp_path / 'two'}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert lines.returncode == 0, lines.stderr[-2000:]
    main([*words, "--out", "one"])
    assert_close(history(tmp_path / "two"), history(tmp_path / "one"))
    assert lines.stdout.count("Training the preset") == 1, "only one process speaks"
    assert lines.stdout.count("said:") == capsys.readouterr().out.count("said:")


CELL = """
import os
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
from accelerate import notebook_launcher
from utils.config import ModelArgs
from utils.training import parse_settings, train
args = ModelArgs.preset("cpu", **parse_settings({changes!r}))
notebook_launcher(train, (args, {data!r}, None, {out!r}), num_processes=2, use_port="{port}")
"""


def test_a_notebook_launches_two_processes(parquet, tmp_path):
    """In a real kernel; what the processes print arrives, bars and all, without a complaint."""
    changes = (
        "device=cpu epochs=1 augment_strength=0 embeddings_dims=16 no_of_encoder_layers=1".split()
    )
    changes += "no_of_decoder_layers=1 curriculum_epochs=0 ctc_weight=0 splice_share=0".split()
    source = CELL.format(
        changes=changes, data=f"{parquet}", out=f"{tmp_path / 'two'}", port=free_port()
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    where = {"metadata": {"path": f"{ROOT / 'notebooks'}"}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert "epoch   1   train" in printed and "attempted to send" not in printed
    train(ModelArgs.preset("cpu", **parse_settings(changes)), parquet, out=tmp_path / "one")
    assert_close(history(tmp_path / "two"), history(tmp_path / "one"))


def test_processes_say_why_they_stop_when_another_one_has(clips, tmp_path, monkeypatch):
    """Number 1 runs out of memory; number 0 is told nothing, and must not end with a riddle."""
    step = training.prepare_batch

    def fails(run, indices):
        if run.step >= 2 and run.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(run, indices)

    def work():
        try:
            train(PLAIN, clips, clips, out=tmp_path)
        except ValueError as problem:
            (tmp_path / f"said{os.getpid()}").write_text(f"{problem}")

    monkeypatch.setattr(training, "prepare_batch", fails)
    in_processes(work)
    one, other = sorted(path.read_text() for path in tmp_path.glob("said*"))
    assert one.startswith("another process of this run has stopped: mend")
    assert other.startswith("the memory of cpu is full: set micro_batch_size=2")


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_run_is_the_same_run(clips, tmp_path, monkeypatch, recompute):
    """Traced and differentiated by the compiler; only the writing of kernels is left out."""
    compiler = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    args = replace(PLAIN, epochs=1, gradient_checkpointing=recompute)
    train(args, clips, clips, out=tmp_path / "plain")
    train(args, clips, clips, out=tmp_path / "compiled", compile=True)
    assert_close(history(tmp_path / "compiled"), history(tmp_path / "plain"))


def test_only_training_runs_the_translation(monkeypatch):
    used = []

    def translate(function, dynamic):
        return lambda *inputs: used.append(function) or function(*inputs)

    monkeypatch.setattr(torch, "compile", translate)
    model = build_model(TINY, compile=True)
    mel, tokens = torch.randn(2, 80, 100), torch.randint(400, (2, 9))
    model.train()(mel, tokens).mean().backward()
    assert len(used) == len(model.encoder.blocks) + len(model.decoder.blocks)
    model.eval().greedy(mel, TOKENIZER.prompt, TOKENIZER.end, 4)
    assert len(used) == len(model.encoder.blocks) + len(model.decoder.blocks)


# Streams


def texts_of(stream, number, place=START):
    found = list(itertools.islice(stream_windows(stream, place), number))
    return [where for where, _ in found], [clips.texts for _, clips in found]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_share_a_stream_and_meet_every_clip_once_a_round(parquet, monkeypatch, size):
    """Three files: five processes share rows, fewer share files."""
    table = load_clips(parquet, stream=True)
    everything = Counter(ClipDataset(list(table), TOKENIZER, TINY).texts)
    met = Counter()
    for rank in range(size):
        stream = ClipStream(table, TOKENIZER, TINY, rank, size)
        rows = itertools.takewhile(lambda row: row[1][0] == 0, data.stream_rows(stream, START))
        met += Counter(clip["text"].lower() for clip, _ in rows)
    assert met == everything


def test_a_stream_goes_on_from_any_place(parquet, monkeypatch):
    monkeypatch.setattr(data, "STREAM_WINDOW", 6)
    stream = ClipStream(load_clips(parquet, stream=True), TOKENIZER, TINY)
    places, texts = texts_of(stream, 8)
    assert places[0] == START and [place[0] for place in places] == list(range(8))
    assert texts[:3] != texts[3:6], "the second round has the order of the first"
    for i in range(8):
        assert texts_of(stream, 1, places[i]) == (places[i : i + 1], texts[i : i + 1])


def test_the_corpus_in_gigaspeechs_schema_can_be_streamed():
    table = load_clips("corpus", "validation", stream=True)
    rows = read_rows(iter(table), 20)
    held = load_clips("corpus", "validation").select(range(20))
    assert [row["text"] for row in rows] == held["text"]
    one, other = (ClipDataset(part, TOKENIZER, TINY) for part in (rows, held))
    assert all(torch.equal(a, b) for a, b in zip(one.audio, other.audio, strict=True))


def test_gigaspeech_is_streamed(parquet, monkeypatch):
    monkeypatch.setattr(data, "STREAM_WINDOW", 6)
    asked = []

    def hub(name, subset, split, revision, streaming):
        asked.append((subset, split, streaming))
        files = sorted(map(str, parquet.glob(f"{split}*")))
        return load("parquet", data_files=files, split="train", streaming=streaming)

    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", hub)
    stream, held_out = training.load_data(
        replace(TINY, stream_steps=5, splice_share=0.0), "gigaspeech:xl"
    )
    assert asked == [("xl", "train", True), ("xl", "validation", True)] and len(held_out) == 8
    assert next(stream_windows(stream, START))[1].texts


@pytest.mark.parametrize("size", [1, 2])
def test_a_streamed_run_is_resumed_in_mid_window_bit_for_bit(parquet, monkeypatch, size, tmp_path):
    monkeypatch.setattr(data, "STREAM_WINDOW", 7)
    args, send = (
        replace(TINY, stream_steps=6, splice_share=0.0, epochs=2, save_minutes=0),
        training.train_step,
    )

    def power_cut(run, indices):
        if run.step == 8:
            raise SystemError("power cut")
        return send(run, indices)

    def broken():
        monkeypatch.setattr(training, "train_step", power_cut)
        with pytest.raises(SystemError):
            train(args, f"{parquet}", out=tmp_path / "cut")

    def both(work):
        return in_processes(work, size) if size > 1 else work()

    both(lambda: train(args, f"{parquet}", out=tmp_path / "whole"))
    both(broken)
    assert list_checkpoints(tmp_path / "cut")[-1].name == "state-00000008.safetensors"
    state = load_checkpoint(list_checkpoints(tmp_path / "cut")[-1])[2]
    assert len(state["processes"]) == size and state["processes"][0]["fed"][0][0] > 0
    monkeypatch.setattr(training, "train_step", send)
    both(lambda: train(args, f"{parquet}", out=tmp_path / "cut"))
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_stream_cannot_be_sorted():
    with pytest.raises(ValueError, match="set curriculum_epochs=0 for stream_steps"):
        ModelArgs.preset("cpu", stream_steps=5, splice_share=0.0)


def test_own_recordings_can_be_streamed(tmp_path):
    lines = ["file_name,text"]
    for i, row in enumerate(tones(sentences(5))):
        (tmp_path / f"{i}.wav").write_bytes(row["audio"]["bytes"])
        lines.append(f"{i}.wav,{row['text'].lower()}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    rows = list(load_clips(tmp_path, stream=True))
    assert (
        ClipDataset(rows, TOKENIZER, TINY).texts
        == ClipDataset(load_clips(tmp_path), TOKENIZER, TINY).texts
    )


# TensorBoard, and whoever watches


def test_a_watcher_sees_every_epoch(clips, tmp_path):
    seen = []
    train(PLAIN, clips, clips, tmp_path, watch=lambda history: seen.append(len(history)))
    assert seen == [1, 2]


def test_tensorboard_is_a_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        tensorboard_logger(tmp_path)
    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == tmp_path / "tensorboard"

        def add_scalar(self, *what):
            written.append(what)

        def flush(self):
            written.append("flushed")

    monkeypatch.setattr(training, "find_spec", lambda name: name)
    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    tensorboard_logger(tmp_path)([{"epoch": 1, "step": 7, "val_loss": 2.5}])
    assert written == [("val_loss", 2.5, 7), "flushed"]
