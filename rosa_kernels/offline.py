"""Compiles every kernel for GPUs that are not there and reads registers, spills and access widths off the result.

What is compiled is what would be launched: the arguments come from the launch functions themselves, called on meta
tensors of a model's shape, and are specialized as Triton's launcher specializes them (alignment, unit strides).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rosa_kernels.bounds import Floors, chain, floors, programs_held
from rosa_kernels.cards import CARDS
from rosa_kernels.machine_code import instructions
from rosa_kernels.shapes import SHAPES, Shape, launches, road_launches
from rosa_kernels.walk import Walk, argument_words, walk

TOKENS = 4096  # at which what a token takes is counted
FEW_TOKENS = 460  # 2 x 230, at which the longest chain of steps is
ALL_LAUNCHES = (launches, road_launches)
FOOTNOTE = """\
Registers and spilled bytes of a thread, shared memory of a program in bytes, widest global accesses in bits;
bytes moved for a token in bfloat16, and the time of that at the card's datasheet bandwidth, the kernel's floor.
Compiled here, not run."""
BOUNDS_FOOTNOTE = f"""\
Programs that a multiprocessor holds at once; warp instructions a token, loops counted by their trips; nanoseconds a
token that each part of a card needs at its datasheet rate, at {TOKENS} tokens: memory, issue slots, shared memory and
load/store units, tensor cores, special functions. The largest is the bound. All are floors: without latency, caches,
bank conflicts and waiting. Chain: the trips, loop by loop, of the program that does most at {FEW_TOKENS} tokens."""
BOUNDS_ROW = "{:26} {:13} {:6} {:>5} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>8}"
ROW = "{:26} {:13} {:19} {:>5} {:>6} {:>6} {:>5} {:>5} {:>8} {:>8}"


POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}


class Report(NamedTuple):
    """What one compiled kernel uses. Spills in bytes a thread, shared memory in bytes a program, accesses in bits."""

    kernel: str
    shape: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    widest_load: int
    widest_store: int
    bytes_per_token: float

    @property
    def nanoseconds_per_token(self) -> float:
        """Time to move the bytes of one token at the card's datasheet bandwidth: the floor of the kernel's time."""
        return self.bytes_per_token / CARDS[self.arch].bandwidth * 1e9


def bytes_per_token(launch, tokens: int) -> float:
    """Bytes a launch moves for each of `tokens`: every tensor once, as little as any version of it can."""
    leaves = torch.utils._pytree.tree_leaves(launch.arguments)
    tensors = {id(t): t for t in leaves if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / tokens


class Specialization(NamedTuple):
    """What Triton makes a binary for: two launches with equal ones share it."""

    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]


def specialize(launch) -> Specialization:
    """The specialization that Triton's launcher gives a launch: by dtypes, unit strides and alignment.

    Arguments may be tuples; their parts are specialized each by itself.
    """
    constants, attributes, kinds = {}, {}, {}
    for (_, path, value), (kind, is_constant, is_aligned) in zip(_leaves(launch), _specialized(launch), strict=True):
        kinds[path] = kind
        if is_constant:
            constants[path] = getattr(value, "value", value)
        if is_aligned:  # torch aligns tensors to 16 bytes
            attributes[path] = [["tt.divisibility", 16]]
    signature = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_tuple = isinstance(value, tuple)
        kind = type(value)(*(kinds[i, j] for j in range(len(value)))) if is_tuple else kinds[(i,)]
        signature[parameter.name] = kind
    return Specialization(signature, constants, attributes)


def _specialized(launch) -> list[tuple[str, bool, bool]]:
    return [_specialize(parameter, value) for parameter, _, value in _leaves(launch)]


def _leaves(launch) -> Iterator[tuple[Any, tuple[int, ...], Any]]:
    """Each argument, and each part of one that is a tuple: its parameter, its place, its value."""
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, tuple):
            yield from ((parameter, (i, j), part) for j, part in enumerate(value))
        else:
            yield parameter, (i,), value


def _specialize(parameter, value) -> tuple[str, bool, bool]:
    """The type of an argument, whether it is a constant, and whether it is a multiple of 16."""
    import triton.language as tl

    if parameter.is_constexpr or isinstance(value, tl.constexpr):
        return "constexpr", True, False
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], False, True
    if parameter.annotation_type:
        return parameter.annotation_type, False, False
    if isinstance(value, bool):
        return "u1", False, False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", True, False
    return "i32" if abs(value) < 2**31 else "i64", False, value % 16 == 0 and not parameter.do_not_specialize


def compile_launch(launch, arch: str):
    """The kernel of a launch compiled for `arch`, such as "sm_86". Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rosa_kernels.launch import NUM_STAGES

    signature, constants, attributes = specialize(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": launch.num_warps, "num_stages": NUM_STAGES}
    return triton.compile(source, target=target, options=options)


def report(
    shape: Shape, arch: str, dtype: torch.dtype = torch.bfloat16, launched: Sequence[Callable] = ALL_LAUNCHES
) -> list[Report]:
    """What each kernel uses on `arch` at a model's shape; `launched` says by functions of `shapes.py` which kernels."""
    return [_report(launch, shape, arch) for of in launched for launch in of(shape, 1, TOKENS, dtype)]


def _report(launch, shape: Shape, arch: str) -> Report:
    compiled = compile_launch(launch, arch)
    usage = _amd_usage(compiled.asm["amdgcn"]) if arch.startswith("gfx") else _nvidia_usage(compiled.asm["cubin"])
    return Report(
        kernel=launch.kernel.fn.__name__,
        shape=shape.name,
        arch=arch,
        shared_bytes=compiled.metadata.shared,
        bytes_per_token=bytes_per_token(launch, TOKENS),
        **usage,
    )


class Bound(NamedTuple):
    """What bounds one compiled kernel on a card: floors in nanoseconds a token, warp instructions a token, how many
    programs a multiprocessor holds, and the trips that a program does in a row at FEW_TOKENS tokens."""

    kernel: str
    shape: str
    arch: str
    programs_held: int
    instructions: float
    floors: Floors
    chain: tuple[int, ...]


def bounds(
    shape: Shape, arch: str, dtype: torch.dtype = torch.bfloat16, launched: Sequence[Callable] = ALL_LAUNCHES
) -> list[Bound]:
    """What bounds each kernel on `arch`, a card of NVIDIA's, at a model's shape; `launched` as in `report`."""
    pairs = [zip(of(shape, 1, TOKENS, dtype), of(shape, 1, FEW_TOKENS, dtype), strict=True) for of in launched]
    return [_bound(launch, few, shape, arch) for pair in pairs for launch, few in pair]


def _bound(launch, few, shape: Shape, arch: str) -> Bound:
    compiled, walked, card = compile_launch(launch, arch), walk_launch(launch, arch), CARDS[arch]
    registers = _nvidia_usage(compiled.asm["cubin"])["registers"]
    of_all = floors(walked, TOKENS * bytes_per_token(launch, TOKENS), card)
    return Bound(
        kernel=launch.kernel.fn.__name__,
        shape=shape.name,
        arch=arch,
        programs_held=programs_held(registers, compiled.metadata.shared, launch.num_warps, card.multiprocessor),
        instructions=int(walked.issued.sum()) / TOKENS,
        floors=Floors(*(None if time is None else time / TOKENS for time in of_all)),
        chain=chain(walk_launch(few, arch)),
    )


def walk_launch(launch, arch: str) -> Walk:
    """What a launch executes on `arch`, of NVIDIA's: each instruction of its machine code, counted.

    Raises:
        ValueError: a branch depends on what is not known from the launch's arguments.
    """
    _, sass = disassemble(compile_launch(launch, arch).asm["cubin"])
    words = argument_words([kind for kind, *_ in _specialized(launch)], [value for *_, value in _leaves(launch)], arch)
    return walk(instructions(sass), words, launch.programs, launch.num_warps)


@cache
def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of an NVIDIA binary, by the disassembler that Triton's wheel carries."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return usage, sass


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    usage, sass = disassemble(cubin)

    def field(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage).group(1))

    return dict(
        registers=field("REG"),
        spill_bytes=field("STACK") + field("LOCAL"),
        widest_load=_widest(sass, "LDG"),
        widest_store=_widest(sass, "STG"),
    )


