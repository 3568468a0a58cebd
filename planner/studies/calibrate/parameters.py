"""What a fit may move: named physical constants, each with bounds, a prior and its source.

A parameter is one number in one place of one or more profiles, for example the sustained share of
the matrix-product rate of all A100 devices. Nothing here can name a model, a source or a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from hardware_profiles.documents import read_document, validate
from hardware_profiles.schema import ClusterSpec, Profile, Sourced, StackSpec
from hardware_profiles.units import to_si
from planner.errors import InputError

Kind = Literal["device", "node", "link", "stack"]


class Target(Profile):
    """The places of one path in the profiles of ``kind`` whose names match one of ``names``
    (shell patterns). A part of ``path`` that is ``*`` stands for every key."""

    kind: Kind
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    path: str


class Constant(Profile):
    """A positive number that a fit may move between ``low`` and ``high``.

    ``spread`` is the prior's standard deviation of the number's logarithm; ``prior`` its middle.
    """

    name: str
    low: Annotated[float, Field(gt=0)]
    high: Annotated[float, Field(gt=0)]
    prior: Annotated[float, Field(gt=0)]
    spread: Annotated[float, Field(gt=0)]
    source: str
    """Where bounds and prior are from."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.prior <= self.high:
            raise ValueError(
                f"{self.name}: prior {self.prior:g} is outside {self.low:g} to {self.high:g}"
            )
        return self

    def coordinate(self, value: float) -> float:
        """The coordinate in which a fit moves: log of ``value`` over the prior."""
        return math.log(value / self.prior)

    def at(self, coordinate: float) -> float:
        """The value at a coordinate, inside the bounds."""
        return min(max(self.prior * math.exp(coordinate), self.low), self.high)


class Parameter(Constant):
    """A constant of profiles: ``scale`` multiplies what they say, ``set`` replaces it (SI)."""

    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    mode: Literal["set", "scale"] = "set"


class ParameterFile(Profile):
    """A list of parameters as a document."""

    parameters: Annotated[tuple[Parameter, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [parameter.name for parameter in self.parameters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"parameter {twice[0]!r} is there twice")
        return self


def read_parameters(path: Any) -> tuple[Parameter, ...]:
    """The parameters of a YAML or JSON file. Raises :class:`DocumentError`."""
    return validate(ParameterFile, read_document(path), where=str(path)).parameters


class Overlay:
    """Profiles with some constants replaced; equal names give equal objects, made once."""

    def __init__(self, parameters: Sequence[Parameter], values: Mapping[str, float]) -> None:
        self._changes = [(p, values[p.name]) for p in parameters if p.name in values]
        self._made: dict[int, tuple[BaseModel, Any]] = {}
        self._clusters: dict[int, tuple[ClusterSpec, ClusterSpec]] = {}

    def stack(self, stack: StackSpec) -> StackSpec:
        """The stack under the overlay."""
        changed: StackSpec = self._profile("stack", stack)
        return changed

    def cluster(self, cluster: ClusterSpec) -> ClusterSpec:
        """The cluster with its devices, nodes and links under the overlay."""
        known = self._clusters.get(id(cluster))
        if known is None:
            groups = tuple(
                group.model_copy(update={"node": self._node(group.node)})
                for group in cluster.groups
            )
            # The original is kept too, so that its id stays its own.
            known = (cluster, cluster.model_copy(update={"groups": groups}))
            self._clusters[id(cluster)] = known
        return known[1]

    def _node(self, node: Any) -> Any:
        parts = {
            "device": self._profile("device", node.device),
            "scale_up": self._profile("link", node.scale_up),
            "scale_out": self._profile("link", node.scale_out),
        }
        return self._changed("node", node.model_copy(update=parts))

    def _profile(self, kind: Kind, spec: Any) -> Any:
        # Not by name: a run may have changed its profile. The original is kept with its id.
        known = self._made.get(id(spec))
        if known is None:
            known = self._made[id(spec)] = (spec, self._changed(kind, spec))
        return known[1]

    def _changed(self, kind: Kind, spec: Any) -> Any:
        for parameter, value in self._changes:
            for target in parameter.targets:
                if target.kind == kind and matches(target, spec.name):
                    spec = replaced(spec, target.path.split("."), parameter.mode, value)
        return spec


def matches(target: Target, name: str) -> bool:
    """Whether a profile of the target's kind is meant."""
    return any(fnmatchcase(name, wanted) for wanted in target.names)


def replaced(spec: Any, path: Sequence[str], mode: str, value: float) -> Any:
    """``spec`` with the number at ``path`` set or scaled. A place that does not exist is left out:
    not every device has every dtype. Raises :class:`InputError` for what is not a number."""
    if not path:
        return _number(spec, mode, value)
    head, rest = path[0], path[1:]
    if isinstance(spec, BaseModel):
        if head not in type(spec).model_fields:
            raise InputError(f"no field {head!r} in {type(spec).__name__}")
        inner = getattr(spec, head)
        if inner is None:
            return spec
        return spec.model_copy(update={head: replaced(inner, rest, mode, value)})
    if isinstance(spec, Mapping):
        return {
            key: replaced(inner, rest, mode, value) if head in ("*", key) else inner
            for key, inner in spec.items()
        }
    raise InputError(f"{head!r} leads into {spec!r}, which is not a mapping")


def _number(spec: Any, mode: str, value: float) -> Any:
    if isinstance(spec, Sourced):
        unit = to_si(1.0, spec.unit)
        new = spec.value * value if mode == "scale" else value / unit
        return spec.model_copy(update={"value": new})
    if isinstance(spec, (int, float)) and not isinstance(spec, bool):
        return spec * value if mode == "scale" else value
    raise InputError(f"{spec!r} is not a number")


def reaches(parameter: Parameter, cluster: ClusterSpec, stack: StackSpec) -> bool:
    """Whether the price of a layout on this cluster and stack can depend on ``parameter``."""
    present: dict[Kind, set[str]] = {"stack": {stack.name}, "node": set()}
    present["device"], present["link"] = set(), set()
    for group in cluster.groups:
        node = group.node
        present["node"].add(node.name)
        present["device"].add(node.device.name)
        present["link"] |= {node.scale_up.name, node.scale_out.name}
    return any(
        matches(target, name) for target in parameter.targets for name in present[target.kind]
    )
