"""Train Headrace's default model on the Python standard library's own source.

    python tools/train_model.py train --minutes 72      # tokenizer and training state, into --work
    python tools/train_model.py export                  # training state -> Hugging Face checkpoint folder
    python tools/train_model.py evaluate                # held-out perplexity of the exported folder

Every random choice derives from --seed and the step number. With --steps the learning-rate schedule follows
the step count, so a run can be repeated; with --minutes it follows the clock.
"""

import argparse
import dataclasses
import math
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import evaluate_checkpoint, format_evaluation, write_checkpoint, write_model_card
from corpus import pack, sample_batch, split_line_ends, split_texts, train_tokenizer
from llama import Llama, ModelConfig, window_losses

WORK = Path("build/train")
FOLDER = Path(__file__).parents[1] / "src/headrace/assets/headrace-python-5m"


def make_optimizers(model: Llama, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (more progress per token at this scale), AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
    embedding = [p for n, p in named if "embed" in n]
    norms = [p for _, p in named if p.dim() == 1]
    groups = [{"params": embedding, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(groups, lr=args.adam_lr, betas=(0.9, 0.95), fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate_scale(progress: float, warmup: float = 0.01, decay_from: float = 0.3) -> float:
    """Fraction of the peak rate at progress in [0, 1]: linear warmup, flat, linear to zero."""
    return max(0.0, min(1.0, (progress + 1e-3) / warmup, (1.0 - progress) / (1.0 - decay_from)))


def say(line: str) -> None:
    """Print at once, so that a redirected log can be followed."""
    print(line, flush=True)


def prepare(work: Path, config: ModelConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Train and save the tokenizer; return the training and held-out token streams, each [total] uint16."""
    work.mkdir(parents=True, exist_ok=True)
    training, held_out = split_texts(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(training, config.vocab_size)
    tokenizer.save(str(work / "tokenizer.json"))
    tokens = split_line_ends(tokenizer, pack(tokenizer, training), seed)
    return torch.from_numpy(tokens), torch.from_numpy(pack(tokenizer, held_out))


def training_options(args: argparse.Namespace) -> dict[str, float]:
    """The numeric options of a run, as recorded in its state."""
    return {name: value for name, value in vars(args).items() if isinstance(value, (int, float))}


def train_step(model: nn.Module, optimizers: list, batch: tuple[Tensor, Tensor], scale: float) -> float:
    """One optimisation step at scale times the peak learning rates; returns the mean loss in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def save_state(path: Path, model: Llama, optimizers: list, done: dict, args: argparse.Namespace) -> None:
    """Write what a run needs to continue or be exported; a crash leaves no half-written file in its place."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "done": done,
        "options": {name: value for name, value in vars(args).items() if isinstance(value, (int, float))},
        "config": dataclasses.asdict(model.config),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path) -> dict:
    """A saved training state."""
    return torch.load(path, map_location="cpu", weights_only=True)


def restore(path: Path, model: Llama, optimizers: list) -> dict:
    """Load a saved state into model and optimizers; returns what the run had done."""
    state = load_state(path)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["done"]


def progress_of(done: dict, args: argparse.Namespace) -> float:
    """How far a run is, from 0 to 1, by steps or by the clock."""
    return done["step"] / args.steps if args.steps else done["seconds"] / (60 * args.minutes)


def train(args: argparse.Namespace) -> None:
    """Train until --steps or --minutes is used up, saving state regularly."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = ModelConfig()
    tokens, held_out = prepare(args.work, config, args.seed)
    model = Llama(config)
    compiled = torch.compile(model, dynamic=False)
    optimizers = make_optimizers(model, args)
    done = {"step": 0, "tokens": 0, "seconds": 0.0, "long_steps": 0}
    path = args.work / "state.pt"
    if args.resume:
        done = restore(path, model, optimizers)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} training tokens")
    started = time.monotonic() - done["seconds"]
    saved_at = time.monotonic()
    while (progress := progress_of(done, args)) < 1.0:
        long = progress >= 1.0 - args.long_part
        length = config.max_position_embeddings if long else args.length
        batch = sample_batch(tokens, done["step"], args.seed, args.batch_tokens // length, length)
        loss = train_step(compiled, optimizers, batch, learning_rate_scale(progress))
        done["step"] += 1
        done["tokens"] += batch[0].numel()
        done["long_steps"] += int(long)
        done["seconds"] = time.monotonic() - started
        if done["step"] % 50 == 0:
            say(f"{progress:6.1%}  step {done['step']}  loss {loss:.3f}  {done['tokens']:,} tokens")
        if progress_of(done, args) >= 1.0 or time.monotonic() - saved_at > 60 * args.save_minutes:
            loss = window_losses(model, held_out, args.length).mean().item()
            say(f"held-out loss {loss:.3f}, perplexity {math.exp(loss):.2f}")
            save_state(path, model, optimizers, done, args)
            saved_at = time.monotonic()


def export(args: argparse.Namespace) -> None:
    """Write the checkpoint folder, with its model card, from the latest training state."""
    state = load_state(args.work / "state.pt")
    write_checkpoint(state, args.work / "tokenizer.json", args.folder)
    print(format_evaluation(write_model_card(state, args.folder, args.note)))


def evaluate(args: argparse.Namespace) -> None:
    """Print held-out quality of the checkpoint folder."""
    result = evaluate_checkpoint(args.folder)
    print(f"{result.files} files, {result.bytes:,} bytes, {result.tokens:,} tokens held out\n")
    print(format_evaluation(result))


def parse_arguments() -> argparse.Namespace:
    """The command line; `run` is the chosen command's function."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help=train.__doc__)
    command.set_defaults(run=train)
    command.add_argument("--work", type=Path, default=WORK, help="where tokenizer and training state go")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--minutes", type=float, default=72.0)
    command.add_argument("--steps", type=int, default=0, help="train this many steps instead of --minutes")
    command.add_argument("--batch-tokens", type=int, default=4096)
    command.add_argument(
        "--length", type=int, default=512, help="sequence length of the first part of training"
    )
    command.add_argument("--long-part", type=float, default=0.2, help="last part of training, at full length")
    command.add_argument("--muon-lr", type=float, default=0.02)
    command.add_argument("--adam-lr", type=float, default=3e-3)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--save-minutes", type=float, default=5.0)
    command.add_argument("--resume", action="store_true", help="continue from the state in --work")
    command = commands.add_parser("export", help=export.__doc__)
    command.set_defaults(run=export)
    command.add_argument("--work", type=Path, default=WORK)
    command.add_argument("--folder", type=Path, default=FOLDER)
    command.add_argument("--note", default="", help="what else the model card says about the run")
    command = commands.add_parser("evaluate", help=evaluate.__doc__)
    command.set_defaults(run=evaluate)
    command.add_argument("--folder", type=Path, default=FOLDER)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.run(args)


if __name__ == "__main__":
    main()
