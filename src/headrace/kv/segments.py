"""Free block ids as coalesced segments, so that a sequence's blocks are few long runs (FlowKV, section 3.2: one call per run)."""

from bisect import bisect_left, bisect_right, insort


class Segments:
    """A set of block ids, kept as disjoint, non-touching segments. Allocation is best fit, ties by lowest id."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._counts: dict[int, int] = {}
        self._sizes: list[tuple[int, int]] = []
        self.total = 0
        """Blocks in the set."""

    def runs(self) -> list[tuple[int, int]]:
        """All (first, count) segments, ascending."""
        return [(first, self._counts[first]) for first in self._starts]

    def add(self, first: int, count: int) -> None:
        """Put blocks in. None of them may be in already (a double free)."""
        assert count > 0
        at = bisect_right(self._starts, first)
        self.total += count
        if at < len(self._starts):
            following = self._starts[at]
            assert first + count <= following, f"block {following} is free twice"
            if first + count == following:
                count += self._drop(following)
        if at > 0:
            before = self._starts[at - 1]
            end = before + self._counts[before]
            assert end <= first, f"block {first} is free twice"
            if end == first:
                first, count = before, count + self._drop(before)
        insort(self._starts, first)
        self._counts[first] = count
        insort(self._sizes, (count, first))

    def remove(self, first: int, count: int) -> None:
        """Take these very blocks out. All must be in."""
        at = bisect_right(self._starts, first) - 1
        assert at >= 0, f"block {first} is not in the set"
        start = self._starts[at]
        size = self._counts[start]
        assert first + count <= start + size, f"blocks {first}..{first + count - 1} are not all in the set"
        self._drop(start)
        self.total -= size
        if first > start:
            self.add(start, first - start)
        if start + size > first + count:
            self.add(first + count, start + size - first - count)

    def take(self, count: int, near: int = -1) -> list[tuple[int, int]]:
        """Take any `count` (at most `total`) blocks out, in as few runs as may be.

        First what continues at block id `near`, then the smallest segment that fits, else the largest segments.
        """
        assert 0 <= count <= self.total
        taken: list[tuple[int, int]] = []
        if count and near in self._counts:
            taken.append(self._cut(near, count))
            count -= taken[0][1]
        while count:
            at = min(bisect_left(self._sizes, (count, -1)), len(self._sizes) - 1)
            run = self._cut(self._sizes[at][1], count)
            taken.append(run)
            count -= run[1]
        return taken

    def take_all(self) -> list[tuple[int, int]]:
        """Empty the set."""
        runs = self.runs()
        self._starts.clear()
        self._counts.clear()
        self._sizes.clear()
        self.total = 0
        return runs

    def _cut(self, start: int, count: int) -> tuple[int, int]:
        """Take up to `count` blocks off the beginning of a segment: the run."""
        size = self._counts.pop(start)
        count = min(size, count)
        at = bisect_left(self._starts, start)
        del self._sizes[bisect_left(self._sizes, (size, start))]
        self.total -= count
        if size > count:
            self._starts[at] = start + count
            self._counts[start + count] = size - count
            insort(self._sizes, (size - count, start + count))
        else:
            del self._starts[at]
        return start, count

    def _drop(self, start: int) -> int:
        count = self._counts.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._sizes[bisect_left(self._sizes, (count, start))]
        return count
