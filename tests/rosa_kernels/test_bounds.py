"""What bounds the kernels, read off their machine code: counts held to those of small code and of known shapes."""

from pathlib import Path

import pytest

from rosa_kernels.bounds import chain, floors, programs_held, trips
from rosa_kernels.cards import CARDS
from rosa_kernels.machine_code import count, instructions, loops
from rosa_kernels.walk import walk

# Programs 0 to 5 of two warps. Odd ones leave at once; the others do `c[0x0][0x160]` trips of a loop, and in each of
# them as many of another as their number says; the store there is of the threads below 8 alone.
CODE = """
        /*0000*/                   S2R R0, SR_CTAID.X ;                 /* 0x0000000000007919 */
                                                                        /* 0x000e220000002500 */
        /*0010*/                   LOP3.LUT P0, RZ, R0, 0x1, RZ, 0xc0, !PT ;
        /*0020*/                   S2R R1, SR_TID.X ;
        /*0030*/              @P0 EXIT ;
        /*0040*/                   IMAD.MOV.U32 R2, RZ, RZ, RZ ;
        /*0050*/                   ISETP.GE.AND P2, PT, R1, 0x8, PT ;
        /*0060*/                   MOV R3, R0 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R12.reuse, R16, R8 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   ISETP.GE.AND P1, PT, R3, 0x1, PT ;
        /*00a0*/              @!P1 BRA 0xe0 ;
        /*00b0*/              @!P2 STG.E.128 [R4.64], R8 ;
        /*00c0*/                   IADD3 R3, R3, -0x1, RZ ;
        /*00d0*/                   BRA 0x90 ;
        /*00e0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00f0*/                   MUFU.EX2 R20, R8 ;
        /*0100*/                   ISETP.NE.AND P1, PT, R2, c[0x0][0x160], PT ;
        /*0110*/               @P1 BRA 0x60 ;
        /*0120*/                   LDSM.16.M88.4 R8, [R4] ;
        /*0130*/                   EXIT ;
        /*0140*/                   BRA 0x140;
        /*0150*/                   NOP;
"""
OUTER, INNER = (0x60, 0x110), (0x90, 0xD0)


def walked(text=CODE, steps=3, programs=6, warps=2):
    return walk(instructions(text), {0x160: steps}, programs, warps)


def of_kind(w, kind):
    """Warp instructions of a kind, bytes that their threads move, and floating-point operations."""
    rows = [(i, int(n), int(t)) for i, n, t in zip(w.code, w.issued, w.threads, strict=True) if i.kind == kind]
    return sum(n for _, n, _ in rows), sum(i.bytes * t for i, _, t in rows), sum(i.flops * n for i, n, _ in rows)


def test_instructions_are_told_apart_by_kind():
    code = instructions(CODE)
    assert len(code) == 22 and code[3].guard == "P0" and code[3].name == "EXIT"
    assert count(code) == {"all": 22, "tensor": 1, "barrier": 1, "store": 1, "special": 1, "shared": 1}
    with pytest.raises(ValueError, match="no machine code"):
        instructions("Resource usage:")


@pytest.mark.parametrize(
    "name, kind, size, flops",
    [
        ("LDG.E", "load", 4, 0), ("LDG.E.128", "load", 16, 0), ("LDG.E.U16", "load", 2, 0),
        ("STG.E.64", "store", 8, 0), ("LDSM.16.MT88.4", "shared", 16, 0), ("LDSM.16.M88", "shared", 4, 0),
        ("STSM.16.M88.2", "shared", 8, 0), ("LDS.128", "shared", 16, 0), ("SHFL.BFLY", "shuffle", 4, 0),
        ("HMMA.16816.F32.BF16", "tensor", 0, 4096), ("HMMA.1688.F32.TF32", "tensor", 0, 2048),
        ("HGMMA.64x32x16.F32.BF16", "tensor", 0, 16384), ("FFMA", None, 0, 0), ("MUFU.RCP", "special", 0, 0),
    ],
)  # fmt: skip
def test_bytes_and_operations_of_an_instruction(name, kind, size, flops):
    i = instructions(f"        /*0000*/          @!P1 {name} R4, [R6.64] ;")[0]
    assert (i.kind, i.bytes, i.flops) == (kind, size, flops)


def test_loops_are_jumps_backwards_and_no_others():
    found = loops(instructions(CODE))
    assert [loop[:2] for loop in found] == [OUTER, INNER]
    assert found[0].counts == {"all": 12, "tensor": 1, "barrier": 1, "store": 1, "special": 1}
    assert found[1].counts == {"all": 5, "store": 1}


