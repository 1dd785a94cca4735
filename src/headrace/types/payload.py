"""What only shells and executors see: token ids and how to draw them. No core imports this module."""

import msgspec

from headrace.types.ids import BlockHash, SequenceKey
from headrace.types.request import FinishReason, Request, Timeline


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn. Defaults draw from the unchanged distribution; `temperature=0` is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """A request without one is given one by the API, so that a failover draws the same tokens again."""
    logprobs: int | None = None
    """None: none; k: the drawn token's and the k most likely (0..20)."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    """End-of-text and stop tokens are masked before so many tokens."""
    tokens_max: int = 16
    """New tokens at most, counted from the prompt's end whatever worker draws them."""


class SequencePayload(msgspec.Struct, frozen=True):
    """Attached by the shell to the message that starts a sequence on an instance."""

    root: BlockHash
    """Root of the hash chain of this request's blocks."""
    token_ids: list[int]
    """Prompt, then what was already emitted (the history a failover resumes from)."""
    prompt: int
    """How many of them are the prompt."""
    sampling: SamplingParams
    version: int = 0
    """Of the weights that the root is of."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities under the raw distribution: the drawn token's, its rank (1 = most likely), and the most likely ones."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Emission(msgspec.Struct, frozen=True):
    """Token ids drawn for one sequence in one step, the ids behind an `Output.emitted` count."""

    key: SequenceKey
    first: int
    """Index of the first of them among the choice's new tokens (history included)."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """As many as ids when asked for, else empty."""
    weights: tuple[int, int] = (0, 0)
    """Versions: of the oldest weights whose KV it may have used, and of those that drew it."""


class Submission(msgspec.Struct, frozen=True):
    """What the API hands to the service: the request as cores see it, and its payload."""

    request: Request
    payload: SequencePayload
    salt: str = ""
    """The cache salt, for roots under other weights."""


class Chunk(msgspec.Struct, frozen=True):
    """New tokens of one choice, in order, each sent exactly once."""

    choice: int
    first: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    timeline: Timeline | None = None
    """With the first tokens, as far as it has come, and with `finish`: how this choice spent its time."""
    weights: tuple[int, int] = (0, 0)
    """As `Emission.weights`."""
