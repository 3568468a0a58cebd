"""One parser per tool: recognise its output, and read from it what a cluster file needs.

Each takes text and fills :class:`Facts`; a text that a tool printed but that lacks what it must
have raises :class:`InputError` with the line that is missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

from planner.errors import InputError
from planner.studies.discovery.facts import Facts, Port, SlurmNode
from planner.studies.discovery.hostlist import expand_hostlist

Parser = Callable[[str, Facts, str], None]

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TOPOLOGY_ROW = re.compile(r"^\s*GPU(\d+)\s+(\S.*)$", re.MULTILINE)
_SMI_NAME = re.compile(r"^\s*Product Name\s*:\s*(.+?)\s*$", re.MULTILINE)
_SMI_ATTACHED = re.compile(r"^Attached GPUs\s*:\s*(\d+)", re.MULTILINE)
_SMI_MEMORY = re.compile(r"FB Memory Usage\s*\n\s*Total\s*:\s*(\d+)\s*MiB")
_SMI_PCIE = re.compile(r"PCIe Generation\s*\n\s*Max\s*:\s*(\d+)")
_SMI_MIG = re.compile(r"MIG Mode\s*\n\s*Current\s*:\s*Enabled")
_SMI_LIST = re.compile(r"^GPU (\d+): (.+?) \(UUID: ", re.MULTILINE)
_ROCM_NAME = re.compile(r"^GPU\[(\d+)\]\s*:\s*Card [Ss]eries:\s*(.+?)\s*$", re.MULTILINE)
_ROCM_MEMORY = re.compile(r"^GPU\[(\d+)\]\s*:\s*VRAM Total Memory \(B\):\s*(\d+)", re.MULTILINE)
_ROCM_MARK = re.compile(r"ROCm System Management Interface|^GPU\[\d+\]\s*:", re.MULTILINE)
_CA = re.compile(r"^CA '([^']+)'", re.MULTILINE)
_NODE = re.compile(r"^NodeName=(\S+)", re.MULTILINE)
_GRES = re.compile(r"gpu(?::([A-Za-z][^:(,\s]*))?:(\d+)")
_NAME = r"[A-Za-z][\w.-]*(\[[\d,\s-]+\][\w.-]*)*"
_HOSTS = re.compile(rf"^{_NAME}(,{_NAME})*$")
_IDLE = frozenset({"idle", "alloc", "allocated", "mix", "mixed", "comp", "completing", "resv",
                   "reserved", "planned", "plnd"})  # fmt: skip


def parse(text: str, facts: Facts, where: str) -> str:
    """Read ``text`` into ``facts``; the tool that printed it. Raises :class:`InputError`."""
    clean = _ANSI.sub("", text).replace("\r\n", "\n")
    for tool, (recognise, read) in TOOLS.items():
        if recognise(clean):
            read(clean, facts, where)
            return tool
    raise InputError(
        f"{where}: no tool that is known here printed this",
        hint="pass what these print, each saved to a file: " + ", ".join(TOOLS),
    )


def _topology(text: str, facts: Facts, where: str) -> None:
    """``nvidia-smi topo -m``: a matrix; NV18 is 18 NVLink lanes, PIX, NODE, SYS ... are PCIe."""
    rows = {int(number): rest.split() for number, rest in _TOPOLOGY_ROW.findall(text)}
    matrix = {number: cells for number, cells in rows.items() if "X" in cells}
    if not matrix:
        raise InputError(f"{where}: the topology has no row of a GPU")
    count = len(matrix)
    for number, cells in matrix.items():
        if len(cells) < count:
            raise InputError(
                f"{where}: the row of GPU{number} has {len(cells)} entries for {count} GPUs",
                hint="save the whole output of nvidia-smi topo -m, without cutting its lines",
            )
    _set_devices(facts, count, where)
    pairs = [
        cell
        for number, cells in matrix.items()
        for other, cell in enumerate(cells[:count])
        if other != number
    ]
    lanes = [int(cell[2:]) if re.fullmatch(r"NV\d+", cell) else 0 for cell in pairs]
    facts.nvlinks = max(lanes, default=0)
    if lanes and min(lanes) != max(lanes):
        facts.notes.append(
            f"{where}: not all pairs of GPUs have the same links (NVLink lanes: "
            f"{', '.join(f'{n} pairs with {lane}' for lane, n in sorted(Counter(lanes).items()))})"
        )
        facts.nvlinks = min(lanes)
    names = re.findall(r"\bNIC(\d+)\b", text.split("\n", 1)[0]) or re.findall(
        r"^\s*NIC(\d+)\s", text, re.MULTILINE
    )
    legacy = re.findall(r"\bmlx5_\d+\b", text.split("\n", 1)[0])
    if names or legacy:
        facts.nics = len(set(names or legacy))


def _smi_query(text: str, facts: Facts, where: str) -> None:
    """``nvidia-smi -q``."""
    names = _SMI_NAME.findall(text)
    if not names:
        raise InputError(f"{where}: nvidia-smi's report has no 'Product Name'")
    if _SMI_MIG.search(text):
        raise InputError(
            f"{where}: MIG is enabled: a job gets instances, and no layout spans them",
            hint="nvidia-smi -mig 0, then nvidia-smi -q again",
        )
    _set_product(facts, names, where)
    attached = _SMI_ATTACHED.search(text)
    if attached is not None and int(attached.group(1)) != len(names):
        facts.notes.append(
            f"{where}: {attached.group(1)} GPUs attached, {len(names)} reported: the file is cut"
        )
    _set_devices(facts, int(attached.group(1)) if attached else len(names), where)
    memory = [int(size) for size in _SMI_MEMORY.findall(text)]
    if memory:
        facts.memory_mib = min(memory)
    generation = _SMI_PCIE.search(text)
    if generation is not None:
        facts.pcie_generation = int(generation.group(1))


def _smi_list(text: str, facts: Facts, where: str) -> None:
    """``nvidia-smi -L``."""
    rows = _SMI_LIST.findall(text)
    _set_product(facts, [name for _, name in rows], where)
    _set_devices(facts, len(rows), where)


def _rocm(text: str, facts: Facts, where: str) -> None:
    """``rocm-smi --showproductname --showmeminfo vram``."""
    names, memory = _ROCM_NAME.findall(text), _ROCM_MEMORY.findall(text)
    if not names and not memory:
        raise InputError(
            f"{where}: neither product names nor memory in rocm-smi's report",
            hint="rocm-smi --showproductname --showmeminfo vram > FILE",
        )
    if names:
        _set_product(facts, [name for _, name in names], where)
    _set_devices(facts, len({number for number, _ in names or memory}), where)
    if memory:
        facts.memory_mib = min(int(size) for _, size in memory) / 2**20


def _ibstat(text: str, facts: Facts, where: str) -> None:
    """``ibstat``: adapters with their ports; only active ports count."""
    cuts = [match.start() for match in _CA.finditer(text)]
    sections = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    idle = 0
    for section in sections:
        match = _CA.match(section)
        assert match is not None
        for part in re.split(r"^\s*Port \d+:\s*$", section, flags=re.MULTILINE)[1:]:
            state, rate = _field(part, "State"), _field(part, "Rate")
            if state != "Active":
                idle += 1
                continue
            if rate is None or not re.fullmatch(r"\d+(\.\d+)?", rate):
                raise InputError(f"{where}: port of {match.group(1)} has rate {rate!r}, not Gb/s")
            infiniband = (_field(part, "Link layer") or "InfiniBand") == "InfiniBand"
            facts.ports.append(Port(match.group(1), float(rate), infiniband))
    if idle:
        facts.notes.append(f"{where}: ports that are not active are left out: {idle}")
    if not facts.ports:
        raise InputError(f"{where}: no active port in ibstat's report")


def _field(text: str, name: str) -> str | None:
    match = re.search(rf"^\s*{name}:\s*(\S+)\s*$", text, re.MULTILINE)
    return match.group(1) if match else None


def _scontrol(text: str, facts: Facts, where: str) -> None:
    """``scontrol show node``: one record per node."""
    cuts = [match.start() for match in _NODE.finditer(text)]
    for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True):
        record = text[a:b]
        values = dict(re.findall(r"(\w+)=(\S*)", record))
        kind, count = _gres(values.get("Gres", ""))
        memory = values.get("RealMemory", "")
        state = values.get("State", "UNKNOWN").lower()
        facts.nodes.append(
            SlurmNode(
                values["NodeName"], kind, count, int(memory) if memory.isdigit() else None,
                down=not _is_up(state),
            )
        )  # fmt: skip
    if not any(node.devices for node in facts.nodes):
        raise InputError(f"{where}: no node has a Gres with gpu in it")


def _sinfo(text: str, facts: Facts, where: str) -> None:
    """``sinfo -N -o "%N %G %m %t"``: a line per node and partition."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    header = [name.upper() for name in lines[0]]
    column = {name: header.index(name) for name in header}
    if "GRES" not in column:
        raise InputError(f"{where}: no GRES column", hint='sinfo -N -o "%N %G %m %t" > FILE')
    seen: set[str] = set()
    for cells in lines[1:]:
        if len(cells) < len(header):
            raise InputError(f"{where}: line {' '.join(cells)!r} has fewer columns than the header")
        kind, count = _gres(cells[column["GRES"]])
        memory = cells[column["MEMORY"]].rstrip("+") if "MEMORY" in column else ""
        state = cells[column["STATE"]].lower() if "STATE" in column else "idle"
        for name in expand_hostlist(cells[column["NODELIST"]], where=where):
            if name not in seen:
                seen.add(name)
                facts.nodes.append(
                    SlurmNode(
                        name, kind, count, int(memory) if memory.isdigit() else None,
                        down=not _is_up(state),
                    )
                )  # fmt: skip
    if not facts.nodes:
        raise InputError(f"{where}: no nodes below the header")


