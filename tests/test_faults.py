"""Whatever happens, the last good checkpoint is in place and one sentence says what to do."""

import errno
import os
import random
import shutil
import signal
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from test_training import TINY, same_weights, sentences, tones, weights

from utils import files, training
from utils.__main__ import main
from utils.data import ClipDataset, load_clips
from utils.distributed import STREAM_START, ClipStream
from utils.files import latest_checkpoint, list_checkpoints, write_atomic
from utils.recipes import run_training
from utils.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

OFTEN = replace(TINY, epochs=2, save_minutes=0)  # a checkpoint after every step
WORDS = """
    --data speech --out run --set device=cpu epochs=2 embeddings_dims=16 curriculum_epochs=0
    save_minutes=0 no_of_encoder_layers=1 no_of_decoder_layers=1 batch_size=4
""".split()


@pytest.fixture(scope="module")
def clips():
    return ClipDataset(tones(sentences(24)), Tokenizer.for_args(TINY), TINY)


@pytest.fixture
def speech(tmp_path, monkeypatch):
    """A folder with a data set, in which the command line is called."""
    monkeypatch.chdir(tmp_path)
    table = datasets.Dataset.from_list(tones(sentences(16)))
    table.to_parquet(tmp_path / "speech" / "train-0.parquet")
    table.to_parquet(tmp_path / "speech" / "validation-0.parquet")
    return tmp_path / "speech"


