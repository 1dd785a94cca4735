"""Conservative admission: nothing that it starts can ever run short."""

from hypothesis import given
from hypothesis import strategies as st

from headrace import registry
from headrace.engine.policies import FOREVER, AdmissionView, StepView
from headrace.engine.sequence import Sequence, Status
from headrace.types.messages import Role
from tests.engine.build import SIZE, sequence_of


def blocks(tokens: int) -> int:
    return -(-tokens // SIZE)


def running(n: int, prompt: int, emits_max: int, emitted: int = 0, role: Role = Role.WHOLE) -> Sequence:
    sequence = sequence_of(n, prompt, emits_max=emits_max, role=role)
    sequence.status = Status.RUNNING
    sequence.emitted = emitted
    sequence.total += emitted
    sequence.tables = [list(range(blocks(sequence.total)))]
    return sequence


def view_of(
    total: int, others: list[Sequence], candidate: Sequence, receiving: list[Sequence] | None = None
) -> AdmissionView:
    """A pool of one group in which nobody else holds anything."""
    receiving = receiving or []
    held = sum(len(s.tables[0]) for s in [*others, *receiving, candidate])
    need = blocks(candidate.total) - len(candidate.tables[0])
    return AdmissionView(others, [total - held], (total,), [need], SIZE, receiving, [], 7)


POLICY = registry.load("engine.admission", "conservative")
ROWS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 29)), max_size=6)


@given(rows=ROWS, prompt=st.integers(1, 30), emits=st.integers(1, 30), spare=st.integers(0, 40))
def test_it_admits_exactly_what_fits_at_full_length(
    rows: list[tuple[int, int, int]], prompt: int, emits: int, spare: int
):
    others = [running(n, p, e, min(done, e - 1)) for n, (p, e, done) in enumerate(rows)]
    candidate = sequence_of(99, prompt, emits_max=emits)
    total = sum(len(s.tables[0]) for s in others) + spare
    whole = sum(blocks(p + e - 1) for p, e, _ in rows) + blocks(prompt + emits - 1)
    fits_now = blocks(prompt) <= spare
    admitted = POLICY.admit(view_of(total, others, candidate), candidate)
    assert admitted == (fits_now and (not others or whole <= total))


def test_a_limit_counts_and_not_what_was_generated():
    candidate = sequence_of(9, 4, emits_max=1)
    early, late = running(1, 4, 41, 1), running(1, 4, 41, 40)
    assert POLICY.admit(view_of(12, [early], candidate), candidate)
    assert POLICY.admit(view_of(12, [late], candidate), candidate)
    assert not POLICY.admit(view_of(11, [early], candidate), candidate)


def test_what_is_received_counts_and_what_is_only_prefilled_grows_by_one():
    candidate = sequence_of(9, 4, emits_max=1)
    coming = running(1, 8, 33)
    assert not POLICY.admit(view_of(10, [], candidate, [coming]), candidate)
    assert POLICY.admit(view_of(11, [], candidate, [coming]), candidate)
    prefilled = running(2, 8, 1000, role=Role.PREFILL)
    assert POLICY.admit(view_of(4, [prefilled], candidate), candidate)


def test_what_another_holder_has_is_not_counted_on():
    other, candidate = running(1, 4, 17), sequence_of(9, 4, emits_max=1)
    view = view_of(100, [other], candidate)
    view.blocks_free = [4]
    assert not POLICY.admit(view, candidate)
    view.blocks_free = [5]
    assert POLICY.admit(view, candidate)


def test_a_handover_within_the_pool_takes_its_blocks_along():
    coming, candidate = running(1, 8, 1), sequence_of(9, 4, emits_max=1)
    coming.status, coming.tables = Status.RECEIVING, [[]]
    view = view_of(10, [], candidate, [coming])
    view.blocks_free = [1]
    assert POLICY.admit(view, candidate)


def test_a_window_that_has_passed_is_judged_by_what_fits_now():
    other, candidate = running(1, 40, 400), sequence_of(9, 4, emits_max=1)
    other.trimmed = [3]
    view = view_of(100, [other], candidate)
    view.blocks_free = [1]
    assert POLICY.admit(view, candidate)


def test_it_need_not_be_asked_while_only_decodes_run():
    """The contract of the axis holds it to this."""
    assert POLICY.horizon(StepView(0, [], [], [sequence_of(1, 4)], 8, 8)) == FOREVER
