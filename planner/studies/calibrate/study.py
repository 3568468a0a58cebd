"""``planner calibrate``: measurements in, profiles and their left-out errors out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.loader import load_cluster, load_device, load_link
from hardware_profiles.schema import LinkSpec
from planner.errors import InputError
from planner.studies.calibrate.cases import Case, RunPricer, cases_of
from planner.studies.calibrate.fit import Fitted, Pricer, Problem, family_weights, fit, values_at
from planner.studies.calibrate.folds import LeftOut, leave_one_out
from planner.studies.calibrate.gemm import (
    GemmPricer,
    Product,
    csv_rows,
    fitted_constants,
    read_products,
)
from planner.studies.calibrate.nccl import Log, NetworkPricer, NodePricer, constants_of, read_log
from planner.studies.calibrate.parameters import Parameter, Target
from planner.studies.calibrate.profiles import profile, profiles_of
from planner.studies.runs import MAX_BYTES, read_runs
from planner.studies.statistics import statistics

FOLDS = 5
LEAST_MEASUREMENTS = 3
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """A fit with its judgement."""

    fitted: Fitted
    left_out: LeftOut
    before: np.ndarray
    """Residuals at the priors."""


def calibrate(
    files: Sequence[Path],
    *,
    device: str | None = None,
    cluster: str | None = None,
    parameters: Sequence[Parameter] | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Fit what the files measure: runs, matrix products, or logs of nccl-tests, of one kind.

    Products need ``device``; logs need ``cluster``. Returns ``{"kind", "measurements", "fits":
    [{"title", "constants", "errors"}], "profiles": {file name: YAML}}``. Raises
    :class:`InputError`.
    """
    texts = [(path, _read(path)) for path in files]
    kinds = {_kind_of(text) for _, text in texts}
    if len(kinds) > 1:
        raise InputError(
            f"the files are of several kinds: {', '.join(sorted(kinds))}",
            hint="fit products and collectives first, then the runs",
        )
    kind = kinds.pop()
    if kind == "runs":
        return _runs([path for path, _ in texts], parameters, progress)
    if kind == "products":
        if device is None:
            raise InputError(
                "products of which device?", hint="--device h100-sxm-80gb, or a device's file"
            )
        rows = [each for path, text in texts for each in read_products(path, csv_rows(path, text))]
        return _products(rows, device, _names(files), progress)
    if cluster is None:
        raise InputError("logs of which machine?", hint="--cluster dgx-h100:4")
    return _logs([read_log(path, text) for path, text in texts], cluster, _names(files), progress)


def judged(pricer: Pricer, *, refine: int = 0, progress: Progress = lambda _: None) -> Outcome:
    """Fit, and leave each family out in turn. Raises :class:`InputError` for too few."""
    if len(pricer.families) < LEAST_MEASUREMENTS:
        raise InputError(
            f"{len(pricer.families)} measurements that can be priced: "
            f"at least {LEAST_MEASUREMENTS} are needed",
            hint="of runs, `planner validate` says why rows are skipped",
        )
    problem = Problem(pricer, family_weights(pricer.families))
    before = pricer.residuals(values_at(pricer.parameters, np.zeros(len(pricer.parameters))))
    fitted = fit(problem, progress=progress)
    left_out = leave_one_out(problem, fitted, refine=refine, progress=progress)
    return Outcome(fitted, left_out, before)


def described(title: str, pricer: Pricer, outcome: Outcome) -> dict[str, Any]:
    """What moved, and the errors before, after and left out."""
    values = values_at(pricer.parameters, outcome.fitted.x)
    rows = []
    for index, constant in enumerate(pricer.parameters):
        value = values[constant.name]
        others = [each[constant.name] for each in outcome.left_out.values.values()]
        rows.append(
            {
                "name": constant.name, "before": constant.prior, "after": value,
                "low": constant.low, "high": constant.high,
                "at_bound": not constant.low * 1.001 < value < constant.high / 1.001,
                "left_out_range": [min(others), max(others)],
                "measurements": int(pricer.moved_by(index).sum()),
            }
        )  # fmt: skip
    errors = {
        name: statistics(np.expm1(found).tolist())
        for name, found in (
            ("before", outcome.before),
            ("after", outcome.fitted.residuals),
            ("left_out", outcome.left_out.residuals),
        )
    }
    return {"title": title, "constants": rows, "errors": errors}


def default_parameters(cases: Sequence[Case]) -> tuple[Parameter, ...]:
    """What a file of runs can tell: the sustained rate and streaming efficiency of each device, the
    host time and contention of each stack, the efficiency of each link between nodes."""
    devices: dict[str, tuple[float, float]] = {}
    stacks: dict[str, tuple[float, float]] = {}
    links: dict[str, float] = {}
    for case in cases:
        node, stack = case.request.cluster.groups[0].node, case.request.stack
        kernels = node.device.kernels
        shares = [constants.sustained for constants in kernels.matmul.values()]
        devices[node.device.name] = (min(shares), kernels.memory_bound_efficiency.si)
        stacks[stack.name] = (stack.launch_overhead.si, stack.overlap_contention.si)
        if case.request.cluster.nodes > 1:
            links[node.scale_out.name] = node.scale_out.efficiency.si
    made = []
    for name, (sustained, streaming) in sorted(devices.items()):
        made += [
            _parameter(f"sustained rate of {name}", "device", name, "kernels.matmul.*.sustained",
                       sustained, 0.5, 1.0, 0.12),
            _parameter(f"streaming efficiency of {name}", "device", name,
                       "kernels.memory_bound_efficiency", streaming, 0.4, 0.95, 0.1),
        ]  # fmt: skip
    for name, (launch, contention) in sorted(stacks.items()):
        made += [
            _parameter(f"host seconds per launch of {name}", "stack", name, "launch_overhead",
                       launch, 2e-7, 1e-4, 0.7),
            _parameter(f"contention of overlap in {name}", "stack", name, "overlap_contention",
                       contention, 0.01, 0.6, 0.5),
        ]  # fmt: skip
    for name, efficiency in sorted(links.items()):
        made.append(
            _parameter(f"efficiency of {name}", "link", name, "efficiency",
                       efficiency, 0.1, 1.0, 0.25)
        )  # fmt: skip
    return tuple(made)