def _hostlist(text: str, facts: Facts, where: str) -> None:
    """A node list such as ``SLURM_JOB_NODELIST``: node[001-016,020]."""
    names = [name for line in _lines(text) for name in expand_hostlist(line, where=where)]
    facts.nodes += [SlurmNode(name, None, 0, None, down=False) for name in dict.fromkeys(names)]


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        stripped = line.strip()
        if stripped:
            yield stripped.rpartition("NODELIST=")[2].strip("\"'")


def _is_hostlist(text: str) -> bool:
    lines = list(_lines(text))
    return bool(lines) and all(_HOSTS.match(line) for line in lines)


def _gres(text: str) -> tuple[str | None, int]:
    """Type and number of devices in ``gpu:h100:8(S:0-1)``."""
    match = _GRES.search(text)
    return (match.group(1), int(match.group(2))) if match else (None, 0)


def _is_up(state: str) -> bool:
    words = re.split(r"[+\s]", state.rstrip("*~#!%$@^-"))
    return words[0] in _IDLE and not {"drain", "down", "fail"} & set(words) and "*" not in state


def _set_devices(facts: Facts, count: int, where: str) -> None:
    if count < 1:
        raise InputError(f"{where}: no devices")
    if facts.devices not in (None, count):
        raise InputError(
            f"{where}: {count} devices, but another file says {facts.devices}",
            hint="pass the files of one node; the others are the scheduler's to list",
        )
    facts.devices = count


