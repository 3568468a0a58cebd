"""The passes of a microbatch over a virtual stage."""

from __future__ import annotations

from enum import IntEnum


class Pass(IntEnum):
    """What an action computes."""

    FORWARD = 0
    BACKWARD = 1
    """Gradients of inputs and weights."""
    INPUT = 2
    """Gradients of inputs alone."""
    WEIGHT = 3
    """Gradients of weights alone."""
