"""The part of the accuracy page that is about the order of layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import judgement
import readings
import replays
from words import percent, table

from planner.studies.ranking import ranking
from planner.studies.statistics import statistics

DATA = Path(__file__).parent / "data"
SWEEP = readings.SWEEP
RUNS = DATA / "runs.csv"
REDUCTIONS = DATA / "vtrain_all_reduce.csv"
TIMES = tuple(1e-4 * step for step in range(10, 61))
"""Seconds that a layer's launches may take."""


def ranked(rows: Sequence[judgement.Row]) -> list[str]:
    """The section on ranking: a row per source."""
    lines = [
        "Sweeps: runs of one release of a source that differ in their layout only. Tau is "
        "Kendall's, averaged",
        "over sweeps; the regret is what taking the best predicted of the measured layouts costs. "
        "Left-out",
        "predictions. *Releases mixed*: runs of all releases of a source together, whose layouts "
        "differ together",
        "with the software that ran them. The versions that a run's place names are its release.",
        "",
    ]
    alone, mixed = judgement.ranked(rows), judgement.ranked(rows, mixed=True)
    found = [
        (source, *_ranked(alone.get(source)), *_ranked(each)) for source, each in mixed.items()
    ]
    columns = ("sweeps", "layouts", "tau", "mean regret", "worst regret")
    header = ("source", *columns, "releases mixed: sweeps", *columns[1:])
    return [*lines, *table(header, found), "", *_releases(rows)]


def _releases(rows: Sequence[judgement.Row]) -> list[str]:
    """What sweeps over releases hold beside layouts, for the source that has no others."""
    source = "nvidia-dgxc"
    moved = judgement.drift(rows)[source]
    last = judgement.ranked(judgement.newest(rows), mixed=True)[source]
    span = [percent(end, sign=True) for end in (min(moved), max(moved))]
    return [
        f"{source} has no two layouts in one release. From one release to the next the same "
        "layout of it took",
        f"{span[0]} to {span[1]} ({len(moved)} pairs, half of them beyond "
        f"{percent(median(map(abs, moved)))}), which its regrets hold",
        "beside the choice of a layout. By the newest run of each layout the regret is "
        f"{percent(last['mean_regret'])} on",
        f"average, {percent(last['worst_regret'])} at worst. The worst six are Llama 70B in fp8: "
        "tp 4 pp 4 cp 2 until v25.02, tp 4 pp 8 from",
        "v25.04.02 on, when NeMo 24.12's Hydra script on The Pile also became NeMo 25.02's recipe "
        "on synthetic",
        "data with `enable_vboost` (`llama3.1/configure.sh`, `llama3.1/pretrain_llama31.py`). In "
        "bf16 the runs kept",
        "their layout and moved by -1.4 % to +0.3 %. That says little of fp8: from v24.11.1 to "
        "v25.02, with the layout",
        "kept in both, bf16 moved by -0.9 % to -0.2 % and fp8 by -5.0 % to -3.5 %. How much of the "
        "gain is the layout's",
        "cannot be told; the prediction has this pair in the wrong order.",
    ]


def taken_apart(rows: Sequence[judgement.Row]) -> list[str]:
    """What the largest sweep is made of."""
    found = readings.steps(rows, RUNS)
    straight = readings.straightness(found)
    read, own = (readings.layer_times(found, field) for field in ("measured_s", "left_out_s"))
    pairs = readings.ordered(found)
    against = sum(read[less] > read[more] for less, more in pairs)
    nearest = readings.nearest_in_order(read, pairs)
    lines = [
        f"{len(found)} step times, but {len(read)} readings. Among runs of one hidden size, tensor",
        "parallelism, microbatch size and degrees, the step is a straight line in layers and",
        f"microbatches to {straight['median']:.1e} (median of {straight['runs']:.0f} runs) and "
        f"{straight['p90']:.1e} (P90): straighter",
        "than runs repeat that are clocked one by one. One time of a layer and microbatch is in",
        "all of them. Milliseconds, as read (as predicted):",
        "",
    ]
    sizes = sorted({cell[2] for cell in read})
    places = sorted({cell[:2] for cell in read})
    cells = [
        (str(hidden), str(tp), *(_layer_ms(read, own, (hidden, tp, mbs)) for mbs in sizes))
        for hidden, tp in places
    ]
    lines += table(("hidden", "tp", *(f"microbatch {mbs}" for mbs in sizes)), cells)
    table_ns = replays.table_of(REDUCTIONS)
    launches = replays.launches(found, read, table_ns)
    fixed = replays.regrets_at(found, read, table_ns, launches, TIMES[0])
    worst = [max(replays.regrets_at(found, read, table_ns, launches, t)) for t in TIMES]
    least, most = min(worst), max(worst)
    lines += [
        "",
        f"Of {len(pairs)} pairs in which one has more work at the same tensor parallelism, "
        f"{against} take less time.",
        "",
        *_replayed(found, table_ns),
        "",
        f"A layer is traced without collectives, so {len(launches.cells)} of the layers that wait "
        "for the host launch the same",
        f"kernels; their single traces take {1e3 * launches.low_s:.2f} to "
        f"{1e3 * launches.high_s:.2f} ms, in no order of work. No price that is the same for",
        "the same launches can follow that: "
        f"{len(fixed)} sweeps hold nothing but such layers, and with one time for these",
        f"launches, any from {1e3 * TIMES[0]:.0f} to {1e3 * TIMES[-1]:.0f} ms, and all else as "
        "read, the layouts taken in them cost",
        f"{percent(least)} at worst."
        if least == most
        else f"{percent(least)} to {percent(most)} at worst.",
        "",
        "The ranking follows from the layer times alone:",
        "",
    ]
    cases = (
        ("as predicted", own),
        ("as read, the same launches at the mean of their traces", launches.equal),
        ("as read, moved as little as puts all pairs in order", nearest),
        ("as read", read),
    )
    outcomes = [(words, *_ranked(readings.ranked_with(found, times))) for words, times in cases]
    columns = ("layer times", "sweeps", "layouts", "tau", "mean regret", "worst regret")
    return lines + table(columns, outcomes)