def _set_product(facts: Facts, names: list[str], where: str) -> None:
    kinds = Counter(names)
    if len(kinds) > 1:
        raise InputError(
            f"{where}: devices of {len(kinds)} kinds in one node: {', '.join(sorted(kinds))}",
            hint="a node has one kind of device here; describe the one that you train on",
        )
    facts.product = names[0]


def _contains(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: compiled.search(text) is not None


TOOLS: dict[str, tuple[Callable[[str], bool], Parser]] = {
    "nvidia-smi topo -m": (_contains(r"^\s*GPU0\s+(X|NV\d+|[A-Z]{3,4})\s*"), _topology),
    "nvidia-smi -q": (_contains(r"NVSMI LOG|^\s*Product Name\s*:"), _smi_query),
    "nvidia-smi -L": (lambda text: _SMI_LIST.search(text) is not None, _smi_list),
    "rocm-smi": (lambda text: _ROCM_MARK.search(text) is not None, _rocm),
    "ibstat": (lambda text: _CA.search(text) is not None, _ibstat),
    "scontrol show node": (lambda text: _NODE.search(text) is not None, _scontrol),
    "sinfo -N": (_contains(r"\A\s*NODELIST\b"), _sinfo),
    "a SLURM node list": (_is_hostlist, _hostlist),
}
"""How each tool's output is recognised, and its parser."""
