"""The shape of a model as Megatron-Core flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.models.spec import AttentionSpec, LatentAttentionSpec, MlpSpec, MoeSpec
from planner.workload import SIGMOID_ROUTERS

if TYPE_CHECKING:
    from hardware_profiles.schema import StackSpec
    from planner.exports.launch import Flag
    from planner.models.spec import BlockSpec, ModelSpec
    from planner.specs import JobSpec

_GELU = {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_tanh"}
_SILU = {"silu", "swish"}
_DISPATCHER: dict[str, tuple[Flag, ...]] = {
    "alltoall": (("--moe-token-dispatcher-type", "alltoall"),),
    "allgather": (("--moe-token-dispatcher-type", "allgather"),),
    # DeepEP takes routing probabilities in fp32 only.
    "deepep": (
        ("--moe-token-dispatcher-type", "flex"),
        ("--moe-enable-deepep",),
        ("--moe-router-dtype", "fp32"),
    ),
}


def model_flags(
    model: ModelSpec, job: JobSpec, stack: StackSpec, *, mtp_layers: int
) -> tuple[list[Flag], list[str], list[str]]:
    """Flags of the model's shape, what has no flag, and what the reader should know."""
    blocks = [model.blocks[run.block] for run in model.layers]
    mixers = list(dict.fromkeys(block.mixer for block in blocks))
    dense = _only(block.feed_forward for block in blocks if isinstance(block.feed_forward, MlpSpec))
    moe = _only(block.feed_forward for block in blocks if isinstance(block.feed_forward, MoeSpec))
    problems = _problems(model, blocks)
    if problems:
        return [], problems, []
    flags: list[Flag] = [
        ("--num-layers", str(model.layer_count)),
        ("--hidden-size", str(model.hidden)),
        *_mixer_flags(model, mixers[0]),
        *_feed_forward_flags(model, stack, dense, moe),
        *_vocabulary_flags(model, job, stack),
        *_norm_and_bias_flags(model, mixers[0], dense, moe),
    ]
    if mtp_layers:
        flags.append(("--mtp-num-layers", str(mtp_layers)))
    if not (model.dropout if job.dropout is None else job.dropout):
        flags += [("--attention-dropout", "0.0"), ("--hidden-dropout", "0.0")]
    if "cross_entropy" in stack.fused:
        flags.append(("--cross-entropy-loss-fusion",))
    return flags, [], _notes(model, job, mixers[0], dense)


def _only(specs: object) -> object | None:
    """The one feed-forward among ``specs``; ``None`` when there is none or more than one kind."""
    found = list(dict.fromkeys(specs))  # type: ignore[call-overload]
    return found[0] if len(found) == 1 else None


def _mixer_flags(model: ModelSpec, mixer: object) -> list[Flag]:
    flags: list[Flag] = []
    if isinstance(mixer, AttentionSpec):
        flags.append(("--num-attention-heads", str(mixer.heads)))
        if mixer.kv_heads < mixer.heads:
            flags += [("--group-query-attention",), ("--num-query-groups", str(mixer.kv_heads))]
        if mixer.heads * mixer.head_dim != model.hidden:
            flags.append(("--kv-channels", str(mixer.head_dim)))
        if mixer.window is not None:
            flags.append(("--window-size", f"{mixer.window - 1},0"))
        if mixer.qk_norm == "per_head":
            flags.append(("--qk-layernorm",))
    if isinstance(mixer, LatentAttentionSpec):
        flags += [("--num-attention-heads", str(mixer.heads)), ("--multi-latent-attention",)]
        if mixer.q_lora_rank is not None:
            flags.append(("--q-lora-rank", str(mixer.q_lora_rank)))
        flags += [
            ("--kv-lora-rank", str(mixer.kv_lora_rank)),
            ("--qk-head-dim", str(mixer.qk_nope_head_dim)),
            ("--qk-pos-emb-head-dim", str(mixer.qk_rope_head_dim)),
            ("--v-head-dim", str(mixer.v_head_dim)),
            ("--qk-layernorm",),
        ]
    return flags


def _feed_forward_flags(
    model: ModelSpec, stack: StackSpec, dense: object, moe: object
) -> list[Flag]:
    flags: list[Flag] = []
    if isinstance(dense, MlpSpec):
        flags.append(("--ffn-hidden-size", str(dense.intermediate)))
    elif isinstance(moe, MoeSpec):
        flags.append(("--ffn-hidden-size", str(moe.intermediate)))
    either = dense if isinstance(dense, MlpSpec) else moe
    if isinstance(either, MlpSpec | MoeSpec):
        if either.gated:
            flags.append(("--swiglu",))
        elif either.activation == "squared_relu":
            flags.append(("--squared-relu",))
    if not isinstance(moe, MoeSpec):
        return flags
    flags += [
        ("--num-experts", str(moe.experts)),
        ("--moe-router-topk", str(moe.top_k)),
        ("--moe-ffn-hidden-size", str(moe.intermediate)),
        ("--moe-grouped-gemm",),
        *_DISPATCHER[stack.moe_dispatcher["default"]],
    ]
    if moe.routing_groups > 1:
        flags += [
            ("--moe-router-num-groups", str(moe.routing_groups)),
            ("--moe-router-group-topk", str(moe.routing_group_limit)),
        ]
    if moe.shared_intermediate:
        flags.append(("--moe-shared-expert-intermediate-size", str(moe.shared_intermediate)))
    if moe.shared_gate:
        flags.append(("--moe-shared-expert-gate",))
    if model.family in SIGMOID_ROUTERS:
        flags += [
            ("--moe-router-score-function", "sigmoid"),
            ("--moe-router-enable-expert-bias",),
        ]
    if dense is not None:
        flags.append(("--moe-layer-freq", _layer_pattern(model)))
    return flags


