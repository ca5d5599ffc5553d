"""Cards and their rates, by what their makers publish."""

from __future__ import annotations

from typing import NamedTuple

GIGA = 1e9
TERA = 1e12

# Of every multiprocessor from sm_80 to sm_120. Issue: four schedulers of one warp instruction a clock each (the
# architectures' white papers). Shared memory: 32 banks of four bytes, and special functions: 16 a clock (the CUDA
# programming guide: "Shared Memory", and its table of arithmetic throughput).
ISSUED_PER_CLOCK = 4
SHARED_BYTES_PER_CLOCK = 128
SPECIAL_PER_CLOCK = 16
SCHEDULERS = 4
REGISTERS = 64 * 1024
REGISTERS_AT_A_TIME = 256  # that a warp is given: eight a thread
SHARED_OF_A_PROGRAM = 1024  # that the system keeps of each program's


class Multiprocessor(NamedTuple):
    """What a multiprocessor holds (the CUDA programming guide's table of compute capabilities), and its load/store
    units (the white papers of A100, GA102, AD102, H100 and RTX Blackwell: a thread's access a clock each)."""

    warps: int
    programs: int
    shared_bytes: int
    load_store_units: int | None


class Card(NamedTuple):
    """A card by its maker's datasheet.

    Bandwidth in bytes per second, tensor cores in dense floating-point operations per second on bfloat16, summed in
    float32; multiprocessors, their highest published clock in Hz, and what each of them holds. What is not published is
    None.
    """

    name: str
    bandwidth: float
    tensor_flops: float | None = None
    multiprocessors: int | None = None
    clock: float | None = None
    multiprocessor: Multiprocessor | None = None


KIB = 1024
CARDS = {
    # NVIDIA A100 datasheet (80GB SXM); A100 white paper, table 1: 108 SMs, 1410 MHz.
    "sm_80": Card("A100 80GB SXM", 2039 * GIGA, 312 * TERA, 108, 1.41 * GIGA, Multiprocessor(64, 32, 164 * KIB, 32)),
    # GA102 white paper, appendix A: 82 SMs, 1695 MHz, 71 TFLOPS with float32 sums.
    "sm_86": Card("RTX 3090", 936 * GIGA, 71 * TERA, 82, 1.695 * GIGA, Multiprocessor(48, 16, 100 * KIB, 16)),
    # Ada white paper, appendix A: 128 SMs, 2520 MHz, 165.2 TFLOPS with float32 sums.
    "sm_89": Card("RTX 4090", 1008 * GIGA, 165.2 * TERA, 128, 2.52 * GIGA, Multiprocessor(48, 24, 100 * KIB, 16)),
    # H100 datasheet (SXM); white paper: 132 SMs, 1830 MHz where tensor cores work, 1980 MHz elsewhere.
    "sm_90": Card("H100 SXM", 3350 * GIGA, 989.4 * TERA, 132, 1.98 * GIGA, Multiprocessor(64, 32, 228 * KIB, 32)),
    # DGX B200 datasheet, an eighth of it: 2.25 PFLOPS. Neither multiprocessors nor clock are published.
    "sm_100": Card("B200", 8000 * GIGA, 2250 * TERA, multiprocessor=Multiprocessor(64, 32, 228 * KIB, None)),
    # RTX Blackwell white paper, appendix A: 170 SMs, 2407 MHz, 209.5 TFLOPS with float32 sums.
    "sm_120": Card("RTX 5090", 1792 * GIGA, 209.5 * TERA, 170, 2.407 * GIGA, Multiprocessor(48, 24, 100 * KIB, 16)),
    "gfx942": Card("MI300X", 5300 * GIGA),
}
