"""`headrace compare`: which variants there are, that all get the same requests, and what is said of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.cli.compare import compare
from headrace.cli.options import ClusterOptions, resolve
from headrace.cli.simulate import Outputs
from headrace.cli.variants import Job, Variant, run_job, run_jobs, variants
from headrace.cli.workload import Workload
from headrace.types.errors import ConfigError

LOAD = Workload("conversations:conversations=12,arrivals.rate_per_s=20,think_ms.median=200,turns.max=4")


def options(**settings: Any) -> ClusterOptions:
    return resolve(
        ClusterOptions, None, {"model": "llama-3.1-8b", "hardware": "h100-sxm", "instances": 3, **settings}
    )


def test_variants_are_every_combination_in_order() -> None:
    found = variants(options(), ["cluster.placement=least_load,round_robin", "separate-pools=true,false"])
    assert [variant.name for variant in found] == [
        "least_load + separate-pools=true",
        "least_load + separate-pools=false",
        "round_robin + separate-pools=true",
        "round_robin + separate-pools=false",
    ]
    assert [v.options.placement.name for v in found] == ["least_load"] * 2 + ["round_robin"] * 2
    assert [v.options.separate_pools for v in found] == [True, False] * 2
    assert all(v.options.instances == 3 and str(v.options.model) == "llama-3.1-8b" for v in found)


def test_a_policy_varies_with_its_settings() -> None:
    first, second = variants(options(), ["engine.admission=aggressive,{name: past_future, reserve: 0.1}"])
    assert (first.name, second.name) == ("aggressive", "past_future(reserve=0.1)")
    assert second.options.admission.config == {"reserve": 0.1}


def test_numbers_of_prefill_and_decode_replace_instances() -> None:
    first, _ = variants(options(), ["prefill=1,2"])
    assert (first.name, first.options.prefill, first.options.instances) == ("prefill=1", 1, None)
    pair = options(instances=None, prefill=1, decode=1)
    _, four = variants(pair, ["instances=2,4"])
    assert (four.options.instances, four.options.prefill, four.options.decode) == (4, None, None)


def test_all_variants_get_the_same_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vary = ["cluster.placement=least_load,round_robin"]
    jobs = [Job(variant, LOAD, range(2), seed) for seed in range(2) for variant in variants(options(), vary)]
    runs = list(run_jobs(jobs, 1))
    assert [(run.name, run.seed) for run in runs] == [
        ("least_load", 0),
        ("round_robin", 0),
        ("least_load", 1),
        ("round_robin", 1),
    ]
    for first, second in (runs[:2], runs[2:]):
        assert (first.outcomes.arrival_ns == second.outcomes.arrival_ns).all()
        assert (first.outcomes.prompt == second.outcomes.prompt).all()
        assert (first.outcomes.decode != second.outcomes.decode).any()
    outputs = Outputs(json=tmp_path / "page.json", html=tmp_path / "page.html")
    found = compare(options(), LOAD, vary, outputs, seeds=3, jobs=1)
    said = capsys.readouterr().out
    assert "another trace of the same generator" in said and "Simulated" in said
    assert found.seeds_matter and found.variants == ["least_load", "round_robin"]
    assert json.loads((tmp_path / "page.json").read_bytes())["variants"] == found.variants
    page = (tmp_path / "page.html").read_text()
    assert "round_robin" in page and "another trace of the same generator" in page


def test_processes_change_nothing() -> None:
    job = Job(Variant("one", options()), LOAD, range(2), 1)
    here, (there, _) = run_job(job), run_jobs([job, job], 2)
    assert (here.outcomes.finished_ns == there.outcomes.finished_ns).all() and here.settings == there.settings


@pytest.mark.parametrize(
    ("vary", "named"),
    [
        ([], "nothing to compare"),
        (["placement=least_load"], "nothing to compare"),
        (["placement"], "give key=value"),
        (["placment=a,b"], "did you mean placement"),
        (["port=1,2"], "does not read this setting"),
        (["placement=a,b", "cluster.placement=c,d"], "given twice"),
        (["prefill=1,x"], "--vary: prefill"),
        (["placement=best,least_load"], "there are: "),
        (["placement={name: a,b"], "no values between commas"),
        (["hardware=h100-sxm,rtx-4080"], "did you mean rtx-4090"),
    ],
)
def test_what_cannot_be_compared_is_said(vary: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        compare(options(), LOAD, vary, Outputs(), seeds=2, jobs=1)


def test_seeds_and_jobs_have_limits() -> None:
    for flags, named in (({"seeds": 0}, "--seeds 0"), ({"jobs": 0}, "--jobs 0")):
        with pytest.raises(ConfigError, match=named):
            compare(options(), LOAD, ["placement=least_load,round_robin"], Outputs(), **flags)
