"""Make a checkpoint with random weights: the shape that benchmarks use, or a smaller one for tests of speed.

    python tools/make_model.py FOLDER [--layers 28 --hidden 1024 ...]

The defaults are Qwen3-0.6B's shape with a vocabulary of 32,000. Weights are drawn from a seeded normal distribution (0.02), norms are ones.
The tokenizer is one of bytes: text is encoded byte by byte, the words beyond these are made-up ones that only decode.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def config(options: argparse.Namespace) -> dict[str, object]:
    """config.json of a Qwen3 model with tied embeddings."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "intermediate_size": options.intermediate,
        "vocab_size": options.vocabulary,
        "max_position_embeddings": options.positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "dtype": options.dtype,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def tensors(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """All weights, by their Hugging Face names."""
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(options.seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)

    hidden, dim = options.hidden, options.head_dim
    made = {
        "model.embed_tokens.weight": matrix(options.vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
    }
    for i in range(options.layers):
        layer = f"model.layers.{i}"
        made |= {
            f"{layer}.input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{layer}.self_attn.q_norm.weight": torch.ones(dim, dtype=dtype),
            f"{layer}.self_attn.k_norm.weight": torch.ones(dim, dtype=dtype),
            f"{layer}.self_attn.q_proj.weight": matrix(options.heads * dim, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(options.kv_heads * dim, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(options.kv_heads * dim, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, options.heads * dim),
            f"{layer}.mlp.gate_proj.weight": matrix(options.intermediate, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(options.intermediate, hidden),
            f"{layer}.mlp.down_proj.weight": matrix(hidden, options.intermediate),
        }
    return made


def tokenizer(options: argparse.Namespace) -> Tokenizer:
    """Word 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *alphabet]
    if options.vocabulary < len(words):
        raise SystemExit(f"--vocabulary {options.vocabulary} is too small for bytes: at least {len(words)}")
    words += [f"<{number}>" for number in range(len(words), options.vocabulary)]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(words[:1])
    return made


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    sizes = {"hidden": 1024, "layers": 28, "heads": 16, "kv-heads": 8, "head-dim": 128, "intermediate": 3072}
    for name, size in (sizes | {"vocabulary": 32000, "positions": 4096, "seed": 0}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    words = tokenizer(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "config.json").write_text(json.dumps(config(options), indent=1) + "\n")
    words.save(str(options.folder / "tokenizer.json"))
    (options.folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}\n')
    save_file(tensors(options), options.folder / "model.safetensors", metadata={"format": "pt"})
    print(f"made {options.folder}: {sum(p.stat().st_size for p in options.folder.iterdir()) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
