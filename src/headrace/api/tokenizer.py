"""Text to token ids and back, from a checkpoint's own files: `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`.

`tokenizers` does the work; what `transformers` adds on top (which tokens begin and end a text, chat templates) is read here, because
importing it costs seconds and gigabytes.
"""

import json
from pathlib import Path
from typing import Any, Self

import msgspec
from tokenizers import Tokenizer as RustTokenizer

from headrace.api.chat import ChatTemplate
from headrace.types.errors import CheckpointError, ConfigError

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class SamplingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """Sampling that the checkpoint recommends (`generation_config.json`); None: it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's spelling of bytes: printable Latin-1 stands for itself, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if there is no such file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def token_string(value: Any) -> str | None:
    """A special token as configurations write it: a string, or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def as_ids(value: Any) -> list[int]:
    """`eos_token_id` is a number, a list of numbers, or absent."""
    return [value] if isinstance(value, int) else [i for i in value or [] if isinstance(i, int)]


def template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """The checkpoint's chat template: its own file, or a string or list of named ones in `tokenizer_config.json`."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


class Tokenizer:
    """One checkpoint's tokenizer. Safe to use from several threads."""

    def __init__(
        self,
        rust: RustTokenizer,
        *,
        tokens: dict[str, str] | None = None,
        eos_ids: tuple[int, ...] = (),
        add_bos: bool | None = None,
        template: str | None = None,
        defaults: SamplingDefaults | None = None,
    ) -> None:
        # Settings of training time; serving must neither cut nor fill a prompt.
        rust.no_truncation()
        rust.no_padding()
        self._rust = rust
        tokens = tokens or {}
        bos, eos = tokens.get("bos_token"), tokens.get("eos_token")
        self.bos_id = rust.token_to_id(bos) if bos else None
        eos_id = rust.token_to_id(eos) if eos else None
        self.eos_ids = tuple(sorted({*eos_ids, *([] if eos_id is None else [eos_id])}))
        self._add_bos = add_bos
        self.special_ids = frozenset(
            i for i, token in rust.get_added_tokens_decoder().items() if token.special
        )
        self.defaults = defaults or SamplingDefaults()
        self.chat = ChatTemplate(template, tokens) if template else None
        self.token_chars_max = max((len(token) for token in rust.get_vocab()), default=1)
        """No token stands for more characters of a prompt (a normalizer that shortens text aside)."""
        decoder = json.loads(rust.to_str()).get("decoder") or {}
        kinds = {part.get("type") for part in [decoder, *decoder.get("decoders", [])]}
        self._alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        self.fallback_bytes = (
            {rust.token_to_id(f"<0x{b:02X}>"): b for b in range(256)} if "ByteFallback" in kinds else {}
        )
        """Tokens that stand for one byte of a character the vocabulary does not have."""
        self.fallback_bytes.pop(None, None)

    @classmethod
    def load(cls, folder: Path, chat_template: Path | None = None) -> Self:
        """From a checkpoint's folder; `chat_template` is a file to use in place of its own.

        Raises CheckpointError, ConfigError.
        """
        file = folder / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"{file} is missing: only checkpoints with a fast tokenizer can be served")
        try:
            rust = RustTokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        config = read_json(folder / "tokenizer_config.json")
        named = read_json(folder / "special_tokens_map.json") | config
        generation = read_json(folder / "generation_config.json")
        model = read_json(folder / "config.json")
        tokens = {name: text for name in TOKEN_NAMES if (text := token_string(named.get(name))) is not None}
        try:
            defaults = msgspec.convert(generation, SamplingDefaults)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{folder / 'generation_config.json'}: {error}") from error
        if chat_template is not None and not chat_template.is_file():
            raise ConfigError(f"--chat-template {chat_template} is no file")
        return cls(
            rust,
            tokens=tokens,
            eos_ids=tuple(as_ids(generation.get("eos_token_id", model.get("eos_token_id")))),
            add_bos=config.get("add_bos_token"),
            template=chat_template.read_text() if chat_template else template_source(folder, config),
            defaults=defaults,
        )

    @property
    def size(self) -> int:
        """Tokens known, added ones included."""
        return self._rust.get_vocab_size()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, begun as the checkpoint wants texts begun."""
        ids = self._encode(text, special)
        if special and self.bos_id is not None:
            if self._add_bos is True and ids[:1] != [self.bos_id]:
                return [self.bos_id, *ids]
            if self._add_bos is False and ids[:1] == [self.bos_id]:
                return self._encode(text, special=False)
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        # `encode` would keep the GIL, and count characters that nobody asks for.
        return self._rust.encode_batch_fast([text], add_special_tokens=special)[0].ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of `ids` as a whole. Bytes that are no UTF-8 become U+FFFD."""
        return self._rust.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, which may be part of a character. Ids beyond the vocabulary stand for nothing."""
        token = self._rust.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.special_ids:
            return token.encode()
        if self._alphabet is not None:
            known = [self._alphabet.get(char) for char in token]
            return bytes(byte for byte in known if byte is not None) if None not in known else token.encode()
        if token_id in self.fallback_bytes:
            return bytes([self.fallback_bytes[token_id]])
        return token.replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """One token as logprobs show it: its text, or as OpenAI does `bytes:\\xe4\\xbd` for a part of a character."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
