"""Learning from little speech: an auxiliary CTC loss, a length curriculum, splicing augmentation."""

import copy
import itertools
import random

import torch
import torchaudio

from utils.audio import HOP_LENGTH
from utils.data import epoch_seed, padded_length
from utils.loss import encode_clips
from utils.model import ctc_labels, ctc_losses


def ctc_loss(ctc_head, states, texts, characters):
    """CTC loss in nats per character of the whole batch: states (B, T, D), B texts -> scalar.

    A text that does not fit into T states counts nothing.
    """
    losses = ctc_losses(ctc_head, states, texts, zero_infinity=True)
    return losses.sum() / max(1, characters)


def fading_ctc_loss(model, states, batch, run):
    """`ctc_weight` times `ctc_loss`, which fades to a tenth: in the end, the decoder's loss counts."""
    weight = run.args.ctc_weight * (1 - 0.9 * run.step / run.total_steps)
    return weight * ctc_loss(model.ctc_head, states, batch.texts, batch.characters)


def curriculum_limit(epoch, args):
    """Seconds that a clip may last in this epoch: 1, 1.5 … in the first ones, then any (None)."""
    return 1 + 0.5 * epoch if epoch < args.curriculum_epochs else None


CURRICULUM_PASSES = 4  # over the short clips, in one early epoch


def curriculum_batches(clips, epoch, args):
    """The batches of an epoch; early ones take short clips, as far as there are any."""
    limit = curriculum_limit(epoch, args)
    if limit is None:
        return clips.batches(epoch)
    first, size = CURRICULUM_PASSES * epoch, max(1, args.batch_size // 2)
    orders = range(first, first + CURRICULUM_PASSES)
    short = [batch for order in orders for batch in clips.batches(order, limit, size)]
    return short or clips.batches(epoch)


def word_boundaries(log_probs, text):
    """In which states the spaces of `text` lie, on its most probable CTC alignment.

    (T, 29) -> list of ints, by torchaudio's `forced_align`; empty where there is no space, or where
    the states are too few for the text.
    """
    labels = ctc_labels(text)
    repeated = sum(a == b for a, b in itertools.pairwise(labels))  # each needs a blank between
    if " " not in text or len(labels) + repeated > len(log_probs):
        return []
    path, _ = torchaudio.functional.forced_align(log_probs[None], torch.tensor([labels]))
    pairs = itertools.pairwise([0, *path[0].tolist()])
    return [t for t, (before, label) in enumerate(pairs) if label == 1 != before]


@torch.inference_mode()
def find_boundaries(run):
    """Between which samples of each clip two words meet, by the CTC head: a list for each clip."""
    clips, size = run.source, run.args.stride * HOP_LENGTH  # samples of one state
    run.model.eval()
    boundaries = [[]] * len(clips)
    for indices in clips.batches():
        states, *_ = encode_clips(run.model, clips, indices)  # (B, T, D)
        log_probs = run.model.ctc_head(states).log_softmax(dim=-1).cpu()  # (B, T, 29)
        for i, rows in zip(indices, log_probs, strict=True):
            rows = rows[: len(clips.audio[i]) // size]
            boundaries[i] = [round((t + 0.5) * size) for t in word_boundaries(rows, clips.texts[i])]
    return boundaries


UNKNOWN_SPEAKERS = {None, "", "N/A"}
MAX_PARTNER_TRIES = 8


def splice_pair(clips, boundaries, i, j, rng):
    """The start of clip i joined to the end of clip j -> audio, text; None if of another length."""
    a, b = rng.randrange(len(boundaries[i])), rng.randrange(len(boundaries[j]))
    first, second = clips.audio[i], clips.audio[j]
    length = boundaries[i][a] + len(second) - boundaries[j][b]
    if padded_length(length, clips.args) != clips.lengths[i]:
        return None
    level = (first.float().square().mean() / second.float().square().mean().clamp(min=1)).sqrt()
    parts = first[: boundaries[i][a]].float(), level * second[boundaries[j][b] :].float()
    words = clips.texts[i].split()[: a + 1] + clips.texts[j].split()[b + 1 :]
    return torch.cat(parts).clamp(-32767, 32767).round().to(torch.int16), " ".join(words)


def splice_clips(clips, boundaries, share, seed, forbidden=()):
    """A `ClipDataset` of which about `share` are new: the start of one clip, the end of another.

    `boundaries`: for each clip the samples between its words. Both parts are of one speaker; no new
    text is among `forbidden`; padded lengths are those of `clips`.
    """
    rng, new, partners = random.Random(seed), copy.copy(clips), {}
    new.audio, new.tokens, new.texts = map(list, (clips.audio, clips.tokens, clips.texts))
    for i, speaker in enumerate(clips.speakers):
        if boundaries[i] and speaker not in UNKNOWN_SPEAKERS:
            partners.setdefault(speaker, []).append(i)
    longest = clips.args.block_size - len(clips.tokenizer.prompt)
    for i in itertools.chain(*partners.values()):
        if rng.random() >= share:
            continue
        for j in rng.choices(partners[clips.speakers[i]], k=MAX_PARTNER_TRIES):
            made = splice_pair(clips, boundaries, i, j, rng)
            tokens = clips.tokenizer.encode(made[1]) if made else []
            if made and made[1] not in forbidden and len(tokens) <= longest:
                new.audio[i], new.texts[i], new.tokens[i] = *made, tokens
                break
    return new


CTC_WARMUP_EPOCHS = 2  # after the curriculum: the CTC head learns where words end


def splice_epoch(run):
    """The clips of this epoch, `splice_share` of them spliced, once the CTC head finds boundaries."""
    args = run.args
    if run.epoch < args.curriculum_epochs + CTC_WARMUP_EPOCHS:
        return run.source
    if "boundaries" not in run.memory:
        run.memory["boundaries"] = find_boundaries(run)
    forbidden = run.source.forbidden | set(run.validation.texts)
    seed = epoch_seed(args.seed, run.epoch)
    return splice_clips(run.source, run.memory["boundaries"], args.splice_share, seed, forbidden)
