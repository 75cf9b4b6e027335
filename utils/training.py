"""Training: one plain loop, with everything else handed in as a `Recipe`."""

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm as text_bar
from tqdm.auto import tqdm

from utils.checkpoints import check_tensors, load_checkpoint, save_checkpoint
from utils.config import ModelArgs
from utils.data import ClipDataset, load_splits
from utils.files import as_value_error, check_device_works, explain_failures
from utils.files import graceful_interrupt, write_atomic
from utils.loss import SingleProcess, autocast, select_targets, summed_cross_entropy
from utils.loss import to_device, training_log_mel, validate
from utils.model import Whisper

# %% optimiser and schedule


def adamw(model: Whisper, args: ModelArgs) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019), with weight decay on matrices alone."""
    weights = list(model.parameters())
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": args.weight_decay_optim},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = dict(fused=True, capturable=args.device.startswith("cuda"))
    return [torch.optim.AdamW(groups, lr=args.max_lr, betas=(0.9, 0.98), **options)]


def learning_rate(step: int, steps: int, args: ModelArgs) -> float:
    """Linear warm-up to `max_lr`, then half a cosine, or a straight line, down to zero."""
    warm = max(1, round(args.warmup_ratio * steps))
    if step < warm:
        return args.max_lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    left = 1 - done if args.linear_decay else (1 + math.cos(math.pi * done)) / 2
    return args.max_lr * left


# %% a batch


@dataclass
class Batch:
    """A batch, or a part of one, on the device."""

    mel: Tensor  # (B, M, T), log-mel
    inputs: Tensor  # (B, S), tokens
    positions: Tensor  # (N,), which of the B·S positions are scored
    targets: Tensor  # (N,), the tokens there
    texts: list  # B transcripts
    tokens: float  # scored in the whole batch: what its loss is divided by
    characters: float  # of the whole batch


def prepare_batch(run, indices, tokens, characters) -> Batch:
    """Clips `indices` of a run -> a `Batch` on its device."""
    audio, inputs, labels = run.clips.collate(indices)
    device = run.args.device
    mel = run.recipe.features(to_device(audio, device), run.args, run.step / run.total_steps)
    rest = [to_device(t, device) for t in (inputs, *select_targets(labels))]
    return Batch(mel, *rest, [run.clips.texts[i] for i in indices], tokens, characters)


def count_targets(clips: ClipDataset, indices) -> tuple[int, int]:
    """How many tokens (with the end of each text) and how many characters the clips have."""
    tokens = sum(len(clips.tokens[i]) + 1 for i in indices)
    return tokens, sum(len(clips.texts[i]) for i in indices)


def micro_batches(indices: list, args: ModelArgs) -> list[list]:
    """The parts of a batch whose gradients are accumulated one after another."""
    size = args.micro_batch_size or max(1, len(indices))
    return [indices[start : start + size] for start in range(0, len(indices), size)]


# %% one step


def forward_backward(run, batch: Batch) -> Tensor:
    """Add the gradient of a batch, or of a part -> its summed loss in nats, a scalar tensor."""
    model, extra = run.model, run.recipe.extra_loss
    with autocast(run.args.device):
        states = model.encoder(batch.mel)  # (B, T, D)
        scored = batch.inputs, batch.positions, batch.targets
        smoothed, loss = summed_cross_entropy(model, states, *scored, run.args.label_smoothing)
        objective = smoothed / batch.tokens
        if extra:
            objective = objective + extra(model, states, batch, run)
    objective.backward()
    return loss.detach()


def flatten_gradients(model) -> Tensor:
    """One vector: the gradients of all weights (each `p.grad` is a view of it), then one number."""
    weights = list(model.parameters())
    sizes = [p.numel() for p in weights]
    flat = torch.zeros(sum(sizes) + 1, device=weights[0].device)
    for p, part in zip(weights, flat[:-1].split(sizes), strict=True):
        p.grad = part.view_as(p)
    return flat


def optimizer_step(run):
    """Clip the gradient to `max_grad_norm` and move the weights.

    Where loss or gradient are not finite, no weight moves and the loss becomes NaN.
    """
    gradient, loss = run.flat[:-1], run.flat[-1]
    norm = gradient.norm()
    gradient *= (run.args.max_grad_norm / (norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_ does
    broken = ~(norm + loss).isfinite()
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = run.lr
        optimizer.found_inf = broken.float()  # where it is 1, a step does nothing
        optimizer.step()
    loss.masked_fill_(broken, math.nan)


def train_step(run, indices) -> tuple[Tensor, int]:
    """One optimiser step on clips `indices` -> summed loss (NaN: no weight moved), number of tokens."""
    counts = run.recipe.processes.sum(*count_targets(run.clips, indices))
    run.flat.zero_()
    for part in micro_batches(indices, run.args):
        run.flat[-1] += run.recipe.forward_backward(run, prepare_batch(run, part, *counts))
    run.recipe.processes.sum_tensor(run.flat)  # gradients and loss
    run.lr.fill_(learning_rate(run.step, run.total_steps, run.args))
    run.recipe.optimizer_step(run)
    return run.flat[-1].clone(), int(counts[0])


# %% recipe and run


def shuffled_buckets(clips, epoch, args):
    """The batches of an epoch: clips of similar length together, in random order."""
    return clips.batches(epoch)


def same_clips(run):
    """What is learnt in this epoch: all clips as they were recorded."""
    return run.source


@dataclass(frozen=True)
class Recipe:
    """What a run does. The default is the plain loop; `utils.recipes` composes the others."""

    load_data: Callable = load_splits  # (args, source) -> clips, validation
    build_model: Callable = Whisper  # (args) -> model
    optimizers: Callable = adamw  # (model, args) -> list of optimisers
    batches: Callable = shuffled_buckets  # (clips, epoch, args) -> lists of indices
    features: Callable = training_log_mel  # (audio, args, progress) -> (B, M, T)
    begin_epoch: Callable = same_clips  # (run) -> clips of this epoch
    extra_loss: Callable | None = None  # (model, states, batch, run) -> scalar
    forward_backward: Callable = forward_backward  # (run, batch) -> summed loss, gradients added
    optimizer_step: Callable = optimizer_step  # (run) moves the weights
    processes: SingleProcess = SingleProcess()


class Run:
    """A training run: all that the next step depends on.

    `model`, `optimizers`, `lr` (of this step), `flat` (gradients and loss); `source`, the clips as
    recorded, `clips` of this epoch, `validation`; `epoch`, `batch` in it, `step` of `total_steps`;
    `loss_sum` and `tokens` of the epoch so far; `history`, one dict an epoch, `seconds` of training;
    `memory`, what parts of the recipe keep; `out`, the folder.
    """

    def __init__(self, args, clips, validation, out, recipe=Recipe()):
        torch.manual_seed(args.seed)
        self.args, self.recipe, self.out, self.tokenizer = args, recipe, Path(out), clips.tokenizer
        self.clips = self.source = clips.to(args.device)
        self.validation = validation.to(args.device)
        self.model = recipe.build_model(args).to(args.device)
        self.model.decoder.token_embedding.sparse = args.device == "cpu"  # a GPU would have to wait
        self.optimizers, self.flat = (
            recipe.optimizers(self.model, args),
            flatten_gradients(self.model),
        )
        self.lr = torch.zeros((), device=args.device)
        self.epoch = self.batch = self.step = self.tokens = 0
        self.loss_sum, self.seconds, self.history, self.memory = 0.0, 0.0, [], {}
        self.total_steps = sum(len(self.batches(epoch)) for epoch in range(args.epochs))
        self.clock = self.saved = time.perf_counter()
        torch.manual_seed(args.seed + 1 + recipe.processes.rank)  # each draws its own augmentation

    def batches(self, epoch):
        """The batches of an epoch, lists of indices of `clips`."""
        return self.recipe.batches(self.clips, epoch, self.args)


# %% save and resume

PROGRESS_FIELDS = "epoch batch step loss_sum tokens seconds history".split()
CHANGEABLE_SETTINGS = "device micro_batch_size gradient_checkpointing save_minutes".split()


def check_finite(run, loss):
    """Raises `ValueError` where a loss or a gradient was not finite."""
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss or its gradient is not finite any more at step {run.step}: "
            "train again with a lower max_lr, into another folder."
        )


def rng_states(device: str) -> list[Tensor]:
    """The states of PyTorch's random generators: the CPU's, and the GPU's where that one trains."""
    gpu = [torch.cuda.get_rng_state(device)] if device.startswith("cuda") else []
    return [torch.get_rng_state(), *gpu]


