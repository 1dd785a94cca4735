"""What every `Costs` keeps: no argument makes a step shorter, and decodes are affine in context inside a bucket, to the unit."""

from hypothesis import strategies as st

from headrace.types.costs import Costs

CHUNKS = st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 100_000)), max_size=4)
ROWS = st.integers(0, 600)
LENGTH = st.integers(1, 20_000)


def check_monotone(costs: Costs, chunks: list[tuple[int, int]], rows: int, context: int, more: int) -> None:
    """One argument more, and all else equal."""
    took = costs.step_ps(chunks, rows, context)
    assert isinstance(took, int) and took >= 0
    assert costs.step_ps(chunks, rows, context + more) >= took
    assert costs.step_ps(chunks, rows + 1, context) >= took
    assert costs.step_ps(chunks, rows + more % 64, context) >= took
    assert costs.step_ps([*chunks, (more % 2048 + 1, context)], rows, context) >= took
    for index, (tokens, before) in enumerate(chunks):
        rest = chunks[:index] + chunks[index + 1 :]
        assert costs.step_ps([*rest, (tokens + 1, before)], rows, context) >= took
        assert costs.step_ps([*rest, (tokens, before + more)], rows, context) >= took
    assert costs.transfer_ns(context + more) >= costs.transfer_ns(context) >= 0


def check_affine(costs: Costs, rows: int, context: int) -> None:
    """`decode` says what `step_ps` says, everywhere in the bucket, and the next bucket begins no lower."""
    cost = costs.decode(rows, context)
    assert cost.until > context
    last = min(cost.until - 1, context + 1_000_000)
    for at in {context, (context + last) // 2, last}:
        assert costs.step_ps((), rows, at) == cost.fixed_ps + cost.slope_ps * at
        assert costs.decode(rows, at) == cost
    if cost.until < 2**50:
        after = costs.decode(rows, cost.until)
        here = cost.fixed_ps + cost.slope_ps * cost.until
        assert after.fixed_ps + after.slope_ps * cost.until == here
