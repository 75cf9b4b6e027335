"""Tables of recordings in the layouts that people bring, and what GigaSpeech asks of a machine."""

import csv
import fnmatch
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import cache
from glob import escape
from itertools import groupby, product
from pathlib import Path, PureWindowsPath
from unicodedata import normalize
from urllib.request import url2pathname

import datasets
import psutil

from utils.files import as_value_error, name_some, nearest_folder, print_once

__all__ = ["load_table"]

COLUMNS = {  # ours, and what others call it, the preferred first
    "audio": "audio filename path file audiopath audiofile audiofilepath wavfilename".split(),
    "text": "text transcription sentence transcript".split(),
    "speaker": "speaker speakerid clientid".split(),
    "split": ["split"],
}
# how the names of their files and folders begin, the preferred first
SPLITS = dict.fromkeys(["train", "training"], "train")
SPLITS |= dict.fromkeys(["test", "testing", "eval", "evaluation"], "test")
SPLITS |= dict.fromkeys(["validation", "dev", "valid", "val"], "validation")
TEXTS, KINDS = (".csv", ".tsv", ".jsonl"), (".csv", ".tsv", ".jsonl", ".parquet")
ENDINGS = ("", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".webm")
BESIDE = ("", "clips", "wavs", "audio")  # folders of recordings, beside their table
SOUND = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
ROW = {"audio": SOUND, "text": datasets.Value("string"), "speaker": datasets.Value("string")}
CSV_ADVICE = "write file_name,text in each line, quote texts with commas, close all quotation marks"
JSON_ADVICE = "write one JSON object a line, with file_name and text"
LAYOUTS = (
    "known are a metadata.csv, .tsv or .jsonl with the columns file_name and text, such a table or "
    "folder for each split, Common Voice, LJSpeech, Parquet files and what save_to_disk writes"
)


def plain(name: str) -> str:
    """The name of a column without case, spaces and punctuation."""
    return re.sub("[^a-z0-9]", "", name.lower())


def find_columns(names: list[str], place: str | os.PathLike) -> dict[str, str]:
    """The columns of a table -> {"audio": the name of that column, "text": …, "speaker": …}.

    Raises `ValueError` if there is none for audio or text, or two have one name.
    """
    words, found = [plain(name) for name in names], {}
    for column, known in COLUMNS.items():
        if word := next((word for word in known if word in words), None):
            found[column] = names[words.index(word)]
            if words.count(word) > 1:
                raise ValueError(f"{place} has two columns {found[column]!r}: rename one of them.")
    if not {"audio", "text"} <= found.keys():
        advice = "name the recordings file_name (audio in Parquet files) and their words text"
        raise ValueError(f"{place} has the columns {', '.join(names)}: {advice}.")
    return found


def read_utf8(path: Path) -> str:
    """The text of a table. Raises `ValueError` for any encoding but UTF-8."""
    data, advice = path.read_bytes(), "save it as UTF-8, which spreadsheets call CSV UTF-8"
    with as_value_error(f"{path} is not in UTF-8", advice):
        if b"\0" in data:
            raise ValueError("UTF-16, it seems")
        return data.decode("utf-8-sig")  # spreadsheets write a signature


def unquote(field: str) -> str:
    """A field without the quotation marks that a spreadsheet puts around it, between tabs too."""
    quoted = re.fullmatch('"((?:[^"]|"")*)"', field)
    return quoted[1].replace('""', '"') if quoted else field


def wrong_line(path: Path, line: int, what: object) -> ValueError:
    """The exception about a line of a table."""
    advice = JSON_ADVICE if path.suffix.lower() == ".jsonl" else CSV_ADVICE
    return ValueError(f"{path} is wrong in line {line} ({what}): {advice}.")


