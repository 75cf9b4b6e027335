"""Gives a trained model a deeper encoder, without changing what it computes.

    python data/grow.py runs/start.safetensors runs/words runs/voices runs/last

The model is the mean of the weights of the runs. Behind each block of its encoder comes a copy
whose two output maps are zero. At first, it adds nothing to the residual stream, so training goes
on from the loss of the smaller model (Chen et al. 2016, "Net2Net").
"""

import copy
import sys
from dataclasses import replace

from ship import load_mean
from torch import nn

from utils.checkpoints import save_checkpoint


def double_encoder(model):
    """Give `model` twice as many blocks in its encoder; its outputs stay as they are."""
    blocks = []
    for block in model.encoder.blocks:
        added = copy.deepcopy(block)
        for output in (added.attn.out, added.mlp[2]):
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)
        blocks += [block, added]
    model.encoder.blocks = nn.Sequential(*blocks)
    model.args = replace(model.args, no_of_encoder_layers=len(blocks))


def main(paths):
    if len(paths) < 2:
        print("give the file to write and the runs: see data/grow.py", file=sys.stderr)
        return 2
    model, tokenizer, _ = load_mean(paths[1:])
    double_encoder(model)
    save_checkpoint(paths[0], model, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
