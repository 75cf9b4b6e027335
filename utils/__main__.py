import argparse, sys, json
from dataclasses import fields
from pathlib import Path
from utils.config import ModelArgs
def parse_value(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
def parse_settings(pairs):
    names = {item.name for item in fields(ModelArgs)}
    changes = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in names:
            raise ValueError(f"unknown setting {name!r}: choose from {', '.join(sorted(names))}.")
        changes[name] = parse_value(value)
    return changes
def main(words=None):
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser()
    parser.add_argument("cmd"); parser.add_argument("rest", nargs="*")
    for n in "preset data out start device".split(): parser.add_argument("--"+n)
    parser.add_argument("--set", nargs="*", default=[])
    o = parser.parse_args(words)
    code = 0
    try:
        if o.cmd == "train":
            from utils.recipes import run_training
            from utils import training
            args = ModelArgs.preset(o.preset or "cpu", **parse_settings(o.set))
            out = Path(o.out or "runs/cpu")
            h = run_training(args, o.data or "corpus", out=out, start=o.start)
            code = 0 if len(h) == args.epochs else 130
            print(f"Test it: python -m utils evaluate {out}/model.safetensors --data {o.data}")
    except ValueError as p:
        print(p, file=sys.stderr); code = 2
    if code: sys.exit(code)
if __name__ == "__main__": main()
