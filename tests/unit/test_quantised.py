"""What Transformer Engine quantises, gathers and transposes, against bytes counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.ops import Collective, Elementwise, GroupedMatMul, MatMul, Op, collectives
from cost_models.step import price_layer
from hardware_profiles.loader import load_cluster, load_stack
from planner.models.reader import read_model
from planner.request import Request
from planner.specs import JobSpec

ONE = np.ones(1, dtype=np.int64)
TOKENS, TP = 4096, 4
H, QKV, HEADS, INNER = 8192, 10240, 8192, 28672
"""Llama 3 70B: hidden, queries with keys and values, queries, feed-forward."""


def asked(stack: str, cluster: str, precision: str, model: str = "llama-3-70b") -> Request:
    job = JobSpec(sequence_length=TOKENS, global_batch=32, precision=precision)  # type: ignore[arg-type]
    return Request(read_model(model), load_cluster(cluster), job, load_stack(stack))


def shard(tp: int = TP, *, sp: bool = True) -> Shard:
    return Shard(
        sequence=TOKENS, microbatch=ONE, tp=tp * ONE, cp=ONE, ep=ONE, etp=ONE,
        sequence_parallel=np.array([sp]), cp_kind=0 * ONE,
    )  # fmt: skip


def ops(request: Request, place: Shard, kind: str | None = None) -> dict[str, Op]:
    workload = request.workload
    return {op.name: op for op in workload.kinds[kind or workload.layers[0]].ops(place)}


def moved(op: Op) -> tuple[float, float]:
    """Bytes per thousand that quantising moves, forward and backward."""
    assert isinstance(op, MatMul | GroupedMatMul)
    assert op.quantised is not None
    sides = (op.quantised.forward_bytes, op.quantised.backward_bytes)
    forward, backward = (float(np.ravel(np.asarray(side))[0]) for side in sides)
    return forward, backward


def gathered(op: Op) -> tuple[int, int]:
    assert isinstance(op, Collective)
    sizes = (np.ravel(np.asarray(each))[0] for each in (op.forward_bytes, op.backward_bytes))
    forward, backward = (int(size) for size in sizes)
    return forward, backward


X, R = TOKENS, TOKENS // TP
WIDE = {
    # Delayed: the norm writes 8 bits; transposed copies of what is gathered; 2 + 1 + 1 for the
    # rest, 2 + 1 for what is gathered.
    ("megatron-core", "dgx-h100", "fp8"): {
        "qkv": (0, 2 * X * H + 4 * X * QKV / TP),
        "proj": (4 * X * HEADS / TP, 3 * R * H + 2 * X * H),
        "fc1": (0, 2 * X * H + 4 * X * 2 * INNER / TP),
        "fc2": (4 * X * INNER / TP, 3 * R * H + 2 * X * H),
    },
    # One scale per tensor: what the norm wrote is read once (its kernel has the largest value), all
    # else twice; the output projection's 16-bit input is quantised twice.
    ("megatron-bridge-fp8", "dgx-h100", "fp8"): {
        "qkv": (3 * R * H, 2 * X * H + 6 * X * QKV / TP),
        "proj": (5 * X * HEADS / TP, 5 * R * H + 2 * X * H + 6 * X * HEADS / TP),
        "fc1": (3 * R * H, 2 * X * H + 6 * X * 2 * INNER / TP),
        "fc2": (6 * X * INNER / TP, 5 * R * H + 2 * X * H),
    },
    # Blackwell's products need no transposed copy.
    ("megatron-core", "dgx-b200", "fp8"): {
        "qkv": (0, 3 * X * QKV / TP),
        "proj": (3 * X * HEADS / TP, 3 * R * H),
        "fc1": (0, 3 * X * 2 * INNER / TP),
        "fc2": (3 * X * INNER / TP, 3 * R * H),
    },
    # Blocks: 33 bytes of 32 elements by rows and by columns, at once.
    ("megatron-bridge-mxfp8", "dgx-b200", "fp8"): {
        "qkv": (4.0625 * R * H, 4.0625 * X * QKV / TP),
        "proj": (3.03125 * X * HEADS / TP, 4.0625 * R * H + 3.03125 * X * HEADS / TP),
        "fc1": (4.0625 * R * H, 4.0625 * X * 2 * INNER / TP),
        "fc2": (4.0625 * X * INNER / TP, 4.0625 * R * H),
    },
    # 9 bytes of 16 elements, and the tensor's largest value first.
    ("megatron-bridge-fp8", "dgx-b200", "nvfp4"): {
        "qkv": (5.125 * R * H, 5.125 * X * QKV / TP),
        "proj": (4.5625 * X * HEADS / TP, 5.125 * R * H + 4.5625 * X * HEADS / TP),
        "fc1": (5.125 * R * H, 5.125 * X * 2 * INNER / TP),
        "fc2": (5.125 * X * INNER / TP, 5.125 * R * H),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", list(WIDE), ids="-".join)
def test_bytes_of_quantising(case: tuple[str, str, str]) -> None:
    found = ops(asked(*case), shard())
    for name, expected in WIDE[case].items():
        assert moved(found[name]) == pytest.approx(expected), name


@pytest.mark.parametrize(("tp", "sp"), [(1, True), (1, False), (4, False)])
def test_what_is_not_gathered_is_transposed_where_it_is_quantised(tp: int, sp: bool) -> None:
    """But for the norm's output, which only the norm's kernel sees in 16 bits."""
    found = ops(asked("megatron-core", "dgx-h100", "fp8"), shard(tp, sp=sp))
    assert moved(found["qkv"]) == (0, 2 * X * H + 4 * X * QKV / tp)
    assert moved(found["proj"]) == (4 * X * HEADS / tp, 4 * X * H)
    found = ops(asked("megatron-bridge-fp8", "dgx-h100", "fp8"), shard(tp, sp=sp))
    assert moved(found["fc1"]) == (4 * X * H, 6 * X * 2 * INNER / tp)


@pytest.mark.parametrize(
    ("stack", "cluster", "precision", "share", "gradient"),
    [
        ("megatron-core", "dgx-h100", "bf16", 1, 1),
        ("megatron-core", "dgx-h100", "fp8", 1 / 2, 1 / 2),
        ("megatron-bridge-fp8", "dgx-h100", "fp8", 1 / 2, 1 / 2),
        # Both products of the backward read the gradient, by rows and by columns.
        ("megatron-bridge-mxfp8", "dgx-b200", "fp8", 33 / 64, 33 / 32),
        ("megatron-bridge-fp8", "dgx-b200", "nvfp4", 9 / 32, 9 / 16),
        # torchtitan's DTensor gathers 16 bits unless a stack says so.
        ("torchtitan", "dgx-h100", "fp8", 1, 1),
    ],
)
def test_bytes_gathered(
    stack: str, cluster: str, precision: str, share: float, gradient: float
) -> None:
    """Inputs forward and again for their weights' gradients; reductions stay in 16 bits."""
    request, full = asked(stack, cluster, precision), 2 * X * H
    found = ops(request, shard())
    for name in ("qkv", "fc1"):
        forward, backward = gathered(found[f"{name}.gather"])
        assert forward == full * share
        assert backward == (0 if stack == "torchtitan" else full * share)
        assert gathered(found[f"{name}.scatter"]) == (0, full)
    for name in ("proj", "fc2"):
        assert gathered(found[f"{name}.scatter"]) == (full, full * gradient)
    head = {op.name: op for op, _ in collectives(request.workload.head.ops(shard()))}
    assert gathered(head["lm_head.gather"])[0] == full


