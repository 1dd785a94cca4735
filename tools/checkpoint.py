"""The default model as a Hugging Face checkpoint folder: writing, reading, evaluating and its model card."""

import dataclasses
import json
import math
import platform
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from corpus import END_OF_TEXT, HELD_OUT_PERCENT, bigram_losses, pack, split_texts
from llama import Llama, ModelConfig, generate, window_losses

PROMPTS = ("def fibonacci(n):\n", "import os\n\nclass ", "for i in range(")
# Messages are concatenated as they are: the model knows source text, not turns.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out quality of the model and of the bigram baseline; losses are mean nats per token."""

    files: int
    tokens: int
    bytes: int
    loss: float
    early_loss: float  # over the first quarter of each window's positions
    late_loss: float  # over the last quarter
    bigram_loss: float

    def bits_per_byte(self, loss: float) -> float:
        return loss * self.tokens / math.log(2) / self.bytes


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(state: dict, tokenizer_path: Path, folder: Path) -> None:
    """Write the weights of a training state in bfloat16, with configuration and tokenizer, into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    end = Tokenizer.from_file(str(tokenizer_path)).token_to_id(END_OF_TEXT)
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state["model"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it readable by its owner alone
    family = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    write_json(folder / "config.json", family | state["config"] | special)
    write_json(folder / "generation_config.json", special)
    shutil.copyfile(tokenizer_path, folder / "tokenizer.json")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": state["config"]["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def read_checkpoint(folder: Path) -> tuple[Llama, Tokenizer]:
    """The model, its bfloat16 weights widened to float32 for arithmetic, and its tokenizer."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    model = Llama(ModelConfig(**{name: value for name, value in values.items() if name in fields}))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def evaluate_checkpoint(folder: Path) -> Evaluation:
    """Score the checkpoint and a bigram model of the same tokens on the held-out files.

    The files form one stream, each preceded by <|endoftext|>, read in consecutive windows of all positions.
    """
    model, tokenizer = read_checkpoint(folder)
    training, held_out = split_texts(Path(sysconfig.get_path("stdlib")))
    stream = pack(tokenizer, held_out)
    length = model.config.max_position_embeddings
    losses = window_losses(model, torch.from_numpy(stream), length).double().numpy()
    position = np.arange(len(losses)) % length
    return Evaluation(
        files=len(held_out),
        tokens=len(losses),
        bytes=sum(len(text.encode()) for text in held_out),
        loss=losses.mean(),
        early_loss=losses[position < length // 4].mean(),
        late_loss=losses[position >= length - length // 4].mean(),
        bigram_loss=bigram_losses(pack(tokenizer, training), stream, tokenizer.get_vocab_size()).mean(),
    )


def format_evaluation(result: Evaluation) -> str:
    """A Markdown table of the model beside the bigram baseline."""
    rows = ["| | perplexity per token | bits per byte |", "|---|---|---|"]
    for name, loss in (("this model", result.loss), ("bigram baseline, same tokenizer", result.bigram_loss)):
        rows.append(f"| {name} | {math.exp(loss):.2f} | {result.bits_per_byte(loss):.3f} |")
    return "\n".join(rows)


def sample_completions(model: Llama, tokenizer: Tokenizer) -> str:
    """Markdown code blocks: PROMPTS, each with one completion at a low temperature."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    blocks = []
    for prompt in PROMPTS:
        ids = generate(model, tokenizer.encode(prompt).ids, end, count=80, temperature=0.3, seed=0)
        blocks.append(f"```python\n{prompt}{tokenizer.decode(ids).rstrip()}\n```")
    return "\n\n".join(blocks)


def write_model_card(state: dict, folder: Path, note: str) -> Evaluation:
    """Evaluate the checkpoint in folder and describe it, and the run in note, in its README.md."""
    result = evaluate_checkpoint(folder)
    model, tokenizer = read_checkpoint(folder)
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    config, options, done = state["config"], state["options"], state["done"]
    values = {
        "note": f" {note}" if note else "",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "minutes_budget": options["minutes"],
        "python": platform.python_version(),
        "percent": HELD_OUT_PERCENT,
        "minutes": f"{done['seconds'] / 60:.0f}",
        "steps": f"{done['step']:,}",
        "step_count": done["step"],
        "tokens": f"{done['tokens'] / 1e6:.1f}",
        "long_tokens": f"{done['long_steps'] * options['batch_tokens'] / 1e6:.1f}",
        "files": result.files,
        "held_out_bytes": f"{result.bytes:,}",
        "held_out_tokens": f"{result.tokens:,}",
        "early": f"{math.exp(result.early_loss):.2f}",
        "late": f"{math.exp(result.late_loss):.2f}",
        "table": format_evaluation(result),
        "samples": sample_completions(model, tokenizer),
    }
    card = template.format_map(config | options | values)  # later ones win: what was done, not what was asked
    (folder / "README.md").write_text(card, encoding="utf-8")
    return result