def fails(capsys, words=WORDS):
    """Call the command line -> the sentence with which it ends, exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(["train", *words])
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line]
    assert end.value.code == 2 and lines
    return lines[-1]


def check_checkpoints(folder):
    """Every checkpoint there loads, there are two at most, and no half-written file."""
    paths = list_checkpoints(folder)
    for path in paths:
        torch.load(path, weights_only=True)
    assert len(paths) <= 2 and not list(folder.glob("*.part"))
    return paths


def killed(clips, folder, seconds):
    """Train in a process of its own, kill -9 after so long -> whether it was alive till then."""
    # tqdm's own lock is shared with the child: killed while it holds it, it leaves the parent
    # waiting for ever. Each class of bars may have one; these are copied into the child.
    for bar in (training.tqdm, training.text_bar):
        bar.set_lock(threading.RLock())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run_training(OFTEN, clips, clips, out=folder)
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # nothing can be tidied up
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "it broke by itself"
    return os.WIFSIGNALED(status)


@pytest.mark.posix
def test_killed_twenty_times(clips, tmp_path):
    """kill -9 at random moments, and every run ends with the weights of an undisturbed one."""
    run_training(OFTEN, clips, clips, out=tmp_path / "whole")
    whole, moment, kills, found = weights(tmp_path / "whole"), random.SystemRandom(), 0, 0
    folder = tmp_path / "run0"
    while kills < 20:
        kills += killed(clips, folder, moment.uniform(0.02, 0.5))
        for path in list_checkpoints(folder):
            torch.load(path, weights_only=True)
            found += 1
        if (folder / "model.safetensors").exists():
            folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    assert found > 5, "killed before anything was saved"
    for folder in tmp_path.glob("run*"):
        run_training(OFTEN, clips, clips, out=folder)
        assert same_weights(weights(folder), whole), folder.name
        assert len(check_checkpoints(folder)) == 2


def test_what_a_killed_run_had_half_written_is_cleared_away(clips, tmp_path):
    (tmp_path / "state-00000009.pt.part").write_bytes(b"half")
    run_training(OFTEN, clips, clips, out=tmp_path)
    assert len(check_checkpoints(tmp_path)) == 2


def test_a_damaged_checkpoint_sends_us_to_the_one_before(clips, tmp_path, capsys):
    run_training(OFTEN, clips, clips, out=tmp_path)
    before, last = weights(tmp_path), list_checkpoints(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:3000])
    assert len(run_training(OFTEN, clips, clips, out=tmp_path)) == 2
    assert "Going back to the checkpoint before it" in capsys.readouterr().out
    assert same_weights(weights(tmp_path), before)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="not a whole checkpoint in .*: empty it and run again"):
        latest_checkpoint(tmp_path)


def test_beginning_anew_forgets_the_old_checkpoints(clips, tmp_path):
    run_training(OFTEN, clips, clips, out=tmp_path)
    old = weights(tmp_path)
    run_training(replace(OFTEN, seed=5, epochs=1), clips, clips, out=tmp_path, resume=False)
    assert not same_weights(weights(tmp_path), old)
    assert latest_checkpoint(tmp_path)[1]["progress"]["epoch"] == 1


def test_what_saves_memory_may_change_when_a_run_goes_on(clips, tmp_path):
    run_training(replace(OFTEN, epochs=2), clips, clips, out=tmp_path)
    smaller = replace(OFTEN, micro_batch_size=2, gradient_checkpointing=True, save_minutes=9.0)
    assert len(run_training(smaller, clips, clips, out=tmp_path)) == 2


def test_a_full_disk(speech, capsys, monkeypatch):
    calls, sync = [], os.fsync

    def full(file):
        calls.append(file)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(files.os, "fsync", full)
    said = fails(capsys)
    kept = check_checkpoints(speech.parent / "run")
    assert len(kept) == 2 and said == (
        "OSError: [Errno 28] No space left on device: make room on the disk, then run again: "
        f"it goes on from {kept[-1].name}."
    )
    monkeypatch.setattr(files.os, "fsync", sync)
    main(["train", *WORDS])  # and it does
    assert (speech.parent / "run" / "model.safetensors").exists()


def test_nobody_reads_what_is_printed(speech, capsys, monkeypatch):
    """`| head` has gone in mid-run: it ends without a word, and the checkpoints stay."""

    def nobody(*given, **named):
        raise BrokenPipeError

    monkeypatch.setattr(training.tqdm, "write", nobody)
    with pytest.raises(SystemExit) as end:
        main(["train", *WORDS])
    assert end.value.code == 141 and "again" not in capsys.readouterr().err
    assert check_checkpoints(speech.parent / "run")


def test_a_gpu_without_memory(speech, capsys, monkeypatch):
    step = training.prepare_batch

    def out_of_memory(run, *others):
        if run.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return step(run, *others)

    monkeypatch.setattr(training, "prepare_batch", out_of_memory)
    said = fails(capsys)
    assert (
        "the memory of cpu is full: set micro_batch_size=2 or gradient_checkpointing=true" in said
    )
    assert "it goes on from state-00000003" in said
    assert check_checkpoints(speech.parent / "run")[-1].name == "state-00000003.pt"
    monkeypatch.setattr(training, "prepare_batch", step)
    main(["train", *WORDS, "micro_batch_size=2"])  # what it said


def test_a_loss_that_is_no_number_is_never_saved(speech, capsys, monkeypatch):
    step = training.prepare_batch

    def nan(run, *others):
        batch = step(run, *others)
        return replace(batch, mel=batch.mel * (float("nan") if run.step == 3 else 1))

    monkeypatch.setattr(training, "prepare_batch", nan)
    assert "at step 4: train again with a lower max_lr" in fails(capsys)
    paths = check_checkpoints(speech.parent / "run")
    assert paths[-1].name == "state-00000003.pt"
    saved = torch.load(paths[-1], weights_only=True)["model"]
    assert all(weight.isfinite().all() for weight in saved.values())


def test_a_data_file_that_vanishes_in_mid_stream(speech):
    (speech / "train-1.parquet").write_bytes((speech / "train-0.parquet").read_bytes())
    args = replace(TINY, stream_steps=1, splice_share=0.0)
    stream = ClipStream(load_clips(speech, stream=True), Tokenizer.for_args(args), args)
    _, position = stream.read(STREAM_START)
    for path in speech.glob("train*"):
        path.unlink()
    with pytest.raises(ValueError, match="stream of clips broke off .*: check the files"):
        for _ in range(20):
            _, position = stream.read(position)


def test_a_data_file_that_vanishes_from_a_streamed_run(speech, capsys, monkeypatch):
    end, words = training.end_epoch, [*WORDS, "stream_steps=6", "splice_share=0", "epochs=5"]

    def vanish(run, watch=None):
        end(run, watch)
        shutil.rmtree(speech, ignore_errors=True)

    monkeypatch.setattr(training, "end_epoch", vanish)
    assert "run again to continue" in fails(capsys, words)
    assert check_checkpoints(speech.parent / "run")


@pytest.mark.parametrize("content", [b"", b"not Parquet"])
def test_a_broken_data_file(speech, capsys, content):
    (speech / "train-0.parquet").write_bytes(content)
    said = fails(capsys)
    assert "cannot be read" in said and "copy the files again" in said


def test_data_are_on_the_disk_before_their_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """Else a power failure leaves an empty file under the right name, or the old one."""
    done, sync, rename = [], os.fsync, Path.replace

    def synced(file):
        done.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else os.fstat(file).st_size)
        sync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda *names: done.append("name") or rename(*names))
    write_atomic(tmp_path / "file", b"new")
    assert done == [3, "name", "folder"]