@pytest.mark.parametrize(
    ("stack", "cluster", "precision", "reduced"),
    [
        ("megatron-core", "dgx-h100", "fp8", False),
        ("megatron-bridge-fp8", "dgx-h100", "fp8", True),
        ("megatron-bridge-mxfp8", "dgx-b200", "fp8", False),
        ("megatron-bridge-fp8", "dgx-b200", "nvfp4", True),
        ("megatron-bridge-fp8", "dgx-h100", "bf16", False),
    ],
)
def test_ranks_agree_on_a_scale_that_comes_from_the_tensor(
    stack: str, cluster: str, precision: str, reduced: bool
) -> None:
    found = ops(asked(stack, cluster, precision), shard())
    names = {name for name in found if name.endswith(".amax")}
    assert names == (
        {f"{each}.amax" for each in ("qkv", "proj", "fc1", "fc2")} if reduced else set()
    )
    for name in names:
        inward = name.startswith(("qkv", "fc1"))
        assert gathered(found[name]) == ((4, 0) if inward else (0, 4))


def test_norms_write_8_bits_where_scales_are_known() -> None:
    """2 bytes read and one written of each element; 2 and 2 without, and before routers."""

    def forward(*case: str, model: str = "llama-3-70b", norm: str = "norm1") -> float:
        found = ops(asked(*case, model=model), shard())[norm]
        assert isinstance(found, Elementwise)
        return float(np.ravel(np.asarray(found.forward_bytes))[0])

    assert forward("megatron-core", "dgx-h100", "fp8") == 3 * R * H
    assert forward("megatron-core", "dgx-h100", "bf16") == 4 * R * H
    assert forward("megatron-bridge-fp8", "dgx-h100", "fp8") == 4 * R * H
    routed = forward("megatron-core", "dgx-h100", "fp8", model="mixtral-8x7b")
    assert routed == 4 * R * 4096
    assert forward(
        "megatron-core", "dgx-h100", "fp8", model="mixtral-8x7b", norm="norm0"
    ) == 3 * R * 4096  # fmt: skip


