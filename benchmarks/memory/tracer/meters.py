"""What is measured on the traced rank: bytes by category, live storages, collectives."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Groups:
    """The parameter groups of one FSDP module as one: experts have a mesh of their own.

    Hooks go to the first group, whose backward comes last.
    """

    def __init__(self, groups: list[Any]) -> None:
        self.__dict__["groups"] = groups
        self.__dict__["fsdp_params"] = [p for group in groups for p in group.fsdp_params]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.groups[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.groups[0], name, value)


class RepeatedForwardTracker(FSDPMemTracker):
    """PyTorch's tracker for steps that run a module several times: microbatches, loss chunks.

    It refuses a second forward of a root module because it keeps one record per module and step.
    Only the peak and the current bytes are wanted here, so the record starts anew instead. It also
    refuses modules with two parameter groups, which it sees as one here.
    """

    def __init__(self, parts: list[torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(parts[0], optimizer)
        self._root_mod = torch.nn.ModuleList(parts)
        FSDPState._fsdp_param_group = property(  # type: ignore[assignment]
            lambda state: _Groups(state._fsdp_param_groups) if state._fsdp_param_groups else None
        )

    def _fsdp_state_pre_forward(self, fsdp_mod: Any, orig_fsdp_state_pre_fw: Any) -> Any:
        record = super()._fsdp_state_pre_forward(fsdp_mod, orig_fsdp_state_pre_fw)

        def inner(*args: Any, **kwargs: Any) -> Any:
            if not self._mod_tracker.is_bw:
                self.memory_tracking.pop(fsdp_mod, None)
            return record(*args, **kwargs)

        return inner

    def forget_peak(self) -> None:
        """Start a measured step: the first one also counts what DTensor allocates once."""
        self.reset_mod_stats()
        self._peak_mem.clear()
        self._peak_mem_snap.clear()

    def bytes_by_category(self, moment: str) -> dict[str, int]:
        """``peak`` or ``current``, by the tracker's categories."""
        for device, categories in self.get_tracker_snapshot(moment).items():
            if str(device).startswith("cpu"):
                return {getattr(k, "value", str(k)): int(v) for k, v in categories.items()}
        return {}


class LiveStorages(TorchDispatchMode):
    """An independent sum: every storage seen below dispatch, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.total = 0
        self.peak = 0

    def see(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor once; of a sharded tensor, that of the local shard."""
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self._resize(key, storage.nbytes())
            weakref.finalize(storage, self._drop, key)

    def _resize(self, key: int, size: int) -> None:
        self.total += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.total)

    def _drop(self, key: int) -> None:
        self.total -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, result)
        return result

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """FSDP frees gathered parameters by resizing their storage to nothing."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self.sizes:
                self._resize(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]


KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_to_all_single": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
}
"""One name for each collective, whichever interface issued it."""


class Collectives(TorchDispatchMode):
    """Counts collectives by phase, kind, group size and element type.

    ``bytes`` is the largest buffer of the call: the gathered or unreduced one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.count: Counter[tuple[str, str, int, str]] = Counter()
        self.bytes: Counter[tuple[str, str, int, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name in KINDS:
                self._record(KINDS[name], (args, kwargs, result))
        elif func.namespace == "cplib":
            # Keys and values are two collectives inside one operator of context parallelism.
            backward = "backward" in func._schema.name
            group = next(a for a in args if isinstance(a, str))
            for whole in args[:2] if backward else result:
                kind = "reduce_scatter" if backward else "all_gather"
                self._record(kind, (whole, group))
        return result

    def _record(self, kind: str, call: Any) -> None:
        leaves = tree_leaves(call)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        size = max((t.numel() * t.element_size() for t in tensors), default=0)
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        key = (self.phase, kind, _group_size(leaves), dtype)
        self.count[key] += 1
        self.bytes[key] += size

    def rows(self) -> list[dict[str, Any]]:
        """One row per phase, kind, group size and element type."""
        return [
            {"phase": phase, "kind": kind, "group_size": group, "dtype": dtype,
             "count": self.count[key], "bytes": self.bytes[key]}
            for key in sorted(self.count)
            for phase, kind, group, dtype in [key]
        ]  # fmt: skip


def _group_size(leaves: list[Any]) -> int:
    resolve: Callable[[str], Any] = dist.distributed_c10d._resolve_process_group
    for leaf in leaves:
        if isinstance(leaf, str):
            try:
                return int(resolve(leaf).size())
            except (RuntimeError, ValueError, KeyError):
                continue
        if isinstance(leaf, torch.ScriptObject):
            try:
                return int(dist.ProcessGroup.unbox(leaf).size())
            except (RuntimeError, TypeError):
                continue
    return 1
