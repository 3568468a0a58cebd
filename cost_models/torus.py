"""Collectives among devices joined as a torus: links to the nearest neighbours, along axes.

Ranks fill the torus with the first axis fastest, so a group of ``size`` members ``stride`` ranks
apart is a box: along each axis, ``extent`` members ``step`` devices apart. What the box can use:

* Rings (all collectives but all-to-all): an axis that closes on itself carries both ways around,
  one that does not (or of which the group is a part) half of that; neighbours ``step`` devices
  apart pass over ``step`` links, which as many groups share. The buffer is cut so that all axes
  work at once, each on its own part (the multi-phase algorithm of torus machines: Jouppi et al.,
  arXiv 2304.01433, section 2; the JAX scaling book, "Sharding"), so bandwidths add::

      B = sum over axes with extent > 1 of d / step * bandwidth,  d = 2 (closed) or 1 (open)
      t = launch + steps * latency + bus_factor * payload / B

  No member can receive faster over the links that the group has, so t is also a lower bound.
* All-to-all: on an axis with n members, the links in the middle carry a quarter of what all send,
  half of that each way around a closed axis: ``payload * extent * step / (8 bandwidth)``, or over 4
  where the axis is open. The axes work in parallel on different parts; the slowest sets the time.
* A shift to the next member passes ``step`` links of one axis, which all groups use at once.

Degrees that do not divide an axis are priced at fractional extents, as open axes. Seconds, bytes,
seconds per byte; arguments are arrays over groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hardware_profiles.schema import LinkSpec, TorusSpec

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Torus:
    """One slice: its axes, innermost first."""

    extents: tuple[int, ...]
    closed: tuple[bool, ...]
    s_per_byte: tuple[float, ...]
    """Of one link, one direction, achieved."""
    latency_s: float

    @property
    def devices(self) -> int:
        """Devices of the slice."""
        return prod(self.extents)


@dataclass(frozen=True, slots=True)
class _Box:
    """A group along one axis."""

    extent: Floats
    step: Floats
    closed: NDArray[np.bool_]
    s_per_byte: float


def torus_of(spec: TorusSpec, devices: int, link: LinkSpec) -> Torus:
    """The slice of ``devices`` devices joined by ``link``, in the shape that it is allotted."""
    extents = slice_shape(spec.axes, devices, spec.closes_at)
    each = tuple(extent % spec.closes_at == 0 for extent in extents)
    closed = each if spec.closes == "each" else (all(each),) * len(extents)
    rate = link.bandwidth.si / (2 * len(spec.axes))
    rates = [value.si for value in spec.link_bandwidth] or [rate] * len(spec.axes)
    return Torus(
        extents=extents,
        closed=closed,
        s_per_byte=tuple(1 / (each_rate * link.efficiency.si) for each_rate in rates),
        latency_s=link.latency.si,
    )


def slice_shape(axes: tuple[int, ...], devices: int, closes_at: int) -> tuple[int, ...]:
    """Extents of a slice within ``axes``: all axes closed if possible, then the most compact.

    Google Cloud TPU documentation, slice shapes: 4 x 4 x 8 and 8 x 16 rather than longer boxes.
    Where no box has that many devices, they are taken to stand in one row.
    """
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    boxes = [
        box
        for box in product(*([n for n in divisors if n <= axis] for axis in axes))
        if prod(box) == devices
    ]
    if not boxes:
        return (*(1,) * (len(axes) - 1), devices)
    return min(boxes, key=lambda box: (any(n % closes_at for n in box), max(box), sum(box), box))


def ring_s_per_byte(torus: Torus, size: Floats, stride: Floats) -> Floats:
    """Seconds per byte on the wire of a ring collective; 0 for a group of one."""
    rate = np.zeros_like(size)
    for box in _boxes(torus, size, stride):
        ways = np.where(box.closed, 2.0, 1.0)
        rate = rate + np.where(box.extent > 1, ways / (box.step * box.s_per_byte), 0.0)
    return np.divide(1.0, rate, out=np.zeros_like(rate), where=rate > 0)


def ring_latency_s(torus: Torus, size: Floats, stride: Floats) -> Floats:
    """Latency of the steps of one pass of a ring collective, its axes one after the other."""
    links = np.zeros_like(size)
    for box in _boxes(torus, size, stride):
        steps = np.where(box.closed, np.ceil(box.extent / 2), box.extent - 1)
        links = links + np.where(box.extent > 1, steps * box.step, 0.0)
    return links * torus.latency_s


def all_to_all_s_per_byte(torus: Torus, size: Floats, stride: Floats) -> Floats:
    """Seconds per byte that each member sends in all, its own share included."""
    slowest = np.zeros_like(size)
    for box in _boxes(torus, size, stride):
        share = box.extent * box.step / np.where(box.closed, 8.0, 4.0) * box.s_per_byte
        slowest = np.maximum(slowest, np.where(box.extent > 1, share, 0.0))
    return slowest


def shift_s_per_byte(torus: Torus, size: Floats, stride: Floats) -> Floats:
    """Seconds per byte of a transfer to the next member of the group."""
    slowest = np.zeros_like(size)
    for box in _boxes(torus, size, stride):
        slowest = np.maximum(slowest, np.where(box.extent > 1, box.step * box.s_per_byte, 0.0))
    return slowest


def _boxes(torus: Torus, size: Floats, stride: Floats) -> list[_Box]:
    """The group along each axis."""
    boxes, before = [], 1.0
    reach = size * stride
    for extent, closed, s_per_byte in zip(
        torus.extents, torus.closed, torus.s_per_byte, strict=True
    ):
        first = np.maximum(stride, before)
        members = np.maximum(np.minimum(reach, before * extent) / first, 1.0)
        step = first / before
        whole = closed & (members * step == extent) & (step == np.floor(step))
        boxes.append(_Box(members, np.maximum(step, 1.0), whole, s_per_byte))
        before *= extent
    return boxes
