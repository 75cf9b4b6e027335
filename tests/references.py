"""What several test files hold against the code: a model of real shape, a hostile pickle."""

import copy
from pathlib import Path

import torch
import whisper
from whisper.model import ModelDimensions

from utils.checkpoints import external_name, full_state_dict, load_official


def openai_model(*sizes):
    """openai-whisper's model; the positions of text, which it leaves uninitialised, are zero."""
    theirs = whisper.model.Whisper(ModelDimensions(*sizes)).eval()
    torch.nn.init.zeros_(theirs.decoder.positional_embedding)
    return theirs


@torch.no_grad()
def random_tiny(vocabulary):
    """tiny in its real shape, as openai-whisper's model and as ours.

    Its weights are random, and so large that a text depends on all its sound.
    """
    torch.manual_seed(0)
    dims = ModelDimensions(80, 1500, 384, 6, 4, vocabulary, 448, 384, 6, 4)
    theirs = whisper.model.Whisper(dims).eval()
    scales = {"conv": 4, "attn": 3, "mlp": 2, "token_embedding": 3, "positional": 16}
    for name, weight in theirs.named_parameters():
        scale = next((scales[piece] for piece in scales if piece in name), 1)
        if weight.ndim > 1:  # rows of an embedding are vectors
            fan = weight.shape[1] if "embedding" in name else weight[0].numel()
            weight.normal_(std=scale * fan**-0.5)
    for block in theirs.decoder.blocks:
        block.cross_attn.out.weight *= 8  # listen
    bias = theirs.decoder.ln.bias.normal_()
    embedding, one = theirs.decoder.token_embedding.weight, bias / bias.square().sum()
    embedding[vocabulary - 1608] += 6 * one  # the end and all times: logits higher by so much
    embedding[-1501:] += 4 * one
    return theirs, load_official(theirs)


class Payload:
    """What a hostile pickle does: it runs code of its choice when it is read."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def openai_twin(ours):
    """openai-whisper's model with the weights and the alignment heads of our official model."""
    a, layers = ours.args, ours.args.no_of_decoder_layers
    audio = (a.max_t // a.stride, a.embeddings_dims, a.no_of_heads, a.no_of_encoder_layers)
    text = (a.block_size, a.embeddings_dims, a.no_of_heads, layers)
    dims = ModelDimensions(a.log_mel_features, *audio, a.tgt_vocab_size, *text)
    theirs = whisper.model.Whisper(dims)
    weights = full_state_dict(ours).items()
    theirs.load_state_dict({external_name(name, "openai"): tensor for name, tensor in weights})
    if ours.alignment_heads:
        mask = torch.zeros(layers, a.no_of_heads, dtype=torch.bool)
        mask[tuple(zip(*ours.alignment_heads, strict=True))] = True
        theirs.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return theirs.eval()


def write_openai(theirs, path):
    """Write openai-whisper's model as OpenAI publishes them, a `.pt` in half precision -> path."""
    theirs = copy.deepcopy(theirs).half()
    torch.save({"dims": vars(theirs.dims), "model_state_dict": theirs.state_dict()}, path)
    return path
