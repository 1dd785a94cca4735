"""What `/metrics` shows: vLLM's names where the meaning is the same, `headrace:` for the rest.

Times and tokens of requests are taken where the client's stream is made, so that they hold across workers; what a choice did between
(queue, prefill, transfer, decode) comes from its `Timeline`. Everything else is read from the service when someone asks.
Each choice counts as one request, as in vLLM.
"""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.ports import Gateway
from headrace.types.request import FinishReason, Timeline
from headrace.types.service import ServiceStatus

LABELS = ("model_name", "engine")
SHORT = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
    20,
)
FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
STAGE = (
    0.0001,
    0.0005,
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    20,
    60,
)
REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
COUNTS = tuple(m * 10**e for e in range(5) for m in (1, 2, 5))
BYTES = tuple(4**i * 1024 for i in range(14))
STATES = ("starting", "ready", "draining", "restarting", "failed")
SOURCES = {
    "tokens_prompt_computed": "local_compute",
    "tokens_prompt_hit": "local_cache_hit",
    "tokens_transferred": "external_kv_transfer",
}
"""The service's counters that vLLM shows as `prompt_tokens_by_source`."""
RANGE_COUNTERS = {
    "blocks_mapped": "KV blocks mapped into the range of a sequence",
    "blocks_in_place": "KV blocks that a new sequence's range had mapped already",
    "blocks_unmapped": "KV blocks unmapped",
    "map_calls": "Pieces of successive KV blocks mapped",
    "map_ns": "Seconds spent on mapping, on any thread",
    "stalls": "Steps that waited for a mapping",
    "stall_ns": "Seconds that steps waited for mappings",
}
RANGE_GAUGES = {
    "in_use": "Ranges that a sequence has",
    "mapped_bytes": "KV bytes mapped into ranges",
    "held_bytes": "KV bytes of the blocks that present sequences have, shared ones counted for each",
    "used_bytes": "KV bytes of the tokens in them",
    "resident_bytes": "Bytes of the worker's KV pool that exist",
}
"""Of virtual KV memory (`types.ranges.RangeCounts`)."""


