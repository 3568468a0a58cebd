"""Orders of work that a user gives as a file: a row of actions for each rank of the pipeline.

The format is that of ``torch.distributed.pipelining`` (torch 2.13.0, ``schedules.py``:
``_PipelineScheduleRuntime._load_csv``, ``compute_only``): ``3F0`` is the forward of microbatch 0 on
virtual stage 3, ``B`` its backward, ``I`` and ``W`` the backward's halves, ``(0F1;3B0)OVERLAP_F_B``
a pair, which PyTorch runs one after the other. Empty cells are idle. What is refused is what
PyTorch refuses, cannot run to its end, or gets wrong: it numbers losses in the order in which the
last stage makes them. Stages lie where torchtitan puts them (``distributed/pipeline_parallel.py``,
``_get_pp_rank_to_stage_indices_mapping``): round and round, or on a V.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cost_models.given_order import GivenOrder
from cost_models.layout import GivenSchedule
from planner.errors import InputError
from planner.specs import JobSpec

WORKS = "FBIW"
"""Passes in the order of ``cost_models.passes.Pass``."""
_ACTION = re.compile(r"(\d{1,6})([FBIW])(\d{1,6})")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
_MOVES = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)\d*")


class _Action(NamedTuple):
    """A pass of a microbatch on a virtual stage, and where it stands in the file, from 1 on."""

    work: str
    stage: int
    microbatch: int
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.stage}{self.work}{self.microbatch}"


_Rows = list[list[tuple[_Action, ...]]]
"""Cells of each rank; a pair is one cell."""


def with_actions(job: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a job with the rows of its ``schedule_csv`` in place of the file's name."""
    named = str(job["schedule_csv"])
    if job.get("schedule_actions"):
        raise InputError(
            f"schedule_csv {named} and schedule_actions both give the order of work",
            hint="give one of them",
        )
    rows = _cells_of(named)
    _order_of(rows, named)
    kept = [",".join(cell.strip() for cell in row if cell.strip()) for row in rows]
    return {**job, "schedule_csv": None, "schedule_actions": kept}


def check_actions(job: JobSpec) -> None:
    """Raise :class:`InputError` for rows of actions that cannot run, or contradict the job."""
    if not job.schedule_actions:
        return
    given_order(job.schedule_actions)
    named = job.constraints.schedule
    if named is not None:
        raise InputError(
            f"--schedule {named} and --schedule-csv both name the order of work",
            hint="leave --schedule out: the file is the schedule",
        )


@lru_cache(maxsize=64)
def given_order(rows: tuple[str, ...]) -> GivenOrder:
    """The order that a job's rows of actions give; raises :class:`InputError` for what cannot
    run."""
    return _order_of([row.split(",") for row in rows], "schedule_actions")


def _cells_of(name: str) -> list[list[str]]:
    from hardware_profiles.documents import MAX_BYTES, decode

    try:
        with Path(name).open("rb") as file:
            text = decode(file.read(MAX_BYTES + 1), where=name)
    except OSError as error:
        raise InputError(
            f"--schedule-csv {name}: cannot be read: {error.strerror}",
            hint="a file with a row of actions for each rank, such as 0F0,0F1,0B0,0B1",
        ) from None
    return list(csv.reader(text.removeprefix("\ufeff").splitlines()))


