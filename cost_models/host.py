"""The wait of a device for its host.

The host queues kernels ahead of the device, over many layers: a layer takes the longer of its host
time and its device time, forward, recomputation and backward *together*. The exact floor is that
of a whole chunk, the maximum of two sums; this one is the sum of the maxima, never below it and
equal to it for layers of one kind (and linear in the layers, as measured steps of small models
are). Where the forward waits for a count from the device (experts' rows), the queue is empty there,
so each pass has its own floor.

The maximum is smooth (:func:`elapsed_s`): where both are about as long the queue runs dry now and
then, since neither the host's calls nor the device's kernels are all of one length, and ranks of a
group wait in each collective for the one whose host is behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cost_models.laws import smooth_maximum

if TYPE_CHECKING:
    from cost_models.repeat import Repeats

Real = NDArray[np.float64]

HOST_P = 4.0
"""Sharpness of the maximum of host and device time. Of 2, 3, 4 and 64 the best on vTrain's 884 runs
of small layers (mean error 7.3, 6.4, 6.0 and 6.9 % with host time and rate fitted for each); other
runs are too far from the point where both are equal to tell them apart."""


def elapsed_s(device_s: Real, host_s: Real) -> Real:
    """Seconds of work that keeps a device and its host busy for so long, one beside the other."""
    return smooth_maximum(device_s, host_s, HOST_P)


def wait_for_host(wait: dict[str, Real], repeats: Repeats, *, drains: bool) -> None:
    """Add the seconds for which the device waits to ``wait`` (by pass), for one layer.

    Where the passes share a floor, each gets its part of the wait in proportion to what it would
    wait alone; recomputation gets what it adds to the wait (``cost_models.repeat``). ``drains``:
    the layer's forward empties the queue.
    """
    forward, backward = repeats.whole.wait_s, repeats.back.wait_s
    if drains:
        wait["forward"] += forward + repeats.sync_s
        wait["backward"] += backward
        return
    shared = (repeats.whole + repeats.back).wait_s
    apart = forward + backward
    own = np.divide(shared * forward, apart, out=np.zeros_like(apart), where=apart > 0)
    wait["forward"] += own
    wait["backward"] += shared - own
