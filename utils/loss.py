"""The loss, and what a validation measures beside it: word error rate and the shuffled-audio gap."""

import jiwer
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.audio import log_compress, mel_spectrogram
from utils.config import ModelArgs
from utils.data import IGNORE_INDEX, ClipDataset
from utils.model import greedy_generate

# %% the loss


def select_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (B, S) -> positions among the B·S that are scored, (N,), and the tokens there, (N,)."""
    flat = labels.flatten()
    positions = (flat != IGNORE_INDEX).nonzero()[:, 0]
    return positions, flat[positions]


def summed_cross_entropy(model, states, inputs, positions, targets, smoothing=0.0):
    """Cross-entropy in nats, summed over N targets: states (B, T, D), (B, S), (N,), (N,) -> 2 scalars.

    The first has smoothed labels and is minimised, the second has not and is reported. Positions are
    selected before the output projection, so that padding costs no product with V.
    """
    features = model.decoder.features(inputs, states).flatten(0, 1)  # (B·S, D)
    logits = model.decoder.logits(features[positions]).float()  # (N, V)
    plain = F.cross_entropy(logits, targets, reduction="sum")
    if not smoothing:
        return plain, plain
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing), plain


def token_loss(model, states, inputs, labels, smoothing=0.0) -> Tensor:
    """Mean cross-entropy in nats per scored token: states (B, T, D), (B, S), (B, S) -> scalar."""
    positions, targets = (t.to(states.device) for t in select_targets(labels))
    loss, _ = summed_cross_entropy(model, states, inputs, positions, targets, smoothing)
    return loss / len(positions)


# %% device


def autocast(device):
    """A context in which a GPU with native bfloat16 multiplies matrices in it; elsewhere a no-op."""
    native = str(device).startswith("cuda") and torch.cuda.is_bf16_supported(False)  # not emulated
    return torch.autocast("cuda", torch.bfloat16, enabled=native)


def to_device(tensor: Tensor, device) -> Tensor:
    """Copy to `device`; to a GPU from pinned memory, without waiting for the copy to end."""
    if str(device).startswith("cuda") and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def training_log_mel(audio: Tensor, args: ModelArgs, progress: float = 0.0) -> Tensor:
    """Audio (B, samples) -> log-mel (B, M, T), the same at each `progress` of a run (0 to 1)."""
    return log_compress(mel_spectrogram(audio, args.log_mel_features))


# %% validation


class SingleProcess:
    """A run in one process; chapter 21 has the same for several."""

    rank, size = 0, 1

    def sum(self, *numbers):
        """Each number, summed over all processes."""
        return numbers

    def sum_tensor(self, tensor):
        """Sum a tensor over all processes, in place."""

    def gather(self, item):
        """The `item` of each process, in a list."""
        return [item]


def encode_clips(model, clips: ClipDataset, indices) -> tuple[Tensor, Tensor, Tensor]:
    """Clips `indices` -> encoder states (B, T, D), inputs (B, S), labels (B, S)."""
    audio, inputs, labels = (to_device(t, model.device) for t in clips.collate(indices))
    return model.encoder(training_log_mel(audio, model.args)), inputs, labels


def greedy_transcripts(model, tokenizer, states: Tensor, longest: int) -> list[str]:
    """Greedy transcripts of about `longest` tokens at most: states (B, T, D) -> B texts."""
    rows = greedy_generate(model, states, tokenizer.prompt, tokenizer.end, longest + 8)
    return [tokenizer.decode(row).strip() for row in rows]


def shuffled_audio_losses(model, states, inputs, labels) -> tuple[int, float, float]:
    """-> number of tokens, loss, and loss with the audio of the next clip, of one batch.

    States (B, T, D), (B, S), (B, S) on the model's device; losses in nats per token.
    """
    tokens = int((labels != IGNORE_INDEX).sum())
    loss = token_loss(model, states, inputs, labels).item()
    return tokens, loss, token_loss(model, states.roll(1, dims=0), inputs, labels).item()


@torch.inference_mode()
def validate(model, clips: ClipDataset, processes=SingleProcess()) -> dict:  # noqa: B008
    """-> {"val_loss", "gap", "wer"}: nats per token, nats per token, share of words.

    `gap` is the loss with the audio shuffled across each batch minus the loss: clearly positive for
    a model that attends to the audio. Batches are four times as large as in training.
    """
    was_training = model.training
    model.eval()
    totals, references, hypotheses = torch.zeros(3, dtype=torch.float64), [], []
    size = 4 * (clips.args.micro_batch_size or clips.args.batch_size)
    for indices in clips.batches(size=size)[processes.rank :: processes.size]:
        with autocast(model.device):
            states, inputs, labels = encode_clips(model, clips, indices)
            tokens, right, wrong = shuffled_audio_losses(model, states, inputs, labels)
            hypotheses += greedy_transcripts(model, clips.tokenizer, states, inputs.shape[1])
        references += [clips.texts[i] for i in indices]
        totals += torch.tensor([tokens, tokens * right, tokens * wrong], dtype=torch.float64)
    model.train(was_training)
    tokens, loss, shuffled = processes.sum(*totals.tolist())
    parts = zip(*processes.gather((references, hypotheses)), strict=True)
    wer = jiwer.wer(*(sum(part, []) for part in parts))
    return {"val_loss": loss / tokens, "gap": (shuffled - loss) / tokens, "wer": wer}
