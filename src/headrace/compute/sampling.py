"""From logits to the next token of one sequence: penalties, bias, masks, temperature, filters, draw, log probabilities.

The order is vLLM's: masks and bias, penalties, temperature, then the filters (see `draw`). Log probabilities are those
of the raw distribution, before all of this.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.compute.draw import reached, uniform
from headrace.compute.ops.choice import Choice, Logits, choose
from headrace.types.payload import SamplingParams, TokenLogprobs
from headrace.types.request import FinishReason


class Token(NamedTuple):
    """One drawn token."""

    id: int
    finish: FinishReason | None
    logprobs: TokenLogprobs | None


class Sampler:
    """Draws the tokens of one sequence. Keeps of its history what penalties and limits need."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        choice: int,
        vocab: int,
        eos_token_ids: Iterable[int],
        prompt: Sequence[int],
    ):
        """`prompt`: the prompt's ids; what was already drawn follows by `append`.

        Raises ValueError if the parameters name words that the model does not have.
        """
        if unknown := [id for id in params.logit_bias if not 0 <= id < vocab]:
            raise ValueError(f"logit_bias names token {unknown[0]}, but the model has {vocab}")
        self.params = params
        self.choice = choice
        self.drawn = 0
        """Tokens of the output so far."""
        eos, stop = set(eos_token_ids), set(params.stop_token_ids)
        self._stops = stop if params.ignore_eos else stop | eos
        self._masked = np.array(sorted(id for id in stop | eos if 0 <= id < vocab), dtype=np.intp)
        self._bias_ids = np.fromiter(params.logit_bias, dtype=np.intp)
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self._seen: NDArray[np.bool_] | None = None
        self._counts: Logits | None = None
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab, dtype=np.bool_)
            self._seen[np.asarray(prompt, dtype=np.intp)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.zeros(vocab, dtype=np.float32)

    def append(self, token_ids: Sequence[int]) -> None:
        """Count tokens of the output, drawn here or elsewhere."""
        self.drawn += len(token_ids)
        if self._seen is not None:
            self._seen[np.asarray(token_ids, dtype=np.intp)] = True
        if self._counts is not None:
            np.add.at(self._counts, np.asarray(token_ids, dtype=np.intp), 1)

    def sample(self, logits: Logits) -> Token:
        """Draw the next token and count it. `logits` are left as they are.

        Raises FloatingPointError if they do not define a distribution (NaN, or nothing finite).
        """
        [token] = sample_all([self], [logits], threads=1)
        if isinstance(token, FloatingPointError):
            raise token
        return token

    def ask(self) -> Choice:
        """How the next token is drawn."""
        params = self.params
        u = uniform(params.seed, self.choice, self.drawn)
        return Choice(params.temperature, u, max(params.top_k, 0), params.top_p, params.min_p)

    def conclude(self, logits: Logits, chosen: int) -> Token:
        """Count the token drawn from these logits."""
        params = self.params
        self.append([chosen])
        finish = None
        if chosen in self._stops:
            finish = FinishReason.STOP
        elif self.drawn >= params.tokens_max:
            finish = FinishReason.LENGTH
        found = None if params.logprobs is None else logprobs(logits, chosen, params.logprobs)
        return Token(chosen, finish, found)

    def adjust(self, logits: Logits) -> Logits:
        """Logits after masks, bias and penalties: a copy if any applies."""
        params = self.params
        masks = self.drawn < params.min_tokens and len(self._masked)
        if not masks and not len(self._bias) and self._seen is None and self._counts is None:
            return logits
        logits = logits.copy()
        if masks:
            logits[self._masked] = -np.inf
        logits[self._bias_ids] += self._bias
        if self._seen is not None:
            # Keskar et al. 2019, arXiv:1909.05858
            words = np.flatnonzero(self._seen)
            penalty, found = np.float32(params.repetition_penalty), logits[words]
            logits[words] = np.where(found > 0, found / penalty, found * penalty)
        if self._counts is not None:
            words = np.flatnonzero(self._counts)
            penalty = np.float32(params.frequency_penalty) * self._counts[words]
            logits[words] -= penalty + np.float32(params.presence_penalty)
        return logits


def sample_all(
    samplers: Sequence[Sampler], logits: Sequence[Logits], *, threads: int
) -> list[Token | FloatingPointError]:
    """Draw the next token of every sequence, each from its row, and count it. `logits` are left as they are.

    A row that does not define a distribution (NaN, or nothing finite) gives an error, and nothing is counted there.
    """
    adjusted = [sampler.adjust(row) for sampler, row in zip(samplers, logits, strict=True)]
    words = choose(adjusted, [sampler.ask() for sampler in samplers], threads=threads)
    tokens: list[Token | FloatingPointError] = []
    for sampler, row, seen, word in zip(samplers, logits, adjusted, words, strict=True):
        if np.isfinite(seen[word]):
            tokens.append(sampler.conclude(row, word))
        else:
            tokens.append(FloatingPointError(f"the largest logit is {seen[word]}"))
    return tokens


def logprobs(logits: Logits, chosen: int, count: int) -> TokenLogprobs:
    """Natural logs of softmax(logits): of the chosen word, and of the `count` likeliest, ties by lower id."""
    largest = logits.max()
    normaliser = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    value = logits[chosen]
    rank = 1 + int(np.count_nonzero(logits > value)) + int(np.count_nonzero(logits[:chosen] == value))
    top = likeliest(logits, min(count, len(logits)))
    return TokenLogprobs(
        logprob=float(value) - normaliser,
        rank=rank,
        top_ids=tuple(top.tolist()),
        top_logprobs=tuple((logits[top].astype(np.float64) - normaliser).tolist()),
    )


def likeliest(logits: Logits, count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest logits, largest first, ties by lower id."""
    if not count:
        return np.empty(0, dtype=np.intp)
    candidates = np.flatnonzero(logits >= reached(logits, count))
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]
