"""A minimal Llama for training on CPU.

Parameter names are those of transformers' LlamaForCausalLM, so that the state dict is the checkpoint.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the Llama-family model; names follow Hugging Face's LlamaConfig."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 576
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_position_embeddings, head_dim], halves repeated as Llama expects."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.outer(torch.arange(config.max_position_embeddings), config.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to x [rows, heads, length, head_dim]."""
    low, high = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Causal softmax attention; q, k, v and the result are [rows, heads, length, head_dim].

    Up to 1,024 positions, blocks of queries meet their causal prefix of keys in plain products: compiled,
    that takes half the time of torch's fused kernel for CPUs, which wins only on longer sequences.
    """
    length = q.shape[2]
    if length > 1024:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = (q[:, :, start:end] * q.shape[-1] ** -0.5) @ k[:, :, :end].transpose(-1, -2)
        allowed = torch.arange(start, end)[:, None] >= torch.arange(end)
        weights = scores.float().masked_fill(~allowed, float("-inf")).softmax(-1).to(v.dtype)
        outputs.append(weights @ v[:, :, :end])
    return torch.cat(outputs, dim=2)


class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        q, k, v = (
            p(x).view(rows, length, -1, self.config.head_dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = causal_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Decoder with tied input and output embeddings."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Normal weights; projections onto the residual stream start at zero, so layers start as identity."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)

    def logits(self, ids: Tensor) -> Tensor:
        """Unnormalised next-token scores [rows, length, vocab] for ids [rows, length]."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, [rows * length] float32, of targets given ids, both [rows, length]."""
        logits = self.logits(ids).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), reduction="none")


@torch.no_grad()
def window_losses(model: Llama, tokens: Tensor, length: int) -> Tensor:
    """Next-token losses in nats, [total - 1] float32, over tokens [total] in windows of length."""
    losses = []
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1].long()[None]
        losses.append(model(window[:, :-1], window[:, 1:]))
    return torch.cat(losses)


@torch.no_grad()
def generate(model: Llama, ids: list[int], stop: int, count: int, temperature: float, seed: int) -> list[int]:
    """Up to count tokens after ids, ending before stop; greedy at temperature 0.

    Recomputes the whole prefix for each token: enough for a few samples.
    """
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.tensor([ids])
    for _ in range(count):
        scores = model.logits(sequence)[0, -1].float()
        if temperature == 0:
            following = scores.argmax()[None]
        else:
            following = torch.multinomial(F.softmax(scores / temperature, -1), 1, generator=generator)
        if following.item() == stop:
            break
        sequence = torch.cat((sequence, following[None]), dim=1)
    return sequence[0, len(ids) :].tolist()