def _replayed(found: Sequence[readings.Step], listed: replays.Table) -> list[str]:
    """What shows that the steps are a predictor's sums."""
    added, fitted = replays.reductions(found), replays.lines(found)
    hops, depths = replays.hops(fitted), replays.by_depth(fitted)
    same = sum(len(set(each)) == 1 for each in added.values())
    known = [place for place in added if place in listed]
    equal = sum(set(added[place]) == {listed[place]} for place in known)
    few, many = replays.shorter_for_more(added)
    return [
        "They are sums that vTrain's own predictor makes (VIA-Research/vTrain@f8dda84, "
        "`src/predictor.py`) of one",
        "traced step per layer time, not steps that were clocked, though `data/README.md` there "
        "calls them measured:",
        "",
        f"- what data parallelism adds to a step: {sum(map(len, added.values()))} pairs of runs, "
        f"{len(added)} sizes of gradients in whole MiB, and",
        f"  {same} of the sizes add one time to the nanosecond, whatever the model; of the "
        f"{len(known)} that were looked up, {equal} are the",
        "  entry of `trace/a100/AR_GPU*_LUT`. Beyond the table's last 1,024 MiB a bandwidth "
        "replaces it:",
        f"  {many[1]} MiB over {many[0]} devices take {added[many][0] / 1e6:.3f} ms, {few[1]} MiB "
        f"{added[few][0] / 1e6:.3f} ms",
        f"- what two stages more add beside layers: {len(hops)} cells, four times "
        "2 x bytes / (800 x 2^30 / 32 per second), to",
        f"  {max(map(abs, hops)):.0e}",
        f"- a layer and microbatch takes the same in a pipeline as without one ({len(depths)} "
        f"cases, to {max(map(abs, depths)):.0e}): the",
        "  predictor runs forwards again in all stages but the last, so here it ran none again, "
        "though the",
        "  configurations beside the runs (and the runs' `recompute`) say full recomputation; "
        "priced without,",
        "  by the constants that ship:",
        f"  {_priced(replays.without_recomputation(found, RUNS))}",
    ]


def _priced(found: Sequence[readings.Step]) -> str:
    errors = statistics(step.row.error for step in found)
    assert errors is not None
    rank = ranking([(s.row.sweep, s.row.layout, s.row.left_out_s, s.row.measured_s) for s in found])
    each = rank[readings.SWEEP]
    return (
        f"median error {percent(errors['median'])}, bias {percent(errors['bias'])}, "
        f"mean regret {percent(each['mean_regret'])}, worst {percent(each['worst_regret'])}"
    )


def _layer_ms(
    read: Mapping[readings.Cell, float], own: Mapping[readings.Cell, float], cell: readings.Cell
) -> str:
    return f"{1e3 * read[cell]:.2f} ({1e3 * own[cell]:.2f})" if cell in read else ""


def _ranked(each: Mapping[str, Any] | None) -> tuple[str, ...]:
    if each is None:
        return "0", "", "", "", ""
    tau = "" if each["tau"] is None else f"{each['tau']:.2f}"
    regrets = percent(each["mean_regret"]), percent(each["worst_regret"])
    return str(each["sweeps"]), str(each["layouts"]), tau, *regrets
