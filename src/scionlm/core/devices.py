"""What devices can do: peak speed and memory by name, and which one this machine has. Without torch.

Peaks are dense products as the makers' data sheets give them; float32 is without TF32, which torch does not use unless
told to. Processors are given per core, by what training reached with their instruction set, see
docs/results/evaluation.md: planning needs the order of magnitude, and `scion plan --calibrate` measures.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from scionlm.core.machine import local_processes, usable_cores


@dataclass(frozen=True)
class Device:
    """A device to compute on.

    Attributes:
        name: Its name.
        bf16_flops: Peak of bfloat16 products, operations a second; for a device without them that of float32.
        fp32_flops: Of float32.
        memory_bytes: Its memory; None where that is not known.
        utilization: Which share of the peak a training step of Scion is expected to reach.
        bandwidth: Bytes a second that it reads of its memory.
        full_width: Hidden size from which on a model reaches that share in bfloat16; 0 where that is not known.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory_bytes: int | None
    utilization: float
    bandwidth: float
    full_width: int = 0

    def reached(self, precision: str, hidden_size: int) -> float:
        """Return which share of the peak a model of this width is expected to reach: of fast products less, if narrow.

        The cube root fits a width of 256 beside one of 576 on two kinds of processor (docs/results/evaluation.md).
        """
        narrow = min(hidden_size / self.full_width, 1.0) if self.full_width and precision == "bf16" else 1.0
        return self.utilization * narrow ** (1 / 3)

    def peak(self, precision: str) -> float:
        """Return the peak in `fp32` or `bf16`."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bfloat16 faster than float32."""
        return self.bf16_flops > self.fp32_flops


_GB = 10**9
_MEMORY = re.compile(r"(\d+)gb")
_GPU, _CPU = 0.4, 0.5
_CPU_WIDTH = 576
_CPU_BANDWIDTH = 20e9  # of a processor with two channels of DDR4: the order of magnitude
GPUS = {
    device.name.lower(): device
    for device in (
        Device("B200", 2.25e15, 80e12, 180 * _GB, _GPU, 8e12),
        Device("H200", 989e12, 67e12, 141 * _GB, _GPU, 4.8e12),
        Device("H100", 989e12, 67e12, 80 * _GB, _GPU, 3.35e12),
        Device("A100", 312e12, 19.5e12, 80 * _GB, _GPU, 2.04e12),
        Device("L40S", 362e12, 91.6e12, 48 * _GB, _GPU, 864e9),
        Device("A10", 125e12, 31.2e12, 24 * _GB, _GPU, 600e9),
        Device("A10G", 70e12, 31.5e12, 24 * _GB, _GPU, 600e9),
        Device("4090", 165e12, 82.6e12, 24 * _GB, _GPU, 1.01e12),
        Device("3090", 71e12, 35.6e12, 24 * _GB, _GPU, 936e9),
    )
}
# Per core: name of the instruction set in /proc/cpuinfo, bf16, float32.
_CORES = (
    ("amx_bf16", 420e9, 100e9),
    ("avx512_bf16", 290e9, 90e9),
    ("avx512f", 90e9, 90e9),
    ("avx2", 90e9, 90e9),
    ("", 20e9, 20e9),
)


def gpu_by_name(name: str) -> Device | None:
    """Return the entry whose name is a word of a device's own name."""
    words = name.lower().replace("-", " ").replace("rtx", " ").split()
    found = next((GPUS[word] for word in words if word in GPUS), None)
    size = next((int(match[1]) for word in words if (match := _MEMORY.fullmatch(word))), None)
    if found is None or size is None or size * _GB == found.memory_bytes:
        return found
    return replace(found, memory_bytes=size * _GB)  # there are A100 of 40 and of 80 GB


def this_machine() -> Device:
    """Return the first GPU of this machine where the driver shows one that is in the table, else its processor."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = next((line for line in path.read_text().splitlines() if line.startswith("Model:")), "")
        found = gpu_by_name(model)
        if found:
            return found
    cores = usable_cores() * local_processes()
    flags = cpu_flags()
    _, bf16, fp32 = next(entry for entry in _CORES if not entry[0] or entry[0] in flags)
    name = cpu_facts().get("model name", "processor")
    count = f"{cores} core" + "s" * (cores != 1)
    return Device(f"{name}, {count}", cores * bf16, cores * fp32, memory_bytes(), _CPU, _CPU_BANDWIDTH, _CPU_WIDTH)


def cpu_facts() -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo, where there is one."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_flags() -> frozenset[str]:
    """Return the names of what the first processor can do: instruction sets, as /proc/cpuinfo has them."""
    facts = cpu_facts()
    return frozenset(f"{facts.get('flags', '')} {facts.get('Features', '')}".split())


def memory_bytes() -> int | None:
    """Return the memory of this machine; None where that is not known."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    line = next((line for line in path.read_text().splitlines() if line.startswith("MemTotal:")), "")
    return int(line.split()[1]) * 1024 if line else None