def test_trips_and_branches_of_every_program_are_counted():
    w = walked()
    # Programs 0, 2 and 4 of two warps do three trips; of the inner loop 0, 2 and 4 in each, and the test that ends it.
    assert of_kind(w, "tensor") == (3 * 3 * 2, 0, 3 * 3 * 2 * 4096)
    assert of_kind(w, "special")[0] == of_kind(w, "barrier")[0] == 3 * 3 * 2
    assert of_kind(w, "store")[:2] == (3 * 6 * 2, 3 * 6 * 8 * 16)  # issued by both warps, done by eight threads
    assert of_kind(w, "shared")[:2] == (3 * 2, 3 * 64 * 16)
    outside, outer, inner, its_end = 6 * 4 + 3 * (2 + 2), 9 * (3 + 4), 18 * 5, 9 * 2
    assert int(w.issued.sum()) == 2 * (outside + outer + inner + its_end)
    assert [(t.loop.first, t.total, t.most) for t in trips(w)] == [(0x60, 9, 3), (0x90, 9 + 18, 3 + 12)]
    assert chain(w) == (3, 15)
    assert [t.total for t in trips(walked(steps=5))] == [15, 15 + 30]


def test_programs_that_differ_in_their_masks_alone_are_counted_apart():
    w = walked(CODE.replace("MOV R3, R0", "MOV R3, 0x2").replace("PT, R1, 0x8", "PT, R0, 0x3"))
    assert [t.total for t in trips(w)] == [9, 27]
    assert of_kind(w, "store")[:2] == (9 * 2 * 2, 6 * 2 * 64 * 16)  # program 4 issues what it does not do


def test_a_branch_on_data_is_an_error():
    loaded = CODE.replace("MOV R3, R0 ;", "LDG.E R3, [R4.64] ;")
    with pytest.raises(ValueError, match="not known before the launch: .*BRA"):
        walked(loaded)
    # A program that never gets there does not ask.
    assert of_kind(walked(loaded.replace("0x1, RZ, 0xc0", "0xf0, RZ, 0xc0").replace("@P0", "@!P0")), "store")[0] == 0


def test_code_without_an_end_is_an_error(monkeypatch):
    monkeypatch.setattr("rosa_kernels.walk.MAX_STEPS", 1000)
    with pytest.raises(ValueError, match="no end after 1000 steps"):
        walked(CODE.replace("IADD3 R2, R2, 0x1, RZ", "NOP"))


# Registers come in blocks of 256 a warp, from the quarter of the register file that is its scheduler's.
@pytest.mark.parametrize(
    "arch, registers, shared, held",
    [
        ("sm_86", 168, 0, 3), ("sm_86", 128, 0, 4), ("sm_86", 129, 0, 3), ("sm_86", 255, 0, 2), ("sm_86", 32, 0, 12),
        ("sm_80", 32, 0, 16), ("sm_90", 64, 0, 8), ("sm_86", 64, 24 * 1024, 4), ("sm_80", 64, 40 * 1024, 4),
        ("sm_90", 64, 100 * 1024, 2), ("sm_86", 32, 99 * 1024, 1),
    ],
)  # fmt: skip
def test_programs_that_a_multiprocessor_holds(arch, registers, shared, held):
    assert programs_held(registers, shared, 4, CARDS[arch].multiprocessor) == held


def test_a_program_of_one_warp_stays_with_one_scheduler():
    assert programs_held(152, 0, 1, CARDS["sm_86"].multiprocessor) == 4 * 3  # 13 by all registers together


def test_floors_are_counts_by_rates():
    w, card = walked(), CARDS["sm_86"]
    issued, tensor, special = int(w.issued.sum()), 18, 18
    seconds = floors(w, 1e6, card)
    clock = 1e9 / (82 * 1.695e9)  # nanoseconds of a clock, all multiprocessors together
    assert seconds.memory == pytest.approx(1e6 / 936)
    assert seconds.issue == pytest.approx(issued / 4 * clock)
    assert seconds.special == pytest.approx(special * 32 / 16 * clock)
    assert seconds.tensor == pytest.approx(tensor * 4096 / 71e12 * 1e9)
    # 36 stores of 8 threads: 16 units take two clocks each; 6 x 32 threads of 16 bytes: four clocks a warp.
    assert seconds.shared == pytest.approx((36 * 2 + 6 * 4) * clock)
    assert seconds.largest == "memory" and floors(w, 0, card).largest == "tensor"
    assert floors(w, 1e6, CARDS["sm_100"])[1:3] == (None, None)  # no clock is published
    assert floors(w, 1e6, CARDS["sm_100"]).largest is None


COUNTED = f"""
import runpy
runpy.run_path({str(Path(__file__).with_name("counted_kernel.py"))!r}, run_name="__main__")
"""


