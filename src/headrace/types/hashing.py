"""Chained block hashes: one name for a block's content and everything before it.

The root of a chain covers all that makes two KV caches differ for equal tokens: model fingerprint, weights version, KV spec, dtype,
numerics id, cache salt. Matching, transfer, migration, tiers and KV events all use the same chain.
"""

from collections.abc import Sequence
from hashlib import blake2b
from struct import pack

from headrace.types.ids import BlockHash

HASH_BYTES = 16


def chain_root(*parts: str) -> BlockHash:
    """Root of a hash chain. Each part is length-prefixed, so ("ab", "c") and ("a", "bc") differ."""
    digest = blake2b(digest_size=HASH_BYTES)
    for part in parts:
        raw = part.encode()
        digest.update(pack("<I", len(raw)) + raw)
    return BlockHash(digest.digest())


def root_of_version(root: BlockHash, version: int) -> BlockHash:
    """The root of the same chain under other weights: `version` 0 is what the service was started with."""
    return root if version == 0 else chain_root(root.hex(), "weights", str(version))


def block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of one full block: its parent's hash and its token ids (each 0..2**32-1)."""
    return BlockHash(
        blake2b(pack(f"<{len(token_ids)}I", *token_ids), key=parent, digest_size=HASH_BYTES).digest()
    )


def block_hashes(root: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """Hashes of every full block of `token_ids`, in order."""
    chain: list[BlockHash] = []
    parent = root
    for at in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(parent, token_ids[at : at + block_size])
        chain.append(parent)
    return chain
