"""Fits a speller to a model that has none, and leaves all its other weights as they are.

    python data/speller.py data/model.safetensors

The speller reads letters off the encoder's states, and in a beam search it has a say (chapters 09
and 11). Training with `spelling` makes one; this is for a model that was trained without, or whose
speller was not kept. Three passes over the training split of the embedded corpus, augmented; about
a minute on one core. The file is written anew.
"""

import sys

import torch
from tqdm import tqdm

from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.data import Clips, load_clips
from utils.training import make_speller, spelling_loss, to_mel

EPOCHS, RATE, AUGMENT = 3, 1e-2, 0.9


def fit(model, clips, seed=0):
    """Give `model` a speller that was trained on `clips` -> its loss in the end, in nats."""
    torch.manual_seed(seed)
    speller, losses = make_speller(model.args).to(model.device), []
    optimizer = torch.optim.Adam(speller.parameters())
    batches = [batch for epoch in range(EPOCHS) for batch in clips.batches(epoch)]
    for step, indices in enumerate(tqdm(batches, leave=False)):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / len(batches))
        audio, *_ = clips.collate(indices)
        with torch.no_grad():
            states = model.encoder(to_mel(audio.to(model.device), model.args, AUGMENT))
        loss = spelling_loss(speller, states, [clips.texts[i] for i in indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.speller = speller
    return sum(losses[-50:]) / len(losses[-50:])


def main(words):
    try:
        if len(words) != 1:
            raise ValueError("give the model: python data/speller.py data/model.safetensors")
        model, tokenizer, extra = load_checkpoint(words[0])
        if model.speller is not None:
            raise ValueError(f"{words[0]} has a speller already: there is nothing to do.")
        clips = Clips(load_clips("corpus", "train"), tokenizer, model.args)
        loss = fit(model, clips)
        save_checkpoint(words[0], model, tokenizer, **extra)
        print(f"{words[0]} has a speller now: {loss:.2f} nats a letter on augmented clips")
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
