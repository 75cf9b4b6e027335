"""Several processes are one run; streams that fit no memory; batches in parts."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from test_training import TINY, new_run, same_weights, sentences, step_and_wait, tones, weights

from utils import distributed, training
from utils.__main__ import main, setting
from utils.config import ModelArgs
from utils.data import ClipDataset, hold_out, load_clips
from utils.distributed import (
    STREAM_START,
    ClipStream,
    current_processes,
    load_stream,
    process_share,
)
from utils.loss import SingleProcess, micro_batches
from utils.recipes import run_training
from utils.tokenizer import Tokenizer
from utils.training import latest_checkpoint, list_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
TOKENIZER = Tokenizer.for_args(TINY)
PLAIN = replace(TINY, augment_strength=0.0, epochs=2)
STREAMED = replace(TINY, stream_steps=3, splice_share=0.0)


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
                where |= {"RANK": rank, "LOCAL_RANK": rank, "GLOO_SOCKET_IFNAME": LOOPBACK}
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
    runs = [new_run(replace(PLAIN, micro_batch_size=s), clips) for s in (None, size)]
    (whole, n), (parts, m) = (step_and_wait(run, indices) for run in runs)
    assert n == m and whole == pytest.approx(parts, rel=1e-5)
    torch.testing.assert_close(runs[0].flat, runs[1].flat, rtol=1e-3, atol=1e-5)


def test_parts_cover_the_batch_once():
    for number, size in itertools.product(range(8), (None, 1, 3, 9)):
        parts = micro_batches(list(range(number)), replace(TINY, micro_batch_size=size))
        assert sum(parts, []) == list(range(number))
        assert all(0 < len(part) <= (size or number) for part in parts)


# Several processes


@pytest.mark.posix
@pytest.mark.parametrize("size, micro", [(2, None), (3, 1)])
def test_several_processes_are_one_run(clips, tmp_path, size, micro):
    """The same losses, up to rounding: batches of 4 and less on 2 or 3 processes."""
    args = replace(PLAIN, micro_batch_size=micro)
    in_processes(lambda: run_training(args, clips, clips, out=tmp_path / "many"), size)
    run_training(PLAIN, clips, clips, out=tmp_path / "one")
    assert_close(history(tmp_path / "many"), history(tmp_path / "one"))
    assert {p.name for p in (tmp_path / "many").iterdir()} == {
        p.name for p in (tmp_path / "one").iterdir()
    }
    with pytest.raises(ValueError, match="differs from this run in processes"):
        run_training(args, clips, clips, out=tmp_path / "many")


@pytest.mark.posix
def test_several_processes_stop_together_and_go_on(clips, tmp_path, monkeypatch):
    args, send = replace(TINY, epochs=2), training.train_step

    def stop_one(run, indices):
        if run.step == 3 and run.recipe.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # one of them is told to end
        return send(run, indices)

    in_processes(lambda: run_training(args, clips, clips, out=tmp_path / "whole"))
    monkeypatch.setattr(training, "train_step", stop_one)
    in_processes(lambda: run_training(args, clips, clips, out=tmp_path / "stopped"))
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["state-00000004.pt"]
    monkeypatch.setattr(training, "train_step", send)
    in_processes(lambda: run_training(args, clips, clips, out=tmp_path / "stopped"))
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


@pytest.mark.posix
def test_processes_that_do_not_share_the_folder_do_not_go_on(clips, tmp_path):
    """Two machines with a disk each: only the first one has what was saved."""

    def work():
        folder = tmp_path / f"disk{os.environ['RANK']}"
        try:
            run_training(PLAIN, clips, clips, out=folder)
        except ValueError as problem:
            assert "`out` must be a folder that all processes share" in f"{problem}"
            (tmp_path / f"refused{os.environ['RANK']}").touch()

    in_processes(work)
    assert len(list_checkpoints(tmp_path / "disk0")) == 2 and not (tmp_path / "disk1").exists()
    in_processes(work)
    assert len(list(tmp_path.glob("refused*"))) == 2


SMALL = "device=cpu epochs=1 augment_strength=0 embeddings_dims=16 no_of_encoder_layers=1".split()
SMALL += "no_of_decoder_layers=1 curriculum_epochs=0 ctc_weight=0 splice_share=0".split()


@pytest.mark.posix
def test_accelerate_launches_the_command_line(parquet, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", f"{parquet}", "--set", *SMALL]
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1".split()
    launch += "--mixed_precision no --dynamo_backend no --main_process_port 0 -m".split()
    lines = subprocess.run(
        [sys.executable, "-m", *launch, "utils", *words, "--out", f"{tmp_path / 'two'}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK},
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
os.environ["GLOO_SOCKET_IFNAME"] = {loopback!r}
from accelerate import notebook_launcher
from utils.config import ModelArgs
from utils.__main__ import setting
from utils.recipes import run_training
args = ModelArgs.preset("cpu", **dict(map(setting, {changes!r})))
notebook_launcher(run_training, (args, {data!r}, None, {out!r}), num_processes=2, use_port="{port}")
"""


