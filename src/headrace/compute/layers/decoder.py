"""The decoder: embedding, layers with a residual stream normalised before each part, final norm, LM head."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.compute.checkpoint import Weights
from headrace.compute.layers.batch import Batch
from headrace.compute.layers.rms_norm import RMSNorm
from headrace.compute.layers.rotary import Angles, Rotary
from headrace.compute.ops import PackedWeight, fixed_linear, pack
from headrace.types.kv import KVGroup


class Mixer(Protocol):
    """What lets tokens see each other: attention, or another state kept in the KV pool."""

    def __call__(self, x: Tensor, batch: Batch, angles: Angles) -> Tensor: ...


class Feed(Protocol):
    """What works on each token alone: an MLP, or experts."""

    def __call__(self, x: Tensor, batch: Batch) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    mixer_norm: RMSNorm
    mixer: Mixer
    feed_norm: RMSNorm
    feed: Feed

    def __call__(self, x: Tensor, delta: Tensor | None, batch: Batch, angles: Angles) -> Tensor:
        """The residual stream [tokens, hidden], which is added to in place, and what the layer before adds to it -> what this adds."""
        mixed = self.mixer(self.mixer_norm(x, delta, batch.threads), batch, angles)
        return self.feed(self.feed_norm(x, mixed, batch.threads), batch)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A whole model. `forward` is the only thing that the runner calls."""

    embedding: Tensor
    """[vocab, hidden]."""
    rotary: Rotary
    layers: Iterable[DecoderLayer]
    """In order. All in memory, unless the weights that it was loaded from give one at a time: then they can be walked once."""
    norm: RMSNorm
    head: PackedWeight
    groups: tuple[KVGroup, ...]
    """What `forward` expects in `Batch.groups`."""
    length: int
    """Positions 0 .. length - 1 can be computed."""

    @property
    def vocab(self) -> int:
        return self.embedding.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @torch.inference_mode()
    def forward(self, batch: Batch, layers_done: Callable[[int], None] | None = None) -> Tensor:
        """Write the KV of all tokens; return f32 logits [wanted, vocab]. Only wanted rows go through the LM head.

        `layers_done(n)` is called when the KV of the first n layers is written.
        """
        if torch.get_num_threads() != batch.threads:
            torch.set_num_threads(batch.threads)
        x = F.embedding(batch.ids, self.embedding)
        delta: Tensor | None = None
        angles = self.rotary(batch.positions)
        for done, layer in enumerate(self.layers, 1):
            delta = layer(x, delta, batch, angles)
            if layers_done is not None:
                layers_done(done)
        if not len(batch.wanted):
            return torch.empty(0, self.vocab)
        last = None if delta is None else delta.index_select(0, batch.wanted)
        x = self.norm(x.index_select(0, batch.wanted), last, batch.threads)
        return fixed_linear(x, self.head, threads=batch.threads)


def load_decoder(
    weights: Weights,
    *,
    vocab: int,
    hidden: int,
    layers: int,
    eps: float,
    tied: bool,
    rotary: Rotary,
    groups: tuple[KVGroup, ...],
    length: int,
    mixer: Callable[[int, str], Mixer],
    feed: Callable[[int, str], Feed],
) -> Decoder:
    """Compose a decoder whose tensors bear the names that Llama gave them (`model.layers.0.input_layernorm.weight`).

    `mixer` and `feed` load those parts of one layer, given its index and the prefix of its tensors' names.
    """

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weights.take(f"{name}.weight", hidden), eps)

    def layer(index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}."
        return DecoderLayer(
            norm(f"{prefix}input_layernorm"),
            mixer(index, prefix),
            norm(f"{prefix}post_attention_layernorm"),
            feed(index, prefix),
        )

    embedding = weights.take("model.embed_tokens.weight", vocab, hidden)
    # Files of tied models may hold the head too; like transformers, believe the tensor, not the flag, if they differ.
    own = any(f"lm_head.{stored}" in weights for stored in ("weight", "weight_packed", "qweight"))
    head = weights.dense("lm_head", vocab, hidden) if own or not tied else embedding
    decoder = Decoder(
        embedding=embedding,
        rotary=rotary,
        layers=weights.layers(layers, layer),
        norm=norm("model.norm"),
        head=pack(head),
        groups=groups,
        length=length,
    )
    weights.ignore("rotary_emb.inv_freq")
    weights.finish()
    return decoder
