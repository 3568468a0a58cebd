"""The wait of a device for its host.

The host queues kernels ahead of the device, over many layers: a layer takes the longer of its host
time and its device time, forward, recomputation and backward *together*. The exact floor is that
of a whole chunk, the maximum of two sums; this one is the sum of the maxima, never below it and
equal to it for layers of one kind (and linear in the layers, as measured steps of small models
are). Where the forward waits for a count from the device (experts' rows), the queue is empty there,
so each pass has its own floor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cost_models.repeat import Repeats

Real = NDArray[np.float64]


def wait_for_host(wait: dict[str, Real], repeats: Repeats, *, drains: bool) -> None:
    """Add the seconds for which the device waits to ``wait`` (by pass), for one layer.

    Where the passes share a floor, each gets its part of the wait by its own shortfall;
    recomputation gets what it adds to the wait (``cost_models.repeat``). ``drains``: the layer's
    forward empties the queue.
    """
    forward = np.maximum(repeats.forward_ahead, 0.0)
    backward = np.maximum(repeats.backward_ahead, 0.0)
    if drains:
        wait["forward"] += forward + repeats.sync_s
        wait["backward"] += backward
        return
    shared = np.maximum(repeats.forward_ahead + repeats.backward_ahead, 0.0)
    apart = forward + backward
    wait["forward"] += np.divide(shared * forward, apart, out=np.zeros_like(apart), where=apart > 0)
    wait["backward"] += shared - wait["forward"]
