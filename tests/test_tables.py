"""Tables of recordings in other people's layouts: each is read, or refused in one sentence."""

import io
import json

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from utils import tables
from utils.config import ModelArgs
from utils.data import has_split, is_on_hub, load_clips, load_gigaspeech, load_splits

LJSPEECH = 'LJ001-01|in 1810, "the" Dr.|in eighteen ten, "the" doctor\nLJ001-02|no numbers|\n'
COMMON_VOICE = (
    'client_id\tpath\tsentence\tup_votes\nab12\tcommon_voice_1.mp3\t"Tea" or "coffee"?\t2\n'
)
ROWS = [("a.wav", "one two"), ("b.wav", "three")]


def write(folder, files):
    """Write {name: text, bytes, or None for an empty sound} into a folder -> the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content or b""
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(folder, split="train", **options):
    """Name, text and speaker of each clip; every sound must be there."""
    found = []
    for row in load_clips(folder, split, **options):
        assert set(row["audio"]) == {"bytes", "path"} and row["audio"]["bytes"] is None
        path = folder / row["audio"]["path"]
        assert path.is_file(), path
        found.append((path.relative_to(folder).as_posix(), row["text"], row["speaker"]))
    return found


A, B = ("a.wav", "one two", ""), ("b.wav", "three", "")
SOUNDS = {"a.wav": None, "b.wav": None}
TABLES = {  # of the same two recordings
    "commas": ("metadata.csv", "file_name,text\na.wav,one two\nb.wav,three\n"),
    "semicolons": ("metadata.csv", "file_name;text\na.wav;one two\nb.wav;three\n"),
    "tabs": ("metadata.csv", "file_name\ttext\na.wav\tone two\nb.wav\tthree\n"),
    "bars": ("metadata.csv", "file_name|text\na.wav|one two\nb.wav|three\n"),
    "tsv": ("metadata.tsv", "path\tsentence\na.wav\tone two\nb.wav\tthree\n"),
    "upper case": ("METADATA.CSV", "File Name , TRANSCRIPTION\na.wav,one two\nb.wav,three\n"),
    "other order": ("metadata.csv", "Transcript,audio\none two,a.wav\nthree,b.wav\n"),
    "signature": ("metadata.csv", "\ufefffile,text\na.wav,one two\nb.wav,three\n"),
    "hint for Excel": ("metadata.csv", "sep=;\nfile_name;text\na.wav;one two\nb.wav;three\n"),
    "Windows": ("metadata.csv", "file_name,text\r\na.wav,one two\r\nb.wav,three\r\n"),
    "old Mac": ("metadata.csv", "file_name,text\ra.wav,one two\rb.wav,three\r"),
    "no last end": ("metadata.csv", "file_name,text\na.wav,one two\nb.wav,three"),
    "blank lines": ("metadata.csv", "\nfile_name,text\n\na.wav,one two\n,\n  \nb.wav,three\n\n"),
    "quoted": ("metadata.csv", '"file_name","text"\n"a.wav", "one two"\n"b.wav","three"\n'),
    "two lines": ("metadata.csv", 'file_name,text\na.wav,"one two\n"\nb.wav,three\n'),
    "commas, then a line": ("metadata.csv", 'text,file\n"one\ntwo","a.wav"\n"three",b.wav\n'),
    "more columns": ("metadata.csv", ",file_name,text,,\n0,a.wav,one two,,\n1,b.wav,three,,\n"),
    "more commas": ("metadata.csv", "file_name,text\na.wav,one two,,\nb.wav,three,\n"),
    "blanks": ("metadata.csv", "file_name,text\n a.wav , one two \nb.wav,three\n"),
    "jsonl": ("metadata.jsonl", jsonl(*({"file_name": a, "text": b} for a, b in ROWS)) + "\n"),
    "NeMo": ("metadata.jsonl", jsonl(*({"audio_filepath": a, "text": b, "x": 1} for a, b in ROWS))),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_of_the_same_recordings(tmp_path, case):
    name, table = TABLES[case]
    found = rows_of(write(tmp_path, {name: table, **SOUNDS}), stream=case in ("tabs", "jsonl"))
    assert [(a, " ".join(b.split()), c) for a, b, c in found] == [A, B]


def test_quoted_fields_keep_what_they_hold(tmp_path):
    for name, delimiter in (("metadata.csv", ","), ("metadata.csv", ";"), ("metadata.csv", "\t")):
        table = f'file_name{delimiter}text\na.wav{delimiter}"one{delimiter} ""two"""\n'
        if delimiter == "\t":
            table = 'file_name\ttext\na.wav\t"one ""two"""\n'
        text = 'one "two"' if delimiter == "\t" else f'one{delimiter} "two"'
        assert rows_of(write(tmp_path, {name: table, **SOUNDS})) == [("a.wav", text, "")]