def list_checkpoints(out) -> list[Path]:
    """The checkpoints in the folder of a run, the newest last."""
    return sorted(Path(out).glob("state-*.pt"))


def save_state(run):
    """Write all that the next step depends on; the last two checkpoints are kept."""
    check_finite(run, run.loss_sum)
    now = time.perf_counter()
    run.seconds, run.clock, run.saved = run.seconds + now - run.clock, now, now
    run.loss_sum = float(run.loss_sum)
    mine = {"random": rng_states(run.args.device), "memory": run.memory}
    state = {
        "args": asdict(run.args),
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "progress": {name: getattr(run, name) for name in PROGRESS_FIELDS},
        "processes": run.recipe.processes.gather(mine),
    }
    if run.recipe.processes.rank == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(run.out / f"state-{run.step:08}.pt", buffer.getvalue())
        for old in list_checkpoints(run.out)[:-2]:
            old.unlink()


def latest_checkpoint(out) -> tuple[Path, dict]:
    """-> path and content of the newest checkpoint that is whole; prints which ones are not.

    Raises `ValueError` if none is. Nothing in the file is unpickled but tensors and plain values.
    """
    for path in reversed(list_checkpoints(out)):
        try:
            with as_value_error(f"{path} is not a whole checkpoint", "delete it and run again"):
                state = torch.load(path, map_location="cpu", weights_only=True)
                return path, {name: state[name] for name in STATE_FIELDS}
        except ValueError as found:
            problem = found
            print(f"{problem} Going back to the checkpoint before it.")
    raise problem