def test_a_kernel_of_known_trips_is_counted_exactly_on_every_card(compiler):
    """Loops of runtime bounds, one in the other and unrolled by the compiler, divisions, masks, a counter."""
    rows = compiler(COUNTED, "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    loads = 128 * sum(i % 10 // 3 * (3 + 1) for i in range(84))
    stores = 32 * sum(5 - i for i in range(5)) + 128 * (84 // 7)
    assert [row[0] for row in rows] == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    assert all([*map(int, row[1:])] == [loads, stores, 84] for row in rows), rows


KERNELS = """
import sys
from rosa_kernels.offline import SHAPES, bytes_per_token, launches, road_launches, walk_launch
tokens = 256
for launch in (*launches(SHAPES[0], 1, tokens), *road_launches(SHAPES[0], 1, tokens)):
    walked = walk_launch(launch, sys.argv[1])
    counted = dict(load=0, store=0, tensor=0)
    for i, issued, threads in zip(walked.code, walked.issued.tolist(), walked.threads.tolist()):
        if i.kind in counted:
            counted[i.kind] += threads * i.bytes + issued * i.flops
    outputs = sum(t.numel() * t.element_size() for t in launch.outputs) / tokens
    print(launch.kernel.fn.__name__.removesuffix("_kernel"), *(n / tokens for n in counted.values()),
          bytes_per_token(launch, tokens) - outputs, outputs)
"""


def test_bytes_and_operations_of_the_kernels_are_those_of_their_shapes(compiler):
    rows = {}
    for kernel, *numbers in compiler(KERNELS, "sm_120"):
        rows[kernel] = loaded, stored, flops, inputs, outputs = [*map(float, numbers)]
        if kernel.startswith("roae"):  # what programs hand to each other may come on top of the outputs
            assert outputs <= stored <= 1.5 * outputs, kernel
        else:
            assert stored == outputs, kernel
        assert loaded >= 0.9 * inputs, kernel  # all at least once; of the keys' low pairs alone, in the keys' backward
        assert (flops > 0) == kernel.startswith("roae"), kernel
    heads, low, rank, rotary = (28 + 4) * 128, (28 + 4) * 32, 128, 2 * 64
    # Each of 8 groups of heads reads cos and sin again.
    assert rows["rope_roae_forward"][0] == 2 * (heads + low + 8 * rotary)
    assert rows["rope_roae_backward"][0] == 2 * (heads + 2 * low + 8 * rotary)
    # Eq. 2 and Eq. 3 forward (its first factor from all of S), Eq. 3's second factor; S again and the gradient through
    # Eq. 3. Warps may do the same products: of one small dot up to four times.
    query, key = 2 * 28 * 32 * rank, 2 * 4 * 32 * rank
    for kernel, least in (("forward", 3 * query + key), ("backward_keys", 2 * key), ("backward", 2 * query)):
        assert least <= rows[f"roae_{kernel}"][2] <= 4 * least, kernel


TARGETS = """
import sys
from rosa_kernels.bounds import chain, programs_held, trips
from rosa_kernels.cards import CARDS
from rosa_kernels.offline import SHAPES, compile_launch, launches, walk_launch, _nvidia_usage
arch = sys.argv[1]
for shape in SHAPES:
    for launch in launches(shape, 1, 460):
        kernel = launch.kernel.fn.__name__
        if kernel not in ("roae_forward_kernel", "roae_backward_kernel"):
            continue
        binary, walked = compile_launch(launch, arch), walk_launch(launch, arch)
        blocks = -(-460 // launch.arguments["shape"].BLOCK_T.value)
        heads = [t.loop.counts for t in trips(walked) if t.total == shape.heads * blocks and t.loop.counts["store"]]
        usage = _nvidia_usage(binary.asm["cubin"])
        held = programs_held(usage["registers"], binary.metadata.shared, 4, CARDS[arch].multiprocessor)
        counts = [heads[-1][kind] for kind in ("all", "tensor", "barrier")]
        print(shape.name, kernel, usage["spill_bytes"], held, *counts, *chain(walked))
"""
# Of one head of one product for each part of a pair, of which four warps did half twice over, at 32 tokens.
TWO_PRODUCTS = {"roae_forward_kernel": (430, 32, 16), "roae_backward_kernel": (720, 64, 30)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_a_head_of_roae_takes_few_instructions_and_barriers_and_its_keys_few_steps(compiler, arch):
    rows = compiler(TARGETS, arch)
    assert len(rows) == 6
    for shape, kernel, *numbers in rows:
        spilled, held, instructions, products, barriers, *steps = map(int, numbers)
        most, products_before, barriers_before = TWO_PRODUCTS[kernel]
        assert spilled == 0 and held >= 3 and instructions <= most, (shape, kernel, numbers)
        # Gemma-2's programs have 16 tokens, of which nothing was done twice.
        assert products <= products_before / 2 and barriers <= barriers_before / 2, (shape, kernel, numbers)
        assert max(steps) <= 8, (shape, kernel, numbers)