class StatusCollector(Collector):
    """The service's own numbers, read when Prometheus asks."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._info = gateway.info()

    def collect(self) -> Iterator[Metric]:
        status = self._gateway.status()
        values = [self._info.model, "0"]
        yield self._gauge(
            "vllm:num_requests_running", "Requests being computed", status.requests_running, values
        )
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting", status.requests_waiting, values)
        used = 1 - status.blocks_free / status.blocks_total if status.blocks_total else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use (1 = all)", used, values)
        yield self._gauge("headrace:kv_blocks", "KV blocks over all pools", status.blocks_total, values)
        yield self._gauge("headrace:weights_version", "0: as started", status.weights, values)
        yield self._gauge("headrace:ready", "1: the service takes requests", float(status.ready), values)
        sources = CounterMetricFamily(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by where their KV came from",
            labels=[*LABELS, "source"],
        )
        for name, source in SOURCES.items():
            if name in status.counters:
                sources.add_metric([*values, source], status.counters[name])
        yield sources
        for name, count in sorted(status.counters.items()):
            family = "vllm:num_preemptions" if name == "preemptions" else f"headrace:{name}"
            counter = CounterMetricFamily(family, f"{name.replace('_', ' ')} since start", labels=LABELS)
            counter.add_metric(values, count)
            yield counter
        yield from self._instances(status)

    def _instances(self, status: ServiceStatus) -> Iterator[Metric]:
        labels = ["model_name", "instance", "leaning"]
        state = GaugeMetricFamily(
            "headrace:instance_state", "1: the worker is in this state", labels=[*labels, "state"]
        )
        epoch = GaugeMetricFamily("headrace:instance_epoch", "Starts of this worker", labels=labels)
        gauges = {
            field: GaugeMetricFamily(
                f"headrace:instance_{field}", f"{field.replace('_', ' ')} on this worker", labels=labels
            )
            for field in (
                "waiting",
                "running",
                "held",
                "receiving",
                "tokens_waiting",
                "blocks_total",
                "blocks_free",
                "steps",
            )
        }
        for instance in status.instances:
            values = [self._info.model, instance.name, instance.leaning]
            epoch.add_metric(values, instance.epoch)
            for name in STATES:
                state.add_metric([*values, name], float(instance.state == name))
            for field, gauge in gauges.items():
                if instance.report is not None:
                    gauge.add_metric(values, getattr(instance.report, field))
        yield from (state, epoch, *gauges.values())
        yield from self._ranges(status, labels)

    def _ranges(self, status: ServiceStatus, labels: list[str]) -> Iterator[Metric]:
        known = [instance for instance in status.instances if instance.ranges is not None]
        if not known:
            return
        for kind, texts in ((CounterMetricFamily, RANGE_COUNTERS), (GaugeMetricFamily, RANGE_GAUGES)):
            for field, text in texts.items():
                timed = field.endswith("_ns")
                name = f"headrace:kv_range_{field.removesuffix('_ns')}{'_seconds' * timed}"
                family = kind(name, text, labels=labels)
                for instance in known:
                    count = getattr(instance.ranges, field)
                    family.add_metric(
                        [self._info.model, instance.name, instance.leaning], count * 1e-9 if timed else count
                    )
                yield family

    def _gauge(self, name: str, text: str, value: float, values: list[str]) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=LABELS)
        gauge.add_metric(values, value)
        return gauge


class Metrics:
    """All metrics of one API process."""

    def __init__(self, gateway: Gateway) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(StatusCollector(gateway))
        ProcessCollector(registry=self.registry)
        self._values = (gateway.info().model, "0")
        self.prompt_tokens = self.counter("vllm:prompt_tokens", "Prompt tokens of requests that got a token")
        self.generation_tokens = self.counter("vllm:generation_tokens", "New tokens sent")
        self.disconnects = self.counter("headrace:client_disconnects", "Requests whose client left")
        self.stalls = self.counter("headrace:client_stalls", "Requests cut because the client read nothing")
        self.ttft = self.histogram("vllm:time_to_first_token_seconds", "Arrival to first token", FIRST)
        self.itl = self.histogram("vllm:inter_token_latency_seconds", "Gaps between a choice's chunks", SHORT)
        self.tpot = self.histogram(
            "vllm:request_time_per_output_token_seconds",
            "(latency - ttft) / (tokens - 1) of a request",
            SHORT,
        )
        self.latency = self.histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", REQUEST)
        self.prompt_length = self.histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request", COUNTS
        )
        self.output_length = self.histogram(
            "vllm:request_generation_tokens", "New tokens of a request", COUNTS
        )
        self.choices = self.histogram("vllm:request_params_n", "n of a request", COUNTS)
        self.tokens_max = self.histogram("vllm:request_params_max_tokens", "max_tokens of a request", COUNTS)
        self.stages = StageMetrics(self)
        self._active = Gauge(
            "headrace:http_requests_active", "Generation requests in this process", registry=self.registry
        )
        self._success = Counter(
            "vllm:request_success", "Finished requests", (*LABELS, "finished_reason"), registry=self.registry
        )
        self._responses = Counter(
            "headrace:http_responses",
            "Answers by path and status",
            ("path", "status"),
            registry=self.registry,
        )

    def counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=self.registry).labels(*self._values)

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, LABELS, buckets=buckets, registry=self.registry).labels(*self._values)

    def ended(self, reason: str, count: int = 1) -> None:
        """`count` choices ended: "stop", "length", "abort" or "error"."""
        if count:
            self._success.labels(*self._values, reason).inc(count)

    def responded(self, path: str, status: int) -> None:
        self._responses.labels(path, str(status)).inc()

    def active(self, count: int) -> None:
        self._active.set(count)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class StageMetrics:
    """What choices did between arrival and end, from their timelines."""

    def __init__(self, metrics: Metrics) -> None:
        counter, histogram = metrics.counter, metrics.histogram
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens found there")
        self._recomputed = counter(
            "headrace:tokens_recomputed", "Tokens computed again after preemption or failover"
        )
        self._retries = counter("headrace:request_retries", "Attempts of choices beyond the first")
        self._placement = histogram("headrace:request_placement_time_seconds", "Arrival to placement", STAGE)
        self._queue = histogram("vllm:request_queue_time_seconds", "Arrival to first prefill chunk", STAGE)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "First chunk to first token", STAGE)
        self._decode = histogram("vllm:request_decode_time_seconds", "First token to last token", REQUEST)
        self._inference = histogram(
            "vllm:request_inference_time_seconds", "First chunk to last token", REQUEST
        )
        self._transfer = histogram(
            "headrace:request_transfer_time_seconds", "First token to all KV on the decode worker", STAGE
        )
        self._moved = histogram("headrace:request_transfer_bytes", "KV bytes moved for a request", BYTES)

    def observe(self, line: Timeline, prompt: int) -> None:
        """A choice with a prompt of `prompt` tokens has ended."""
        self._queries.inc(prompt)
        self._hits.inc(line.cached)
        self._recomputed.inc(line.recomputed)
        self._retries.inc(max(0, line.attempts - 1))
        spans = (
            (self._placement, line.arrival_ns, line.placed_ns),
            (self._queue, line.arrival_ns, line.prefill_ns),
            (self._prefill, line.prefill_ns, line.prefilled_ns),
            (self._decode, line.prefilled_ns, line.finished_ns),
            (self._inference, line.prefill_ns, line.finished_ns),
        )
        for histogram, begin, end in spans:
            if end:
                histogram.observe(max(0, end - begin) / 1e9)
        if line.writes and line.joined_ns:
            self._transfer.observe(max(0, line.joined_ns - line.prefilled_ns) / 1e9)
            self._moved.observe(line.bytes_moved)


class Meter:
    """Measures one job."""

    def __init__(
        self, metrics: Metrics, prompts: list[int], n: int, tokens_max: int, arrival_s: float
    ) -> None:
        self._metrics = metrics
        self._prompts = prompts
        self._n = n
        self._arrival = arrival_s
        self._first = [0.0] * (len(prompts) * n)
        self._last = [0.0] * (len(prompts) * n)
        self._unfinished = len(self._first)
        metrics.choices.observe(n)
        metrics.tokens_max.observe(tokens_max)

    def tokens(self, index: int, count: int) -> None:
        """A choice got `count` tokens now."""
        if not count:
            return
        now = time.monotonic()
        metrics = self._metrics
        if self._first[index]:
            metrics.itl.observe(now - self._last[index])
        else:
            self._first[index] = now
            metrics.ttft.observe(now - self._arrival)
            if index % self._n == 0:
                metrics.prompt_tokens.inc(self._prompts[index // self._n])
        self._last[index] = now
        metrics.generation_tokens.inc(count)

    def finished(self, index: int, finish: FinishReason, tokens: int, timeline: Timeline | None) -> None:
        """A choice is complete."""
        metrics = self._metrics
        self._unfinished -= 1
        now = self._last[index] or time.monotonic()
        prompt = self._prompts[index // self._n]
        metrics.ended(finish.value)
        metrics.latency.observe(now - self._arrival)
        metrics.prompt_length.observe(prompt)
        metrics.output_length.observe(tokens)
        if tokens > 1:
            metrics.tpot.observe((now - self._first[index]) / (tokens - 1))
        if timeline is not None:
            metrics.stages.observe(timeline, prompt)

    def ended(self, reason: str) -> None:
        """The request is over; choices that are not complete ended for `reason`."""
        self._metrics.ended(reason, self._unfinished)
        self._unfinished = 0
