import torch
from torch import nn

from utils.attention import KeyValueCache, MultiHeadAttention
from utils.encoder import feed_forward


class DecoderBlock(nn.Module):
    """Listen to the text so far, then to the audio, then think: three residual steps."""

    def __init__(self, args):
        super().__init__()
        width, heads = args.embeddings_dims, args.no_of_heads
        self.attn_ln = nn.LayerNorm(width)
        self.attn = MultiHeadAttention(width, heads, args.attn_dropout)
        self.cross_attn_ln = nn.LayerNorm(width)
        self.cross_attn = MultiHeadAttention(width, heads, args.attn_dropout)
        self.mlp_ln = nn.LayerNorm(width)
        self.mlp = feed_forward(width, args.hidden_dim)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, states, caches=(None, None)):
        x = x + self.dropout(self.attn(self.attn_ln(x), causal=True, cache=caches[0]))
        x = x + self.dropout(self.cross_attn(self.cross_attn_ln(x), states, cache=caches[1]))
        return x + self.dropout(self.mlp(self.mlp_ln(x)))


class TextDecoder(nn.Module):
    """Tokens so far and audio states -> logits of each next token (paper, figure 1).

    Positions are learned; the output matrix is the embedding matrix. Equals openai-whisper's
    `TextDecoder`.
    """

    def __init__(self, args):
        super().__init__()
        width = args.embeddings_dims
        self.args = args
        self.token_embedding = nn.Embedding(args.tgt_vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(args.block_size, width))
        self.blocks = nn.ModuleList(DecoderBlock(args) for _ in range(args.no_of_decoder_layers))
        self.ln = nn.LayerNorm(width)
        self.dropout = nn.Dropout(args.dropout)
        # logits = unit-variance features · embedding: small embeddings make a uniform first guess
        nn.init.normal_(self.token_embedding.weight, std=0.3 * width**-0.5)
        nn.init.normal_(self.positional_embedding, std=0.3 * width**-0.5)

    def new_cache(self, audio_positions):
        """Empty caches for one decoding: per layer one for the text, one for the audio."""
        return [
            (KeyValueCache(self.args.block_size), KeyValueCache(audio_positions))
            for _ in self.blocks
        ]

    def features(self, tokens, states, cache=None):
        """(B, S) tokens, (B, T, D) audio states -> (B, S, D), just before the output projection.

        With a cache, `tokens` are only the new ones. Raises `ValueError` past the context.
        """
        start = cache[0][0].length if cache else 0
        stop = start + tokens.shape[1]
        if stop > self.args.block_size:
            raise ValueError(
                f"the text has {stop} tokens and the context {self.args.block_size}: "
                "shorten the text or raise block_size."
            )
        x = self.token_embedding(tokens) + self.positional_embedding[start:stop]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, states, cache[i] if cache else (None, None))
        return self.ln(x)

    def logits(self, features):
        """(..., D) -> (..., V): the similarity with each token's embedding."""
        return features @ self.token_embedding.weight.T

    def forward(self, tokens, states, cache=None):
        """(B, S), (B, T, D) -> logits (B, S, V)."""
        return self.logits(self.features(tokens, states, cache))
