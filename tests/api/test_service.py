"""Everything around generation: models, readiness, metrics, keys, request ids, tokenizing."""

import re
import subprocess
import sys
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.api.settings import ApiSettings
from headrace.api.tokenizer import Tokenizer
from tests.api.fakes import LENGTH_MAX, MODEL, WAIT_S, FakeGateway, serving

BODY = {"model": MODEL, "prompt": "The quick fox", "max_tokens": 4, "ignore_eos": True}


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, headrace.api.server, headrace.api.app, headrace.api.tokenizer; "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "headrace")
    assert model.to_dict()["max_model_len"] == LENGTH_MAX
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_health_and_version(plain: httpx.Client) -> None:
    assert plain.get("/health").status_code == 200
    assert plain.get("/version").json() == {"version": "0.1.0"}


def test_readiness(plain: httpx.Client, gateway: FakeGateway) -> None:
    ready = plain.get("/ready")
    assert ready.status_code == 200
    content = ready.json()
    assert content["ready"]
    assert (content["numerics"], content["promise"]) == ("fake-numerics", "equal bits")
    assert content["instances"][0] == {
        "name": "p0",
        "epoch": 1,
        "leaning": "prefill",
        "state": "ready",
        "weights": 0,
        "pid": None,
    }
    gateway.ready = False
    starting = plain.get("/ready")
    assert (starting.status_code, starting.json()["reason"]) == (503, "p0 starts")
    assert plain.get("/health").status_code == 200


class TestRequestIds:
    def test_echoed(self, plain: httpx.Client, gateway: FakeGateway) -> None:
        response = plain.post("/v1/completions", json=BODY, headers={"X-Request-Id": "my-id.1"})
        assert response.headers["x-request-id"] == "my-id.1"
        assert response.json()["id"] == "cmpl-my-id.1"

    def test_generated(self, plain: httpx.Client) -> None:
        one, two = (plain.get("/health").headers["x-request-id"] for _ in range(2))
        assert re.fullmatch("[0-9a-f]{32}", one)
        assert one != two

    @pytest.mark.parametrize("name", ["x" * 129, "a b", "", "é"])
    def test_unusable_ones_are_replaced(self, plain: httpx.Client, name: str) -> None:
        response = plain.get("/health", headers={"X-Request-Id": name.encode()})  # type: ignore[dict-item]
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])

    def test_on_errors_and_streams(self, plain: httpx.Client, gateway: FakeGateway) -> None:
        headers = {"X-Request-Id": "r1"}
        assert plain.get("/nothing", headers=headers).headers["x-request-id"] == "r1"
        stream = plain.post("/v1/completions", json=BODY | {"stream": True}, headers=headers)
        assert stream.headers["x-request-id"] == "r1"
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.text.endswith("data: [DONE]\n\n")


class TestTokens:
    def test_there_and_back(self, plain: httpx.Client, tokenizer: Tokenizer) -> None:
        text = "fox 你好 🎉"
        there = plain.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert there["tokens"] == tokenizer.encode(text)
        assert there["count"] == len(there["tokens"]) == len(there["token_strs"])
        assert there["max_model_len"] == LENGTH_MAX
        assert plain.post("/detokenize", json={"tokens": there["tokens"]}).json() == {"prompt": text}

    def test_messages(self, plain: httpx.Client, tokenizer: Tokenizer) -> None:
        messages = [{"role": "user", "content": "hi"}]
        ids = plain.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert tokenizer.decode(ids, skip_special=False) == "<s>[user] hi\n[assistant] "


def test_api_keys(tokenizer: Tokenizer) -> None:
    gateway = FakeGateway(tokenizer)
    with (
        serving(gateway, tokenizer, ApiSettings(api_keys=("first", "second"))) as running,
        httpx.Client(base_url=running.address, timeout=WAIT_S) as plain,
    ):
        for key in ("first", "second"):
            with openai.OpenAI(base_url=f"{running.address}/v1", api_key=key) as client:
                assert client.completions.create(model=MODEL, prompt="fox").choices
        for header in ("", "Bearer", "Bearer third", "Basic first", "first"):
            response = plain.post("/v1/completions", json=BODY, headers={"authorization": header})
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "x-request-id" in response.headers
        assert plain.get("/v1/models").status_code == 401
        assert plain.post("/tokenize", json={"prompt": "x"}).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert plain.get(path).status_code == 200
    assert len(gateway.submissions) == 2


