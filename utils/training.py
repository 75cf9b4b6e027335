import argparse
import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import jiwer
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from utils.audio import log_mel_spectrogram
from utils.checkpoints import load_checkpoint, save_checkpoint, write_safely
from utils.config import ModelArgs
from utils.data import IGNORE, Clips, augment_audio, load_clips, spec_augment
from utils.model import Whisper
from utils.tokenizer import Tokenizer


def token_loss(model, states, inputs, labels, smoothing=0.0):
    """Mean cross-entropy in nats over the real tokens, selected before the output projection.

    Audio states (B, T, D), (B, S), (B, S) -> scalar. Padding costs no product with V.
    """
    features = model.decoder.features(inputs, states)  # (B, S, D)
    real = labels != IGNORE
    logits = model.decoder.logits(features[real])  # (real tokens, V)
    return F.cross_entropy(logits.float(), labels[real], label_smoothing=smoothing)


def learning_rate(step, steps, args):
    """Linear warm-up to `max_lr`, then half a cosine down to zero."""
    warm = max(1, round(args.warmup * steps))
    if step < warm:
        return args.max_lr * (step + 1) / warm
    return args.max_lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def make_optimizer(model, args):
    """AdamW with weight decay on matrices alone: biases and norms have one axis and keep theirs."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay_optim},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.max_lr, betas=(0.9, 0.98), fused=True)


def augment_strength(progress, args):
    """Nothing in the first tenth of the run, then rising to `args.augment` at three tenths."""
    return args.augment * min(1.0, max(0.0, (progress - 0.1) / 0.2))


def to_mel(audio, args, strength=0.0):
    """(B, samples) -> (B, M, T), augmented with `strength`, on the device of the audio."""
    longest = round(args.max_t * args.STRIDE_DURATION * args.sr)  # samples
    audio = augment_audio(audio, strength, longest)
    mel = log_mel_spectrogram(audio, args.log_mel_features)
    return spec_augment(mel, strength)


@torch.inference_mode()
def transcribe_clips(model, clips):
    """Greedy transcripts of all clips, batched -> references, transcripts."""
    references, transcripts = [], []
    for indices in clips.batches():
        audio, inputs, _ = clips.collate(indices)
        mel, room = to_mel(audio.to(model.device), model.args), inputs.shape[1] + 8
        rows = model.greedy(mel, clips.tokenizer.prompt, clips.tokenizer.end, room)
        references += [clips.texts[i] for i in indices]
        transcripts += [clips.tokenizer.decode(row).strip() for row in rows]
    return references, transcripts


@torch.inference_mode()
def evaluate(model, clips):
    """-> {"val_loss", "gap", "wer"}: nats per token, nats per token, share of words.

    `gap` is the loss with the audio shuffled across each batch minus the loss: a model that
    listens has a clearly positive one.
    """
    was_training = model.training
    model.eval()
    loss = shuffled = tokens = 0
    for indices in clips.batches():
        audio, inputs, labels = (t.to(model.device) for t in clips.collate(indices))
        states = model.encoder(to_mel(audio, model.args))
        real = int((labels != IGNORE).sum())
        tokens += real
        loss += real * token_loss(model, states, inputs, labels).item()
        shuffled += real * token_loss(model, states.roll(1, dims=0), inputs, labels).item()
    wer = jiwer.wer(*transcribe_clips(model, clips))
    model.train(was_training)
    return {"val_loss": loss / tokens, "gap": (shuffled - loss) / tokens, "wer": wer}


PLACE = "epoch batch step loss_sum tokens seconds history".split()


class Run:
    """A training run: model, optimiser, place in the data and history, to be saved and resumed."""

    def __init__(self, args, clips, validation, out, compile=False):
        torch.manual_seed(args.seed)
        self.args, self.clips, self.validation, self.out = args, clips, validation, Path(out)
        self.model = Whisper(args).to(args.device)
        self.encode = torch.compile(self.model.encoder) if compile else self.model.encoder
        self.optimizer = make_optimizer(self.model, args)
        self.steps = sum(len(self.batches(epoch)) for epoch in range(args.epochs))
        self.epoch = self.batch = self.step = self.tokens = 0
        self.loss_sum = self.seconds = 0.0
        self.history = []

    def batches(self, epoch):
        """The batches of one epoch; the first `curriculum` epochs take clips of 1, 1.5, 2 s."""
        short = self.args.curriculum
        return self.clips.batches(epoch, 1 + 0.5 * (3 * epoch // short) if epoch < short else None)

    @property
    def state_path(self):
        return self.out / "state.safetensors"


def save_run(run):
    """Write everything that the next step depends on, random numbers included."""
    random = [torch.get_rng_state()]
    if run.args.device.startswith("cuda"):
        random.append(torch.cuda.get_rng_state())
    place = {name: getattr(run, name) for name in PLACE}
    optimizer = list(run.optimizer.state_dict()["state"].values())
    tokenizer, more = run.clips.tokenizer, dict(place=place, random=random, optimizer=optimizer)
    save_checkpoint(run.state_path, run.model, tokenizer, **more)


def load_run(run):
    """Go back to where `save_run` was called: what follows is the same, bit for bit, on a CPU.

    Raises `ValueError` where the saved run had other settings.
    """
    model, _, state = load_checkpoint(run.state_path)
    if replace(model.args, device=run.args.device) != run.args:
        raise ValueError(
            f"{run.state_path} belongs to a run with other settings: continue with the same ones, "
            "or give this run another folder."
        )
    run.model.load_state_dict(model.state_dict())
    saved = dict(enumerate(state["optimizer"]))
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": saved})
    torch.set_rng_state(state["random"][0])
    if run.args.device.startswith("cuda") and len(state["random"]) > 1:
        torch.cuda.set_rng_state(state["random"][1])
    for name in PLACE:
        setattr(run, name, state["place"][name])


def train_step(run, indices):
    """One optimiser step on the clips `indices` -> summed loss of their tokens, their number."""
    args, progress = run.args, run.step / run.steps
    audio, inputs, labels = (t.to(args.device) for t in run.clips.collate(indices))
    mel = to_mel(audio, args, augment_strength(progress, args))
    with torch.autocast("cuda", torch.bfloat16, enabled=args.device.startswith("cuda")):
        loss = token_loss(run.model, run.encode(mel), inputs, labels, args.label_smoothing)
    if not loss.isfinite():
        raise ValueError(
            f"the loss is {loss.item()} at step {run.step}: lower max_lr and start again from "
            f"{run.state_path}, the last good state."
        )
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, run.steps, args)
    run.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
    run.optimizer.step()
    real = int((labels != IGNORE).sum())
    return real * loss.item(), real


@contextmanager
def interrupt_flag():
    """Within this block Ctrl-C only sets a flag, so that the step under way ends first."""
    pressed = []
    try:
        before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    except ValueError:  # not the main thread: nothing to catch there
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def train_epoch(run):
    """The rest of the run's epoch -> whether it was completed, not stopped by Ctrl-C."""
    run.model.train()
    batches = run.batches(run.epoch)
    bar = tqdm(batches[run.batch :], desc=f"epoch {run.epoch + 1}/{run.args.epochs}", leave=False)
    start = time.perf_counter()
    with interrupt_flag() as interrupted:
        for indices in bar:
            loss, tokens = train_step(run, indices)
            run.loss_sum, run.tokens = run.loss_sum + loss, run.tokens + tokens
            run.batch, run.step = run.batch + 1, run.step + 1
            bar.set_postfix(loss=f"{run.loss_sum / run.tokens:.3f}")
            if interrupted:
                break
    run.seconds += time.perf_counter() - start
    return run.batch == len(batches)