@pytest.mark.posix
def test_a_notebook_launches_two_processes(parquet, tmp_path):
    """In a real kernel; what the processes print arrives, bars and all, without a complaint."""
    words = dict(changes=SMALL, data=f"{parquet}", out=f"{tmp_path / 'two'}", loopback=LOOPBACK)
    source = CELL.format(**words, port=free_port())
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    where = {"metadata": {"path": f"{ROOT / 'notebooks'}"}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert "epoch   1   train" in printed and "attempted to send" not in printed
    args = ModelArgs.preset("cpu", **dict(map(setting, SMALL)))
    run_training(args, parquet, out=tmp_path / "one")
    assert_close(history(tmp_path / "two"), history(tmp_path / "one"))


@pytest.mark.posix
def test_processes_say_why_they_stop_when_another_one_has(clips, tmp_path, monkeypatch):
    """Number 1 runs out of memory; number 0 is told nothing, and must not end with a riddle."""
    step = training.prepare_batch

    def fails(run, *given):
        if run.step >= 2 and run.recipe.processes.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(run, *given)

    def work():
        try:
            run_training(PLAIN, clips, clips, out=tmp_path)
        except ValueError as problem:
            (tmp_path / f"said{os.getpid()}").write_text(f"{problem}")

    monkeypatch.setattr(training, "prepare_batch", fails)
    in_processes(work)
    one, other = sorted(path.read_text() for path in tmp_path.glob("said*"))
    assert one.startswith("another process of this run has stopped: mend")
    assert other.startswith("the memory of cpu is full: set micro_batch_size=2")


class Rank(SingleProcess):
    """One of several processes, played by this one."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_each_process_draws_its_own_augmentation_and_all_begin_with_the_same_weights(clips):
    drawn, begun = [], []
    for rank in range(3):
        run = new_run(TINY, clips, processes=Rank(rank, 3))
        drawn.append(torch.rand(5))
        begun.append(run.model.state_dict())
    assert not any(torch.equal(drawn[a], drawn[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert all(same_weights(begun[0], other) for other in begun[1:])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_shares_of_a_batch_are_the_batch(clips, size):
    whole = new_run(PLAIN, clips).batches(0)
    parts = [new_run(PLAIN, clips, processes=Rank(r, size)) for r in range(size)]
    parts = [process_share(training.shuffled_buckets, run.recipe.processes) for run in parts]
    parts = [share(clips, 0, PLAIN) for share in parts]
    for number, batch in enumerate(whole):
        shares = [part[number] for part in parts]
        assert sorted(sum(shares, [])) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.process_group(TINY) as args:
        processes = current_processes()
    assert args is TINY and (processes.rank, processes.size) == (0, 1)
    assert list(processes.sum(2, 3.5)) == [2, 3.5] and processes.gather("a") == ["a"]


def test_processes_that_cannot_be_connected_say_so(monkeypatch):
    """More of them than GPUs, a port in use, started by something that sets no rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    sentence = r"the processes cannot connect \(.*\): launch one per GPU, on a free port"
    for device in ("cpu", "cuda:0"):
        with (
            pytest.raises(ValueError, match=sentence),
            distributed.process_group(replace(TINY, device=device)),
        ):
            pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
        for name, value in where.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match=sentence), distributed.process_group(TINY):
            pass


# Streams


def streams(table, args, size=1):
    return [ClipStream(table, TOKENIZER, args, Rank(rank, size)) for rank in range(size)]


def rows_of_a_round(stream, number=0):
    """The rows of one round over the data, in order."""
    return list(stream.round_table(number))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_share_a_stream_and_meet_every_clip_once_a_round(parquet, size):
    """Three files: three processes share files, other numbers share rows."""
    table = load_clips(parquet, stream=True)
    everything = Counter(row["text"] for row in table)
    for number in (0, 1):
        met = Counter()
        for stream in streams(table, STREAMED, size):
            met += Counter(row["text"] for row in rows_of_a_round(stream, number))
        assert met == everything


def test_rounds_have_different_orders_and_the_seed_decides(parquet):
    table = load_clips(parquet, stream=True)
    [stream], [again] = streams(table, STREAMED), streams(table, STREAMED)
    [other] = streams(table, replace(STREAMED, seed=1))
    orders = [[row["text"] for row in rows_of_a_round(stream, number)] for number in range(6)]
    assert len({tuple(order) for order in orders}) > 2
    assert [row["text"] for row in rows_of_a_round(again, 3)] == orders[3]
    assert any([r["text"] for r in rows_of_a_round(other, n)] != orders[n] for n in range(6))