STATE_FIELDS = "args model optimizers progress processes".split()


def check_same_run(run, state, path):
    """Raises `ValueError` unless the saved `state` is one of this run."""
    saved, own = dict(state["args"]), asdict(run.args)
    for name in CHANGEABLE_SETTINGS:
        saved[name] = own[name]
    progress = state["progress"]
    done = sum(len(run.batches(epoch)) for epoch in range(progress["epoch"])) + progress["batch"]
    same = saved == own and progress.keys() == set(PROGRESS_FIELDS) and done == progress["step"]
    if not same or len(state["processes"]) != run.recipe.processes.size:
        raise ValueError(
            f"{path} belongs to a run with other settings or other data, or of another number of "
            "processes: continue with the same ones, or give this run another folder."
        )


def load_state(run):
    """Go back to where `save_state` was called: on a CPU, what follows is the same bit for bit.

    Raises `ValueError` where the saved run had other settings or other data.
    """
    path, state = latest_checkpoint(run.out)
    check_same_run(run, state, path)
    run.model.load_state_dict(state["model"])
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for name, value in state["progress"].items():
        setattr(run, name, value)
    mine = state["processes"][run.recipe.processes.rank]
    run.memory = mine["memory"]
    torch.set_rng_state(mine["random"][0])
    if run.args.device.startswith("cuda") and len(mine["random"]) > 1:
        torch.cuda.set_rng_state(mine["random"][1], run.args.device)


# %% the loop


def report_loss(run, bar):
    """Check that the loss is finite, and show it. A GPU has to be waited for."""
    check_finite(run, run.loss_sum)
    bar.set_postfix(loss=f"{float(run.loss_sum) / run.tokens:.3f}", refresh=False)


def progress_bar(run, batches):
    """A bar over the batches of this epoch that are left, drawn by the first process."""
    rank, size = run.recipe.processes.rank, run.recipe.processes.size
    bar = tqdm if size == 1 else text_bar  # a forked process cannot draw in its notebook
    style = {"leave": False, "mininterval": 1, "disable": rank > 0}
    name = f"epoch {run.epoch + 1}/{run.args.epochs}"
    return bar(batches[run.batch :], total=len(batches), initial=run.batch, desc=name, **style)


def train_epoch(run, interrupted=()) -> bool:
    """The rest of the run's epoch -> whether it was completed, not stopped by Ctrl-C."""
    run.model.train()
    batches, on_cpu = run.batches(run.epoch), not run.args.device.startswith("cuda")
    with progress_bar(run, batches) as bar:
        for indices in bar:
            loss, tokens = train_step(run, indices)
            run.loss_sum, run.tokens = run.loss_sum + loss, run.tokens + tokens
            run.batch, run.step = run.batch + 1, run.step + 1
            if on_cpu or run.step % 20 == 0:
                report_loss(run, bar)
            late = time.perf_counter() - run.saved > 60 * run.args.save_minutes
            stop, late = run.recipe.processes.sum(bool(interrupted), late)  # all together
            if late:
                save_state(run)
            if stop:
                break
    return run.batch == len(batches)


LOG_FORMAT = (
    "epoch {epoch:3d}   train {train_loss:.3f}   validation {val_loss:.3f}   "
    "word error rate {wer:6.1%}   gap {gap:5.2f}   {seconds:5.0f} s"
)


def write_history(run):
    """One line of JSON an epoch, in `history.jsonl`."""
    lines = "".join(json.dumps(row) + "\n" for row in run.history)
    write_atomic(run.out / "history.jsonl", lines.encode())


