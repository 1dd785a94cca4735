import numpy as np
import pytest
import torch
from transformers.generation import logits_process as oracle

from headrace.compute.sampling import Sampler, likeliest, logprobs
from headrace.types.payload import SamplingParams
from headrace.types.request import FinishReason

VOCAB = 50
EOS = 2


def sampler(prompt=(5, 6, 7), choice=0, vocab=VOCAB, **params) -> Sampler:
    settings = SamplingParams(**{"tokens_max": 1000, **params})
    return Sampler(settings, choice=choice, vocab=vocab, eos_token_ids=(EOS,), prompt=prompt)


def row(seed=0, vocab=VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def frequencies(count=4000, logits=None, history=(), **params) -> np.ndarray:
    """How often each word is drawn, over many seeds."""
    seen = np.zeros(VOCAB)
    for seed in range(count):
        drawing = sampler(seed=seed, **params)
        drawing.append(history)
        seen[drawing.sample(row() if logits is None else logits).id] += 1
    return seen / count


def test_greedy_takes_the_lowest_id_of_equals():
    logits = np.array([0, 3, 1, 3], dtype=np.float32)
    assert sampler(vocab=4, temperature=0.0).sample(logits).id == 1
    assert sampler(vocab=4, top_k=1).sample(logits).id == 1


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({}, []),
        ({"temperature": 0.5}, [oracle.TemperatureLogitsWarper(0.5)]),
        ({"top_k": 5}, [oracle.TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [oracle.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [oracle.MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.5, "top_k": 8, "top_p": 0.8},
            [oracle.TemperatureLogitsWarper(1.5), oracle.TopKLogitsWarper(8), oracle.TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_distribution_is_that_of_transformers(params, processors):
    scores = torch.from_numpy(row())[None]
    for processor in processors:
        scores = processor(torch.zeros(1, 0, dtype=torch.long), scores)
    expected = scores.softmax(-1)[0].numpy()
    found = frequencies(**params)
    assert (found[expected == 0] == 0).all()
    assert np.abs(found - expected).max() < 0.03


def test_repetition_penalty_covers_prompt_and_output():
    prompt, output = [5, 6, 7, 7], [9, 10]
    expected = oracle.RepetitionPenaltyLogitsProcessor(1.8)(
        torch.tensor([[*prompt, *output]]), torch.from_numpy(row())[None]
    )[0]
    drawing = sampler(prompt, repetition_penalty=1.8)
    drawing.append(output)
    torch.testing.assert_close(torch.from_numpy(drawing.adjust(row())), expected, rtol=0, atol=0)


def test_presence_and_frequency_penalties_cover_the_output_only():
    drawing = sampler(presence_penalty=0.5, frequency_penalty=0.25)
    drawing.append([9, 10, 9])
    drawing.append([9])
    expected = row()
    expected[9] -= 0.5 + 3 * 0.25
    expected[10] -= 0.5 + 0.25
    np.testing.assert_array_equal(drawing.adjust(row()), expected)


def test_logit_bias():
    logits = row()
    assert sampler(temperature=0.0, logit_bias={33: 100.0}).sample(logits).id == 33
    assert frequencies(count=200, logit_bias={int(logits.argmax()): -100.0})[logits.argmax()] == 0
    np.testing.assert_array_equal(logits, row(), "the row is left as it was")
    with pytest.raises(ValueError, match="token 50"):
        sampler(logit_bias={50: 1.0})


def test_finish():
    favours = {word: np.eye(VOCAB, dtype=np.float32)[word] for word in (EOS, 8, 9)}
    greedy = {"temperature": 0.0, "stop_token_ids": (8,)}
    assert sampler(**greedy).sample(favours[9]).finish is None
    assert sampler(**greedy).sample(favours[8]).finish is FinishReason.STOP
    assert sampler(**greedy).sample(favours[EOS]).finish is FinishReason.STOP
    assert sampler(**greedy, ignore_eos=True).sample(favours[EOS]).finish is None
    assert sampler(**greedy, ignore_eos=True).sample(favours[8]).finish is FinishReason.STOP
    assert sampler(**greedy, tokens_max=1).sample(favours[9]).finish is FinishReason.LENGTH
    assert sampler(**greedy, tokens_max=1).sample(favours[8]).finish is FinishReason.STOP
    resumed = sampler(**greedy, tokens_max=3)
    resumed.append([9])
    assert [resumed.sample(favours[9]).finish for _ in range(2)] == [None, FinishReason.LENGTH]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_masks_what_would_end_the_text(ignore_eos):
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[EOS, 8, 9]] = 3, 2, 1
    drawing = sampler(temperature=0.0, stop_token_ids=(8, 999), min_tokens=2, ignore_eos=ignore_eos)
    assert [drawing.sample(logits).id for _ in range(3)] == [9, 9, EOS]


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 0.3, "logit_bias": {4: 5.0}, "top_p": 0.9}]
)
def test_logprobs_are_of_the_raw_distribution(params):
    logits = row(3)
    token = sampler(logprobs=7, **params).sample(logits)
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    top = expected.topk(7)
    assert token.logprobs is not None
    assert token.logprobs.top_ids == tuple(top.indices.tolist())
    np.testing.assert_allclose(token.logprobs.top_logprobs, top.values, atol=1e-6)
    np.testing.assert_allclose(token.logprobs.logprob, expected[token.id], atol=1e-6)
    assert token.logprobs.rank == 1 + int((expected > expected[token.id]).sum())


def test_logprobs_counts_and_ties():
    logits = np.array([1, 2, 2, 0, 2], dtype=np.float32)
    assert likeliest(logits, 2).tolist() == [1, 2]
    assert likeliest(logits, 5).tolist() == [1, 2, 4, 0, 3]
    assert [logprobs(logits, word, 0).rank for word in range(5)] == [4, 1, 2, 5, 3]
    assert logprobs(logits, 0, 0).top_ids == ()
    assert len(logprobs(logits, 0, 20).top_ids) == 5
    assert sampler(vocab=5, temperature=0.0).sample(logits).logprobs is None
    big = np.random.default_rng(0).permutation(30_000).astype(np.float32)
    assert likeliest(big, 20).tolist() == (-big).argsort()[:20].tolist()


def test_draws_depend_on_seed_choice_and_position_only():
    """A failover resumes with what the lost worker would have drawn."""
    rows = [row(seed) for seed in range(30)]
    whole = sampler(seed=5, top_p=0.95)
    ids = [whole.sample(logits).id for logits in rows]
    resumed = sampler(seed=5, top_p=0.95)
    resumed.append(ids[:13])
    assert [resumed.sample(logits).id for logits in rows[13:]] == ids[13:]
    other = sampler(seed=5, choice=1, top_p=0.95)
    assert [other.sample(logits).id for logits in rows] != ids


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_distribution(bad, temperature):
    logits = row()
    logits[30] = bad
    with pytest.raises(FloatingPointError):
        sampler(temperature=temperature).sample(logits)
    with pytest.raises(FloatingPointError):
        sampler(temperature=temperature).sample(np.full(VOCAB, -np.inf, dtype=np.float32))
