"""From a Hugging Face config.json to a `ModelShape` and a `KVSpec`. Reads a dict, no file.

To add an architecture: a function from its fields to its layers, and its lines in `FAMILIES`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.cost import quantization
from headrace.cost.fields import Fields
from headrace.cost.shape import Attention, Experts, Layer, Matmul, ModelShape
from headrace.types.errors import ConfigError
from headrace.types.kv import GroupKind, KVGroup, KVSpec

Layers = tuple[Layer, ...]


def shape_of(config: Mapping[str, Any], *, weight_bits: float | None = None) -> ModelShape:
    """The arithmetic of the model that a config.json describes.

    `weight_bits`: bits of a weight inside layers, with its scales, instead of what the file says; the products then run in bf16.
    Raises ConfigError naming the key that is missing or wrong, or the architecture that is not known.
    """
    fields = Fields(config)
    architecture = _architecture(fields)
    family = next(family for names, family in FAMILIES if architecture in names)
    plain_bits = 32 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 16
    stored = quantization.of(fields, plain_bits)
    hidden, vocabulary = fields.count("hidden_size"), fields.count("vocab_size")
    embedding = hidden * vocabulary
    if architecture == "OPTForCausalLM":
        embedding += hidden * (fields.count("max_position_embeddings") + 2)
    return ModelShape(
        architecture=architecture,
        hidden=hidden,
        vocabulary=vocabulary,
        layers=family(fields),
        embedding_weights=embedding,
        tied=fields.flag("tie_word_embeddings", architecture.startswith(("Gemma", "OPT"))),
        weight_bits=stored.bits if weight_bits is None else weight_bits,
        plain_bits=plain_bits,
        arithmetic=stored.arithmetic if weight_bits is None else "bf16",
    )


def kv_spec(shape: ModelShape, block_size: int, dtype: str = "bfloat16") -> KVSpec:
    """What the model keeps per token: full groups first, then by window. Recurrent layers are in `state_bytes` instead.

    A latent is one plane with one head. Raises ConfigError for a dtype that a KV cache cannot have here.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"KV dtype {dtype!r} is not known; known: float32, bfloat16, float16")
    found: dict[tuple[int, int, int, int], list[int]] = {}
    for layer in shape.layers:
        if kept := layer.attention:
            group = (kept.window, kept.kv_heads, kept.head_dim, kept.planes)
            found.setdefault(group, []).extend(layer.indices)
    groups = tuple(
        KVGroup(
            kind=GroupKind.WINDOW if window else GroupKind.FULL,
            layers=tuple(sorted(indices)),
            kv_heads=kv_heads,
            head_dim=head_dim,
            planes=planes,
            window=window,
        )
        for (window, kv_heads, head_dim, planes), indices in sorted(found.items())
    )
    return KVSpec(groups=groups, block_size=block_size, dtype=dtype)


def _architecture(fields: Fields) -> str:
    """The first that is named and known. Raises ConfigError if none is."""
    named = fields.words("architectures")
    known = [name for names, _ in FAMILIES for name in names]
    for name in named:
        if name in known:
            return name
    raise ConfigError(
        f"config.json: architectures is {', '.join(named) or 'missing'}; the cost model knows: "
        + ", ".join(sorted(known))
    )


def _alike(kinds: Sequence[Layer]) -> Layers:
    """Layers, one each in the model's order, merged where they differ in their index only."""
    merged: dict[Layer, list[int]] = {}
    for index, kind in enumerate(kinds):
        merged.setdefault(kind, []).append(index)
    return tuple(
        Layer(
            indices=tuple(indices),
            matmuls=kind.matmuls,
            vectors=kind.vectors,
            attention=kind.attention,
            experts=kind.experts,
            state_elements=kind.state_elements,
            window_elements=kind.window_elements,
            state_flops=kind.state_flops,
        )
        for kind, indices in merged.items()
    )