def _layer_pattern(model: ModelSpec) -> str:
    """Which layers are MoE, as the list expression that ``--moe-layer-freq`` evaluates."""
    runs = [
        (int(isinstance(model.blocks[run.block].feed_forward, MoeSpec)), run.count)
        for run in model.layers
    ]
    return "(" + "+".join(f"[{is_moe}]*{count}" for is_moe, count in runs) + ")"


def _vocabulary_flags(model: ModelSpec, job: JobSpec, stack: StackSpec) -> list[Flag]:
    sequence = job.sequence_length or model.max_sequence or model.position_embeddings
    learned = model.position_embeddings > 0
    flags: list[Flag] = [
        ("--seq-length", str(sequence)),
        ("--max-position-embeddings", str(model.position_embeddings if learned else sequence)),
        ("--position-embedding-type", "learned_absolute" if learned else "rope"),
        ("--vocab-size", str(model.vocab)),
        ("--make-vocab-size-divisible-by", str(stack.vocab_divisor)),
    ]
    if not model.tied_embeddings:
        flags.append(("--untie-embeddings-and-output-weights",))
    return flags


def _norm_and_bias_flags(model: ModelSpec, mixer: object, dense: object, moe: object) -> list[Flag]:
    flags: list[Flag] = [("--normalization", "RMSNorm" if model.norm == "rms" else "LayerNorm")]
    if not _linear_bias(mixer, dense, moe):
        flags.append(("--disable-bias-linear",))
        if isinstance(mixer, AttentionSpec) and mixer.qkv_bias:
            flags.append(("--add-qkv-bias",))
    return flags


def _linear_bias(mixer: object, dense: object, moe: object) -> bool:
    outs = [mixer.out_bias] if isinstance(mixer, AttentionSpec | LatentAttentionSpec) else []
    if isinstance(dense, MlpSpec):
        outs.append(dense.bias)
    if isinstance(moe, MoeSpec):
        outs.append(moe.expert_bias)
    return any(outs)


def _problems(model: ModelSpec, blocks: list[BlockSpec]) -> list[str]:
    problems = []
    if len({block.mixer for block in blocks}) > 1:
        problems.append("layers with unlike attention")
    for kind, cls in (("MLP", MlpSpec), ("MoE", MoeSpec)):
        if len({b.feed_forward for b in blocks if isinstance(b.feed_forward, cls)}) > 1:
            problems.append(f"layers with unlike {kind} sizes")
    if any(block.mixer is None or block.feed_forward is None for block in blocks):
        problems.append("blocks without attention or feed-forward")
    if any(block.parallel for block in blocks):
        problems.append("attention and MLP in parallel")
    if any(block.norms != 2 for block in blocks):
        problems.append("another number of norms than two in a block")
    if model.embedding_dim not in (None, model.hidden) or model.embedding_norm:
        problems.append("an embedding that is projected or normed")
    if model.head_bias:
        problems.append("a bias in the LM head")
    if model.vision is not None:
        problems.append("a vision tower")
    for block in blocks:
        problems += [p for p in _block_problems(block) if p not in problems]
    return problems


def _block_problems(block: BlockSpec) -> list[str]:
    problems = []
    mixer, ffn = block.mixer, block.feed_forward
    if isinstance(mixer, AttentionSpec) and mixer.qk_norm == "full":
        problems.append("a norm over all query or key heads together")
    if isinstance(mixer, AttentionSpec):
        problems += [
            what
            for what, present in (
                ("attention sinks", mixer.sinks),
                ("chunked attention", mixer.chunk is not None),
                ("a gated attention output", mixer.output_gate),
                ("values that are the keys", mixer.tied_kv),
                ("layers without positions", not mixer.rotary),
            )
            if present
        ]
    elif mixer is not None and not isinstance(mixer, LatentAttentionSpec):
        problems.append(f"{mixer.kind} layers")
    if isinstance(ffn, MlpSpec | MoeSpec):
        if ffn.gated and ffn.activation not in _SILU:
            problems.append(f"a gated {ffn.activation} MLP")
        if not ffn.gated and ffn.activation not in _GELU | {"squared_relu", "relu"}:
            problems.append(f"activation {ffn.activation}")
    if (
        isinstance(mixer, AttentionSpec | LatentAttentionSpec)
        and isinstance(ffn, MlpSpec)
        and mixer.out_bias != ffn.bias
    ):
        problems.append("biases in only one of attention output and MLP")
    return problems


def _notes(model: ModelSpec, job: JobSpec, mixer: object, dense: object) -> list[str]:
    notes = ["tokenizer, data, learning rate, checkpoints and train-iters are the script's"]
    if job.document_length is not None:
        notes.append(
            "the plan counts on packed documents that attend to themselves only: the data loader "
            "must pass their boundaries (packed sequence parameters)"
        )
    if model.position_embeddings == 0:
        notes.append("rotary base and scaling do not change the plan: add --rotary-base and such")
    if isinstance(mixer, LatentAttentionSpec):
        notes.append("with latent attention --rope-type is yarn unless the script says rope")
    if isinstance(dense, MlpSpec) and dense.activation == "relu":
        notes.append("the model's ReLU has no flag: the run uses GELU, at the same cost")
    return notes