def test_web_pages_may_call_if_allowed(tokenizer: Tokenizer) -> None:
    settings = ApiSettings(allowed_origins=("https://chat.example",), api_keys=("k",))
    preflight = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    with serving(FakeGateway(tokenizer), tokenizer, settings) as running:
        url = f"{running.address}/v1/completions"
        allowed = httpx.options(url, headers=preflight, timeout=WAIT_S)
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        other = httpx.options(url, headers=preflight | {"origin": "https://x.example"}, timeout=WAIT_S)
        assert "access-control-allow-origin" not in other.headers


def test_sampling_defaults_of_the_checkpoint(tokenizer: Tokenizer) -> None:
    recommended = Tokenizer(
        tokenizer._rust,
        tokens={"eos_token": "</s>"},
        defaults=type(tokenizer.defaults)(0.6, 0.95, 20, None, 1.05, 9),
    )
    fields: list[Any] = []
    for settings in (ApiSettings(), ApiSettings(model_defaults=False)):
        gateway = FakeGateway(recommended)
        with serving(gateway, recommended, settings) as running:
            asked = BODY | {"top_p": 0.5}
            httpx.post(f"{running.address}/v1/completions", json=asked, timeout=WAIT_S)
        sampling = gateway.submissions[0].payload.sampling
        fields.append((sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty))
    assert fields == [(0.6, 0.5, 20, 1.05), (1.0, 0.5, 0, 1.0)]


@pytest.fixture(scope="module")
def samples(tokenizer: Tokenizer) -> dict[str, float]:
    """All samples after two completions of four tokens and one refused request, by name and telling labels."""
    gateway = FakeGateway(tokenizer)
    gateway.cached = 2
    with (
        serving(gateway, tokenizer) as running,
        httpx.Client(base_url=running.address, timeout=WAIT_S) as plain,
    ):
        plain.post("/v1/completions", json=BODY)
        plain.post("/v1/completions", json=BODY | {"stream": True})
        plain.post("/v1/completions", json=BODY | {"n": 0})
        response = plain.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            if sample.name.startswith("vllm:"):
                assert sample.labels["model_name"] == MODEL
                assert sample.labels["engine"] == "0"
            found["|".join([sample.name, *sorted(labels.values())])] = sample.value
    return found


class TestMetrics:
    def test_tokens(self, samples: dict[str, float], tokenizer: Tokenizer) -> None:
        prompt = len(tokenizer.encode(str(BODY["prompt"])))
        assert samples["vllm:prompt_tokens_total"] == 2 * prompt
        assert samples["vllm:generation_tokens_total"] == 8
        assert samples["vllm:prefix_cache_queries_total"] == 2 * prompt
        assert samples["vllm:prefix_cache_hits_total"] == 4
        assert samples["vllm:prompt_tokens_by_source_total|local_cache_hit"] == 7

    def test_requests(self, samples: dict[str, float]) -> None:
        assert samples["vllm:request_success_total|length"] == 2
        assert samples["headrace:http_responses_total|/v1/completions|200"] == 2
        assert samples["headrace:http_responses_total|/v1/completions|400"] == 1
        assert "headrace:http_requests_active" in samples

    def test_service(self, samples: dict[str, float]) -> None:
        assert samples["vllm:num_requests_running"] == 1
        assert samples["vllm:num_requests_waiting"] == 2
        assert samples["vllm:kv_cache_usage_perc"] == 0.25
        assert samples["vllm:num_preemptions_total"] == 3
        assert samples["headrace:failovers_total"] == 1
        assert samples["headrace:transfer_bytes_total"] == 4096
        assert samples["headrace:instance_state|d0|decode|ready"] == 1

    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("vllm:time_to_first_token_seconds", 2),
            ("vllm:inter_token_latency_seconds", 6),
            ("vllm:request_time_per_output_token_seconds", 2),
            ("vllm:e2e_request_latency_seconds", 2),
            ("vllm:request_queue_time_seconds", 2),
            ("vllm:request_prefill_time_seconds", 2),
            ("vllm:request_decode_time_seconds", 2),
            ("vllm:request_inference_time_seconds", 2),
            ("vllm:request_prompt_tokens", 2),
            ("vllm:request_generation_tokens", 2),
            ("vllm:request_params_n", 2),
            ("vllm:request_params_max_tokens", 2),
            ("headrace:request_placement_time_seconds", 2),
            ("headrace:request_transfer_time_seconds", 2),
            ("headrace:request_transfer_bytes", 2),
        ],
    )
    def test_histograms(self, samples: dict[str, float], name: str, count: int) -> None:
        assert samples[f"{name}_count"] == count
