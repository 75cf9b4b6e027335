"""Files that are whole or absent, and errors in one sentence."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INSTALLED = Path(__file__).parent / "shipped"  # where `pip install .` puts the folder data/
DATA_DIR = INSTALLED if INSTALLED.is_dir() else Path(__file__).parent.parent / "data"


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` so that `path` holds either the old file or the whole new one, never a part.

    Write under another name, sync, rename, and sync the folder, so that the rename outlives a power
    failure too. Missing folders are created. Raises `OSError` where the disk refuses, and then
    leaves the old file alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Ask the disk to keep the folder's entries; Windows and some network disks cannot."""
    with suppress(OSError):
        entries = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)


@contextmanager
def as_value_error(what: str, advice: str) -> Iterator[None]:
    """Within this block any failure becomes a `ValueError` of one sentence: `what`, why, `advice`."""
    try:
        yield
    except Exception as problem:
        cause = re.split(r"\n|\. ", f"{type(problem).__name__}: {problem}")[0].rstrip(".")
        raise ValueError(f"{what} ({cause}): {advice}.") from problem


def show_error(call: Callable, *inputs, **options) -> None:
    """Print the sentence of the `ValueError` that `call(*inputs, **options)` raises, without folders.

    Raises `AssertionError` if there is none: a check that finds nothing is not a check.
    """
    try:
        call(*inputs, **options)
    except ValueError as problem:
        print(re.sub(r"(?<!\S)/\S*/", "", str(problem)))
    else:
        raise AssertionError("expected a ValueError, and nothing was raised")


def disk_is_full(problem: BaseException | None) -> bool:
    """Whether a full disk is behind the exception `problem`, or behind what caused it."""
    while problem is not None:
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "disk space" in f"{problem}":
            return True
        problem = problem.__cause__ or problem.__context__
    return False