def end_epoch(run, watch=None):
    """Validate, add a line to the history and save: the state first, then the history."""
    check_finite(run, run.loss_sum)
    scores = validate(run.model, run.validation, run.recipe.processes)
    seconds = run.seconds + time.perf_counter() - run.clock
    row = {"epoch": run.epoch + 1, "step": run.step, "train_loss": float(run.loss_sum) / run.tokens}
    lr = learning_rate(run.step - 1, run.total_steps, run.args)
    row |= {
        **scores,
        "lr": lr,
        "seconds": seconds,
        "uniform_loss": math.log(run.args.tgt_vocab_size),
    }
    run.history.append(row)
    run.epoch, run.batch, run.tokens, run.loss_sum = run.epoch + 1, 0, 0, 0.0
    save_state(run)
    if run.recipe.processes.rank == 0:
        write_history(run)
        tqdm.write(LOG_FORMAT.format(**row))
        if watch:
            watch(run.history)


def finish_run(run):
    """Write the model of a complete run; of a stopped one, save the state and say so."""
    stopped = run.epoch < run.args.epochs
    if stopped:
        save_state(run)
    if run.recipe.processes.rank > 0:
        return
    if stopped:
        print(f"Stopped at step {run.step} of {run.total_steps} and saved: run again to continue.")
        return
    write_history(run)
    save_checkpoint(run.out / "model.safetensors", run.model, run.tokenizer, history=run.history)


def load_initial_weights(model, start):
    """Give `model` the weights of the model `start`. Raises `ValueError` where the shapes differ."""
    theirs = load_checkpoint(start)[0].state_dict()
    own, found = (
        {name: w for name, w in weights.items() if not name.startswith("ctc_head.")}
        for weights in (model.state_dict(), theirs)
    )
    check_tensors(own, found, start, "start with a model of the same preset and settings")
    model.load_state_dict(theirs, strict=False)  # a CTC head may be new, or not needed


def start_or_resume(run, resume, start=None):
    """Go on from a checkpoint in the run's folder, or, where none is wanted or there, begin."""
    resuming = resume and list_checkpoints(run.out)
    if run.recipe.processes.rank == 0:
        useless = [] if resuming else list_checkpoints(run.out)
        for path in [*useless, *run.out.glob("*.part")]:  # those of a run that was killed
            path.unlink()
    if resuming:
        load_state(run)
    elif start:
        load_initial_weights(run.model, start)


EXTRA_SETTINGS = "use_muon augment_strength curriculum_epochs ctc_weight splice_share".split()
EXTRA_SETTINGS += "stream_steps gradient_checkpointing".split()


def check_recipe(args, recipe):
    """Raises `ValueError` for settings that the plain loop would ignore."""
    ignored = [name for name in EXTRA_SETTINGS if getattr(args, name)]
    if recipe == Recipe() and ignored:
        raise ValueError(
            f"the plain recipe ignores {', '.join(ignored)}: set them to zero, or train with "
            "recipe=recipe_for(args) from utils.recipes."
        )


def train(
    args: ModelArgs,
    dataset="corpus",
    validation: ClipDataset | None = None,
    out: str | Path = "runs/new",
    recipe: Recipe = Recipe(),  # noqa: B008
    resume: bool = True,
    watch: Callable | None = None,
    start=None,
) -> list[dict]:
    """Train a model -> history, one dict an epoch; files in the folder `out`.

    `dataset`: a `ClipDataset`, or a source for `load_clips` (then `validation` is found too). It
    begins from scratch, or with the weights of another model, `start`. With `resume`, an unfinished
    run in `out` is continued; Ctrl-C saves and stops. `watch` is called with the history after each
    epoch. Writes `model.safetensors`, `history.jsonl` and the last two checkpoints. Raises
    `ValueError` for settings, data or a start that do not fit, and where memory or disk are full.
    """
    check_recipe(args, recipe)
    with explain_failures(args, out), graceful_interrupt() as interrupted:
        check_device_works(args.device)
        torch.backends.cudnn.allow_tf32 = False  # what is not in bfloat16 keeps all its digits
        if validation is None:
            dataset, validation = recipe.load_data(args, dataset)
        run = Run(args, dataset, validation, out, recipe)
        start_or_resume(run, resume, start)
        stop = False
        while run.epoch < args.epochs and not stop:
            run.clips = recipe.begin_epoch(run)
            if train_epoch(run, interrupted):
                end_epoch(run, watch)
            [stop] = recipe.processes.sum(bool(interrupted))
        finish_run(run)
    return run.history
