"""What reaches Triton's launcher by kept launches and by the long way, on a driver that launches nothing.

Run by `test_kept.py` in a process of its own: the interpreter of the other tests excludes the compiler.
"""

import ctypes
import threading

import pytest
import torch
import triton

from benchmarks.host import calls, stubbed
from rosa_kernels import kept, road_triton, roae_triton
from rosa_kernels.kept import run_launch
from rosa_kernels.shapes import Shape

TINY = Shape("tiny", 4, 2, 32, 4)
NAMES = list(calls(TINY, 1, 1))


@pytest.fixture
def driver():
    """Its `seen` is what was launched: programs, stream, binary and arguments of each."""
    seen = []

    def launched(x, y, z, stream, binary, packed, metadata, enter_hook, exit_hook, *arguments):
        for hook in (enter_hook, exit_hook):
            if hook is not None:
                hook(metadata)
        seen.append((x, y, z, stream, binary, arguments))

    with stubbed(launched) as driver:
        driver.seen = seen
        yield driver


def tensors(arguments):
    return [t for t in arguments if isinstance(t, torch.Tensor)]


def named(launched, inputs, outputs):
    """A launch with the names of tensors in place of tensors and of pointers to them."""
    outputs = [t for t in outputs if all(t is not given for given in inputs)]
    name_of = {t.data_ptr(): f"input {i}" for i, t in enumerate(inputs) if t.numel()}
    name_of |= {t.data_ptr(): f"output {i}" for i, t in enumerate(outputs) if t.numel()}
    *head, arguments = launched
    plain = [(t.data_ptr() if t.numel() else 0) if isinstance(t, torch.Tensor) else t for t in flat(arguments)]
    named = [name_of.get(value, value) for value in plain]
    return *head, ["scratch" if isinstance(value, int) and value > 2**40 else value for value in named]


def flat(arguments):
    return [part for value in arguments for part in (value if isinstance(value, tuple) else (value,))]


def long_way(driver, launch, arguments):
    outputs = launch(*arguments).run()
    return named(driver.seen.pop(), tensors(arguments), outputs)


def kept_way(driver, launch, arguments, is_kept=True):
    """As seen the second time; a kept launch has numbers for pointers."""
    run_launch(launch, *arguments)
    outputs = run_launch(launch, *arguments)
    assert is_kept != any(isinstance(value, torch.Tensor) for value in flat(driver.seen[-1][5]))
    return named(driver.seen.pop(), tensors(arguments), outputs), outputs


def check(driver, launch, arguments, is_kept=True):
    """Both ways reach the launcher with the same, and come back with outputs laid out alike."""
    expected, (seen, outputs) = long_way(driver, launch, arguments), kept_way(driver, launch, arguments, is_kept)
    assert seen == expected
    given = {id(t) for t in tensors(arguments)}
    like = [t for t in launch(*arguments).outputs if id(t) not in given]
    layouts = [[(t.shape, t.stride(), t.dtype, t.device) for t in of] for of in (outputs, like)]
    assert layouts[0] == layouts[1]


def moved(t, elements=1):
    """A copy, laid out alike, that begins so many elements after an aligned address."""
    room = torch.empty(t.numel() + elements, dtype=t.dtype)
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    shape = [t.shape[i] for i in order]
    return room[elements:].view(shape).permute(*[order.index(i) for i in range(t.dim())])


@pytest.mark.parametrize("name", NAMES)
def test_the_launcher_gets_what_the_long_way_gives_it(driver, name):
    for batch, seq in ((2, 5), (1, 1), (3, 17), (2, 5), (1, 40), (1, 1)):
        check(driver, *calls(TINY, batch, seq)[name])


@pytest.mark.parametrize("name", NAMES)
def test_kept_launches_are_launched_without_their_launch_function(driver, name):
    launch, arguments = calls(TINY, 2, 5)[name]
    called = []

    def counted(*given):
        called.append(given)
        return launch(*given)

    for _ in range(3):
        run_launch(counted, *arguments)
    assert len(called) == 1 and len(driver.seen) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_new_length_compiles_nothing(driver, name):
    for batch, seq in ((2, 5), (1, 1), (3, 17), (1, 40)):
        run_launch(*_flat(calls(TINY, batch, seq)[name]))
    assert len({binary for _, _, _, _, binary, _ in driver.seen}) == 1


def _flat(call):
    return call[0], *call[1]