def end_epoch(run):
    """Validate, add a line to the history and save: the state first, then the history."""
    start = time.perf_counter()
    scores = evaluate(run.model, run.validation)
    run.seconds += time.perf_counter() - start
    row = {"epoch": run.epoch + 1, "step": run.step, "train_loss": run.loss_sum / run.tokens}
    row |= {**scores, "lr": run.optimizer.param_groups[0]["lr"], "seconds": run.seconds}
    row["uniform_loss"] = math.log(run.args.tgt_vocab_size)  # ln V: knowing nothing
    run.history.append(row)
    run.epoch, run.batch, run.tokens, run.loss_sum = run.epoch + 1, 0, 0, 0.0
    save_run(run)
    lines = "".join(json.dumps(row) + "\n" for row in run.history)
    write_safely(run.out / "history.jsonl", lines.encode())
    tqdm.write(LINE.format(**row))


LINE = (
    "epoch {epoch:3d}   train {train_loss:.3f}   validation {val_loss:.3f}   "
    "word error rate {wer:6.1%}   gap {gap:5.2f}   {seconds:5.0f} s"
)


def load_data(args, source):
    """-> clips to train on, clips to validate on; without a validation split, a tenth of all."""
    tokenizer = Tokenizer.for_args(args)
    table = load_clips(source, "train")
    try:
        held_out = load_clips(source, "validation")
    except ValueError:
        halves = table.train_test_split(test_size=0.1, seed=args.seed)
        table, held_out = halves["train"], halves["test"]
    return Clips(table, tokenizer, args), Clips(held_out, tokenizer, args)