def test_experts_gather_nothing() -> None:
    found = ops(asked("megatron-core", "dgx-h100", "fp8", model="mixtral-8x7b"), shard(1))
    rows = 2 * X  # top 2 of 8, all on this rank
    assert moved(found["expert_fc1"]) == (4 * rows * 4096, 4 * rows * 2 * 14336)
    assert moved(found["expert_fc2"]) == (4 * rows * 14336, 4 * rows * 4096)


def test_time_is_what_the_bytes_and_kernels_take() -> None:
    """Delayed against each operand whole: the difference is that of the bytes, less two kernels'
    latency in the forward (both norms write 8 bits) and more four in the backward (a transposed
    copy for each product); no call of the host beyond one per quantised operand."""
    request = asked("megatron-core", "dgx-h100", "fp8")
    plain = request.stack.model_copy(update={"quantisation": None})
    request_plain = Request(request.model, request.cluster, request.job, plain)
    place = shard()
    (new, old) = (
        price_layer(each.workload.kinds[each.workload.layers[0]], place, each.machine).terms
        for each in (request, request_plain)
    )
    device = request.machine.device
    rate = device.memory_bandwidth.si * device.kernels.memory_bound_efficiency.si
    latency = device.kernels.memory_bound_latency.si
    before = 4 * X * (H + HEADS / TP + H + INNER / TP), 4 * X * (QKV + 2 * INNER) / TP + 8 * X * H
    widths = WIDE[("megatron-core", "dgx-h100", "fp8")].values()
    after = sum(each[0] for each in widths) - 2 * R * H, sum(each[1] for each in widths)
    for phase, bytes_before, bytes_after, kernels in (
        ("forward", before[0], after[0], -2), ("backward", before[1], after[1], 4),
    ):  # fmt: skip
        found = new["memory_bound"][phase][0] - old["memory_bound"][phase][0]
        assert found == pytest.approx((bytes_after - bytes_before) / rate + kernels * latency)
    assert (new["tp_comm"]["forward"] < old["tp_comm"]["forward"]).all()
    assert (new["tp_comm"]["backward"] < old["tp_comm"]["backward"]).all()
