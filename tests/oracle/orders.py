"""Random orders of work that run: any order of actions that keeps what each of them needs."""

from __future__ import annotations

from random import Random

Action = tuple[str, int, int]


def draw_order(rng: Random, pp: int, vpp: int, microbatches: int, *, on_v: bool) -> list[str]:
    """Rows of actions of ``pp`` ranks: backwards whole, split, or some of each."""
    stages = pp * vpp
    home = [s if s < pp else stages - 1 - s for s in range(stages)]
    home = home if on_v else [s % pp for s in range(stages)]
    split = rng.choice((0.0, 0.0, 0.4, 1.0))
    halves = {
        (s, i): rng.random() < split for s in range(stages) for i in range(microbatches)
    }  # fmt: skip
    done: set[Action] = set()
    waiting = [("F", s, i) for s in range(stages) for i in range(microbatches)]
    for (s, i), halved in halves.items():
        waiting += [("I", s, i), ("W", s, i)] if halved else [("B", s, i)]
    rows: list[list[str]] = [[] for _ in range(pp)]
    # Eager ones hold few activations, lazy ones many.
    backwards_first = rng.random()
    while waiting:
        ready = [a for a in waiting if _is_ready(a, done, stages)]
        if rng.random() < backwards_first:
            ready = [a for a in ready if a[0] != "F"] or ready
        action = rng.choice(ready)
        waiting.remove(action)
        done.add(action)
        work, stage, index = action
        rows[home[stage]].append(f"{stage}{work}{index}")
    return [",".join(row) for row in rows]


def _is_ready(action: Action, done: set[Action], stages: int) -> bool:
    work, stage, index = action
    if work == "F":
        if stage == stages - 1 and index and ("F", stage, index - 1) not in done:
            return False  # PyTorch numbers the losses in their order.
        return stage == 0 or ("F", stage - 1, index) in done
    if work == "W":
        return ("I", stage, index) in done
    if stage == stages - 1:
        return ("F", stage, index) in done
    behind = {("B", stage + 1, index), ("I", stage + 1, index)}
    return bool(behind & done)
