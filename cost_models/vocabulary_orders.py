"""The order of work where the vocabulary is divided over the ranks of a pipeline.

Every rank holds a part of the output head, so beside forwards (F) and backwards (B) of its layers
it has one pass of the head per microbatch (S). Yeung et al., arXiv 2411.05288:

* ``1f1b_vocab_1`` (their algorithm 1): S makes the part's logits; the gradients of its input and
  weights come with the S of the next microbatch, and the last rank's backward waits for those. A
  barrier lies between, and another before the backward.
* ``1f1b_vocab_2`` (algorithm 2): S makes the gradient of its input too, scaled when the sums over
  ranks are there: one barrier. The gradient of the weights comes with the next S.
* ``1f1b_interlaced`` (after Lin et al., arXiv 2301.08984): S is the head's whole forward and
  backward, at the same time on all ranks.

Orders are those of the authors' Megatron-LM fork, for the passes that its schedules assume where
nothing was timed (a backward of two forwards). ``S`` of microbatch ``m`` (one beyond the last)
holds what is left of the last one.
"""

from __future__ import annotations

from functools import lru_cache

from cost_models.layout import Schedule

Step = tuple[str, int]
"""``F``, ``B`` or ``S``, and the microbatch."""


def lag_of(schedule: Schedule) -> int:
    """How many passes of the head later than its own a microbatch's backward may start."""
    return 1 if schedule == "1f1b_vocab_1" else 0


def backward_first(pp: int) -> list[bool]:
    """Per rank, whether its S stands between the backward and the forward of a round, instead of
    behind both.

    From the last rank on, each starts its round a forward earlier, while that is no more than a
    backward ahead; else it lets the S slip behind the forward and starts again from there.
    """
    return [behind % 3 != 0 or behind == 0 for behind in range(pp - 1, -1, -1)]


def early_heads(pp: int) -> list[int]:
    """Per rank, passes of the head beyond the first before its first backward."""
    first, counts = backward_first(pp), [0]
    for rank in range(pp - 2, -1, -1):
        slips = first[rank] and not first[rank + 1]
        counts.append(counts[-1] + (not slips))
    return counts[::-1]


@lru_cache(maxsize=4096)
def rank_steps(schedule: Schedule, pp: int, microbatches: int, rank: int) -> tuple[Step, ...]:
    """What a rank does, in order."""
    if schedule == "1f1b_interlaced":
        return _interlaced(pp, microbatches, rank)
    return _divided(pp, microbatches, rank, lag_of(schedule))


def _divided(pp: int, m: int, rank: int, lag: int) -> tuple[Step, ...]:
    warmup = min(pp - rank, m)
    between, early = backward_first(pp)[rank], early_heads(pp)[rank]
    steps: list[Step] = [("F", i) for i in range(warmup)]
    heads = 0
    for _ in range(1 + lag):
        steps.append(("S", heads))
        heads += 1
        if warmup + heads <= m:
            steps.append(("F", warmup + heads - 1))
    most = m + lag
    for _ in range(min(early, most - heads)):
        steps.append(("S", heads))
        heads += 1
    forwards = min(warmup + 1 + lag, m)
    for i in range(m):
        parts: list[Step] = []
        if heads < most:
            parts.append(("S", heads))
            heads += 1
        if forwards < m:
            parts.insert(len(parts) if between else 0, ("F", forwards))
            forwards += 1
        steps += [("B", i), *parts]
    steps += [("S", index) for index in range(heads, m + 1)]
    return tuple(steps)


def _interlaced(pp: int, m: int, rank: int) -> tuple[Step, ...]:
    warmup, heads = min(pp * 3 // 2 - rank, m), min(pp - rank, m)
    alone = max(0, warmup - heads - (pp - rank - 1) // 2)
    forward_first = rank % 2 == pp % 2
    steps: list[Step] = [("F", i) for i in range(warmup)]
    steps += [("S", i) for i in range(heads)]
    forwards = warmup
    for i in range(m):
        pair: list[Step] = [("B", i)]
        if i >= alone and forwards < m:
            pair.insert(0 if forward_first else 1, ("F", forwards))
            forwards += 1
        if heads < m:
            pair.append(("S", heads))
            heads += 1
        steps += pair
    return tuple(steps)


@lru_cache(maxsize=65536)
def most_alive(schedule: Schedule, pp: int, microbatches: int, rank: int) -> int:
    """Most microbatches whose activations a rank holds at once."""
    alive = most = 0
    for work, _ in rank_steps(schedule, pp, microbatches, rank):
        alive += (work == "F") - (work == "B")
        most = max(most, alive)
    return most
