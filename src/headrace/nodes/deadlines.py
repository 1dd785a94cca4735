"""When requests are too late."""

from collections.abc import Container
from heapq import heappop, heappush

from headrace.types.ids import RequestId
from headrace.types.request import NEVER_NS, Request


class Deadlines:
    """Of unfinished requests; those that have ended are forgotten in passing."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, RequestId]] = []

    def add(self, request: Request) -> None:
        if request.deadline_ns < NEVER_NS:
            heappush(self._heap, (request.deadline_ns, request.id))

    def expired(self, now_ns: int) -> list[RequestId]:
        """Whose deadline has passed since this was asked last, unfinished or not."""
        late: list[RequestId] = []
        while self._heap and self._heap[0][0] <= now_ns:
            late.append(heappop(self._heap)[1])
        return late

    def due_ns(self, unfinished: Container[RequestId]) -> int:
        """The next one; 0: there is none."""
        while self._heap and self._heap[0][1] not in unfinished:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else 0