@pytest.mark.parametrize("name", ["rope_roae forward", "road forward", "rope_road forward"])
def test_a_pointer_off_its_alignment_gets_a_binary_of_its_own(driver, name):
    launch, (first, *others) = calls(TINY, 2, 5)[name]
    off = moved(first)
    assert off.stride() == first.stride() and off.data_ptr() % 16 == 2
    binaries = []
    for x in (first, off, first.clone(), moved(first)):
        check(driver, launch, (x, *others))
        run_launch(launch, x, *others)
        binaries.append(driver.seen.pop()[4])
    assert binaries[0] == binaries[2] != binaries[1] == binaries[3]
    assert len([key for key in kept.KEPT if key[0] is launch]) == 2


def test_other_strides_are_other_launches(driver):
    launch, (q, k, *others) = calls(TINY, 2, 5)["rope_roae forward"]
    by_length = torch.empty(5, 2, 4, 32, dtype=q.dtype).permute(1, 2, 0, 3)
    for x in (q, q.contiguous(), by_length, torch.empty(2, 4, 5, 64, dtype=q.dtype)[..., ::2], q):
        check(driver, launch, (x, k, *others))
    assert len(kept.KEPT) == 4


@pytest.mark.parametrize("name", ["rope_roae forward", "rope_roae backward", "rope_road forward", "road forward"])
def test_flags_and_dtypes_are_other_launches(driver, name):
    launch, arguments = calls(TINY, 2, 5)[name]
    check(driver, launch, arguments)
    check(driver, *calls(TINY, 2, 5, torch.float32)[name])
    if name.startswith("rope_roae"):
        check(driver, launch, [0.2 if isinstance(value, float) else value for value in arguments])
    if name == "rope_roae backward":
        check(driver, launch, (*arguments[:-1], [True, False, True, False]))
    for call in (arguments, calls(TINY, 2, 5)[name][1]):
        check(driver, launch, call)


def test_dimensions_of_size_1_have_no_stride(driver):
    """Whatever torch has there: one binary, and the same arguments."""
    launch, (q, k, *others) = calls(TINY, 2, 1)["rope_roae forward"]
    run_launch(launch, q, k, *others)
    odd = q.as_strided(q.shape, (q.stride(0), q.stride(1), 1, 1))
    check(driver, launch, (odd, k, *others))
    run_launch(launch, odd, k, *others)
    assert driver.seen[0][4] == driver.seen[-1][4]


def test_tensors_at_one_address_are_not_taken_for_each_other(driver):
    launch, (q, _, cos, sin, *others) = calls(TINY._replace(key_heads=4), 2, 5)["rope_roae forward"]
    check(driver, launch, (q, q, cos, cos, *others), is_kept=False)
    assert not kept.KEPT
    check(driver, launch, (q, q.clone(), cos, sin, *others))
    run_launch(launch, q, q, cos, cos, *others)
    launched = {t.data_ptr() if isinstance(t, torch.Tensor) else t for t in flat(driver.seen.pop()[5])}
    assert {q.data_ptr(), cos.data_ptr()} <= launched


def test_a_launch_that_copies_copies_every_time(driver):
    launch, (q, k, cos, _, *others) = calls(TINY, 2, 5)["rope_roae forward"]
    column_major = cos.transpose(1, 2).contiguous().transpose(1, 2)
    for _ in range(2):
        run_launch(launch, q, k, column_major, column_major.clone(), *others)
        assert all(part is not column_major for part in flat(driver.seen.pop()[5]))
    assert not kept.KEPT


def test_an_output_that_is_an_input_stays_in_place(driver):
    x, *others = calls(TINY, 2, 5)["road forward"][1]
    for _ in range(3):
        torch.ops.rosa.road_(x, *others)
    assert len(kept.KEPT) == 1
    for *_, arguments in driver.seen[1:]:
        assert flat(arguments).count(x.data_ptr()) == 2


def test_outputs_are_new_every_time(driver):
    launch, arguments = calls(TINY, 2, 5)["roae backward"]
    first, second, third = (run_launch(launch, *arguments) for _ in range(3))
    addresses = [t.data_ptr() for outputs in (first, second, third) for t in outputs if t.numel()]
    assert len(set(addresses)) == len(addresses)


def test_a_kept_launch_holds_no_memory(driver, monkeypatch):
    monkeypatch.setattr(roae_triton, "BLOCK_S", 16)
    monkeypatch.setattr(roae_triton, "KEY_STEPS", 1)
    launch, arguments = calls(TINY, 2, 40)["roae forward"]
    run_launch(launch, *arguments)
    (of_launch,) = kept.KEPT.values()
    layouts = of_launch.outputs + of_launch.scratch + of_launch.zeroed
    assert len(layouts) == 6 and not any(t.untyped_storage().nbytes() for t in layouts)


