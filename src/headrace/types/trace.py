"""A workload as columns: who asks for what, and when. The same for traces from files, generated ones and recorded ones."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.types.ids import BlockHash
from headrace.types.request import Slo

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One row a request, by arrival (ascending). Columns have one length, `len(trace)`; they are int64.

    Prompt blocks have names: `hash_ids[hash_starts[i] : hash_starts[i + 1]]` are those of request i's full blocks of `block_size` tokens.
    An id names a block's content and everything before it, as `types.hashing` does. No hashes (`block_size` 0): no two requests share a
    prefix.
    """

    name: str
    """What it is, for reports: a file's name, or the generator and its settings."""
    arrival_ns: Ints
    """From the trace's begin."""
    prompt: Ints
    """Prompt length, tokens (>= 1)."""
    output: Ints
    """Tokens that come out, the last one included (>= 1)."""
    block_size: int
    hash_ids: Ints
    hash_starts: Ints
    """`len(trace) + 1` offsets into `hash_ids`."""
    follows: Ints
    """Row of the earlier turn whose prompt and output this prompt begins with; -1: none, or not known."""
    session: Ints
    """Conversation; -1: none, or not known."""
    category: Ints
    """Index into `categories`."""
    categories: tuple[str, ...]
    tenant: Ints
    """Index into `tenants`."""
    tenants: tuple[str, ...]
    priority: Ints
    """Lower runs first."""
    goal: Ints
    """Index into `goals`."""
    goals: tuple[Slo, ...]
    hidden: Ints
    """Leading output tokens that the user does not see (reasoning)."""

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def hashes(self, row: int) -> Ints:
        """Ids of the full blocks of a prompt."""
        return self.hash_ids[self.hash_starts[row] : self.hash_starts[row + 1]]

    @property
    def duration_ns(self) -> int:
        """First to last arrival."""
        return int(self.arrival_ns[-1] - self.arrival_ns[0]) if len(self) else 0


def block_name(hash_id: int, part: int = 0) -> BlockHash:
    """The 16 bytes under which cores know a trace's block. `part`: which piece of it, where their blocks are smaller than the trace's."""
    return BlockHash(int(hash_id).to_bytes(12, "little", signed=True) + part.to_bytes(4, "little"))


def make_trace(name: str, arrival_ns: Ints, prompt: Ints, output: Ints, **columns: object) -> Trace:
    """A trace from the columns that are known; the others say so (-1, or one unnamed class)."""
    rows = len(arrival_ns)
    defaults: dict[str, object] = {
        "block_size": 0,
        "hash_ids": np.zeros(0, dtype=np.int64),
        "hash_starts": np.zeros(rows + 1, dtype=np.int64),
        "follows": np.full(rows, -1, dtype=np.int64),
        "session": np.full(rows, -1, dtype=np.int64),
        "category": np.zeros(rows, dtype=np.int64),
        "categories": ("",),
        "tenant": np.zeros(rows, dtype=np.int64),
        "tenants": ("",),
        "priority": np.zeros(rows, dtype=np.int64),
        "goal": np.zeros(rows, dtype=np.int64),
        "goals": (Slo(),),
        "hidden": np.zeros(rows, dtype=np.int64),
    }
    as_ints = [np.asarray(column, dtype=np.int64) for column in (arrival_ns, prompt, output)]
    return Trace(name, *as_ints, **{**defaults, **columns})  # type: ignore[arg-type]