def _order_of(cells: Sequence[Sequence[str]], where: str) -> GivenOrder:
    rows = _parsed(cells, where)
    home = _homes(rows, where)
    pp, vpp = len(rows), len(home) // len(rows)
    turns = _turns(rows, home, where)
    actions = [[action for cell in row for action in cell] for row in rows]
    microbatches = _check_complete(actions, len(home), where)
    _check_losses(actions[home[-1]], len(home) - 1, where)
    _check_runs(rows, home, where)
    splits = any(action.work == "I" for row in actions for action in row)
    tables = []
    for row in actions:
        chunks = [int(a.stage >= pp) if turns else a.stage // pp for a in row]
        columns = ([WORKS.index(a.work) for a in row], chunks, [a.microbatch for a in row])
        tables.append(np.array(columns, dtype=np.int64).T)
        tables[-1].flags.writeable = False
    text = ";".join(",".join(action.name for action in row) for row in actions)
    names: dict[tuple[bool, bool], GivenSchedule] = {
        (False, False): "given", (False, True): "given_split",
        (True, False): "given_v", (True, True): "given_v_split",
    }  # fmt: skip
    return GivenOrder(
        key=hashlib.sha256(text.encode()).hexdigest(),
        schedule=names[turns, splits],
        pp=pp,
        vpp=vpp,
        microbatches=microbatches,
        ranks=tuple(tables),
    )


def _fault(
    where: str, message: str, *, row: int = 0, column: int = 0, hint: str | None = None
) -> InputError:
    place = f", row {row}" if row else ""
    place += f", column {column}" if column else ""
    return InputError(f"{where}{place}: {message}", hint=hint)


def _parsed(cells: Sequence[Sequence[str]], where: str) -> _Rows:
    rows: _Rows = []
    for row, texts in enumerate(cells, start=1):
        found = [
            _parsed_cell(text.strip(), where, row, column)
            for column, text in enumerate(texts, start=1)
            if text.strip()
        ]
        if not found:
            raise _fault(
                where, f"no actions: every row is a rank, so this would be rank {row - 1}",
                row=row, hint="remove the empty row",
            )  # fmt: skip
        rows.append(found)
    if len(rows) < 2:
        raise _fault(
            where, f"{len(rows)} row{'s' * (len(rows) != 1)}: a pipeline has two ranks or more",
            hint="one row of actions for each rank, such as 0F0,0F1,0B0,0B1",
        )  # fmt: skip
    return rows


def _parsed_cell(text: str, where: str, row: int, column: int) -> tuple[_Action, ...]:
    pair = _PAIR.fullmatch(text)
    found = []
    for part in pair.groups() if pair else (text,):
        match = _ACTION.fullmatch(part.strip())
        if match is None:
            hint = "an action is STAGE, F, B, I or W, MICROBATCH: 3F0 is a forward, 3B0 a backward"
            if _MOVES.fullmatch(text):
                hint = "leave communication out (format compute_only): PyTorch adds it itself"
            raise _fault(where, f"{text!r} is no action", row=row, column=column, hint=hint)
        stage, work, microbatch = match.groups()
        found.append(_Action(work, int(stage), int(microbatch), row, column))
    return tuple(found)


def _homes(rows: _Rows, where: str) -> list[int]:
    """The rank of every virtual stage."""
    homes: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for action in (a for cell in row for a in cell):
            if homes.setdefault(action.stage, rank) != rank:
                raise _fault(
                    where, f"{action.name}: virtual stage {action.stage} is on rank "
                    f"{homes[action.stage]} already", row=action.row, column=action.column,
                    hint="all actions of a stage are on one rank",
                )  # fmt: skip
    missing = next(stage for stage in range(len(homes) + 1) if stage not in homes)
    if missing < max(homes):
        raise _fault(
            where, f"no action of virtual stage {missing}, and there are stages up to {max(homes)}",
            hint="stages are numbered from 0 on, in the order of the layers",
        )  # fmt: skip
    return [homes[stage] for stage in range(len(homes))]


def _turns(rows: _Rows, home: Sequence[int], where: str) -> bool:
    """Whether stages lie on a V rather than round and round."""
    pp = len(rows)
    if list(home) == [stage % pp for stage in range(len(home))] and len(home) % pp == 0:
        return False
    if list(home) == [*range(pp), *reversed(range(pp))]:
        return True
    held = [[stage for stage, rank in enumerate(home) if rank == r] for r in range(pp)]
    most = -(-len(home) // pp)
    wrong = next(r for r in range(pp) if held[r] != [r + pp * chunk for chunk in range(most)])
    raise _fault(
        where, f"rank {wrong} holds virtual stages {', '.join(map(str, held[wrong]))} of "
        f"{len(home)}", row=wrong + 1,
        hint=f"rank r holds stages r, {pp} + r, ... (as many on each), or on a V r and "
        f"{2 * pp - 1} - r: so torchtitan builds them",
    )  # fmt: skip


def _check_complete(rows: Sequence[Sequence[_Action]], stages: int, where: str) -> int:
    """Every pass once, forward first, weights last; the number of microbatches."""
    done: set[tuple[str, int, int]] = set()
    for action in (a for row in rows for a in row):
        work, stage, index = action[:3]
        other = {"B": "IW", "I": "B", "W": "B", "F": ""}[work]
        twice = (work, stage, index) in done or any((o, stage, index) in done for o in other)
        before = {"B": "F", "I": "F", "W": "I"}.get(work)
        late = before is not None and (before, stage, index) not in done
        if twice or late:
            text = f"{action.name} is a second time" if twice else (
                f"{action.name} comes before {stage}{before}{index}"
            )  # fmt: skip
            raise _fault(
                where, text, row=action.row, column=action.column,
                hint="every stage runs F once for every microbatch, then B, or I and later W",
            )  # fmt: skip
        done.add((work, stage, index))
    microbatches = 1 + max(index for _, _, index in done)
    for stage in range(stages):
        for index in range(microbatches):
            needed = "F", "W" if ("I", stage, index) in done else "B"
            missing = next((work for work in needed if (work, stage, index) not in done), None)
            if missing is not None:
                raise _fault(
                    where, f"there is no {stage}{missing}{index}",
                    hint=f"every stage runs microbatches 0 to {microbatches - 1}",
                )  # fmt: skip
    return microbatches


def _check_losses(row: Sequence[_Action], last: int, where: str) -> None:
    forwards = [action for action in row if (action.work, action.stage) == ("F", last)]
    for index, action in enumerate(forwards):
        if action.microbatch != index:
            raise _fault(
                where, f"{action.name} is forward number {index} of the last stage: PyTorch takes "
                f"its loss for that of microbatch {index}", row=action.row, column=action.column,
                hint="the last stage takes microbatches in their order",
            )  # fmt: skip


def _needs(action: _Action, stages: int) -> Iterator[tuple[str, int, int]]:
    """What must be there before an action, one of these."""
    work, stage, index = action[:3]
    if work == "F" and stage:
        yield "F", stage - 1, index
    elif work in "BI" and stage < stages - 1:
        yield from (("B", stage + 1, index), ("I", stage + 1, index))


def _check_runs(rows: _Rows, home: Sequence[int], where: str) -> None:
    """Run all ranks until they end or wait for each other; of a pair, both must be ready."""
    done: set[tuple[str, int, int]] = set()
    position = [0] * len(rows)

    def waits_for(action: _Action) -> str | None:
        needs = list(_needs(action, len(home)))
        if not needs or any(need in done for need in needs):
            return None
        work, stage, index = needs[0]
        return f"{stage}{work}{index}"

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while position[rank] < len(row):
                cell = row[position[rank]]
                if any(waits_for(action) is not None for action in cell):
                    break
                done.update(action[:3] for action in cell)
                position[rank] += 1
                moved = True
    for rank, row in enumerate(rows):
        if position[rank] < len(row):
            cell = row[position[rank]]
            action = next(a for a in cell if waits_for(a) is not None)
            raise _fault(
                where, f"{action.name} waits for {waits_for(action)} forever: the ranks wait for "
                "each other", row=action.row, column=action.column,
                hint="a forward needs the stage before, a backward the one behind, earlier in time",
            )  # fmt: skip
