"""Where a process computes: its CPU cores or its GPU, in float32 or bfloat16, alone or with others."""

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch

from scionlm.core.allocator import keep_freed_memory
from scionlm.core.devices import cpu_facts, cpu_flags, gpu_by_name, memory_bytes
from scionlm.core.errors import UsageError
from scionlm.core.log import warn
from scionlm.core.machine import local_processes, peak_memory_bytes, usable_cores
from scionlm.parallel.ranks import ALONE, Ranks

Precision = Literal["fp32", "bf16"]

# torch.compile costs some forty seconds once and then saves up to a fifth of an eager step on a CPU
# (docs/results/train-step.md): below this much work a run ends sooner without it.
_CPU_COMPILE_FLOPS = 1e14
_GPU_COMPILE_FLOPS = 5e16


@dataclass(frozen=True)
class Runtime:
    """A device and how to use it.

    Attributes:
        kind: `cpu` or `cuda`.
        name: The processor's own name.
        threads: CPU threads that torch uses.
        precision: What matrix products are computed in; weights and optimizer stay float32.
        ranks: This process and the others of the run.
        shards: How many devices hold one copy of the weights between them.
    """

    kind: str
    name: str
    threads: int
    precision: Precision
    ranks: Ranks = ALONE
    shards: int = 1

    @property
    def layout(self) -> str:
        """How weights lie on the devices: `single`, `ddp`, `fsdp` or `hsdp`."""
        if self.ranks.world == 1:
            return "single"
        return "ddp" if self.shards == 1 else "fsdp" if self.shards == self.ranks.world else "hsdp"

    @property
    def device(self) -> torch.device:
        """The torch device of this process."""
        return torch.device(self.kind, self.ranks.local_rank) if self.kind == "cuda" else torch.device(self.kind)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The torch type of `precision`."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def to_dict(self) -> dict[str, Any]:
        """Return what manifests say of it."""
        others = {"world": self.ranks.world, "layout": self.layout} if self.ranks.world > 1 else {}
        return {key: getattr(self, key) for key in ("kind", "name", "threads", "precision")} | others

    def seed(self, seed: int) -> None:
        """Seed every generator of this process; those of other ranks draw other numbers."""
        torch.manual_seed(seed + self.ranks.rank)

    def enter_thread(self) -> None:
        """Have this thread compute on the device of its process: a new one has the first."""
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int | None:
        """Return the memory that this process can have; None where that is not known."""
        if self.kind == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        whole = memory_bytes()
        return whole and whole // self.ranks.local_world

    def forget_peak(self) -> None:
        """Count the peak of a GPU's memory from now on; that of a process cannot be forgotten."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Return the most bytes that were in use: of the GPU where there is one, else of the process."""
        return torch.cuda.max_memory_allocated(self.device) if self.kind == "cuda" else peak_memory_bytes()


class Stopwatch:
    """Adds up the time of pieces of work; of a GPU's by its own clock, so that nothing waits for it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def timing(self, device: torch.device) -> Generator[None, None, None]:
        """Add what a piece of work takes on a device."""
        if device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._running.append((begin, end))

    @property
    def seconds(self) -> float:
        """The time of all pieces; waits for those that a GPU has not done yet, so it is best asked for after a step."""
        for begin, end in self._running:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._running.clear()
        return self._seconds


def start_runtime(precision: str = "auto", ranks: Ranks = ALONE) -> Runtime:
    """Choose the device, set torch's threads, and settle the precision.

    `auto` is bf16 where the hardware multiplies it: a GPU since Ampere, a CPU with AVX512-BF16 or AMX or Arm's BF16.
    """
    threads = usable_cores()
    torch.set_num_threads(threads)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        keep_freed_memory()
    if precision == "auto":
        precision = "bf16" if _has_bf16(kind) else "fp32"
    name = torch.cuda.get_device_name() if kind == "cuda" else _cpu_name()
    return Runtime(kind, name, threads, "bf16" if precision == "bf16" else "fp32", ranks)


@contextlib.contextmanager
def measuring_alone() -> Generator[Runtime, None, None]:
    """Give the device to one process of a machine, in float32, while the others wait: with their cores, for so long."""
    before = torch.get_num_threads()
    try:
        runtime = start_runtime("fp32")
        torch.set_num_threads(usable_cores() * local_processes())
        yield runtime
    finally:
        torch.set_num_threads(before)


def reseed(step: int, rank: int) -> None:
    """Seed the generators of a rank that goes on at a step without a state of its own."""
    torch.manual_seed(step * 1_000_003 + rank)


def random_state() -> dict[str, str]:
    """Return the state of torch's generators, as plain text."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {kind: state.numpy().tobytes().hex() for kind, state in states.items()}


def restore_random_state(states: dict[str, str]) -> None:
    """Set torch's generators; one that this machine does not have is left out."""
    for kind, text in states.items():
        state = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        if kind == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


@cache
def peak_flops(runtime: Runtime) -> tuple[float, str] | None:
    """Return the most operations a second that the device can do in a run's precision, and where that is known from.

    None for a GPU that is not in the table. A CPU is measured: the best of some 2048-cubed products.
    """
    if runtime.kind == "cuda":
        known = gpu_by_name(runtime.name)
        return known and (known.peak(runtime.precision), "data sheet")
    size, best = 2048, 0.0
    ones = torch.ones(size, size, dtype=runtime.compute_dtype)  # no random numbers: a run's own must stay as they are
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(ones, ones)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best, "measured"


def _cpu_name() -> str:
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def _has_bf16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def resolve_compile(setting: bool | Literal["auto"], runtime: Runtime, flops: float) -> bool:
    """Return whether to use torch.compile for a run of `flops` operations.

    `auto` compiles where the run is long enough to repay it and the compiler is found that is needed: of C++, or of C
    for a GPU's Triton.
    """
    if setting != "auto":
        return setting
    if runtime.kind == "cuda":
        worth, named = flops >= _GPU_COMPILE_FLOPS, os.environ.get("CC")
        found = any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"]))
        if worth and not found:
            warn("no C compiler is found (CC, gcc, clang), which torch.compile needs; going on without it, more slowly")
        return worth and found
    return flops >= _CPU_COMPILE_FLOPS and any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def check_attention(name: str, runtime: Runtime) -> None:
    """Refuse a kernel of attention that this device or installation does not have.

    Raises:
        UsageError: It needs a GPU, or a package that is not installed.
    """
    if name in ("flash", "flex") and runtime.kind != "cuda":
        raise UsageError(f"train.attention {name} needs a GPU; use sdpa here")
    if name == "flash" and find_spec("flash_attn") is None:
        raise UsageError("train.attention flash needs the package flash-attn; install it, or use sdpa")