@pytest.mark.parametrize("chunk", [1, 5, 4096])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stream_goes_on_from_any_position(parquet, monkeypatch, size, chunk):
    """Epochs of 12 clips, a round of 20: as a run that never stops, whatever the chunks."""
    monkeypatch.setattr(distributed, "STREAM_CHUNK", chunk)
    table = load_clips(parquet, stream=True)
    for stream in streams(table, STREAMED, size):
        one_round = [row["text"].lower() for row in rows_of_a_round(stream, 0)]
        expected = one_round + [row["text"].lower() for row in rows_of_a_round(stream, 1)]
        expected += [row["text"].lower() for row in rows_of_a_round(stream, 2)]
        position, met = STREAM_START, []
        for _ in range(3):
            clips, behind = stream.read(position)
            assert len(clips) == stream.needed
            again, there = streams(table, STREAMED, size)[stream.rank].read(position)
            assert again.texts == clips.texts and there == behind
            met, position = met + clips.texts, behind
        assert met == expected[: len(met)]


def test_clips_that_are_dropped_are_replaced_by_the_next_ones(tmp_path, monkeypatch):
    """Even where the last rows asked for are all garbage."""
    monkeypatch.setattr(distributed, "STREAM_CHUNK", 3)
    texts = [text if i % 4 else "<NOISE>" for i, text in enumerate(sentences(40))]
    table = tones([text for text in sentences(40)])
    rows = [row | {"text": text} for row, text in zip(table, texts, strict=True)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train-0.parquet")
    [stream] = streams(load_clips(tmp_path, stream=True), STREAMED)
    clips, behind = stream.read(STREAM_START)
    good = [text.lower() for text in texts if text != "<NOISE>"]
    assert clips.texts == good[:12] and clips.dropped == {"without text": 4}
    assert stream.read(behind)[0].texts == good[12:24]


def test_a_stream_without_clips_says_so(tmp_path):
    rows = [row | {"text": "<NOISE>"} for row in tones(sentences(20))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train-0.parquet")
    [stream] = streams(load_clips(tmp_path, stream=True), STREAMED)
    with pytest.raises(ValueError, match="kept 0 of .* without text"):
        stream.read(STREAM_START)


def test_the_next_epoch_is_read_meanwhile_and_only_if_there_is_one(parquet, monkeypatch):
    [stream] = streams(load_clips(parquet, stream=True), STREAMED)
    read, asked = stream.read, []
    monkeypatch.setattr(stream, "read", lambda position: asked.append(position) or read(position))
    first, second = distributed.read_epoch(stream, STREAM_START)
    assert stream.ahead[1].get()[0].texts and asked == [STREAM_START, second]
    clips, third = distributed.read_epoch(stream, second, more=False)
    assert asked == [STREAM_START, second], "it was read twice, or for nothing"
    assert clips.texts == read(second)[0].texts
    assert distributed.read_epoch(stream, STREAM_START, more=False)[0].texts == first.texts


def test_the_corpus_in_gigaspeechs_schema_can_be_streamed():
    table = load_clips("corpus", "validation", stream=True)
    rows = list(itertools.islice(table, 20))
    held = load_clips("corpus", "validation").select(range(20))
    assert [row["text"] for row in rows] == held["text"]
    one, other = (ClipDataset(part, TOKENIZER, TINY) for part in (rows, held))
    assert all(torch.equal(a, b) for a, b in zip(one.audio, other.audio, strict=True))


def test_gigaspeech_is_streamed(parquet, monkeypatch):
    asked = []

    def hub(name, subset, split, revision, streaming):
        asked.append((subset, split, streaming))
        files = sorted(map(str, parquet.glob(f"{split}*")))
        return load("parquet", data_files=files, split="train", streaming=streaming)

    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", hub)
    stream, held_out = load_stream(STREAMED, "gigaspeech:xl")
    assert asked == [("xl", "train", True), ("xl", "validation", True)] and len(held_out) == 8
    assert len(stream.read(STREAM_START)[0]) == 12


@pytest.mark.posix
@pytest.mark.parametrize("size, split", [(1, True), (2, True), (2, False)])
def test_a_streamed_run_is_resumed_within_an_epoch_bit_for_bit(
    parquet, monkeypatch, size, split, tmp_path
):
    """With a validation split, and without one."""
    if not split:
        (parquet / "validation-0.parquet").unlink()
    args, send = replace(STREAMED, stream_steps=6, epochs=2, save_minutes=0), training.train_step

    def power_cut(run, indices):
        if run.step == 8:
            raise SystemError("power cut")
        return send(run, indices)

    def broken():
        monkeypatch.setattr(training, "train_step", power_cut)
        with pytest.raises(SystemError):
            run_training(args, f"{parquet}", out=tmp_path / "cut")

    def both(work):
        return in_processes(work, size) if size > 1 else work()

    both(lambda: run_training(args, f"{parquet}", out=tmp_path / "whole"))
    both(broken)
    path, state = latest_checkpoint(tmp_path / "cut")
    assert path.name == "state-00000008.pt" and len(state["processes"]) == size
    assert state["processes"][0]["memory"]["stream"][1] != STREAM_START
    monkeypatch.setattr(training, "train_step", send)
    both(lambda: run_training(args, f"{parquet}", out=tmp_path / "cut"))
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_streamed_run_knows_its_data_as_far_as_it_can(parquet, tmp_path):
    """The number of files, the text that comes first, and the clips of the validation."""
    args = replace(STREAMED, epochs=1)
    run_training(args, f"{parquet}", out=tmp_path / "run")
    assert len(run_training(args, f"{parquet}", out=tmp_path / "run")) == 1
    first, last = parquet / "train-0.parquet", parquet / "validation-0.parquet"
    changed = datasets.Dataset.from_list(tones(sentences(7, seed=5)))
    for path in (parquet / "train-3.parquet", first, last):
        before = path.read_bytes() if path.exists() else None
        changed.to_parquet(path)
        with pytest.raises(ValueError, match="differs from this run in data: continue with"):
            run_training(args, f"{parquet}", out=tmp_path / "run")
        path.write_bytes(before) if before else path.unlink()
    assert len(run_training(args, f"{parquet}", out=tmp_path / "run")) == 1


def test_what_a_stream_leaves_out_is_said_and_most_of_it_is_refused(parquet, tmp_path, capsys):
    short = replace(STREAMED, max_t=60, epochs=1)  # 0.6 s: three of six words
    with pytest.raises(ValueError, match=r"training: kept \d+ of \d+ clips .*longer than 0.6 s"):
        run_training(short, f"{parquet}", out=tmp_path / "run")
    run_training(replace(short, min_kept=0.0), f"{parquet}", out=tmp_path / "run")
    said = capsys.readouterr().out
    assert re.search(r"validation: kept \d of 8 clips", said)
    assert re.search(r"training: kept \d+ of \d+ clips", said)


def test_the_validation_of_a_stream_is_a_draw_of_its_clips(parquet, monkeypatch):
    """At most as many as one epoch can bear, not the first ones, the same for the same seed."""
    monkeypatch.setattr(distributed, "MAX_TEST_CLIPS", 4)
    texts = [load_stream(replace(STREAMED, seed=seed), parquet)[1].texts for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1] and [len(part) for part in texts] == [4] * 4
    assert len(set(map(str, texts))) == 3, "the seed decides"
    first = [row["text"].lower() for row in itertools.islice(load_clips(parquet, "validation"), 4)]
    assert {*texts[0], *texts[2], *texts[3]} - set(first), "always the first ones"


def test_a_stream_without_validation_split_holds_out_a_tenth_of_the_sentences(tmp_path):
    """Each sentence twice, in capitals and without: no sentence is in both parts."""
    rows = tones(sentences(30))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train-0.parquet")
    rows = [row | {"text": row["text"].lower() + "."} for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train-1.parquet")
    stream, held_out = load_stream(STREAMED, tmp_path)
    trained = [row["text"].lower().strip(".") for row in rows_of_a_round(stream, 1)]
    assert Counter(trained + held_out.texts) == Counter(2 * [t.lower() for t in sentences(30)])
    assert not set(trained) & set(held_out.texts) and 2 <= len(held_out) <= 12
    everything = ClipDataset(load_clips(tmp_path), TOKENIZER, replace(STREAMED, seed=1))
    tested = hold_out(everything)[1]  # by `evaluate`
    assert sorted(tested.texts) == sorted(held_out.texts)


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


def test_a_streamed_epoch_has_its_steps_and_each_process_its_share(parquet, monkeypatch):
    """Of three steps of five clips, two processes read nine and six; no step is left over."""
    args = replace(STREAMED, batch_size=5, epochs=1)
    for rank, needed in ((0, 9), (1, 6)):
        monkeypatch.setattr(distributed, "current_processes", partial(Rank, rank, 2))
        stream, _ = load_stream(args, parquet)
        assert (stream.rank, stream.size, stream.needed) == (rank, 2, needed)
        run = SimpleNamespace(source=stream, memory={}, epoch=0, args=args)
        clips = distributed.begin_stream_epoch(run)
        assert len(clips) == needed and stream.ahead == (None, None), "nothing follows"
        batches = distributed.stream_batches(clips, 0, args)
        assert len(batches) <= args.stream_steps == len(distributed.stream_batches(stream, 0, args))
        assert max(map(len, batches)) <= needed / args.stream_steps
