from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cost.measured import Measured
from headrace.types.draws import uniform
from headrace.types.errors import ConfigError
from headrace.types.profile import CopySample, PairSample, Profile, StepSample
from tests.cost import models
from tests.cost.properties import CHUNKS, LENGTH, ROWS, check_affine, check_monotone

START, PER_TOKEN, PER_ROW = 0.029, 0.0013, 0.0004
PER_PAIR, PER_CONTEXT = 3e-8, 3.6e-6


def truth(chunks, rows, context):
    """A two-core machine: weights are read once, then arithmetic counts."""
    tokens = rows + sum(chunk for chunk, _ in chunks)
    pairs = sum(chunk * before + chunk * (chunk + 1) // 2 for chunk, before in chunks)
    attention = PER_PAIR * pairs + PER_CONTEXT * context
    return START + PER_TOKEN * max(0, tokens - 16) + PER_ROW * (rows + len(chunks)) + attention


def profile(noise=0.0, **more):
    shapes = [((), rows, rows * length) for rows, length in product((1, 2, 4, 8, 16, 32), (64, 512, 1500))]
    shapes += [
        (((chunk, before),), 0, 0) for chunk, before in product((16, 64, 256, 512, 1024), (0, 512, 1024))
    ]
    shapes += [(((chunk, 0),), rows, rows * 400) for chunk, rows in product((64, 256), (1, 8))]
    steps = tuple(
        StepSample(
            prefills=chunks,
            decodes=rows,
            context=context,
            seconds=tuple(
                truth(chunks, rows, context) * (1 + noise * (uniform(7, "noise", i, k) - 0.5))
                for k in range(5)
            ),
        )
        for i, (chunks, rows, context) in enumerate(shapes)
    )
    given = {
        "model": "shape",
        "config": models.QWEN3_06B | {"vocab_size": 32000},
        "engine_version": "0",
        "device": "two cores",
        "threads": 1,
        "dtype": "bfloat16",
        "block_size": 32,
        "steps": steps,
    }
    return Profile(**(given | more))


@pytest.fixture(scope="module")
def measured():
    return Measured(profile(noise=0.1))


def test_constants_are_recovered():
    costs = Measured(profile())
    for chunks, rows, context in (
        ((), 3, 3 * 700),
        ((), 24, 24 * 900),
        (((384, 256),), 0, 0),
        (((128, 0),), 4, 4 * 300),
        (((200, 0), (100, 300)), 2, 900),
    ):
        assert costs.step_ps(chunks, rows, context) / 1e12 == pytest.approx(
            truth(chunks, rows, context), rel=0.01
        )
    slope = costs.decode(8, 8 * 500).slope_ps / 1e12
    assert slope == pytest.approx(PER_CONTEXT, rel=0.02)


def test_errors_are_those_of_the_noise(measured):
    exact, noisy = Measured(profile()).errors(), measured.errors()
    assert exact["in_sample"]["median"] < 0.003
    assert exact["held_out"]["median"] < 0.005
    assert 0.001 < noisy["held_out"]["median"] < 0.03  # medians of five draws of 5% each way
    assert noisy["in_sample"]["median"] <= noisy["held_out"]["median"]
    assert {"prefill", "decode", "mixed"} < noisy.keys()
    assert (
        sum(noisy[kind]["samples"] for kind in ("prefill", "decode", "mixed")) == noisy["held_out"]["samples"]
    )


@given(chunks=CHUNKS, rows=ROWS, length=LENGTH, more=LENGTH)
def test_monotone(chunks, rows, length, more):
    check_monotone(NOISY, chunks, rows, rows * length, more)


@given(rows=st.integers(1, 600), length=LENGTH)
def test_decode_is_affine(rows, length):
    check_affine(NOISY, rows, rows * length)


@given(rows=st.integers(1, 200), length=st.integers(1, 3000), more=st.integers(1, 3000))
def test_a_window_is_kept(rows, length, more):
    windowed = WINDOWED
    check_affine(windowed, rows, rows * length)
    check_monotone(windowed, [(64, length)], rows, rows * length, more)
    assert windowed.decode(rows, rows * 5000).slope_ps == 0


def test_an_outlier_among_repetitions_does_not_count():
    steps = profile().steps
    spoilt = tuple(
        StepSample(
            prefills=s.prefills,
            decodes=s.decodes,
            context=s.context,
            seconds=(*s.seconds[:4], 9 * s.seconds[0]),
        )
        for s in steps
    )
    step = (((256, 0),), 4, 2000)
    assert Measured(profile(steps=spoilt)).step_ps(*step) == Measured(profile()).step_ps(*step)


def test_overhead_between_steps_counts_once():
    step = ((), 4, 2000)
    plain, slower = Measured(profile()), Measured(profile(step_overhead_s=0.002))
    assert slower.step_ps(*step) - plain.step_ps(*step) == pytest.approx(2e9, rel=0.001)


def test_copies_pairs_and_messages():
    copies = tuple(
        CopySample(nbytes, writes, (2e-4 + nbytes / 8e9 + writes * 3e-6,) * 3)
        for nbytes, writes in ((1 << 16, 1), (1 << 20, 4), (1 << 24, 64), (1 << 26, 16), (1 << 26, 2048))
    )
    pairs = (
        PairSample("decode", "prefill", 1.5),
        PairSample("decode", "prefill", 1.3),
        PairSample("decode", "prefill", 1.4),
        PairSample("prefill", "decode", 0.97),
    )
    costs = Measured(profile(copies=copies, pairs=pairs, message_s=0.0002, request_overhead_s=0.003))
    assert costs.copy_ns(1 << 25, 100) == pytest.approx(1e9 * (2e-4 + (1 << 25) / 8e9 + 3e-4), rel=0.01)
    assert costs.transfer_ns(1 << 25) == costs.copy_ns(1 << 25, 1)
    assert costs.message_ns == 200_000 and costs.request_overhead_ns == 3_000_000
    assert costs.slowdown("decode", ()) == 1.0
    assert costs.slowdown("decode", ("prefill",)) == 1.4
    assert costs.slowdown("decode", ("prefill", "prefill")) == pytest.approx(1.96)
    assert costs.slowdown("prefill", ("decode",)) == 1.0
    assert costs.slowdown("prefill", ("prefill",)) == 1.0


def test_what_a_profile_lacks():
    with pytest.raises(ConfigError, match="no copies"):
        Measured(profile()).transfer_ns(1)
    with pytest.raises(ConfigError, match="3 usable steps"):
        Measured(profile(steps=profile().steps[:3]))


NOISY = Measured(
    profile(noise=0.3, copies=(CopySample(1 << 20, 1, (0.001,)), CopySample(1 << 24, 9, (0.011,))))
)
WINDOWED = Measured(profile(config=models.MISTRAL_7B, copies=NOISY.profile.copies))