def read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and {column: field} of each row, with commas, semicolons, tabs or `|` between.

    With `|` and without column names, they are LJSpeech's: name, text, normalised text. Quotation
    marks group between commas and semicolons alone. Raises `ValueError` that names the line.
    """
    text = re.sub(r"\Asep=.", "", read_utf8(path))  # a hint for Excel
    head, line = next(iter(text.strip().splitlines()), ""), 1
    delimiter = "|" if "|" in head else max(",;\t", key=head.count)
    named = delimiter != "|" or {plain(name) for name in head.split("|")} & {*COLUMNS["text"]}
    header, grouped = [] if named else ["audio", "text"], delimiter in ",;"
    options = {"delimiter": delimiter, "skipinitialspace": grouped, "strict": True}
    options["quoting"] = csv.QUOTE_MINIMAL if grouped else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    swallowed = re.compile(f"[\r\n].*[{delimiter}]", re.DOTALL)
    try:
        for fields in reader:
            if any(map(swallowed.search, fields)):
                raise csv.Error("a quotation mark opens there and is closed in another row")
            fields = fields if grouped else list(map(unquote, fields))
            if not named and len(fields) in (2, 3):
                fields = [fields[0], fields[-1].strip() or fields[1]]
            if not header and any(fields):
                find_columns(header := fields, path)
            elif any(map(str.strip, fields)):
                if len(fields) < len(header) or any(fields[len(header) :]):
                    raise csv.Error(f"{len(fields)} fields instead of {len(header)}")
                yield line, dict(zip(header, fields, strict=False))
            line = reader.line_num + 1
    except csv.Error as problem:
        raise wrong_line(path, line, problem) from problem


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and {column: value} of each row. Raises `ValueError` that names the line."""
    for line, record in enumerate(read_utf8(path).split("\n"), 1):
        if record.strip():
            with as_value_error(f"{path} is wrong in line {line}", JSON_ADVICE):
                row = {**json.loads(record)}
                json.dumps(row, ensure_ascii=False).encode()  # refuses half a character
            yield line, row


def split_of(name: str) -> str | None:
    """The split that a file or folder is named after, if any: train-00000-of-00002, dev_clean."""
    return SPLITS.get(re.match("[a-z]*", name.lower())[0])


def row_split(row: dict[str, str]) -> str:
    """The split of a row: what its column `split` says, or else the folder of its recording.

    A word for no known split is one of its own.
    """
    place, said = PureWindowsPath(row["audio"]), row["split"]  # knows both kinds of slash
    folders = () if place.anchor else place.parts[:-1]
    return split_of(said) or said or next(filter(None, map(split_of, folders)), "train")


def fold(name: str) -> str:
    """A name without case, and with accents as one character, which macOS makes two."""
    return normalize("NFC", name).casefold()


@cache
def list_folder(folder: str) -> dict[str, list[str]]:
    """The paths in a folder, if it is one, by what `fold` makes of their names."""
    paths = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        paths.setdefault(fold(name), []).append(os.path.join(folder, name))
    return paths


def spell_path(folder: str, path: str) -> list[str]:
    """The files that a path in a folder may mean, whatever its case, with or without its ending."""
    folders, (*parents, last) = [folder], path.split("/")
    for name in parents:
        folders = [p for f in folders for p in list_folder(f).get(fold(name), [])]
    files = [p for f in folders for e in ENDINGS for p in list_folder(f).get(fold(last + e), [])]
    return list(filter(os.path.isfile, files))


def find_sound(name: str, folders: list[str]) -> str:
    """The path of a recording, from whatever system, with or without its ending, in one of `folders`.

    A name that may lead elsewhere is as good; one from another machine is looked for by as many of
    its last parts as are here. What is in none of them is expected in the first. Raises `ValueError`
    where case decides.
    """
    path = url2pathname(name[7:]) if name.startswith("file://") else name.replace("\\", "/")
    parts = path.split("/") if PureWindowsPath(path).anchor else [path]
    for path in ("/".join(parts[first:]) for first in range(len(parts))):
        near = [f for f in folders if list_folder(os.path.dirname(os.path.join(f, path)))]
        for ending, folder in product(ENDINGS, near):
            if os.path.isfile(found := os.path.join(folder, path + ending)):
                return found
        for folder in folders:
            found = spell_path(folder, path)
            if len(found) > 1:
                raise ValueError(f"{name} may be {' or '.join(found)}: write it as it is there.")
            if found:
                return found[0]
    return os.path.join(folders[0], name)