@pytest.mark.parametrize("column", ["speaker", "speaker_id", "client_id", "Speaker"])
@pytest.mark.parametrize("voice", ["7", "ann"])
def test_speakers_are_kept(tmp_path, column, voice):
    table = f"file_name,text,{column}\na.wav,one,{voice}\nb.wav,2,\n"
    found = rows_of(write(tmp_path, {"metadata.csv": table, **SOUNDS}))
    assert found == [("a.wav", "one", voice), ("b.wav", "2", "")]


NAMES = {
    "folders": ("deep/er/a.wav", "deep/er/a.wav"),
    "backslashes": ("deep\\a.wav", "deep/a.wav"),
    "without ending": ("a", "a.flac"),
    "dots": ("LJ001.01", "wavs/LJ001.01.wav"),
    "clips": ("a.mp3", "clips/a.mp3"),
    "wavs": ("a", "wavs/a.wav"),
    "here": ("./a.wav", "a.wav"),
    "case of the ending": ("a.wav", "a.WAV"),
    "no ending, upper case": ("LJ001-0001", "wavs/LJ001-0001.WAV"),
    "case of folders": ("Clips/A.wav", "clips/a.Wav"),
    "file URL": ("file://a%20b.wav", "a b.wav"),
    "of another machine": ("C:\\Users\\me\\a.wav", "clips/a.wav"),
    "of another Unix": ("/home/nobody/corpus/a.wav", "wavs/a.wav"),
    "blanks and accents in folders": ("Grö\u00dfe 1/a b.wav", "gro\u0308\u00dfe 1/a b.wav"),
    "accents of macOS": ("gro\u0308\u00dfe.wav", "gr\u00f6\u00dfe.wav"),
    "accents of others": ("gr\u00f6\u00dfe.wav", "gro\u0308\u00dfe.wav"),
    "not ASCII": ("größe 東京.wav", "größe 東京.wav"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_recordings(tmp_path, case):
    written, there = NAMES[case]
    table = jsonl({"file_name": written, "text": "one"})
    assert rows_of(write(tmp_path, {"metadata.jsonl": table, there: None})) == [(there, "one", "")]


@pytest.mark.parametrize("there", [("a.WAV", "A.wav"), ("a.WAV", "a.FLAC")])
def test_a_name_that_case_decides_is_refused(tmp_path, there):
    table = jsonl({"file_name": "a", "text": "one"})
    write(tmp_path, {"metadata.jsonl": table} | dict.fromkeys(there))
    with pytest.raises(
        ValueError, match=r"(?i)a may be .*/a\.\w+ or .*: write it as it is there\.$"
    ):
        load_clips(tmp_path)
    write(tmp_path, {"a.wav": None})  # now it is clear
    assert rows_of(tmp_path) == [("a.wav", "one", "")]


def test_recordings_of_another_machine_are_found_by_their_last_parts(tmp_path):
    """Not by the last one alone: each speaker may have a recording of that name."""
    there = ["001.wav", "ann/001.wav", "clips/Bob/001.wav"]
    names = ["/home/me/speech/ann/001.wav", "D:\\speech\\bob\\001", "/home/me/cy/001.wav"]
    table = jsonl(*({"file_name": name, "text": "one"} for name in names))
    found = rows_of(write(tmp_path, {"metadata.jsonl": table} | dict.fromkeys(there)))
    assert [name for name, *_ in found] == [there[1], there[2], there[0]]


def test_recordings_elsewhere(tmp_path):
    """Absolute names, and those that leave the folder; what is nowhere stays a row."""
    write(tmp_path, {"else/a.wav": None})
    names = [tmp_path / "else" / "a.wav", "../else/a.wav", "lost.wav"]
    table = jsonl(*({"file_name": str(name), "text": "one"} for name in names))
    folder = write(tmp_path / "mine", {"metadata.jsonl": table})
    paths = [row["audio"]["path"] for row in load_clips(folder)]
    assert paths == [str(names[0]), str(folder / names[1]), str(folder / names[2])]


CSV, TSV = "file_name,text\n{}.wav,{}\n", "path\tsentence\n{}.wav\t{}\n"
LAYOUTS = {  # files, and the texts of train, validation and test
    "upper case": (
        {
            "TRAIN.CSV": CSV.format("a", "one"),
            "Dev/metadata.csv": CSV.format("b", "two"),
            "Dev/audio/b.wav": None,
            **SOUNDS,
        },
        ["one"],
        ["two"],
        [],
    ),
    "Common Voice without its train.tsv": (
        {
            "validated.tsv": TSV.format("a", "one"),
            "test.tsv": TSV.format("a", "one"),
            "clips/a.wav": None,
        },
        [],
        [],
        ["one"],
    ),
    "audiofolder": (
        {
            "train/metadata.csv": CSV.format("a", "one"),
            "train/a.wav": None,
            "test/metadata.csv": CSV.format("b", "two"),
            "test/b.wav": None,
        },
        ["one"],
        [],
        ["two"],
    ),
    "the other words": (
        {
            "training/metadata.csv": CSV.format("a", "one"),
            "training/a.wav": None,
            "evaluation.tsv": TSV.format("b", "two"),
            **SOUNDS,
        },
        ["one"],
        [],
        ["two"],
    ),
    "under data": (
        {
            "data/train/metadata.jsonl": jsonl({"file_name": "a.wav", "text": "one"}),
            "data/train/a.wav": None,
            "data/valid/metadata.tsv": TSV.format("b", "two"),
            "data/valid/b.wav": None,
        },
        ["one"],
        ["two"],
        [],
    ),
    "tables of splits": (
        {
            "train.csv": CSV.format("a", "one"),
            "valid.csv": CSV.format("b", "two"),
            "test_clean.csv": CSV.format("a", "three"),
            "test_other.csv": CSV.format("b", "four"),
            **SOUNDS,
        },
        ["one"],
        ["two"],
        ["three", "four"],
    ),
    "Common Voice": (
        {
            "train.tsv": TSV.format("a", '"one"'),
            "dev.tsv": TSV.format("b", '"Two," she said, "or'),
            "test.tsv": TSV.format("b", "three"),
            "validated.tsv": TSV.format("a", "one") + "b.wav\tthree\n",
            "other.tsv": TSV.format("x", "nobody knows"),
            "invalidated.tsv": TSV.format("x", "wrong"),
            "clip_durations.tsv": "clip\tduration[ms]\na.wav\t100\n",
            "clips/a.wav": None,
            "clips/b.wav": None,
        },
        ["one"],
        ['"Two," she said, "or'],
        ["three"],
    ),
    "a delta of Common Voice": (
        {"validated.tsv": TSV.format("a", "one"), "clips/a.wav": None},
        ["one"],
        [],
        [],
    ),
    "CorporaCreator": (  # its valid.tsv holds all validated clips
        {
            "train.tsv": TSV.format("a", "one"),
            "dev.tsv": TSV.format("b", "two"),
            "valid.tsv": TSV.format("a", "one") + "b.wav\ttwo\n",
            **SOUNDS,
        },
        ["one"],
        ["two"],
        [],
    ),
    "LJSpeech": (
        {"metadata.csv": LJSPEECH, "wavs/LJ001-01.wav": None, "wavs/LJ001-02.wav": None},
        ['in eighteen ten, "the" doctor', "no numbers"],
        [],
        [],
    ),
    "one table of all splits": (
        {
            "metadata.csv": "file_name,text\ntrain/a.wav,one\ndev/b.wav,two\ntest\\c.wav,three\n",
            "train/a.wav": None,
            "dev/b.wav": None,
            "test/c.wav": None,
        },
        ["one"],
        ["two"],
        ["three"],
    ),
    "a column of splits in capitals": (
        {
            "metadata.tsv": "path\ttext\tSplit\na.wav\tone\tTRAIN\nb.wav\ttwo\t Test \n"
            "a.wav\tthree\tunused\n",
            **SOUNDS,
        },
        ["one"],
        [],
        ["two"],
    ),
    "a column of splits": (
        {
            "metadata.csv": "file_name,text,split\na.wav,one,train\nb.wav,two,dev\na.wav,three,\n",
            **SOUNDS,
        },
        ["one", "three"],
        ["two"],
        [],
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_of_splits(tmp_path, case):
    files, *texts = LAYOUTS[case]
    folder = write(tmp_path / "speech", files)
    for split, expected in zip(("train", "validation", "test"), texts, strict=True):
        assert has_split(folder, split) == bool(expected)
        if expected:
            assert [text for _, text, _ in rows_of(folder, split)] == expected
        else:
            with pytest.raises(ValueError, match=f"no table of the split {split}: found .*; known"):
                load_clips(folder, split)


@pytest.mark.parametrize("asked", ["validation", "valid", "dev"])
@pytest.mark.parametrize(
    "there", ["validation.csv", "valid.csv", "dev/metadata.csv", "metadata.csv"]
)
def test_validation_by_any_name(tmp_path, there, asked):
    table = CSV.format("a", "one") if there != "metadata.csv" else CSV.format("dev/a", "one")
    folder = write(tmp_path, {there: table, "a.wav": None, "dev/a.wav": None})
    assert has_split(folder, asked) and load_clips(folder, asked)["text"][:] == ["one"]


def sound(seconds=0.2):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(16_000 * seconds)), 16_000, format="WAV")
    return {"bytes": file.getvalue(), "path": "a.wav"}


def table_of(**columns):
    return datasets.Dataset.from_dict(
        {"audio": [sound(), sound()], "text": ["one", "two"]} | columns
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "name", ["train.parquet", "data/train-00000-of-00001.parquet", "train/0.parquet", "x.parquet"]
)
def test_parquet_files(tmp_path, name, stream):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    table_of().to_parquet(tmp_path / name)
    table_of(text=["three", "four"]).to_parquet((tmp_path / name).parent / "val-0.parquet")
    if name != "train/0.parquet":  # there it is one more file of that folder
        assert [row["text"] for row in load_clips(tmp_path, "validation", stream)] == [
            "three",
            "four",
        ]
        assert [row["text"] for row in load_clips(tmp_path, "train", stream)] == ["one", "two"]
    else:
        assert len(list(load_clips(tmp_path, "train", stream))) == 4


def test_parquet_files_in_folders_with_the_signs_of_patterns(tmp_path):
    for name in ("speech [v2]/train [1].parquet", "wh?t/train.parquet", "all*/x.parquet"):
        (tmp_path / name).parent.mkdir()
        table_of().to_parquet(tmp_path / name)
        for stream in (False, True):
            rows = load_clips((tmp_path / name).parent, stream=stream)
            assert [row["text"] for row in rows] == ["one", "two"]


def test_rows_of_unknown_splits_are_counted(tmp_path, capsys):
    rows = "a.wav,one,train\nb.wav,two,fold7\nb.wav,three,fold7\na.wav,four,dev\n"
    write(tmp_path, SOUNDS | {"metadata.csv": "file_name,text,split\n" + rows})
    assert [text for _, text, _ in rows_of(tmp_path)] == ["one"]
    expected = "has rows of unknown splits: fold7 (2).\n"
    assert capsys.readouterr().out.endswith(expected)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["x.parquet", "metadata.parquet", "saved"])
def test_tests_in_a_table_of_all_splits_are_not_trained_on(tmp_path, kind, stream):
    """Text tables are divided by that column; the others have to be, except with a split's name."""
    table = table_of(Split=["train", "test"])
    if kind == "saved":
        table.save_to_disk(tmp_path)
    else:
        table.to_parquet(tmp_path / kind)
    with pytest.raises(ValueError, match=r"has a column split: write .* as train\.parquet\.$"):
        load_clips(tmp_path, stream=stream)
    table.to_parquet(tmp_path / "train.parquet")
    assert len(list(load_clips(tmp_path, stream=stream))) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_folders_of_save_to_disk(tmp_path, stream):
    table = table_of().rename_column("text", "Sentence").cast_column("audio", datasets.Audio())
    splits = datasets.DatasetDict({"train": table, "valid": table.select([1])})
    splits.save_to_disk(tmp_path / "all")
    table.save_to_disk(tmp_path / "test_one")  # by itself, its name says nothing
    for folder, split, texts in (
        ("all", "train", ["one", "two"]),
        ("all", "validation", ["two"]),
        ("test_one", "train", ["one", "two"]),
    ):
        rows = list(load_clips(tmp_path / folder, split, stream))
        assert [row["text"] for row in rows] == texts and rows[0]["audio"]["bytes"]
    assert not has_split(tmp_path / "all", "test")
    assert not has_split(tmp_path / "test_one", "validation")
    (tmp_path / "all" / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="train .*cannot be read .*copy the files again"):
        load_clips(tmp_path / "all")


COLUMNS = {  # columns of a Parquet file -> text and speaker of its clips
    "other names": (
        {"Transcription": ["a", "b"], "client_id": ["x", None]},
        ["a", "b"],
        ["x", None],
    ),
    "numbers": ({"text": [1, None], "speaker_id": [3, 4]}, ["1", None], ["3", "4"]),
    "nothing": ({"text": [None, None], "speaker": [None, None]}, [None, None], [None, None]),
    "no sound": ({"audio": [None, sound()], "text": ["a", "b"]}, ["a", "b"], None),
    "two tables in one": (
        {"file": ["x", "y"], "path": ["x", "y"], "text": ["a", "b"]},
        ["a", "b"],
        None,
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", COLUMNS)
def test_columns_of_careless_exporters(tmp_path, case, stream):
    columns, texts, speakers = COLUMNS[case]
    table = datasets.Dataset.from_dict({"audio": [sound(), sound()]} | columns)
    table.to_parquet(tmp_path / "train.parquet")
    rows = list(load_clips(tmp_path, stream=stream))
    assert [row["text"] for row in rows] == texts
    assert [row.get("speaker") for row in rows] == (speakers or [None, None])
    assert rows[1]["audio"]["bytes"] == sound()["bytes"]
    assert (rows[0]["audio"] is None) == (case == "no sound")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["path", "audio"])
def test_paths_in_parquet_files_begin_in_their_folder(tmp_path, name, stream):
    columns = pa.table({name: ["deep/a.wav", "b", None], "text": ["one", "two", "three"]})
    pq.write_table(columns, write(tmp_path, {"deep/a.wav": None, "b.flac": None}) / "train.parquet")
    first, second, third = load_clips(tmp_path, stream=stream)
    assert first["audio"] == {"bytes": None, "path": str(tmp_path / "deep/a.wav")}
    assert second["audio"]["path"] == str(tmp_path / "b.flac") and third["audio"] is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("inside", [[], ["bytes"]], ids=["path", "bytes and path"])
@pytest.mark.parametrize(
    "table", ["train.parquet", "data/train.parquet", "train/metadata.parquet", "train/0.parquet"]
)
def test_paths_of_sounds_begin_in_the_folder_of_their_table(
    tmp_path, monkeypatch, table, inside, stream
):
    """Not in the working directory; those with bytes are only names."""
    beside = (tmp_path / table).parent
    write(beside, {"a.wav": None, "clips/b.flac": None})
    write(tmp_path, {"c.wav": None})
    monkeypatch.chdir(write(tmp_path / "elsewhere", {"a.wav": None}))
    sounds = [dict.fromkeys(inside) | {"path": name} for name in ("a.wav", "b", "c.wav")]
    if inside:
        sounds.append(sound())
    columns = {"audio": sounds, "text": ["one"] * len(sounds)}
    pq.write_table(pa.table(columns), tmp_path / table)
    found = [row["audio"] for row in load_clips(tmp_path, stream=stream)]
    expected = [beside / "a.wav", beside / "clips" / "b.flac", tmp_path / "c.wav"]
    assert [row["path"] for row in found[:3]] == list(map(str, expected))
    assert found[3:] == [sound()] * len(inside)


@pytest.mark.parametrize("stream", [False, True])
def test_each_of_several_tables_has_its_own_recordings(tmp_path, stream):
    """Parquet files in two folders, which both name an `a.wav`; one also has speakers."""
    for folder, more in (("train_clean", {}), ("train_other", {"speaker": ["kim"]})):
        write(tmp_path, {f"{folder}/a.wav": None})
        columns = pa.table({"file_name": ["a.wav"], "text": [folder], **more})
        pq.write_table(columns, tmp_path / folder / "metadata.parquet")
    rows = list(load_clips(tmp_path, stream=stream))
    expected = [str(tmp_path / folder / "a.wav") for folder in ("train_clean", "train_other")]
    assert [row["audio"]["path"] for row in rows] == expected
    assert [(row["text"], row["speaker"]) for row in rows] == [
        ("train_clean", None),
        ("train_other", "kim"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_recording_that_was_missing_is_found_once_it_is_there(tmp_path, stream):
    columns = pa.table({"file_name": ["a"], "text": ["one"]})
    pq.write_table(columns, tmp_path / "train.parquet")
    [row] = load_clips(tmp_path, stream=stream)
    assert row["audio"]["path"] == str(tmp_path / "a")
    write(tmp_path, {"a.flac": None})
    [row] = load_clips(tmp_path, stream=stream)
    assert row["audio"]["path"] == str(tmp_path / "a.flac")
    table = datasets.Dataset.from_dict({"audio": [{"bytes": None, "path": "a"}], "text": ["one"]})
    table.save_to_disk(tmp_path / "saved" / "train")
    before = sorted(tmp_path.rglob("*"))
    [row] = load_clips(tmp_path / "saved", stream=stream)
    assert row["audio"]["path"] == str(tmp_path / "saved" / "a")
    assert sorted(tmp_path.rglob("*")) == before, "the folder may be read-only"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_sounds_without_a_name(tmp_path, kind, stream):
    columns = {"audio": pa.array([sound()["bytes"], None], kind), "text": ["one", "two"]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    found = [row["audio"] for row in load_clips(tmp_path, stream=stream)]
    assert found == [{"bytes": sound()["bytes"], "path": None}, None]


def test_categories_are_texts(tmp_path):
    """What pandas makes of a column with few values."""
    words = pa.array(["one", "one"]).dictionary_encode()
    columns = {"audio": [sound()] * 2, "text": words, "speaker": words}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert [(row["text"], row["speaker"]) for row in load_clips(tmp_path)] == [("one", "one")] * 2


@pytest.mark.parametrize(
    "columns, sentence",
    [
        ({"speaker": [["a"], ["b"]]}, "audio bytes or paths, text strings"),
        ({"text": [1.0, 2.5]}, "has double as text|has float64 as text"),
        ({"text": [["one"], ["two"]]}, "has List as text: make strings of them"),
        ({"text": [True, False]}, "has bool as text"),
        ({"audio": [[0.1, 0.2], [0.3]]}, "make audio bytes or paths"),
        ({"audio": [1, 2]}, "make audio bytes or paths"),
        ({"audio": [{"array": [0.1]}, {"array": [0.2]}]}, "make audio bytes or paths"),
        ({"Text": ["a", "b"]}, "two columns 'text': rename one"),
        ({"text": None}, "has the columns audio: name the recordings .* and their words text"),
    ],
)
def test_columns_that_are_refused(tmp_path, columns, sentence):
    table = table_of(**{name: values or [""] * 2 for name, values in columns.items()})
    table = table.select_columns([name for name in table.column_names if columns.get(name, 1)])
    table.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=sentence) as problem:
        load_clips(tmp_path)
    assert str(tmp_path) in str(problem.value) and "\n" not in str(problem.value)


def test_labels_are_no_texts(tmp_path):
    labels = datasets.ClassLabel(names=["yes", "no"])
    table_of(text=[0, 1]).cast_column("text", labels).save_to_disk(tmp_path / "own")
    with pytest.raises(ValueError, match="has ClassLabel as text"):
        load_clips(tmp_path / "own")


def test_a_broken_validation_set_is_not_taken_for_none(tmp_path):
    table_of().to_parquet(tmp_path / "train.parquet")
    (tmp_path / "validation.parquet").write_bytes(b"broken")
    assert has_split(tmp_path, "validation")
    with pytest.raises(ValueError, match=r"validation.parquet .*cannot be read"):
        load_clips(tmp_path, "validation")
    write(
        tmp_path, {"dev.csv": "file_name,text\na.wav\n", "metadata.csv": "file_name,text\na.wav\n"}
    )
    (tmp_path / "validation.parquet").unlink()
    with pytest.raises(ValueError, match="dev.csv is wrong in line 2"):
        load_clips(tmp_path, "validation")


def test_training_uses_the_splits_of_a_layout(tmp_path):
    """A validation set that is there is used; if it is broken, training says so."""
    names = {split: f"{split}.tsv" for split in ("train", "dev", "test")}
    for i, (split, name) in enumerate(names.items()):
        sounds = {f"clips/{split}{k}.wav": sound()["bytes"] for k in range(4)}
        rows = [f"{split}{k}.wav\tword{i} {k}" for k in range(4)]
        write(tmp_path, {name: "\n".join(["path\tsentence", *rows]), **sounds})
    args = ModelArgs.preset("cpu", min_kept=0.0)
    train, validation = load_splits(args, tmp_path)
    assert train.texts == [f"word0 {k}" for k in range(4)]
    assert validation.texts == [f"word1 {k}" for k in range(4)]
    assert train.forbidden == {f"word2 {k}" for k in range(4)}
    (tmp_path / "dev.tsv").write_bytes(b"path\tsentence\ndev0.wav\n")
    with pytest.raises(ValueError, match="dev.tsv is wrong in line 2"):
        load_splits(args, tmp_path)


LONG = "x" * 140_000
REFUSED = {  # a metadata.csv, and what is said about it
    "cp1252": (
        "file_name,text\na.wav,café\n".encode("cp1252"),
        "not in UTF-8 .*0xe9.*: save it as",
    ),
    "utf-16": (
        "file_name,text\na.wav,one\n".encode("utf-16"),
        "not in UTF-8 .*UTF-16.*: save it as",
    ),
    "utf-16 unsigned": ("file_name,text\na.wav,one\n".encode("utf-16-le"), "not in UTF-8"),
    "open": ('file_name,text\na.wav,"one\nb.wav,two\n', "line 2 .*close all quotation marks"),
    "closed later": (
        'file_name,text\na.wav,"one\nb.wav,two"\na.wav,x\n',
        "line 2 .*quotation mark",
    ),
    "open again": ('file_name,text\na.wav,x\na.wav,"one\nb.wav,"two"\n', "line 3 .*quotation mark"),
    "open in a name": ('file_name,text\n"a.wav,one\nb.wav,two\n', "line 2 .*quotation mark"),
    "open header": ('file_name,"text\na.wav,one\nb.wav,two\n', "line 1 .*quotation mark"),
    "without end": (f'file_name,text\na.wav,one\nb.wav,"{LONG}', "line 3 .*quotation mark"),
    "a long field": (f"file_name,text\na.wav,{LONG}\n", "line 2 .*field"),
    "a long field of tabs": (f"file_name\ttext\na.wav\t{LONG}\n", "line 2 .*field"),
    "too many": (
        "file_name,text\na.wav,one\nb.flac,two, three\n",
        "line 3 .*3 fields instead of 2",
    ),
    "too few": ("file_name,text\na.wav\n", "line 2 .*1 fields instead of 2.*file_name,text"),
    "too few of tabs": ("path\tsentence\ta\na.wav\tone\n", "line 2 .*2 fields instead of 3"),
    "LJSpeech": ("LJ1|one|one\nLJ2|one|two|three|four\n", "line 2 .*5 fields"),
    "twice": ("file_name,text,Text\na.wav,one,two\n", "two columns 'text': rename one"),
    "other names": (
        "file_name,words\na.wav,one\n",
        "columns file_name, words: name the recordings",
    ),
    "no names": ("a.wav;one\nb.wav;two\n", "has the columns a.wav, one: name"),
    "one column": ("text\none\n", "has the columns text: name the recordings"),
    "empty": ("", "lists no recording"),
    "blank": ("\n \n", "lists no recording"),
    "names alone": ("file_name,text\n", "lists no recording"),
    "no file": ("file_name,text\n,one\n", "line 2 .*no recording is named"),
    "twice the same": ("file_name,text,text\na.wav,one,two\n", "two columns 'text': rename one"),
    "only tests": ("file_name,text\ntest/a.wav,one\n", "recordings of other splits than train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tables_that_are_refused(tmp_path, case):
    content, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=f"metadata.csv.*{sentence}") as problem:
        load_clips(write(tmp_path, {"metadata.csv": content, **SOUNDS}))
    assert len(str(problem.value)) < 600 and "\n" not in str(problem.value)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"file_name": "a.wav", "text": "one"', "line 2 .*one JSON object a line"),
        ('["a.wav", "one"]', "line 2 .*one JSON object a line"),
        ("[" * 100_000, "line 2 .*one JSON object a line"),
        ('{"file_name": "a.wav", "text": ["one"]}', r"line 2 \(\['one'\] is no text\)"),
        ('{"file_name": "a.wav", "text": NaN}', r"line 2 \(nan is no text"),
        ('{"file_name": "a.wav", "text": true}', r"line 2 \(True is no text"),
        ('{"file_name": {"path": "a.wav"}, "text": "one"}', "line 2 .* is no text"),
        (r'{"file_name": "a.wav", "text": "\ud83d"}', r"line 2 \(UnicodeEncodeError.*ud83d"),
        (r'{"file_name": "\ud83d.wav", "text": "one"}', r"line 2 \(UnicodeEncodeError.*ud83d"),
        ('{"file_name": null, "text": "one"}', "line 2 .*no recording is named"),
        ('{"text": "one"}', "line 2 .*no recording is named"),
    ],
)
def test_lines_of_json_that_are_refused(tmp_path, line, sentence):
    table = jsonl({"file_name": "a.wav", "text": 7, "speaker": 8}) + line + "\n"
    write(tmp_path, {"metadata.jsonl": table.replace(line, ""), **SOUNDS})
    assert rows_of(tmp_path) == [("a.wav", "7", "8")]
    with pytest.raises(ValueError, match=f"metadata.jsonl .*{sentence}"):
        load_clips(write(tmp_path, {"metadata.jsonl": table}))


@pytest.mark.parametrize(
    "files, sentence",
    [
        ({}, "found nothing; known are a metadata.csv"),
        ({f"{i}.wav": None for i in range(9)}, "found 0.wav, .* 4.wav and 4 more; known are"),
        (
            {"wav.scp": "a a.wav", "text": "a ONE", "84/1.flac": None},
            "found 84/, text, wav.scp; known",
        ),
        ({"metadata.csv": CSV, "metadata.jsonl": "{}"}, "several kinds of tables for train"),
        ({"train.csv": CSV, "train.parquet": "x"}, "several kinds of tables for train"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_clips(write(tmp_path, files))


def test_what_is_no_folder_is_refused(tmp_path):
    write(tmp_path, {"metadata.csv": CSV})
    with pytest.raises(ValueError, match="nowhere is not there: check the folder's name"):
        load_clips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="metadata.csv is a file: check the folder's name"):
        load_clips(tmp_path / "metadata.csv")
    with pytest.raises(ValueError, match="corpus has no table of the split tset: found .*train"):
        load_clips("corpus", "tset")


# --- GigaSpeech ---


@pytest.mark.parametrize("name", ["gigaspeech", "gigaspeech_mine", "gigaspeech:xs", "Gigaspeech"])
def test_a_folder_called_gigaspeech_is_a_folder(tmp_path, monkeypatch, name):
    write(tmp_path / name, {"metadata.csv": CSV.format("a", "one"), **SOUNDS})
    monkeypatch.chdir(tmp_path)
    assert load_clips(name)["text"][:] == ["one"]
    assert not has_split(name, "validation")


def test_without_such_a_folder_it_is_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gigaspeech", "gigaspeech:xs", "gigaspeech:l@refs/pr/99"):
        assert is_on_hub(name) and has_split(name, "validation")
    with pytest.raises(ValueError, match="gigaspeech_mine is not there"):
        load_clips("gigaspeech_mine")
    for stream in (False, True):
        with pytest.raises(ValueError, match="no subset 'xxl': choose xs, s, m, l or xl"):
            load_clips("gigaspeech:xxl", stream=stream)


@pytest.mark.parametrize(
    "subset, memory, free, said, advised",
    [
        ("xs", 8e9, 1e11, ["10 hours", "14 GB of disk", "2 GB of memory", "has 8 GB"], False),
        ("xs", 8e9, 1e10, ["14 GB of disk (10 GB are free"], True),
        ("s", 32e9, 1e12, ["250 hours", "70 GB of disk", "30 GB of memory"], False),
        ("s", 16e9, 1e12, ["30 GB of memory"], True),
        ("xl", 2e12, 1e13, ["10,000 hours", "2,316 GB of disk", "1,153 GB of memory"], False),
        ("xl", 128e9, 1e13, ["10,000 hours"], True),
    ],
)
def test_what_gigaspeech_takes_is_said_once(
    monkeypatch, capsys, subset, memory, free, said, advised
):
    tables.announce_gigaspeech.cache_clear()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": memory}))
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Disk", (), {"free": free}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: capsys.readouterr().out)
    printed = load_gigaspeech(subset)  # before anything is loaded
    assert all(words in printed for words in said)
    assert ("stream_steps" in printed) == advised
    assert load_gigaspeech(subset, "validation") == load_gigaspeech(subset, stream=True) == ""
    tables.announce_gigaspeech.cache_clear()
    monkeypatch.setenv("RANK", "1")
    assert load_gigaspeech(subset) == ""
    tables.announce_gigaspeech.cache_clear()
