import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils.config import ModelArgs
from utils.model import Whisper
from utils.tokenizer import Tokenizer


def write_safely(path, data):
    """Write bytes so that `path` holds either the old file or the whole new one, never a half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def pack(value, tensors, name):
    """Move the tensors of a nested dict or list to `tensors`, leaving `{"tensor": name}`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {str(key): pack(item, tensors, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
    return value


def unpack(value, tensors):
    """The inverse of `pack`."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: unpack(item, tensors) for key, item in value.items()}
    return [unpack(item, tensors) for item in value] if isinstance(value, list) else value


def save_checkpoint(path, model, tokenizer=None, **extra):
    """Model, tokenizer and anything made of tensors, numbers, text, dicts and lists -> one file.

    The format is safetensors, with the rest as JSON in its header: nothing is pickled. The
    file is written under another name, synced and renamed, so it is never half there.
    """
    tensors = {f"model.{name}": t.cpu().contiguous() for name, t in model.state_dict().items()}
    header = {
        "args": json.dumps({k: v for k, v in asdict(model.args).items() if k != "device"}),
        "tokenizer": json.dumps(tokenizer.recipe if tokenizer else None),
        "extra": json.dumps(pack(extra, tensors, "extra")),
    }
    write_safely(path, save(tensors, metadata=header))


def load_checkpoint(path, device="cpu"):
    """-> model in eval mode, tokenizer (or None), extra (a dict), as they were saved.

    Raises `ValueError` for a file that is missing, cut short or not a checkpoint of ours.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"there is no checkpoint {path}: train one with `make run`, or check the path."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        args = ModelArgs(**json.loads(header["args"]))
        recipe, extra = json.loads(header["tokenizer"]), json.loads(header["extra"])
        model = Whisper(args)
        model.load_state_dict(
            {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
        )
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(
            f"{path} is not a whole checkpoint of this project ({reason}): "
            "copy it again or train anew."
        ) from problem
    tokenizer = Tokenizer.from_recipe(recipe) if recipe else None
    return model.to(device).eval(), tokenizer, unpack(extra, tensors)
