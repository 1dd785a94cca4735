"""What the API can be told. Read from flags and `cluster.yaml` by `cli`; every limit here has a number."""

import msgspec

MIB = 2**20


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and habits of the HTTP API."""

    api_keys: tuple[str, ...] = ()
    """Accepted in `Authorization: Bearer`; empty: no key is asked for."""
    push_key: str = ""
    """Accepted in `X-Push-Key` from trainers; empty: nobody may push new weights."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages (CORS) that may call the API; "*" is all."""
    body_max: int = 32 * MIB
    """Bytes of a request's body."""
    body_timeout_s: float = 30.0
    """A body that stops arriving for so long ends its request (408)."""
    head_timeout_s: float = 30.0
    """A connection that sends no complete request head for so long is closed."""
    write_timeout_s: float = 60.0
    """A client that takes nothing for so long is cut, and its request cancelled."""
    request_timeout_s: float = 3600.0
    """Deadline of a request that names none, and the longest it may name."""
    deadline_grace_s: float = 5.0
    """The service ends a request at its deadline; one that it has not ended so much later is ended by the API."""
    requests_max: int = 4096
    """Generation requests at once; more are answered 503."""
    choices_max: int = 128
    """`n` at most."""
    sequences_max: int = 1024
    """Prompts times `n` of one request."""
    stops_max: int = 32
    """Stop strings of one request."""
    stop_length_max: int = 1024
    """Characters of a stop string."""
    retry_after_s: int = 1
    """What a 503 tells the client to wait."""
    model_defaults: bool = True
    """Sampling that a request leaves open comes from the checkpoint's `generation_config.json`, as in vLLM; else from OpenAI's defaults."""
