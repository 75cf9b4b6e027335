"""`python -m utils words`: phrases of your own become a recogniser of them."""

import json
import shutil
import sys
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from utils.__main__ import main
from utils.data import load_clips
from utils.evaluation import bootstrap_interval, count_errors
from utils.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))

import voices  # noqa: E402
import words  # noqa: E402

TOKENIZER = Tokenizer.small()


def read(tmp_path, *lines):
    path = tmp_path / "phrases.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return words.read_phrases(path, TOKENIZER, 28)


@pytest.mark.parametrize(
    "line, phrases",
    [
        ("Stop, please!", ["stop please"]),
        ("yes | no", ["no", "yes"]),
        ("turn\ton\N{NO-BREAK SPACE}it", ["turn on it"]),
        ("don’t (stop|go on)  // a comment", ["don't go on", "don't stop"]),
        ("the [very] [big|small] t-shirt", [
            "the big t shirt", "the small t shirt", "the t shirt",
            "the very big t shirt", "the very small t shirt", "the very t shirt",
        ]),
        ("turn (on [again]|off) (it|(my|your) lamp)", [
            f"turn {switch} {what}"
            for switch in ("off", "on again", "on") for what in ("it", "my lamp", "your lamp")
        ]),
    ],
)  # fmt: skip
def test_a_line_stands_for_its_phrases(tmp_path, line, phrases):
    assert read(tmp_path, "hello", "", "// nothing", line) == [["hello"], sorted(phrases)]