def _widest(sass: str, instruction: str) -> int:
    """Bits of the widest access of a kind, such as 128 for LDG.E.128; an access without a width is one of 32."""
    widths = [32]
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", sass):
        widths += [int(w) for w in re.findall(r"\.(64|128|256)\b", modifiers)]
    return max(widths)


def _amd_usage(assembly: str) -> dict[str, int]:
    """By the notes at the end of the assembly: vector registers, and those of them spilled, four bytes each."""

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    def widest(kind: str) -> int:
        return 32 * max(map(int, re.findall(rf"(?:global|buffer)_{kind}_dwordx(\d)\b", assembly)), default=1)

    return dict(
        registers=field("vgpr_count"),
        spill_bytes=4 * field("vgpr_spill_count"),
        widest_load=widest("load"),
        widest_store=widest("store"),
    )


def main(archs: Sequence[str]) -> None:
    """Prints a table of every kernel on every card of `archs` (keys of CARDS) at every shape of SHAPES.

    Raises:
        ValueError: an architecture that is not in CARDS.
        RuntimeError: the compiler or the disassembler failed.
    """
    unknown = [arch for arch in archs if arch not in CARDS]
    if unknown:
        raise ValueError(f"arch must be among {', '.join(CARDS)}, got {', '.join(unknown)}")
    if os.environ.pop("TRITON_INTERPRET", "0") == "1":
        # The interpreter replaces the compiler for the whole process, so a fresh one does the work.
        subprocess.run([sys.executable, "-m", "rosa_kernels.offline", *archs], check=True)
        return
    print(ROW.format("kernel", "shape", "card", "regs", "spills", "shared", "load", "store", "B/token", "ns/token"))
    for shape in SHAPES:
        for arch in archs:
            for r in report(shape, arch):
                numbers = (r.registers, r.spill_bytes, r.shared_bytes, r.widest_load, r.widest_store)
                per_token = (f"{r.bytes_per_token:.0f}", f"{r.nanoseconds_per_token:.2f}")
                print(ROW.format(r.kernel, r.shape, f"{arch} {CARDS[arch].name}", *numbers, *per_token))
    print(FOOTNOTE)
    print_bounds([arch for arch in archs if not arch.startswith("gfx")])


def print_bounds(archs: Sequence[str]) -> None:
    """Prints a table of what bounds every kernel on every card of `archs`, all NVIDIA's, at every shape of SHAPES."""
    if not archs:
        return
    print()
    head = ("kernel", "shape", "card", "held", "instr", *Floors._fields, "bound", "chain")
    print(BOUNDS_ROW.format(*head))
    for shape in SHAPES:
        for arch in archs:
            for b in bounds(shape, arch):
                times = ("-" if time is None else f"{time:.2f}" for time in b.floors)
                numbers = (b.programs_held, f"{b.instructions:.0f}", *times, b.floors.largest or "-")
                print(BOUNDS_ROW.format(b.kernel, b.shape, arch, *numbers, "+".join(map(str, b.chain))))
    print(BOUNDS_FOOTNOTE)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CARDS))
