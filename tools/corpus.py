"""The default model's data: the Python standard library's own source, its tokenizer and a bigram baseline."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
# Third parties' code, generated tables, reformatted documentation, and samples of broken or encoded source.
EXCLUDED_FOLDERS = (
    "site-packages",
    "encodings",
    "pydoc_data",
    "lib2to3/tests",
    "config-",
    "test/encoded_modules",
)
# Written when the interpreter was built: it holds that machine's paths and flags.
EXCLUDED_FILES = ("_sysconfigdata",)
HELD_OUT_KEY = b"headrace"
HELD_OUT_PERCENT = 2


def source_files(root: Path) -> list[tuple[str, str]]:
    """(path relative to root, text) of every usable standard library module, in path order."""
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(EXCLUDED_FOLDERS) or path.name.startswith(EXCLUDED_FILES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            files.append((name, text))
    return files


def is_held_out(name: str) -> bool:
    """Whether a file belongs to the held-out split; depends on its path alone, so it never moves."""
    digest = hashlib.blake2b(name.encode(), key=HELD_OUT_KEY, digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def split_texts(root: Path) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts) of the standard library at root."""
    files = source_files(root)
    return [t for n, t in files if not is_held_out(n)], [t for n, t in files if is_held_out(n)]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over texts; <|endoftext|> is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Token ids [total] uint16 of all texts, each one preceded by <|endoftext|>, and one at the end."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.append(end)
        ids.extend(encoding.ids)
    return np.array([*ids, end], dtype=np.uint16)


def split_table(vocab: dict[str, int], white: str) -> np.ndarray:
    """For each token id, the (white, rest) pair of ids it can be split into, [vocab, 2]; (0, 0) where it cannot.

    white is the byte-level spelling of the leading run to split off: all of it, or there is no split.
    """
    table = np.zeros((len(vocab), 2), dtype=np.uint16)
    for token, index in vocab.items():
        rest = token.removeprefix(white)
        if token.startswith(white) and rest in vocab and not rest.startswith(white):
            table[index] = vocab[white], vocab[rest]
    return table


def split_some(tokens: np.ndarray, table: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """tokens [total] uint16 with a random fraction of those that table can split written as their two parts."""
    chosen = (table[tokens, 1] != 0) & (np.random.default_rng(seed).random(len(tokens)) < fraction)
    result = np.repeat(tokens, 1 + chosen)
    first = (np.arange(len(tokens)) + np.cumsum(chosen) - chosen)[chosen]
    result[first] = table[tokens[chosen], 0]
    result[first + 1] = table[tokens[chosen], 1]
    return result


def split_line_ends(tokenizer: Tokenizer, tokens: np.ndarray, seed: int) -> np.ndarray:
    """tokens with some line breaks apart from the indentation, and some spaces from the word, that follow.

    A prompt often stops there, where the tokenizer would have merged on: the model must know how to continue.
    """
    vocab = tokenizer.get_vocab()
    for white, fraction in (("\u010a", 0.15), ("\u010a\u010a", 0.15), ("\u0120", 0.03)):
        tokens = split_some(tokens, split_table(vocab, white), fraction, seed)
    return tokens


def sample_batch(tokens: Tensor, step: int, seed: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets, both [rows, length] int64, from windows chosen by (seed, step) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator)
    window = tokens[starts + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]


def bigram_losses(training: np.ndarray, held_out: np.ndarray, vocab_size: int) -> np.ndarray:
    """Next-token losses in nats, [len(held_out) - 1], of a bigram model counted on training.

    Witten-Bell smoothing: the more different tokens were seen after a token, the more weight its unseen
    successors get, shared out by the (add-one) unigram distribution. It has no parameter to tune.
    Both streams are [total] uint16.
    """
    pairs = training[:-1].astype(np.int64) * vocab_size + training[1:]
    counts = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    unigram = np.bincount(training, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    seen, kinds = counts.sum(axis=1), np.count_nonzero(counts, axis=1)
    before, after = held_out[:-1].astype(np.int64), held_out[1:].astype(np.int64)
    # A token never followed by anything in training falls back to the unigram distribution alone.
    weight = np.maximum(kinds[before], 1)
    return -np.log((counts[before, after] + weight * unigram[after]) / (seen[before] + weight))
