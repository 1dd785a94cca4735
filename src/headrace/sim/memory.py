"""What stands in a pool's blocks, in simulation: one 64-bit tag per token slot and group, in place of K and V.

Each layer of a group owns some bytes of a tag, so a block of which a layer is missing is a wrong one.
A position's tag depends on its token and on the tags that the model would attend to, *as they are read back*; so does the token drawn after
it. A block that is wrong, stale, or freed while somebody still needs it therefore changes the text, and `expected_tokens` says that it did.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from struct import pack

from headrace.types.ids import BlockHash
from headrace.types.kv import KVSpec
from headrace.types.payload import SamplingParams, SequencePayload
from headrace.types.request import FinishReason

TAG = 8
"""Bytes of a tag."""
EOS = 0
VOCABULARY = 50_000
MASK = 2**64 - 1
WEIGHTS = 0xA0761D6478BD642F
"""What another version of the weights changes in a tag's making."""


class Memory:
    """The tags of one pool. It outlives the instances that map it."""

    def __init__(self, spec: KVSpec, blocks: tuple[int, ...]) -> None:
        self.spec = spec
        self.stride = spec.block_size * TAG
        self.groups = [bytearray(b"\xdd" * (count * self.stride)) for count in blocks]
        self.versions = [bytearray(count * spec.block_size) for count in blocks]
        """Of the weights that computed each tag."""

    @property
    def layers(self) -> int:
        """Of the model."""
        return sum(len(g.layers) for g in self.spec.groups)

    def copy_from(
        self,
        source: "Memory",
        group: int,
        source_first: int,
        target_first: int,
        count: int,
        layers: tuple[int, int] | None = None,
    ) -> None:
        """Whole blocks, unfilled slots too; of these layers of the group (first, end), or of all."""
        stride = self.stride
        data = source.groups[group][source_first * stride : (source_first + count) * stride]
        self._put(group, target_first * stride, data, layers)
        size = self.spec.block_size
        versions = source.versions[group][source_first * size : (source_first + count) * size]
        self.versions[group][target_first * size : (target_first + count) * size] = versions

    def block(self, group: int, number: int) -> bytes:
        """One block as it is kept elsewhere: its tags, then their versions."""
        stride, size = self.stride, self.spec.block_size
        tags = self.groups[group][number * stride : (number + 1) * stride]
        return bytes(tags + self.versions[group][number * size : (number + 1) * size])

    def fill(self, group: int, number: int, kept: bytes) -> None:
        """Put a block there that was kept elsewhere."""
        stride, size = self.stride, self.spec.block_size
        self.groups[group][number * stride : (number + 1) * stride] = kept[:stride]
        self.versions[group][number * size : (number + 1) * size] = kept[stride:]

    def read(self, group: int, table: list[int], first: int, count: int) -> "array[int]":
        """Tags of positions `first .. first+count-1` of a sequence with this block table."""
        tags = array("Q")
        if count <= 0:
            return tags
        memory, stride, size = self.groups[group], self.stride, self.spec.block_size
        low, high = first // size, (first + count - 1) // size
        raw = bytearray()
        for block in table[low : high + 1]:
            assert block >= 0, "a step reads a block that its sequence does not have"
            raw += memory[block * stride : (block + 1) * stride]
        skip = (first - low * size) * TAG
        assert len(raw) >= skip + count * TAG, "a step reads past the end of its sequence's table"
        tags.frombytes(raw[skip : skip + count * TAG])
        return tags

    def read_versions(self, group: int, table: list[int], first: int, count: int) -> bytearray:
        """Of the weights that computed the tags of these positions."""
        versions, size = self.versions[group], self.spec.block_size
        raw = bytearray()
        for block in table[first // size : -(-(first + count) // size)]:
            raw += versions[block * size : (block + 1) * size]
        return raw[first % size : first % size + count]

    def write(
        self,
        group: int,
        table: list[int],
        first: int,
        tags: "array[int]",
        layers: int | None = None,
        version: int = 0,
    ) -> None:
        """Of the group's first `layers` layers, or of all; computed by weights of this version."""
        stride, size = self.stride, self.spec.block_size
        raw = tags.tobytes()
        done = 0
        while done < len(tags):
            at, inside = divmod(first + done, size)
            count = min(size - inside, len(tags) - done)
            assert table[at] >= 0, "a step writes a block that its sequence does not have"
            offset = table[at] * stride + inside * TAG
            data = raw[done * TAG : (done + count) * TAG]
            self._put(group, offset, data, None if layers is None else (0, layers))
            slot = table[at] * size + inside
            self.versions[group][slot : slot + count] = bytes([version]) * count
            done += count

    def _put(self, group: int, offset: int, data: bytes | bytearray, layers: tuple[int, int] | None) -> None:
        memory = self.groups[group]
        if layers is None:
            memory[offset : offset + len(data)] = data
            return
        count = len(self.spec.groups[group].layers)
        for byte in range(TAG * layers[0] // count, TAG * layers[1] // count):
            memory[offset + byte : offset + len(data) : TAG] = data[byte::TAG]


def salts(root: BlockHash, groups: int) -> list[int]:
    """Where a group's chain of tags starts."""
    return [(int.from_bytes(root[:8], "little") + 0x9E3779B97F4A7C15 * (g + 1)) & MASK for g in range(groups)]


def seen_from(window: int, position: int) -> int:
    """First position that the token at `position` attends to. `window` 0: all."""
    return max(0, position - window + 1) if window else 0


def extend(
    tags: "array[int]", first: int, token_ids: list[int], window: int, salt: int, version: int = 0
) -> None:
    """Compute the tags of `token_ids`, which stand at positions `first ..`, behind those that the first of them attends to, by weights
    of this version.

    A tag mixes its token with the sum of the tags it attends to: in the order of no chunk, as attention is.
    """
    low = first - len(tags)
    total = sum(tags) + salt + version * WEIGHTS
    for position, token in enumerate(token_ids, first):
        mixed = ((total & MASK) ^ (token + position * 0xD1342543DE82EF95)) * 0xDA942042E4DD58B5 & MASK
        tag = mixed ^ (mixed >> 29)
        tags.append(tag)
        total += tag
        leaves = position + 1 - window
        if window and leaves >= 0:
            total -= tags[leaves - low]


def draw(seen: list["array[int]"], sampling: SamplingParams, choice: int, index: int) -> int:
    """The token after the tags in `seen`, one array per group; it is the choice's new token number `index`."""
    digest = blake2b(pack("<qii", sampling.seed, choice, index), digest_size=16)
    for tags in seen:
        digest.update(tags.tobytes())
    raw = digest.digest()
    ends_here = int.from_bytes(raw[8:12], "little") % 24 == 0
    if ends_here and (index >= sampling.min_tokens or sampling.ignore_eos):
        return EOS
    return 1 + int.from_bytes(raw[:8], "little") % (VOCABULARY - 1)


def finish_of(token: int, sampling: SamplingParams, index: int) -> FinishReason | None:
    """Why the choice ends with its new token number `index`, as far as an executor sees it (its core counts)."""
    if index + 1 <= sampling.min_tokens:
        return None
    stops = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
    return FinishReason.STOP if stops else None


def audit(
    tags: "array[int]", versions: bytearray, first: int, token_ids: list[int], window: int, salt: int
) -> None:
    """Tags that stand at positions `first ..`: is each what weights of its version make of its token and of the tags before it?

    Those whose window begins before `first` are taken as they are. Raises AssertionError.
    """
    for at in range(len(tags)):
        low = seen_from(window, first + at) - first
        if low >= 0:
            again = tags[low:at]
            extend(again, first + at, [token_ids[first + at]], window, salt, versions[at])
            assert again[-1] == tags[at], f"position {first + at} holds what no weights made of its prefix"


def expected_tokens(
    payload: SequencePayload,
    count: int,
    spec: KVSpec,
    choice: int = 0,
    said: Sequence[int] = (),
) -> tuple[list[int], FinishReason | None]:
    """What a lone sequence says, at most `count` new tokens, of which those in `said` are given: no blocks, no plans, no system."""
    salt = salts(payload.root, len(spec.groups))
    tags = [array("Q") for _ in spec.groups]
    new = list(said)
    token_ids = payload.token_ids[: payload.prompt] + new
    at = 0
    while len(new) < count:
        for group, g in enumerate(spec.groups):
            low = seen_from(g.window, at)
            tail = tags[group][low:]
            extend(tail, at, token_ids[at:], g.window, salt[group], payload.version)
            tags[group] = tags[group][:low] + tail
        at = len(token_ids)
        seen = [tags[i][seen_from(g.window, at - 1) :] for i, g in enumerate(spec.groups)]
        token = draw(seen, payload.sampling, choice, len(new))
        finish = finish_of(token, payload.sampling, len(new))
        new.append(token)
        token_ids.append(token)
        if finish is not None:
            return new, finish
    return new, None