def read_rows(path: Path, split: str | None = None) -> list[dict]:
    """The rows of a text table, columns `audio` (a path), `text` and `speaker`.

    With `split`, of a table that holds several, only its rows: those with that word in the column
    `split`, or whose file is in a folder called so; all others are `train`. Raises `ValueError`.
    """
    records = list((read_json_lines if path.suffix.lower() == ".jsonl" else read_csv)(path))
    if not records:
        raise ValueError(f"{path} lists no recording: write one a line, below the column names.")
    names, rows = find_columns([*dict.fromkeys(name for _, r in records for name in r)], path), []
    folders = [os.path.join(path.parent, f) for f in (*BESIDE, path.stem)]
    unknown = Counter()
    for line, record in records:
        row = {column: record.get(names.get(column)) for column in COLUMNS}
        if odd := [value for value in row.values() if type(value) not in (str, int, type(None))]:
            raise wrong_line(path, line, f"{odd[0]!r} is no text")
        row = {column: "" if x is None else str(x).strip() for column, x in row.items()}
        if not row["audio"]:
            raise wrong_line(path, line, "no recording is named")
        place = row_split(row)
        unknown[place] += place not in SPLITS.values()
        if split in (None, place):
            sound = {"bytes": None, "path": find_sound(row["audio"], folders)}
            rows.append({"audio": sound, "text": row["text"], "speaker": row["speaker"]})
    words = [f"{word} ({count})" for word, count in unknown.items() if count]
    if words and split == "train":
        print_once(f"{path} has rows of unknown splits: {name_some(words, 5)}.")
    return rows


def tables_in(place: Path) -> list[Path]:
    """A table itself; of a folder itself, if `save_to_disk` wrote it, its metadata, or its Parquet."""
    if not place.is_dir():
        return [place] if place.suffix.lower() in KINDS and place.is_file() else []
    names = sorted(os.listdir(place))
    if "state.json" in names:
        return [place]
    found = [n for n in names if re.fullmatch(r"metadata\.(csv|tsv|jsonl|parquet)", n.lower())]
    return [place / n for n in found or fnmatch.filter(names, "[!.]*.parquet")]


def find_tables(folder: Path, split: str) -> tuple[list[Path], str | None]:
    """The tables of a split in a folder or its folder `data`, most by their names alone; or [].

    Files and folders called like the split come first; then, to train on, what has no such name.
    The second value is the split, where the tables may hold rows of others too. Raises
    `ValueError` if such a table has to be looked into and is wrong.
    """
    roots = {root: sorted(os.listdir(root)) for root in (folder, folder / "data") if root.is_dir()}
    split = SPLITS.get(split, split)
    words = [word for word, meant in SPLITS.items() if meant == split] or [split]
    for word, (root, names) in product(words, roots.items()):
        named = [root / name for name in names if re.match(f"{word}(?![a-z])", name.lower())]
        if found := [table for place in named for table in tables_in(place)]:
            return found, None
    for root, names in roots.items():
        found = [table for table in tables_in(root) if table == root or not split_of(table.name)]
        if not any(map(split_of, names)):  # of Common Voice: with the clips of its test.tsv
            found = found or list(root.glob("validated.tsv"))
        if split != "train":  # one table of all splits, or none
            found = [t for t in found if t.suffix.lower() in TEXTS and read_rows(t, split)]
        if found:
            return found, split
    return [], None


def load_table(folder: Path, split: str, stream: bool = False) -> datasets.Dataset:
    """The clips of a split in a folder, columns `audio` (still encoded), `text`, maybe `speaker`.

    Raises `ValueError` if the split is not there, or cannot be read.
    """
    list_folder.cache_clear()  # recordings come and go
    tables, selected = find_tables(folder, split)
    if not tables:
        raise ValueError(explain_layout(folder, split))
    kinds = {"" if path.is_dir() else path.suffix.lower() for path in tables}
    listed = name_some([str(path) for path in tables], 3)
    if len(kinds) > 1:
        raise ValueError(f"{folder} has several kinds of tables for {split} ({listed}): keep one.")
    if kinds <= {*TEXTS}:
        rows = [row for table in tables for row in read_rows(table, selected)]
        if not rows:
            raise ValueError(f"{listed} lists recordings of other splits than {split}.")
        table = datasets.Dataset.from_list(rows, datasets.Features(ROW))
        return table.to_iterable_dataset() if stream else table
    parts, advice = [], "copy the files again, with the same columns"
    for parent, paths in groupby(tables, key=lambda path: path.parent):  # each with its sounds
        with as_value_error(f"{listed} cannot be read", advice):
            if kinds == {".parquet"}:
                options = {"data_files": [escape(f"{p}") for p in paths], "streaming": stream}
                table = datasets.load_dataset("parquet", split="train", **options)
            else:
                table = datasets.concatenate_datasets([datasets.load_from_disk(p) for p in paths])
                table = table.to_iterable_dataset() if stream else table
        if selected and "split" in map(plain, table.column_names):
            raise ValueError(f"{listed} has a column split: write a file each, as train.parquet.")
        places = [os.path.join(p, f) for p, f in product((parent, folder), BESIDE)]
        parts.append(unify_columns(table, folder, places))
    with as_value_error(f"{listed} cannot be read", advice):
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def explain_layout(folder: Path, split: str) -> str:
    """What was found in a folder instead of the tables of a split, and what is known."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        return f"{folder} is {what}: check the folder's name, or give corpus or gigaspeech:xs."
    found = name_some(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir()), 5)
    return f"{folder} has no table of the split {split}: found {found or 'nothing'}; {LAYOUTS}."


def kind_of(feature: object) -> str:
    """The type of a column's values: string, int64, Audio, List …"""
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def as_sound(value: object, folders: list[str]) -> dict | None:
    """A path, the bytes of a sound file, or both -> a value of `SOUND`, found in `folders`."""
    if isinstance(value, str | bytes):
        value = {"bytes": None, "path": None, "path" if isinstance(value, str) else "bytes": value}
    if value and value["path"] and not value["bytes"]:
        value["path"] = find_sound(value["path"], folders)
    return value


