"""What a training run does beyond the plain loop: its settings, composed into a `Recipe`."""

from functools import partial
from pathlib import Path

from utils.augment import augmented_log_mel, curriculum_batches
from utils.config import OFFICIAL_SIZES, ModelArgs
from utils.ctc import fading_ctc_loss, log_mel_with_silence, splice_and_cut
from utils.data import ClipDataset
from utils.distributed import begin_stream_epoch, current_processes, load_stream, process_group
from utils.distributed import process_share, stream_batches
from utils.graphs import GraphedForwardBackward, GraphedFunction, checkpoint_activations
from utils.graphs import compile_blocks
from utils.model import Whisper, make_ctc_head
from utils.optim import muon_and_adamw
from utils.training import Recipe, optimizer_step, train


def fine_tuning_settings(preset: str) -> dict:
    """How an official size is fine-tuned (chapter 19); nothing for our own presets."""
    if preset not in OFFICIAL_SIZES:
        return {}
    rates = {"tiny": 4e-5, "base": 2e-5}  # the larger the model, the smaller the steps
    rate = rates.get(preset.removesuffix(".en"), 1e-5)
    return dict(max_lr=rate, batch_size=16, epochs=3, linear_decay=True, augment_strength=0.2)


def build_training_model(args: ModelArgs, compile: bool = False) -> Whisper:
    """A `Whisper` with what the settings add: a CTC head, compiled blocks, recomputed activations."""
    model = Whisper(args)
    if compile:
        compile_blocks(model)
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    if args.ctc_weight:
        model.ctc_head = make_ctc_head(args)
    return model


def recipe_for(args: ModelArgs, compile: bool = False) -> Recipe:
    """The `Recipe` that the settings `args` ask for; `compile` translates the blocks.

    Of several processes, call it within `process_group`.
    """
    processes, on_gpu = current_processes(), args.device.startswith("cuda")
    parts = (
        (True, "processes", processes),
        (True, "build_model", partial(build_training_model, compile=compile)),
        (True, "batches", process_share(curriculum_batches, processes)),
        (args.use_muon, "optimizers", muon_and_adamw),
        (args.augment_strength, "features", augmented_log_mel),
        (args.cut_share, "features", log_mel_with_silence),
        (args.ctc_weight, "extra_loss", fading_ctc_loss),
        (args.splice_share or args.cut_share, "begin_epoch", splice_and_cut),
        (args.stream_steps, "load_data", load_stream),
        (args.stream_steps, "begin_epoch", begin_stream_epoch),
        (args.stream_steps, "batches", stream_batches),
        (on_gpu, "optimizer_step", GraphedFunction(optimizer_step)),
        (on_gpu and not args.gradient_checkpointing, "forward_backward", GraphedForwardBackward()),
    )
    return Recipe(**{name: part for wanted, name, part in parts if wanted})


def run_training(
    args: ModelArgs, dataset: str | Path | ClipDataset = "corpus",
    validation: ClipDataset | None = None, out: str | Path = "runs/new",
    compile: bool = False, **options,
) -> list[dict]:  # fmt: skip
    """`train` with the recipe of the settings, in each process that a launcher started -> history.

    `options` are those of `utils.training.train`: resume, watch, start.
    """
    with process_group(args) as args:
        return train(args, dataset, validation, out, recipe_for(args, compile), **options)
