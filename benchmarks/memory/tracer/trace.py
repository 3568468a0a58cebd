"""Trace one rank of a torchtitan training step without a GPU: a JSON case in, a JSON result out.

A fake process group answers every collective at once, and fake tensors have shapes and no data, so
one process of less than 1 GB stands for any rank of any number of devices. The step is run twice
over: as it is, for the peak of live storages and the collectives, and under PyTorch's tracker, for
bytes by category. The tracker hooks each module of an FSDP unit by itself, which makes units of
several modules (final norm and head) gather and reduce twice; that is why the two are apart.
"""

import contextlib
import json
import os
import resource
import sys
import time
from typing import Any

SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that call ``autograd.grad``, which the tracker's hooks cannot follow: no categories."""


def main() -> None:
    """Read one case from standard input, write its result as the last line of standard output."""
    case = json.load(sys.stdin)
    os.environ |= {
        "LOCAL_RANK": "0", "RANK": str(case["rank"]), "WORLD_SIZE": str(case["world"]),
        "NGPU": str(case["world"]),
    }  # fmt: skip
    import torch
    import torch.distributed as dist
    import torchtitan.distributed.parallel_dims as parallel_dims
    import torchtitan.tools.utils as tools
    from torch.testing._internal.distributed.fake_pg import FakeStore

    tools.device_type, tools.device_module = "cpu", torch.cpu
    parallel_dims.device_type = "cpu"
    torch.autograd.set_multithreading_enabled(False)
    dist.init_process_group("fake", store=FakeStore(), rank=case["rank"], world_size=case["world"])
    started = time.monotonic()
    result = as_it_is(case)
    if case["layout"]["schedule"] not in SPLIT_BACKWARD:
        result |= by_category(case)
    result["seconds"] = round(time.monotonic() - started, 1)
    result["max_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"case": case, **result}))


def as_it_is(case: dict[str, Any]) -> dict[str, Any]:
    """Peak of live storages, and the collectives of one step."""
    from meters import Collectives, LiveStorages

    counter, live = Collectives(), LiveStorages()
    with contextlib.ExitStack() as stack:
        stack.enter_context(live.following_resizes())
        run = _prepare(case, counter, stack, live)
        run.step()
        live.peak = live.total
        with counter:
            run.step()
    return {
        "parameters": run.parameters,
        "untracked_peak_bytes": live.peak,
        "collectives": counter.rows(),
    }


def by_category(case: dict[str, Any]) -> dict[str, Any]:
    """Bytes by the tracker's categories at the peak and between steps, with a second opinion."""
    from meters import Collectives, LiveStorages, RepeatedForwardTracker

    live = LiveStorages()
    with contextlib.ExitStack() as stack:
        stack.enter_context(live.following_resizes())
        run = _prepare(case, Collectives(), stack, live)
        tracker = RepeatedForwardTracker(run.parts, run.optimizer)
        with tracker:
            tracker.track_inputs(run.inputs)
            run.step()
            # The first step also counts what DTensor allocates once, full-size fakes among it.
            tracker.forget_peak()
            live.peak = live.total
            run.step()
        peak, rest = tracker.bytes_by_category("peak"), tracker.bytes_by_category("current")
    return {
        "peak_bytes": peak,
        "between_steps_bytes": rest,
        "live_storages_peak_bytes": live.peak,
    }


def _prepare(case: dict[str, Any], counter: Any, stack: contextlib.ExitStack, live: Any) -> Any:
    import steps
    import titan
    from torch._subclasses.fake_tensor import FakeTensorMode

    built = titan.build(case)
    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    run = steps.Run(built, case, counter)
    stack.enter_context(live)
    for part in built.parts:
        for tensor in (*part.parameters(), *part.buffers()):
            live.see(tensor)
    return run


if __name__ == "__main__":
    main()