def unify_columns(table: datasets.Dataset, folder: str | Path, folders=("",)) -> datasets.Dataset:
    """Columns called `audio` (still encoded), `text` and `speaker` (strings), among others.

    Recordings that are named, but not in the table, are looked for in `folders`. Raises `ValueError`
    for columns of other kinds.
    """
    names = find_columns(table.column_names, folder)
    kinds = {ours: kind_of(table.features[name]) for ours, name in names.items()}
    if not re.fullmatch("(large_)?string|u?int.*|null", kinds["text"]):
        raise ValueError(f"{folder} has {kinds['text']} as {names['text']}: make strings of them.")
    audio, stream = names["audio"], isinstance(table, datasets.IterableDataset)
    with as_value_error(f"{folder} has wrong values", "make audio bytes or paths, text strings"):
        for column in {"text", "speaker"} & {*names}:
            if "string" not in kinds[column]:
                table = table.cast_column(names[column], datasets.Value("string"))
        bare = re.search("string|binary", kinds["audio"])  # paths or bytes, not both
        if not bare:  # a stream would encode Audio once more
            table = table.cast_column(audio, SOUND if stream else datasets.Audio(decode=False))
        if bare or stream or table.data.column(audio).flatten()[0].null_count:
            features = datasets.Features(table.features | {audio: SOUND})
            # the folder may be read-only: nothing is kept on disk
            options = {} if stream else {"keep_in_memory": True, "load_from_cache_file": False}
            to_sound = lambda value: {audio: as_sound(value, folders)}  # noqa: E731
            table = table.map(to_sound, input_columns=audio, features=features, **options)
    return table.rename_columns({name: ours for ours, name in names.items() if name != ours})


# -- GigaSpeech on the hub ----------------------------------------------------------------------

GIGASPEECH = "speechcolab/gigaspeech"
GIGASPEECH_HOURS = {"xs": 10, "s": 250, "m": 1000, "l": 2500, "xl": 10_000}  # to train on
HUB_ADVICE = (
    f"accept its terms on huggingface.co/datasets/{GIGASPEECH}, log in with `hf auth login`, check "
    "the network and HF_HUB_OFFLINE, or name the revision with its files (`gigaspeech:xs@REVISION`)"
)


@cache
def announce_gigaspeech(subset: str, stream: bool) -> None:
    """Print, once, what a subset takes of this machine, and what to do where that is too much.

    An hour is 16-bit samples at 16 kHz: twice on disk, as they come and as `datasets` keeps them,
    and once in memory, beside about 1 GB for the program; a stream takes neither. Raises
    `ValueError` for an unknown subset.
    """
    if subset not in GIGASPEECH_HOURS:
        raise ValueError(f"GigaSpeech has no subset {subset!r}: choose xs, s, m, l or xl.")
    if stream:
        return
    hours, hour = GIGASPEECH_HOURS[subset], 3600 * 16_000 * 2 / 1e9  # GB
    disk, memory = 2 * hour * (hours + 12 + 40), 1 + hour * hours  # validation and test come along
    place = nearest_folder(datasets.config.HF_DATASETS_CACHE)
    free, total = shutil.disk_usage(place).free / 1e9, psutil.virtual_memory().total / 1e9
    takes = f"{disk:,.0f} GB of disk ({free:,.0f} GB are free) and {memory:,.0f} GB of memory"
    known = f"{hours:,} hours to train on; with validation and test about {takes}"
    print_once(f"GigaSpeech {subset}: {known} (this machine has {total:,.0f} GB)")
    if memory > total or disk > free:
        print_once("That is more than there is: set stream_steps=500 to read it as a stream.")