@pytest.mark.parametrize(
    "line, problem",
    [
        ("turn (on|off the light", r"\) is missing"),
        ("turn on] the light", "] closes nothing"),
        ("(" * 2000 + "light" + ")" * 2000, "recursion"),
        ("turn (on] the light", "] closes nothing"),
        ("turn (on|) the light", "an alternative is empty"),
        ("[please]", "no words"),
        ("channel 5", "'5' cannot be spoken"),
        ("un café", "'é' cannot be spoken"),
        ("<name>", "'<' cannot be spoken"),
        ("xylophone " * 4, "at most 28 fit"),
        ("wednesday september seventeen afternoon thursday television kitchen", "more than 5 s"),
        (" ".join(["(a|b|c|d|e|f|g|h)"] * 8), "more than 10,000 phrases"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_its_line(tmp_path, line, problem):
    with pytest.raises(ValueError, match=rf"phrases.txt, line 3: [^\n]*{problem}[^\n]*\.$"):
        read(tmp_path, "hello", "", line)


def test_a_file_without_phrases_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no phrases"):
        read(tmp_path, "// nothing", "")
    with pytest.raises(ValueError, match="cannot be read"):
        words.read_phrases(DATA / "model.safetensors", TOKENIZER, 28)
    with pytest.raises(ValueError, match="cannot be read"):
        words.read_phrases(tmp_path / "absent.txt", TOKENIZER, 28)


ENGINES = [e for n in (1, 2, 5) for e in combinations(voices.ENGINES, n)]


@pytest.mark.parametrize("engines", ENGINES, ids="-".join)
def test_voices_of_the_test_are_none_of_training(engines):
    training = words.training_speakers(engines, 0)
    unseen = words.unseen_speakers(engines, 0)
    assert len(training) == words.SPEAKERS and len(unseen) >= 12
    assert {s.voice.engine for s in training + unseen} <= set(engines)
    assert not {s.id for s in training} & {s.id for s in unseen}
    if set(engines) & {"festival", "espeak", "pico"}:
        assert not {s.voice for s in training} & {s.voice for s in unseen}


def test_other_words_are_none_of_the_phrases_and_others_in_the_test():
    phrases, said = [["open the terminal", "because"], ["common people"]], {}
    for split in ("train", "test_other_words"):
        clips = words.clips_of(split, phrases, np.random.default_rng(0))
        unknown = [clip.sentence[:-1].split() for clip in clips if clip.unknown]
        said[split] = {word for sentence in unknown for word in sentence}
        assert len(unknown) > 50 and {1, 2, 3} <= set(map(len, unknown))
        assert not said[split] & {"open", "the", "terminal", "because", "common", "people"}
    assert not said["train"] & said["test_other_words"]


def test_every_word_is_said_about_as_often():
    names = [f"call {name}" for name in "anna ben clara david emma frank grace henry".split()]
    clips = words.phrase_clips([names, ["stop"], ["go"]], 600, np.random.default_rng(0))
    said = [clip.sentence[:-1] for clip in clips]
    assert min(map(said.count, [*names, "stop", "go"])) > 30


def test_without_voices_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(voices, "find", lambda module: False)
    (tmp_path / "phrases.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main(["words", str(tmp_path / "phrases.txt"), "--out", str(tmp_path / "mine")])
    told = capsys.readouterr().err
    assert "py-nanotts" in told and "espeak-ng" in told and told.count("\n") == 1
    assert not (tmp_path / "mine").exists()


@pytest.mark.skipif(
    any(shutil.which(program) is None for program in voices.PACKAGES),
    reason="the speech synthesisers are not installed",
)
def test_phrases_become_a_model_and_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(words, "SPEAKERS", 4)
    monkeypatch.setattr(words, "CLIPS_PER_WORD", 4)
    monkeypatch.setattr(words, "NOISE_CLIPS", 2)
    monkeypatch.setattr(
        words, "HELD_OUT_CLIPS",
        {"validation": 4, "test_unseen_voices": 6, "test_other_words": 6},
    )  # fmt: skip
    monkeypatch.setattr(words, "engines_at_hand", lambda: ["flite", "espeak"])
    monkeypatch.setattr(words, "SETTINGS", words.SETTINGS | {"epochs": 1})
    (tmp_path / "phrases.txt").write_text("push to github\n(mute|unmute) it", encoding="utf-8")
    out = tmp_path / "mine"
    main(["words", str(tmp_path / "phrases.txt"), "--out", str(out)])
    shown = capsys.readouterr().out
    assert f"utils live --model {out}/model.safetensors" in shown
    assert (
        f"recording.wav --model {out}/model.safetensors" in shown
        and "Word error rate on 6 clips" in shown
    )
    results = json.loads((out / "results.json").read_text())
    assert results["phrases"] == 3 and 0 <= results["wer"] and 0 <= results["rejected"] <= 1
    rows = {split: load_clips(out / "speech", split) for split in words.SPLITS}
    known = {"push to github", "mute it", "unmute it"}
    assert set(rows["train"]["text"]) == known | {"<UNK>"}
    assert set(rows["test_unseen_voices"]["text"]) <= known
    assert set(rows["test_other_words"]["text"]) == {"<UNK>"}
    assert not set(rows["train"]["speaker"]) & set(rows["test_unseen_voices"]["speaker"])


# Which value reaches which function, without a synthesiser


PHRASES = [["push to github"], ["mute it", "unmute it"]]


def spoken(monkeypatch, split, seed=0):
    """The jobs (speaker, clips, seeds, codec) of a split, and its table."""
    jobs = []

    def perform(given, pool, label):
        jobs.extend(given)
        return [(s.id if s else "none", clip) for s, clips, *_ in given for clip in clips]

    monkeypatch.setattr(words, "perform", perform)
    return jobs, words.speak(split, PHRASES, ["flite", "espeak"], seed, None)


def test_each_split_has_its_voices_its_share_and_its_sound(monkeypatch):
    """Validation has those of training, and neither of them those of the tests."""
    said, who = {}, {}
    for split in words.SPLITS:
        jobs, table = spoken(monkeypatch, split)
        said[split] = [clip for speaker, clips, *_ in jobs if speaker for clip in clips]
        who[split] = {speaker.id for speaker, *_ in jobs if speaker}
        assert table["text"].to_pylist().count("<UNK>") == sum(
            clip.unknown for _, clips, *_ in jobs for clip in clips
        )
        assert len({str(seeds) for _, _, seeds, _ in jobs}) == len(jobs)
    assert who["validation"] <= who["train"]
    assert not who["train"] & (who["test_unseen_voices"] | who["test_other_words"])
    over = {split: sum(clip.telephone for clip in clips) for split, clips in said.items()}
    assert 0 < over.pop("train") < 0.3 * len(said["train"]) and not any(over.values())
    phrases = words.CLIPS_PER_WORD * 6  # words: push to github mute it unmute
    assert sum(not clip.unknown for clip in said["train"]) == phrases
    assert sum(clip.unknown for clip in said["train"]) == words.OTHER_SHARE * phrases


def test_new_vocal_tracts_of_known_voices_are_none_of_training():
    for speaker in words.unseen_speakers(["flite"], 0):
        assert any(low <= speaker.tract <= high for low, high in voices.HELD_OUT_TRACTS)


def test_a_run_is_made_of_what_was_asked_for(monkeypatch, tmp_path):
    """The seed, the speech of both splits, the shipped weights, a new beginning."""
    made, run = [], []
    stand_in = SimpleNamespace(
        get_context=lambda kind: SimpleNamespace(Pool=lambda *_: nullcontext("pool"))
    )
    monkeypatch.setattr(words, "multiprocessing", stand_in)
    monkeypatch.setattr(words, "engines_at_hand", lambda: ["flite"])
    monkeypatch.setattr(words, "speak", lambda *given: made.append(given))
    monkeypatch.setattr(words, "write", lambda tables, split, out: list(tables))
    monkeypatch.setattr(words, "load_clips", lambda source, split: (source, split))
    monkeypatch.setattr(words, "ClipDataset", lambda table, *_: table)
    monkeypatch.setattr(
        words, "run_training", lambda *given, **named: run.append((given, named)) or [{}] * 2
    )
    monkeypatch.setattr(words, "scores", lambda model, source: {"of": [str(model), str(source)]})
    (tmp_path / "phrases.txt").write_text("push to github\n(mute|unmute) it", encoding="utf-8")
    out = tmp_path / "mine"
    results = words.teach(tmp_path / "phrases.txt", out, 7, epochs=2)
    assert made == [(split, PHRASES, ["flite"], 7, "pool") for split in words.SPLITS]
    (args, train, validation, folder), named = run[0]
    assert (args.seed, args.epochs, args.splice_share, folder) == (7, 2, 0.0, out)
    assert (train, validation) == ((out / "speech", "train"), (out / "speech", "validation"))
    assert named == {"start": DATA / "model.safetensors"}
    assert results["of"] == [str(out / "model.safetensors"), str(out / "speech")]
    assert json.loads((out / "results.json").read_text()) == results


def test_a_stopped_run_is_continued_and_any_other_begins_with_the_shipped_model(
    monkeypatch, tmp_path
):
    made, runs, stopped, path = [], [], [True], tmp_path / "phrases.txt"

    def make_speech(phrases, engines, seed, folder):
        made.append(phrases)
        folder.mkdir(exist_ok=True)

    def train(args, train, validation, out, start):
        runs.append([checkpoint.name for checkpoint in out.glob("state-*")])
        (out / "state-1.pt").touch()
        return [{}] * (args.epochs - stopped[0])

    monkeypatch.setattr(words, "engines_at_hand", lambda: ["flite"])
    monkeypatch.setattr(words, "make_speech", make_speech)
    monkeypatch.setattr(words, "load_clips", lambda source, split: None)
    monkeypatch.setattr(words, "ClipDataset", lambda *given: None)
    monkeypatch.setattr(words, "run_training", train)
    monkeypatch.setattr(words, "scores", lambda model, source: {})
    for text, seed in (("mute it", 0), ("mute it", 0), ("mute it", 1), ("go", 1), ("mute it", 0)):
        path.write_text(text, encoding="utf-8")
        assert words.teach(path, tmp_path, seed) is None
    assert runs == [[], ["state-1.pt"], [], [], []]
    assert made == [[["mute it"]], [["mute it"]], [["go"]], [["mute it"]]]
    stopped[0] = False
    for expected in (["state-1.pt"], []):  # it is completed; the next begins once more
        assert words.teach(path, tmp_path) and runs[-1] == expected
    stopped[0] = True
    assert words.teach(path, tmp_path) is None and (tmp_path / "unfinished.json").exists()
    monkeypatch.setattr(words, "make_speech", Mock(side_effect=KeyboardInterrupt))
    path.write_text("go", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):  # its speech is not taken for that of "mute it"
        words.teach(path, tmp_path)
    assert not (tmp_path / "unfinished.json").exists()


def test_another_run_is_left_alone(tmp_path, monkeypatch):
    """Its checkpoints would be deleted, and its model replaced."""
    monkeypatch.setattr(words, "engines_at_hand", lambda: ["flite"])
    monkeypatch.setattr(words, "make_speech", None)  # not called
    (tmp_path / "phrases.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "state-1.pt").touch()
    with pytest.raises(ValueError, match="cpu holds another run: choose another --out"):
        words.teach(tmp_path / "phrases.txt", tmp_path / "cpu")
    assert [path.name for path in (tmp_path / "cpu").iterdir()] == ["state-1.pt"]


def test_scores_are_of_speakers_and_of_what_was_rejected(monkeypatch):
    """Two of six phrases wrong, both by one speaker; three of four other clips without text."""
    texts = {"test_unseen_voices": ["mute it"] * 6, "test_other_words": [""] * 4}
    speakers = {"test_unseen_voices": list("aabbcc"), "test_other_words": list("abcd")}
    heard = {"test_unseen_voices": ["unmute it"] * 2 + ["mute it"] * 4,
             "test_other_words": ["mute it", "", "", ""]}  # fmt: skip

    class Clips(SimpleNamespace):
        def __len__(self):
            return len(self.texts)

    monkeypatch.setattr(words, "load_model", lambda path: (SimpleNamespace(args=None), None))
    monkeypatch.setattr(words, "load_clips", lambda source, split: split)
    monkeypatch.setattr(words, "ClipDataset", lambda table, tokenizer, args, name: Clips(
        texts=texts[name], speakers=speakers[name], name=name
    ))  # fmt: skip
    monkeypatch.setattr(words, "recognise", lambda model, clips: heard[clips.name])
    found = words.scores("model", "speech")
    assert (found["clips"], found["speakers"], found["other_clips"]) == (6, 3, 4)
    assert (found["wer"], found["rejected"]) == (round(2 / 12, 4), 0.75)
    assert found["confusions"] == [["mute it", "unmute it", 2]]
    counts = count_errors(texts["test_unseen_voices"], heard["test_unseen_voices"])
    interval = [round(edge, 4) for edge in bootstrap_interval(counts, [*"aabbcc"])]
    assert found["interval"] == interval != [round(e, 4) for e in bootstrap_interval(counts)]


def test_clips_are_recognised_in_full_scale_with_the_vocabulary_of_the_model(monkeypatch):
    seen = []

    def transcribe(model, audio, tokenizer):
        seen.append((model, audio.tolist(), tokenizer))
        return {"text": f"clip {len(seen)}"}

    monkeypatch.setattr(words, "transcribe", transcribe)
    audio = [torch.tensor([32767, 0], dtype=torch.int16), torch.tensor([-32767], dtype=torch.int16)]
    clips = SimpleNamespace(audio=audio, tokenizer="its own", name="test")
    assert words.recognise("model", clips) == ["clip 1", "clip 2"]
    assert seen == [("model", [1.0, 0.0], "its own"), ("model", [-1.0], "its own")]


def test_the_report_says_each_number_where_it_belongs(capsys):
    words.report(
        {
            "clips": 360, "speakers": 12, "wer": 0.031, "interval": [0.02, 0.045],
            "other_clips": 240, "rejected": 0.87, "minutes": [1.2, 3.4, 5.6],
            "confusions": [["mute it", "unmute it", 2]],
        },
        Path("mine", "model.safetensors"),
    )  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "Word error rate on 360 clips by 12 speakers that were not in training: "
        "3.1% (2.0% to 4.5%)",
        "  'mute it' came out as 'unmute it' (2 times)",
        "Other words: 87% of 240 clips gave no text",
        "Minutes: 1.2 for the speech, 3.4 training, 5.6 testing",
        "Recognise your voice: python -m utils live --model mine/model.safetensors",
        "Transcribe a recording: python -m utils transcribe recording.wav --model "
        "mine/model.safetensors",
    ]
