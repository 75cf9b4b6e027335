"""Several processes, each with a share of every batch, and data that fit no memory and no disk."""

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from datasets import concatenate_datasets
from datasets.distributed import split_dataset_by_node

from utils.data import ClipDataset, epoch_seed, load_clips
from utils.files import as_value_error
from utils.loss import SingleProcess
from utils.tokenizer import Tokenizer


@contextmanager
def process_group(args):
    """Within this block the processes of a launcher know each other; gives args with the device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield args
        return
    on_gpus = args.device.startswith("cuda")
    if on_gpus:
        args = replace(args, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(args.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    try:
        yield args
    finally:
        dist.destroy_process_group()


class Processes:
    """What the processes of a group have to say to each other; as `SingleProcess`, for several."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, *numbers):
        """Each number, summed over all processes."""
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, tensor):
        """Sum a tensor over all processes, in place."""
        dist.all_reduce(tensor)

    def gather(self, item):
        """The `item` of each process, in a list."""
        items = [None] * self.size
        dist.all_gather_object(items, item)
        return items


def current_processes():
    """The group that this process is in: `Processes`, or a `SingleProcess`."""
    return Processes() if dist.is_initialized() else SingleProcess()


def process_share(batches, processes):
    """A recipe's `batches`, of each batch the clips of this process."""

    def share(clips, epoch, args):
        whole = batches(clips, epoch, args)
        return [batch[processes.rank :: processes.size] for batch in whole]

    return share


def process_batch_size(args, processes):
    """How many clips of a batch a process of a stream reads: at least one."""
    return max(1, len(range(processes.rank, args.batch_size, processes.size)))


STREAM_START = {"round": 0, "state": None}
STREAM_VALIDATION_CLIPS = 2000


class ClipStream:
    """Clips of a `datasets.IterableDataset`, read for ever, as many at a time as an epoch needs.

    A position is the round over the data, and `datasets`' own state in it. Of several processes
    each reads other files, or other rows where the files do not divide evenly.
    """

    def __init__(self, table, tokenizer, args, processes=SingleProcess()):  # noqa: B008
        self.table, self.tokenizer, self.args = table, tokenizer, args
        self.rank, self.size = processes.rank, processes.size
        self.batch_size = process_batch_size(args, processes)
        self.pool, self.ahead = ThreadPoolExecutor(1), (None, None)

    def to(self, device):
        """The stream itself: the clips of an epoch are moved when they have been read."""
        return self

    def round_table(self, number):
        """The rows of this process in one round; the order of the files is another one each time."""
        rng, count = random.Random(epoch_seed(self.args.seed, number)), self.table.num_shards
        files = [self.table.shard(count, i) for i in rng.sample(range(count), count)]
        return split_dataset_by_node(concatenate_datasets(files), self.rank, self.size)

    def read_rows(self, position, number):
        """The next `number` rows from a position on -> rows, the position behind them."""
        rows, (turn, state) = [], (position["round"], position["state"])
        while True:
            table, before = self.round_table(turn), len(rows)
            if state:
                table.load_state_dict(state)
            rows += itertools.islice(table, number - before)
            if len(rows) == number:
                return rows, {"round": turn, "state": table.state_dict()}
            if len(rows) == before and not state:
                raise ValueError("the stream holds no clip: check its files.")
            turn, state = turn + 1, None

    def read(self, position):
        """What one epoch needs, from a position on -> `ClipDataset`, the position behind it."""
        needed, clips = self.args.stream_steps * self.batch_size, None
        advice = "check the files, the network and your access, then run again to go on"
        while clips is None or len(clips) < needed:
            with as_value_error("the stream of clips broke off", advice):
                missing = needed - (len(clips) if clips else 0)
                rows, position = self.read_rows(position, missing)
            found = ClipDataset(rows, self.tokenizer, self.args)
            clips = clips.extend(found) if clips else found
        return clips, position

    def epoch(self, position):
        """`read`, and read on in the background: the next call most likely wants what follows."""
        expected, coming = self.ahead
        clips, behind = coming.result() if expected == position else self.read(position)
        self.ahead = behind, self.pool.submit(self.read, behind)
        return clips, behind


def begin_stream_epoch(run):
    """The next clips of the stream; those of before, where a run is resumed within an epoch."""
    start = run.memory.get("stream", {}).get(run.epoch, STREAM_START)
    clips, behind = run.source.epoch(start)
    run.memory["stream"] = {run.epoch: start, run.epoch + 1: behind}
    return clips.to(run.args.device)


def stream_batches(clips, epoch, args):
    """`stream_steps` batches of an epoch's clips; empty ones before these have been read."""
    if isinstance(clips, ClipStream):
        return [[]] * args.stream_steps
    size = process_batch_size(args, current_processes())
    return clips.batches(epoch, size=size)[: args.stream_steps]


def load_stream(args, source):
    """A source of clips -> `ClipStream` to train on, `ClipDataset` to validate on."""
    tokenizer = Tokenizer.for_args(args)
    table, held_out = (load_clips(source, split, stream=True) for split in ("train", "validation"))
    rows = list(itertools.islice(held_out, STREAM_VALIDATION_CLIPS))
    stream = ClipStream(table, tokenizer, args, current_processes())
    return stream, ClipDataset(rows, tokenizer, args)
