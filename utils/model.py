import torch
from torch import nn

from utils.decoder import TextDecoder
from utils.encoder import AudioEncoder


def count_parameters(args):
    """The number of trained weights, by closed formula from the shape alone."""
    D, V, M, k = args.embeddings_dims, args.tgt_vocab_size, args.log_mel_features, args.kernel_size
    norm, attention, mlp = 2 * D, 4 * D * D + 3 * D, 2 * 4 * D * D + 5 * D
    stem = k * D * (M + D) + 2 * D
    encoder = stem + args.encoder_layers * (attention + mlp + 2 * norm) + norm
    decoder = args.no_of_decoder_layers * (2 * attention + mlp + 3 * norm) + norm
    return encoder + decoder + (V + args.block_size) * D


@torch.no_grad()
def initialise(model):
    """Starting weights with which training hears the audio early (ours: the paper gives none).

    With PyTorch's defaults the convolutions leave the sound at a tenth of the sinusoids, and
    each residual branch drowns the embeddings. Louder convolutions, quieter branches and larger
    embeddings mend that; the last norm is scaled back, so that the first guess stays uniform.
    """
    encoder, decoder = model.encoder, model.decoder
    for conv in (encoder.conv1, encoder.conv2):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        conv.weight.mul_(2)
    for name, weight in model.named_parameters():
        if name.endswith(("out.weight", "mlp.2.weight")):  # the last map of a residual branch
            weight.mul_(0.3)
    for embedding in (decoder.token_embedding.weight, decoder.positional_embedding):
        nn.init.normal_(embedding, std=1.2 * model.args.embeddings_dims**-0.5)
    decoder.ln.weight.fill_(0.25)  # logits have a standard deviation of 1.2 · 0.25 = 0.3


class Whisper(nn.Module):
    """The encoder listens, the decoder writes (paper, figure 1).

    `model(mel, tokens)`: (B, M, T), (B, S) -> logits (B, S, V). Equals openai-whisper's
    `Whisper` and transformers' `WhisperForConditionalGeneration` with the same weights.
    """

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.encoder = AudioEncoder(args)
        self.decoder = TextDecoder(args)
        initialise(self)

    @property
    def device(self):
        return self.decoder.token_embedding.weight.device

    def forward(self, mel, tokens):
        return self.decoder(tokens, self.encoder(mel))

    @torch.inference_mode()
    def greedy(self, mel, prompt, end, max_tokens=None):
        """The most probable token, again and again, until `end`: (B, M, T) -> B lists of tokens.

        `prompt` is a list of tokens that every clip starts with; it and `end` are not returned.
        """
        states = self.encoder(mel)  # (B, T // stride, D)
        cache = self.decoder.new_cache(states.shape[1])
        room = self.args.block_size - len(prompt)
        new = torch.tensor([prompt] * len(mel), device=mel.device)  # (B, len(prompt))
        done, columns = torch.zeros(len(mel), dtype=torch.bool, device=mel.device), []
        for _ in range(min(room, max_tokens or room)):
            new = self.decoder(new, states, cache)[:, -1:].argmax(dim=-1)  # (B, 1)
            columns.append(new)
            done |= new[:, 0] == end
            if done.all():
                break
        rows = torch.cat(columns, dim=1).tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]