def _kind(mixer: Layer, ffn: Layer, norms: int) -> Layer:
    """One layer out of what mixes tokens and what follows."""
    return Layer(
        indices=(),
        matmuls=mixer.matmuls + ffn.matmuls,
        vectors=mixer.vectors + ffn.vectors + norms,
        attention=mixer.attention,
        experts=ffn.experts,
        state_elements=mixer.state_elements,
        window_elements=mixer.window_elements,
        state_flops=mixer.state_flops,
    )


def _gated(hidden: int, width: int) -> tuple[Matmul, ...]:
    """Gate and up in one product, then down."""
    return (Matmul(hidden, 2 * width), Matmul(width, hidden, split="inner"))


def _grouped(
    fields: Fields, window: int = 0, *, bias: bool = False, normed: bool = False, gate: bool = False
) -> Layer:
    """Multi-head or grouped-query attention. `gate`: the output is gated, by a projection as wide as Q."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    dim = fields.count("head_dim", 128 if _architecture(fields).startswith("Qwen3") else hidden // heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    projected = ((2 if gate else 1) * heads + 2 * kv_heads) * dim
    return Layer(
        indices=(),
        matmuls=(Matmul(hidden, projected, bias=bias), Matmul(heads * dim, hidden, split="inner")),
        vectors=2 * dim if normed else 0,
        attention=Attention(heads=heads, kv_heads=kv_heads, head_dim=dim, window=window),
    )


def _latent(fields: Fields) -> Layer:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    rank, rope = fields.count("kv_lora_rank"), fields.count("qk_rope_head_dim")
    nope, value = fields.count("qk_nope_head_dim"), fields.count("v_head_dim")
    query_rank = fields.count("q_lora_rank", 0)
    queries = heads * (nope + rope)
    into = (
        (Matmul(hidden, query_rank, split="none"), Matmul(query_rank, queries))
        if query_rank
        else (Matmul(hidden, queries),)
    )
    return Layer(
        indices=(),
        matmuls=(
            *into,
            Matmul(hidden, rank + rope, split="none"),
            Matmul(rank, heads * (nope + value)),
            Matmul(heads * value, hidden, split="inner"),
        ),
        vectors=rank + query_rank,
        attention=Attention(
            heads=heads, kv_heads=1, head_dim=rank + rope, planes=1, score_dim=nope + rope, value_dim=value
        ),
    )


def _dense(fields: Fields) -> Layer:
    return Layer(
        indices=(), matmuls=_gated(fields.count("hidden_size"), fields.count("intermediate_size")), vectors=0
    )


def _routed(
    fields: Fields, *, count: str, chosen: str, width: str, shared: int = 0, shared_gate: bool = False
) -> Layer:
    """Mixture of experts; the keys of its sizes, and the width of all shared experts together."""
    hidden, experts = fields.count("hidden_size"), fields.count(count)
    taken = fields.count(chosen)
    if taken > experts:
        raise ConfigError(f"config.json: {chosen} {taken} exceeds {count} {experts}")
    router = Matmul(hidden, experts, split="none")
    beside = _gated(hidden, shared) if shared else ()
    gate = (Matmul(hidden, 1, split="none"),) if shared_gate else ()
    return Layer(
        indices=(),
        matmuls=(router, *beside, *gate),
        vectors=0,
        experts=Experts(experts, taken, _gated(hidden, fields.count(width))),
    )


def _windows(fields: Fields) -> list[int]:
    """Window of each layer, tokens; 0: full attention. By `layer_types`, or by the older keys of each family."""
    layers, architecture = fields.count("num_hidden_layers"), _architecture(fields)
    unsaid = 4096 if architecture == "MistralForCausalLM" and "sliding_window" not in fields.values else 0
    window, kinds = fields.count("sliding_window", unsaid, least=0), fields.words("layer_types")
    if kinds:
        if len(kinds) != layers:
            raise ConfigError(f"config.json: {len(kinds)} layer_types for {layers} layers")
        if "sliding_attention" in kinds and not window:
            raise ConfigError(
                "config.json: layer_types name sliding_attention, but sliding_window is missing"
            )
        return [window if kind == "sliding_attention" else 0 for kind in kinds]
    if architecture.startswith("Qwen"):
        first = (
            fields.count("max_window_layers", 28, least=0)
            if fields.flag("use_sliding_window", False)
            else layers
        )
        return [window if index >= first else 0 for index in range(layers)]
    if architecture.startswith(("Gemma2", "Gemma3")):
        pattern = fields.count("sliding_window_pattern", 2 if architecture.startswith("Gemma2") else 6)
        window = fields.count("sliding_window")
        return [0 if (index + 1) % pattern == 0 else window for index in range(layers)]
    return [window if architecture.startswith(("Mistral", "Mixtral", "Phi3")) else 0] * layers


def _llama(fields: Fields) -> Layers:
    """Llama and its descendants: grouped-query attention and a gated feed-forward network."""
    architecture = _architecture(fields)
    bias = fields.flag("attention_bias", architecture.startswith("Qwen2"))
    normed = architecture.startswith(("Qwen3", "Gemma3"))
    norms = (4 if architecture.startswith(("Gemma2", "Gemma3")) else 2) * fields.count("hidden_size")
    ffn = _dense(fields)
    return _alike(
        [_kind(_grouped(fields, w, bias=bias, normed=normed), ffn, norms) for w in _windows(fields)]
    )


def _opt(fields: Fields) -> Layers:
    """OPT (arXiv:2205.01068): a plain feed-forward network, biases everywhere."""
    hidden, width = fields.count("hidden_size"), fields.count("ffn_dim")
    if fields.count("word_embed_proj_dim", hidden) != hidden:
        raise ConfigError("config.json: word_embed_proj_dim differs from hidden_size, which is not supported")
    mixer = _grouped(fields, bias=True)
    ffn = Layer(
        indices=(),
        matmuls=(Matmul(hidden, width, bias=True), Matmul(width, hidden, split="inner", bias=True)),
        vectors=hidden,  # the output projection's bias
    )
    return _alike([_kind(mixer, ffn, 4 * hidden)] * fields.count("num_hidden_layers"))


def _mixtral(fields: Fields) -> Layers:
    """Mixtral (arXiv:2401.04088): every layer has routed experts."""
    ffn = _routed(fields, count="num_local_experts", chosen="num_experts_per_tok", width="intermediate_size")
    norms = 2 * fields.count("hidden_size")
    return _alike([_kind(_grouped(fields, window), ffn, norms) for window in _windows(fields)])


def _qwen_ffns(fields: Fields) -> list[Layer]:
    """Of each layer of the Qwen families with experts: dense or routed."""
    shared = fields.count("shared_expert_intermediate_size", 0, least=0)
    routed = _routed(
        fields,
        count="num_experts",
        chosen="num_experts_per_tok",
        width="moe_intermediate_size",
        shared=shared,
        shared_gate=shared > 0,
    )
    step, plain = fields.count("decoder_sparse_step", 1), fields.numbers("mlp_only_layers")
    layers = range(fields.count("num_hidden_layers"))
    return [routed if index not in plain and (index + 1) % step == 0 else _dense(fields) for index in layers]


def _qwen_experts(fields: Fields) -> Layers:
    """Qwen2-MoE and Qwen3-MoE (arXiv:2505.09388)."""
    older = _architecture(fields).startswith("Qwen2")
    bias = fields.flag("qkv_bias" if older else "attention_bias", older)
    norms = 2 * fields.count("hidden_size")
    return _alike(
        [
            _kind(_grouped(fields, window, bias=bias, normed=not older), ffn, norms)
            for window, ffn in zip(_windows(fields), _qwen_ffns(fields), strict=True)
        ]
    )


def _deepseek(fields: Fields) -> Layers:
    """DeepSeek-V2 and -V3 (arXiv:2412.19437), and Kimi K2: latent attention; after the first layers, routed and shared experts."""
    mixer, norms = _latent(fields), 2 * fields.count("hidden_size")
    ffns = _after_first(fields, "n_routed_experts", "num_experts_per_tok", "n_shared_experts")
    return _alike([_kind(mixer, ffn, norms) for ffn in ffns])


def _after_first(fields: Fields, count: str, chosen: str, shared: str) -> list[Layer]:
    """Feed-forward of each layer: `first_k_dense_replace` dense ones, then experts."""
    routed = _routed(
        fields,
        count=count,
        chosen=chosen,
        width="moe_intermediate_size",
        shared=fields.count(shared, 0, least=0) * fields.count("moe_intermediate_size"),
    )
    first, every = fields.count("first_k_dense_replace", 0, least=0), fields.count("moe_layer_freq", 1)
    layers = range(fields.count("num_hidden_layers"))
    return [_dense(fields) if index < first or index % every else routed for index in layers]


def _qwen_next(fields: Fields) -> Layers:
    """Qwen3-Next: gated delta-rule layers (arXiv:2412.06464), every fourth one gated attention; experts everywhere."""
    hidden = fields.count("hidden_size")
    keys, values = fields.count("linear_num_key_heads"), fields.count("linear_num_value_heads")
    key_dim, value_dim = fields.count("linear_key_head_dim"), fields.count("linear_value_head_dim")
    taps = fields.count("linear_conv_kernel_dim")
    mixed = 2 * keys * key_dim + values * value_dim
    linear = Layer(
        indices=(),
        matmuls=(
            Matmul(hidden, mixed + values * value_dim),
            Matmul(hidden, 2 * values),
            Matmul(values * value_dim, hidden, split="inner"),
        ),
        vectors=mixed * taps + 2 * values + value_dim,
        state_elements=values * key_dim * value_dim,
        window_elements=mixed * (taps - 1),
        state_flops=6 * values * key_dim * value_dim,
    )
    full = _grouped(fields, normed=True, gate=True)
    kinds = fields.words("layer_types")
    every = fields.count("full_attention_interval", 4)
    layers = fields.count("num_hidden_layers")
    attends = [kind == "full_attention" for kind in kinds] or [(i + 1) % every == 0 for i in range(layers)]
    ffns = _qwen_ffns(fields)
    if len(attends) != layers:
        raise ConfigError(f"config.json: {len(attends)} layer_types for {layers} layers")
    return _alike(
        [_kind(full if a else linear, ffn, 2 * hidden) for a, ffn in zip(attends, ffns, strict=True)]
    )


def _kimi_linear(fields: Fields) -> Layers:
    """Kimi Linear (arXiv:2510.26692): delta attention with a decay per channel, every fourth layer latent attention."""
    hidden, linear = fields.count("hidden_size"), fields.within("linear_attn_config")
    heads, dim, taps = (
        linear.count("num_heads"),
        linear.count("head_dim"),
        linear.count("short_conv_kernel_size"),
    )
    width = heads * dim
    delta = Layer(
        indices=(),
        matmuls=(
            Matmul(hidden, 3 * width),
            Matmul(hidden, 2 * dim, split="none"),  # the decay's and the gate's low-rank inputs
            Matmul(dim, width),
            Matmul(dim, width),
            Matmul(hidden, heads),
            Matmul(width, hidden, split="inner"),
        ),
        vectors=3 * width * taps + width + heads + dim,
        state_elements=heads * dim * dim,
        window_elements=3 * width * (taps - 1),
        state_flops=6 * heads * dim * dim,
    )
    attends = linear.numbers("full_attn_layers")  # counted from 1
    if not attends:
        raise ConfigError(
            "config.json: linear_attn_config: full_attn_layers is missing; this architecture needs it"
        )
    latent = _latent(fields)
    ffns = _after_first(fields, "num_experts", "num_experts_per_token", "num_shared_experts")
    return _alike(
        [_kind(latent if i in attends else delta, ffn, 2 * hidden) for i, ffn in enumerate(ffns, 1)]
    )


Family = Callable[[Fields], Layers]

FAMILIES: tuple[tuple[tuple[str, ...], Family], ...] = (
    (
        (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "GemmaForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "Phi3ForCausalLM",
        ),
        _llama,
    ),
    (("OPTForCausalLM",), _opt),
    (("MixtralForCausalLM",), _mixtral),
    (("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"), _qwen_experts),
    (("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"), _deepseek),
    (("Qwen3NextForCausalLM",), _qwen_next),
    (("KimiLinearForCausalLM",), _kimi_linear),
)