def _parameter(
    name: str, kind: Any, profile_name: str, path: str, prior: float, low: float, high: float,
    spread: float,
) -> Parameter:  # fmt: skip
    return Parameter(
        name=name, low=low, high=high, prior=min(max(prior, low), high), spread=spread,
        source="the profile in use",
        targets=(Target(kind=kind, names=(profile_name,), path=path),),
    )  # fmt: skip


def _runs(
    paths: Sequence[Path], parameters: Sequence[Parameter] | None, progress: Progress
) -> dict[str, Any]:
    cases = [case for path in paths for case in cases_of(read_runs(path))]
    if len({case.family for case in cases}) < 2:
        cases = [case.in_family(f"part {_fold(case)}") for case in cases]
    pricer = RunPricer(cases, parameters or default_parameters(cases))
    outcome = judged(pricer, progress=progress)
    values = values_at(pricer.parameters, outcome.fitted.x)
    source = f"planner calibrate on {len(cases)} runs of {_names(paths)}"
    machines = [(case.request.cluster, case.request.stack) for case in cases]
    return {
        "kind": "runs",
        "measurements": len(cases),
        "fits": [described("runs", pricer, outcome)],
        "profiles": profiles_of(pricer.parameters, values, machines, source),
    }


def _fold(case: Case) -> int:
    """Runs of one model stay together."""
    dims = case.request.model.model_dump_json()
    return zlib.crc32(dims.encode()) % FOLDS + 1


def _products(
    products: Sequence[Product], device: str, names: str, progress: Progress
) -> dict[str, Any]:
    spec = load_device(device)
    fits, matmul = [], dict(spec.kernels.matmul)
    for dtype in sorted({product.dtype for product in products}):
        if dtype not in spec.peak_flops:
            raise InputError(
                f"{spec.name} has no {dtype} arithmetic (it has {', '.join(spec.peak_flops)})"
            )
        pricer = GemmPricer(spec, dtype, [each for each in products if each.dtype == dtype])
        outcome = judged(pricer, progress=progress)
        fits.append(described(f"{dtype} products", pricer, outcome))
        matmul[dtype] = fitted_constants(
            pricer, values_at(pricer.parameters, outcome.fitted.x),
            np.expm1(outcome.left_out.residuals), f"planner calibrate on {names}",
        )  # fmt: skip
    changed = spec.model_copy(
        update={"kernels": spec.kernels.model_copy(update={"matmul": matmul})}
    )
    name, text = profile(spec, changed, f"planner calibrate on {names}")
    return {
        "kind": "products", "measurements": len(products), "fits": fits, "profiles": {name: text}
    }  # fmt: skip


def _logs(logs: Sequence[Log], cluster: str, names: str, progress: Progress) -> dict[str, Any]:
    spec = load_cluster(cluster)
    node = spec.groups[0].node
    source = f"planner calibrate on {names}"
    fits, texts, made = [], {}, []
    for log in (each for each in logs if each.nodes == 1):
        pricer = NodePricer(log)
        outcome = judged(pricer, progress=progress)
        fits.append(described(f"{log.collective} of {log.devices}", pricer, outcome))
        made.append(constants_of(log, values_at(pricer.parameters, outcome.fitted.x), source))
    if made:
        fresh = {(each.collective, each.devices) for each in made}
        old = load_link(node.scale_up.name)
        kept = tuple(
            each for each in old.collectives if (each.collective, each.devices) not in fresh
        )
        new: LinkSpec = old.model_copy(update={"collectives": (*kept, *made)})
        name, text = profile(old, new, source)
        texts[name] = text
    across = [each for each in logs if each.nodes > 1]
    if across:
        network = NetworkPricer(across, spec)
        outcome = judged(network, progress=progress)
        fits.append(described("between nodes", network, outcome))
        values = values_at(network.parameters, outcome.fitted.x)
        texts |= profiles_of(network.parameters, values, [(spec, None)], source)
    return {
        "kind": "collectives",
        "measurements": sum(len(log.sizes) for log in logs),
        "fits": fits,
        "profiles": texts,
    }


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: more than {MAX_BYTES // 1024 // 1024} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None


def _kind_of(text: str) -> str:
    header = text.lstrip().split("\n", 1)[0]
    names = {name.strip().strip('"').lower() for name in header.split(",")}
    if {"m", "n", "k"} <= names:
        return "products"
    return "logs" if "nThread" in text or "busbw" in text else "runs"
