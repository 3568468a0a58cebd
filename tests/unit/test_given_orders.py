"""Orders of work of one's own: what PyTorch writes, what cannot run, and what they cost.

``tests/data/schedules`` holds PyTorch's own schedules as files (``benchmarks/schedules``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cost_models.layout import DELAYED, NAMED, OVER_PIPELINE, V_SHAPED, Schedule, stage_of
from cost_models.leaf import Completion, stage_costs
from cost_models.orders import rank_order
from cost_models.peaks import peaks
from cost_models.rounds import round_sizes
from cost_models.schedule import Durations, live_peaks, simulate
from cost_models.step_time import simulate_step
from planner.errors import InputError
from planner.jobs import read_job
from planner.pipeline import evaluate, plan, read_request
from planner.schedule_csv import given_order
from planner.specs import JobSpec
from tests.oracle.leaves import draw_leaf

FILES = Path(__file__).parents[1] / "data" / "schedules"
NAMES: dict[str, Schedule] = {
    "Interleaved1F1B": "interleaved",
    "InterleavedZeroBubble": "interleaved_zero_bubble",
    "LoopedBFS": "looped_bfs",
    "ZBVZeroBubble": "zbv",
    "DualPipeV": "dualpipev",
}
JOB: dict[str, Any] = {"stack": "torchtitan", "global_batch": 64, "sequence_length": 4096}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_pytorchs_files_cost_what_its_schedules_do(name: str, recompute: str) -> None:
    given = read_request(
        "llama-3.1-8b", "dgx-h100:4", None, {**JOB, "schedule_csv": str(FILES / f"{name}.csv")}
    )
    named = read_request("llama-3.1-8b", "dgx-h100:4", None, JOB)
    same = {"zero_stage": 2, "recompute": recompute}
    ours = evaluate(given, same)
    theirs = evaluate(
        named, {**same, "pp": 4, "vpp": 2, "microbatch_size": 1, "schedule": NAMES[name]}
    )
    assert ours.prediction == theirs.prediction
    assert [stage.chunks for stage in ours.layout.stages] == [
        stage.chunks for stage in theirs.layout.stages
    ]


@pytest.mark.parametrize(
    "schedule", [name for name in NAMED if name not in (*OVER_PIPELINE, *DELAYED)]
)
def test_any_named_schedule_written_out_costs_the_same(schedule: Schedule) -> None:
    """But those whose transfers run beside a pass: an order has no word for that."""
    rng = Random(f"written out {schedule}")
    compared = 0
    for _ in range(60):
        pp, m = rng.randint(2, 4), rng.randint(1, 9)
        vpp = 1 if schedule in ("gpipe", "1f1b") else 2 if schedule in V_SHAPED else 3
        sizes = round_sizes("any", pp, m) if "interleaved" in schedule else (0,)
        if not sizes or (schedule == "dualpipev" and m < 2 * pp):
            continue
        size = rng.choice(sizes)
        layers = pp * vpp + 3
        leaf = draw_leaf(rng, schedule=schedule, pp=pp, vpp=vpp, microbatches=m, layers=layers)
        leaf = replace(leaf, round_size=size)
        rows = tuple(
            ",".join(
                f"{stage_of(schedule, pp, rank, a.chunk)}{'FBIW'[a.work]}{a.microbatch}"
                for a in rank_order(schedule, pp, vpp, m, rank, size)
            )
            for rank in range(pp)
        )
        order = given_order(rows)
        assert (order.pp, order.vpp, order.microbatches) == (pp, vpp, m)
        cuts = sorted(rng.choices(range(layers + 1), k=leaf.stages - 1))
        bounds = (0, *cuts, layers)
        completion = Completion(bounds, (rng.choice((("none", 0), ("full", 2))),) * leaf.stages)
        other = replace(leaf, schedule=order.schedule, order=order, round_size=0)
        named, given = stage_costs(leaf, completion), stage_costs(other, completion)
        assert simulate_step(leaf, named).total_ns == simulate_step(other, given).total_ns
        assert peaks(leaf, named) == peaks(other, given)
        compared += 1
    assert compared >= 20


def test_one_stage_per_rank_with_halves() -> None:
    """Two ranks by hand, every pass 1, nothing for transfers.

    Rank 1 starts at 1 and is never idle: 9 passes, to 10; its I at 3, 6 and 9. Rank 0 ends its
    forwards at 3, then I0 W0 at 3 to 5, I1 W1 at 6 to 8, I2 W2 at 9 to 11. Alive, waiting for W,
    ended by W: rank 0 has (3, 1, 0) after I0, (2, 0, 1) after W0 and no more; rank 1 (1, 1, 0)
    after each I, (1, 0, 1) after F1.
    """
    rows = ("0F0,0F1,0F2,0I0,0W0,0I1,0W1,0I2,0W2", "1F0,1I0,1W0,1F1,1I1,1W1,1F2,1I2,1W2")
    order = given_order(rows)
    assert (order.schedule, order.pp, order.vpp, order.microbatches) == ("given_split", 2, 1, 3)
    shape = (order.schedule, 2, 1, 3)
    times = Durations([1, 1], [2, 2], [1, 1], [1, 1])
    assert simulate(*shape, times, 0, given=order).finish_ns == (11, 10)
    assert live_peaks(*shape, 0, given=order) == ((2, 0, 1), (3, 1, 0))
    assert live_peaks(*shape, 1, given=order) == ((1, 0, 1), (1, 1, 0))


FAULTS = {
    "0F0,0B0": ("1 row: a pipeline has two ranks", "one row of actions"),
    "0F0,0B0\n\n1F0,1B0": ("row 2: no actions", "remove the empty row"),
    "0F0,0X0\n1F0,1B0": ("row 1, column 2: '0X0' is no action", "3F0 is a forward"),
    "0F0,,0SEND_F0,0B0\n1F0,1B0": ("row 1, column 3: '0SEND_F0'", "compute_only"),
    "0F0,0B0\n1F0,1B0,0F0": ("row 2, column 3: 0F0: virtual stage 0 is on rank 0", "one rank"),
    "0F0,0B0\n2F0,2B0": ("no action of virtual stage 1", "numbered from 0"),
    "1F0,1B0\n0F0,0B0": ("row 1: rank 0 holds virtual stages 1 of 2", "on a V"),
    "0F0,2F0,2B0,0B0\n1F0,1B0": ("row 2: rank 1 holds virtual stages 1 of 3", "as many on each"),
    "0F0,0B0,0B0\n1F0,1B0": ("row 1, column 3: 0B0 is a second time", "once"),
    "0F0,0B0,0I0\n1F0,1B0": ("column 3: 0I0 is a second time", "once"),
    "0B0,0F0\n1F0,1B0": ("row 1, column 1: 0B0 comes before 0F0", "then B"),
    "0F0,0W0\n1F0,1B0": ("0W0 comes before 0I0", "I and later W"),
    "0F0,0I0\n1F0,1B0": ("there is no 0W0", "microbatches 0 to 0"),
    "0F0,0F1,0B0,0B1\n1F0,1B0": ("there is no 1F1", "microbatches 0 to 1"),
    "0F0,0F1,0B1,0B0\n1F1,1F0,1B1,1B0": ("row 2, column 1: 1F1 is forward number 0", "in their"),
    "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1": ("row 1, column 2: 0B0 waits for 1B0 forever", "earlier"),
    "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1F1,1B0,1B1": ("0B0 waits for 1B0", "earlier"),
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
def test_what_cannot_run_is_refused_with_its_place(text: str, tmp_path: Path) -> None:
    message, hint = FAULTS[text]
    path = tmp_path / "own.csv"
    path.write_text(text + "\n")
    with pytest.raises(InputError) as caught:
        read_job(None, {"schedule_csv": str(path)})
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_job_holds_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("0F0 , ,(0F1;0B0)OVERLAP_F_B,0B1\n,1F0,1B0,1F1,1B1\n")
    job = read_job(None, {"schedule_csv": str(path)})
    assert job.schedule_csv is None
    assert job.schedule_actions == ("0F0,(0F1;0B0)OVERLAP_F_B,0B1", "1F0,1B0,1F1,1B1")
    again = JobSpec.model_validate(job.model_dump(mode="json"))
    assert given_order(again.schedule_actions) == given_order(job.schedule_actions)
    with pytest.raises(InputError, match="both give the order"):
        read_job(None, {"schedule_csv": str(path), "schedule_actions": job.schedule_actions})
    with pytest.raises(InputError, match="both name the order"):
        read_job(None, {"schedule_csv": str(path), "constraints": {"schedule": "1f1b"}})
    with pytest.raises(InputError, match=r"none\.csv: cannot be read"):
        read_job(None, {"schedule_csv": str(tmp_path / "none.csv")})


def request_of(name: str, stack: str = "torchtitan") -> Any:
    own = {**JOB, "stack": stack, "schedule_csv": str(FILES / f"{name}.csv")}
    return read_request("llama-3.1-8b", "dgx-h100:4", None, own)


def test_the_search_keeps_what_the_order_fixes() -> None:
    result = plan(request_of("ZBVZeroBubble"))
    layout = result.layout
    assert (layout.schedule, layout.pp, layout.vpp) == ("given_v_split", 4, 2)
    assert layout.num_microbatches == 8
    assert result.certificate.status == "optimal"
    removed = result.certificate.removed
    assert removed["the given order has pp = 4"] > 0
    assert removed["the given order has 8 microbatches"] > 0


def test_layouts_of_another_shape_are_refused() -> None:
    request = request_of("Interleaved1F1B")
    for layout, message in (
        ({"pp": 2}, "pp = 2, but the given order has 4"),
        ({"vpp": 1}, "vpp = 1, but the given order has 2"),
        ({"microbatch_size": 2}, "num_microbatches = 4, but the given order has 8"),
        ({"schedule": "given_v"}, "but the given order is given"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(request, layout)
    assert evaluate(request, {"schedule": "1f1b", "pp": 2}).layout.schedule == "1f1b"
    plain = read_request("llama-3.1-8b", "dgx-h100:4", None, JOB)
    with pytest.raises(InputError, match="none is given") as caught:
        evaluate(plain, {"schedule": "given", "pp": 2})
    assert "--schedule-csv" in str(caught.value.hint)


def test_stacks_say_what_of_it_they_run() -> None:
    assert request_of("Interleaved1F1B", "torchtitan-compile").order is not None
    with pytest.raises(InputError, match="does not split backwards"):
        request_of("ZBVZeroBubble", "torchtitan-compile")
    with pytest.raises(InputError, match="runs no order of work of one's own") as caught:
        request_of("Interleaved1F1B", "megatron-core")
    assert "--stack torchtitan" in str(caught.value.hint) or "nemo-automodel" in str(
        caught.value.hint
    )
