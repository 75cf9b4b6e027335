"""Files that are whole or absent, and errors in one sentence."""

import errno
import hashlib
import json
import os
import re
import signal
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

__all__ = ["DATA_DIR", "as_value_error", "latest_checkpoint", "write_atomic"]

INSTALLED = Path(__file__).parent / "shipped"  # where `pip install .` puts the folder data/
DATA_DIR = INSTALLED if INSTALLED.is_dir() else Path(__file__).parent.parent / "data"


def write_atomic(path: str | os.PathLike, data: bytes | memoryview) -> None:
    """Write `data` so that `path` holds either the old file or the whole new one, never a part.

    Write under another name, sync, rename, and sync the folder, so that the rename outlives a power
    failure too. Missing folders are created. Raises `OSError` where the disk refuses, and then
    leaves the old file alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # shorter than most names, so that it fits where the name fits
    part = path.with_name(f"{path.name[:40]}-{zlib.crc32(os.fsencode(path.name)):08x}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # Windows and some network disks cannot sync a folder
        entries = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)


def nearest_folder(path: str | os.PathLike) -> Path:
    """A path that exists, if only as a link to nothing, or the nearest one above it that does."""
    path = Path(path).absolute()
    return next(place for place in [path, *path.parents] if os.path.lexists(place))


def check_folder(folder: str | os.PathLike) -> None:
    """Raise `ValueError` unless files can be written there; it may be made later."""
    with as_value_error(f"the folder {folder} cannot be written to", "choose another"):
        tempfile.TemporaryFile(dir=nearest_folder(folder)).close()


def print_once(sentence: str) -> None:
    """Print in the first of several processes alone."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence)


def name_some(names: Sequence[str], most: int) -> str:
    """The first names of a list, and how many there are more."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


@contextmanager
def as_value_error(what: str, advice: str) -> Iterator[None]:
    """Within this block any failure becomes a `ValueError` of one sentence: `what`, why, `advice`."""
    try:
        yield
    except Exception as problem:
        cause = problem.__cause__ or problem
        why = re.split(r"\n|\. ", f"{type(cause).__name__}: {cause}")[0].rstrip(".")
        raise ValueError(f"{what} ({why}): {machine_advice(problem, advice)}.") from problem


def machine_advice(problem: BaseException, otherwise="check the path and the disk") -> str:
    """What to do where the machine refuses, by `problem` or what caused it; else `otherwise`."""
    while problem is not None:
        number, file = (getattr(problem, name, None) for name in ("errno", "filename"))
        if number in (errno.ENOSPC, errno.EDQUOT) or "disk space" in f"{problem}":
            return "make room on the disk"
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            cached = os.environ.get("HF_HOME", "huggingface") in f"{file}"
            return f"change its permissions, or {'set HF_HOME to' if cached else 'choose'} another place"
        problem = problem.__cause__ or problem.__context__
    return otherwise


@contextmanager
def graceful_interrupt() -> Iterator[list]:
    """Within this block the first Ctrl-C only fills the list that it gives: what is under way ends.

    The same holds for the signal by which a cluster asks a program to end. The second one
    interrupts as usual. Outside the main thread there is nothing to catch.
    """
    pressed, in_main = [], threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if in_main}

    def note(number, _):
        pressed.append(number)
        signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, note)
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def list_checkpoints(out: str | os.PathLike) -> list[Path]:
    """The checkpoints in a run folder, the newest last."""
    return sorted(Path(out).glob("state-*.pt"))


STATE_FIELDS = ["args", "model", "optimizers", "progress", "processes"]


def latest_checkpoint(out: str | os.PathLike) -> tuple[Path, dict]:
    """-> path and content of the newest checkpoint that is whole; prints which ones are not.

    Raises `ValueError` if none is. Nothing in the file is unpickled but tensors and plain values.
    """
    for path in reversed(list_checkpoints(out)):
        try:
            with as_value_error(f"{path} is not a whole checkpoint", "delete it and run again"):
                state = torch.load(path, map_location="cpu", weights_only=True)
                return path, {name: state[name] for name in STATE_FIELDS}
        except ValueError as problem:
            print(f"{problem} Going back to the checkpoint before it.")
    raise ValueError(f"there is not a whole checkpoint in {out}: empty it and run again.")


def digest(values) -> str:
    """SHA-256 of lists of texts and numbers."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def check_same_run(path: Path, saved: dict, own: dict) -> None:
    """Raise `ValueError` that names what differs, unless a checkpoint says of its run what this one does."""
    if other := [name for name in own | saved if (name, own.get(name)) not in saved.items()]:
        differs = f"{path} differs from this run in {', '.join(other)}"
        raise ValueError(f"{differs}: continue with the same, or give this run another folder.")


@contextmanager
def explain_failures(args, out: str | os.PathLike) -> Iterator[None]:
    """Within this block a full disk or memory becomes a `ValueError` that says what to do.

    So does, in the other processes of a run, what they notice of it: nobody answers them. Device
    and folder are tried first.
    """
    check_device_works(args.device)
    check_folder(out)
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed
        raise
    except (RuntimeError, OSError, MemoryError) as problem:
        reason = f"{type(problem).__name__}: {problem}".strip().partition("\n")[0].rstrip(".")
        if re.search("out of memory|MemoryError|DefaultCPUAllocator|ALLOC_FAILED", reason):
            smaller = max(1, (args.micro_batch_size or args.batch_size) // 2)
            options = f"set micro_batch_size={smaller} or gradient_checkpointing=true"
            reason = f"the memory of {args.device} is full: {options}"
        elif re.search("gloo|NCCL", reason):
            reason = "another process of this run has stopped: mend what it says"
        elif isinstance(problem, OSError) or machine_advice(problem, otherwise=""):
            reason = f"{reason}: {machine_advice(problem)}"
        else:
            raise
        kept = "".join(f": it goes on from {path.name}" for path in list_checkpoints(out)[-1:])
        raise ValueError(f"{reason}, then run again{kept}.") from problem


def check_device_works(device: str) -> None:
    """Raise `ValueError` unless PyTorch can compute on `device` on this machine."""
    with as_value_error(f"no device {device!r} here", "choose another, such as cpu"):
        torch.zeros(1, device=device).add(1)