def train(args, dataset="corpus", validation=None, out="runs/latest", resume=True, compile=False):
    """Train a model from scratch -> history, one dict an epoch; files in the folder `out`.

    `dataset`: `Clips`, or a source for `load_clips` (then `validation` is found too). With
    `resume`, an unfinished run in `out` is continued; Ctrl-C saves and stops. Writes
    `model.safetensors`, `history.jsonl` and `state.safetensors`.
    """
    if validation is None:
        dataset, validation = load_data(args, dataset)
    run = Run(args, dataset, validation, out, compile)
    if resume and run.state_path.exists():
        load_run(run)
    while run.epoch < args.epochs:
        if not train_epoch(run):
            save_run(run)
            print(f"Stopped at step {run.step} of {run.steps} and saved: run again to continue.")
            return run.history
        end_epoch(run)
    model, tokenizer = run.model, dataset.tokenizer
    save_checkpoint(run.out / "model.safetensors", model, tokenizer, history=run.history)
    return run.history


def command_line():
    """The options of `python -m utils.training`."""
    parser = argparse.ArgumentParser(description="Train a Whisper from scratch.")
    parser.add_argument("--preset", default="cpu", help="seed, cpu or an official size")
    parser.add_argument("--data", default="corpus", help="corpus, gigaspeech:xs or a folder")
    parser.add_argument("--out", default="runs/cpu", help="folder of the run")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="epochs=20 …")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    return parser


def parse_changes(pairs):
    """["epochs=20", …] -> {"epochs": 20, …}. Raises `ValueError` for unknown names."""
    names = {item.name for item in fields(ModelArgs)}
    changes = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in names:
            raise ValueError(f"unknown setting {name!r}: choose from {', '.join(sorted(names))}.")
        changes[name] = value if name == "device" else json.loads(value)
    return changes


def show_results(path, source, examples=5):
    """Print some references with their transcripts, and the word error rate of the test split."""
    model, tokenizer, _ = load_checkpoint(path)
    split = "test_unseen_voices" if source == "corpus" else "validation"
    clips = Clips(load_clips(source, split), tokenizer, model.args)
    references, transcripts = transcribe_clips(model, clips)
    for i in range(0, len(clips), max(1, len(clips) // examples)):
        print(f"  said:  {references[i]}\n  heard: {transcripts[i]}\n")
    wer = jiwer.wer(references, transcripts)
    print(f"Word error rate on {len(clips)} unseen sentences by unseen voices: {wer:.1%}")


def main(words=None):
    options = command_line().parse_args(words)
    try:
        args = ModelArgs.preset(options.preset, **parse_changes(options.set))
        print(f"Training the preset {options.preset!r} on {args.device}.")
        train(args, options.data, out=options.out, compile=options.compile)
        show_results(Path(options.out) / "model.safetensors", options.data)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