@pytest.mark.parametrize("first", [True, False])
def test_kept_in_inference_mode_or_not_outputs_are_of_the_mode_they_are_made_in(driver, first):
    launch, arguments = calls(TINY, 2, 5)["rope_roae forward"]
    for mode in (first, not first):
        with torch.inference_mode(mode):
            for _ in range(2):
                assert all(t.is_inference() == mode for t in run_launch(launch, *arguments))
    assert len(kept.KEPT) == 1


def test_counters_are_zero_at_every_launch(driver, monkeypatch):
    monkeypatch.setattr(roae_triton, "BLOCK_S", 16)
    monkeypatch.setattr(roae_triton, "KEY_STEPS", 1)
    launch, arguments = calls(TINY, 2, 40)["roae forward"]
    check(driver, launch, arguments)
    place = launch(*arguments).kernel.arg_names.index("arrived")
    found = []

    def launched(*launcher_arguments):
        counters = (ctypes.c_int32 * 3).from_address(launcher_arguments[9 + place])  # of three blocks of tokens
        found.append([*counters])
        counters[:] = [2, 2, 2]  # as two programs of each leave them

    driver.launched = launched
    for _ in range(5):
        run_launch(launch, *arguments)
    assert found == [[0, 0, 0]] * 5


def test_without_tokens_nothing_is_launched(driver):
    launch, arguments = calls(TINY, 0, 5)["rope_roae forward"]
    for _ in range(2):
        assert run_launch(launch, *arguments)[0].shape == (0, 4, 5, 32)
    assert not driver.seen and not kept.KEPT


def test_the_current_stream_and_profilers_hooks_are_those_of_each_launch(driver):
    launch, arguments = calls(TINY, 2, 5)["road forward"]
    for driver.stream in (0, 7, 0):
        run_launch(launch, *arguments)
    assert [stream for _, _, _, stream, *_ in driver.seen] == [0, 7, 0]

    names = []
    hooks = triton.knobs.runtime.launch_enter_hook

    def hook(metadata):
        names.append(metadata.get()["name"])

    hooks.add(hook)
    try:
        run_launch(launch, *arguments)
    finally:
        hooks.remove(hook)
    run_launch(launch, *arguments)
    assert names == ["road_forward_kernel"]


def test_the_kept_are_bounded(driver, monkeypatch):
    monkeypatch.setattr(kept, "MOST_KEPT", 3)
    for seq in range(1, 9):
        check(driver, *calls(TINY, 2, seq)["road forward"])
        assert len(kept.KEPT) <= 3


def test_threads_do_not_mix_their_pointers(driver):
    """Another thread launches the same between this one's arguments and its launch."""
    launch, arguments = calls(TINY, 2, 5)["road forward"]
    others = calls(TINY, 2, 5)["road forward"][1]
    run_launch(launch, *arguments)
    of_driver, driver.seen[:] = driver.get_current_device, []

    def interrupted():
        driver.get_current_device = of_driver
        thread = threading.Thread(target=run_launch, args=(launch, *others))
        thread.start()
        thread.join()
        return of_driver()

    driver.get_current_device = interrupted
    run_launch(launch, *arguments)
    for (*_, launched), given in zip(driver.seen, (others, arguments), strict=True):
        assert all(t.data_ptr() in flat(launched) for t in tensors(given))


def test_operators_launch_kept_and_fake_tensors_do_not(driver):
    q, k, *others = calls(TINY, 2, 5)["rope_roae forward"][1]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in (q, k, *others)]
        torch.ops.rosa.rope_roae_forward(*fake)
    torch.ops.rosa.rope_roae_forward(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in (q, k, *others)))
    assert not driver.seen and not kept.KEPT
    torch.ops.rosa.rope_roae_forward(q, k, *others)
    assert len(driver.seen) == len(kept.KEPT) == 1


def test_a_changed_constant_needs_other_kept(driver, monkeypatch):
    """As benchmarks and tests do that change one."""
    launch, arguments = calls(TINY, 2, 5)["road backward"]
    check(driver, launch, arguments)
    monkeypatch.setattr(road_triton, "PROGRAMS", 1)
    monkeypatch.setattr(kept, "KEPT", {})
    check(driver, launch, arguments)
