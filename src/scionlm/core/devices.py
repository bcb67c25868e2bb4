"""What devices can do: peak speed and memory by name, and which one this machine has. Without torch.

Peaks are dense products as the makers' data sheets give them, summed in float32; float32 is without TF32, which torch
does not use unless told to. Memory is what the driver leaves of it to a program. Processors are given per core, by what
training reached with their instruction set, see docs/results/evaluation.md: planning needs the order of magnitude, and
`scion plan --calibrate` measures.
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
        kind: `cuda` or `cpu`.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory_bytes: int | None
    utilization: float
    bandwidth: float
    full_width: int = 0
    kind: str = "cuda"

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


_GIB = 2**30
_GPU, _CPU = 0.4, 0.5
_CPU_WIDTH = 576
_CPU_BANDWIDTH = 20e9  # of a processor with two channels of DDR4: the order of magnitude
# Name, bf16, float32, GiB, bytes a second. Volta and Turing have no bfloat16: both peaks are those of float32.
_CARDS = (
    ("B300", 2.25e15, 75e12, 267.0, 8e12),
    ("GB200", 2.5e15, 80e12, 184.0, 8e12),
    ("B200", 2.25e15, 80e12, 178.3, 8e12),
    ("GH200", 989e12, 67e12, 94.5, 4e12),
    ("H200", 989e12, 67e12, 139.8, 4.8e12),
    ("H200 NVL", 835e12, 60e12, 139.8, 4.8e12),
    ("H100", 989e12, 67e12, 79.1, 3.35e12),
    ("H100 NVL", 835e12, 60e12, 93.1, 3.9e12),
    ("H100 PCIe", 756e12, 51e12, 79.1, 2e12),
    ("A100", 312e12, 19.5e12, 79.1, 2.04e12),
    ("A30", 165e12, 10.3e12, 23.5, 933e9),
    ("A40", 150e12, 37.4e12, 44.4, 696e9),
    ("A10", 125e12, 31.2e12, 22.1, 600e9),
    ("A10G", 70e12, 31.5e12, 22.1, 600e9),
    ("L40S", 362e12, 91.6e12, 44.4, 864e9),
    ("L40", 181e12, 90.5e12, 44.4, 864e9),
    ("L4", 121e12, 30.3e12, 22.0, 300e9),
    ("V100", 15.7e12, 15.7e12, 15.8, 900e9),
    ("T4", 8.1e12, 8.1e12, 14.6, 320e9),
    ("RTX 6000 Ada", 364e12, 91.1e12, 47.4, 960e9),
    ("RTX A6000", 155e12, 38.7e12, 47.4, 768e9),
    ("RTX 5090", 210e12, 105e12, 31.4, 1.79e12),
    ("RTX 4090", 165e12, 82.6e12, 23.6, 1.01e12),
    ("RTX 4080", 97e12, 48.7e12, 15.6, 717e9),
    ("RTX 3090", 71e12, 35.6e12, 23.7, 936e9),
)
GPUS = {
    name.lower(): Device(name, bf16, fp32, int(memory * _GIB), _GPU, bandwidth)
    for name, bf16, fp32, memory, bandwidth in _CARDS
}
_SERIES = ("nvidia", "geforce", "rtx", "tesla")  # words of a name that tell no card from another
_ANOTHER = {"laptop", "mobile", "max", "mig", "d", "ti", "super", "quadro", "pro", "ada", "nvl"}
"""Words that make another, mostly smaller, card of the one whose name is beside them."""
_VIRTUAL = re.compile(r"\d+[qabc]")  # A40-8Q: a share of one
_SIZE = re.compile(r"(\d+)gb?")
# Per core: name of the instruction set in /proc/cpuinfo, bf16, float32.
_CORES = (
    ("amx_bf16", 420e9, 100e9),
    ("avx512_bf16", 290e9, 90e9),
    ("avx512f", 90e9, 90e9),
    ("avx2", 90e9, 90e9),
    ("", 20e9, 20e9),
)


def gpu_by_name(name: str) -> Device | None:
    """Return the entry whose name is in a device's own name, or in what somebody calls it; None where none is."""
    words = _words(name)
    fitting = [device for device in GPUS.values() if _words(device.name) <= words]
    found = max(fitting, key=lambda device: len(_words(device.name)), default=None)
    if found is None or (words - _words(found.name)) & _ANOTHER or any(map(_VIRTUAL.fullmatch, words)):
        return None
    assert found.memory_bytes is not None
    size = next((int(match[1]) for word in sorted(words) if (match := _SIZE.fullmatch(word))), None)
    much = (size or 0) * _GIB / found.memory_bytes  # there are A100 of 40 and of 80 GB; GH200 480GB is of its host
    if size is None or 0.9 < much < 1.12 or much > 2.1:
        return found
    return replace(found, memory_bytes=int(0.985 * size * _GIB))


def _words(name: str) -> set[str]:
    """Return the words of a name that tell which card it is."""
    series = "|".join(_SERIES)
    parts = (re.sub(f"^({series})+", "", part) for part in re.split(r"[^a-z0-9]+", name.lower()))
    return {part for part in parts if part}


def driver_gpus() -> list[str]:
    """Return the names of this machine's GPUs, as the driver shows them."""
    paths = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = (line for path in paths for line in path.read_text().splitlines())
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def this_machine() -> Device:
    """Return the first GPU of this machine where the driver shows one that is in the table, else its processor."""
    found = next((known for name in driver_gpus() if (known := gpu_by_name(name))), None)
    if found is not None:
        return found
    cores = usable_cores() * local_processes()
    flags = cpu_flags()
    _, bf16, fp32 = next(entry for entry in _CORES if not entry[0] or entry[0] in flags)
    name = cpu_facts().get("model name", "processor")
    count = f"{cores} core" + "s" * (cores != 1)
    peaks = cores * bf16, cores * fp32
    return Device(f"{name}, {count}", *peaks, memory_bytes(), _CPU, _CPU_BANDWIDTH, _CPU_WIDTH, kind="cpu")


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
