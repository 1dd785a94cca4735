"""The four caching steps between two processes with a pool each, on conversations of two turns."""

import asyncio

from headrace.live.service import Service
from headrace.nodes.limits import Caching, InstanceConfig
from tests.live.serving import collect, prompt_of, run, serving, submission, until, wanted_of

FIRST, SECOND = 40, 60
"""New tokens of each turn."""


async def talk(service: Service, index: int, returned: bool) -> None:
    """Two turns. The second one begins when what the first one left has come back, if it does."""
    prompt = prompt_of(index, 50)
    first = submission(service, prompt, FIRST, seed=index, ignore_eos=True)
    before = service.status().counters.get("tokens_returned", 0)
    said = await collect(service, first)
    assert said == wanted_of(first)
    while returned and service.status().counters.get("tokens_returned", 0) == before:
        await asyncio.sleep(0.005)
    second = submission(service, [*prompt, *said[0], 1, 2, 3], SECOND, seed=index, ignore_eos=True)
    assert await collect(service, second) == wanted_of(second)


def test_each_step_computes_or_moves_less_and_says_the_same() -> None:
    counts: dict[Caching, dict[str, int]] = {}

    async def scenario(caching: Caching) -> None:
        async with serving(shared=False, instance=InstanceConfig(caching=caching)) as service:
            for index in range(3):
                await talk(service, index, caching is Caching.RETURN)
            await until(lambda: service.status().requests_running == 0)
            counts[caching] = service.status().counters

    for caching in Caching:
        run(scenario(caching))
    none, prefill, increment, back = (counts[caching] for caching in Caching)
    assert none["tokens_prompt_computed"] > prefill["tokens_prompt_computed"] > back["tokens_prompt_computed"]
    assert prefill["tokens_prompt_computed"] == increment["tokens_prompt_computed"]
    assert none["transfer_bytes"] == prefill["transfer_bytes"] > increment["transfer_bytes"]
    assert back["returned_bytes"] > 0 and "tokens_returned" not in increment
