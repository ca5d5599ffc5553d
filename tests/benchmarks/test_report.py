"""The report: tables, targets and pictures from rows, here made-up ones of a GPU that does not exist."""

import json

import pytest

from benchmarks import report, targets
from benchmarks.liger import LIGER
from benchmarks.results import ResultsError, machines, read

ABOUT = {"device": "NVIDIA Made-Up 1", "date": "2020-01-02", "driver": "1.2", "commit": "abc1234", "torch": "2.11.0"}
CASES = [
    {"shape": shape, "batch": batch, "seq": seq}
    for shape in ("Qwen2.5-7B", "Gemma-2-9B")
    for batch, seq in ((2, 230), (2, 2048), (1, 16384))
]
# Time of each provider as a multiple of the fused op's, so that some targets are met and some missed.
SLOWER = {"huggingface": 4.0, "liger": 0.9, "eager": 6.0, "compiled": 1.5, "separate": 1.2, "fused": 1.0}
METHODS = {  # milliseconds, bytes
    "frozen floor": (200.0, 30e9),
    "RoSA skip": (220.0, 33e9),
    "RoSA mask": (230.0, 35e9),
    "LoRA r=16": (300.0, 40e9),
}
ERRORS = {"output_max_abs": 1e-3, "output_relative_l2": 2e-3, "gradient_max_abs": 3e-3, "gradient_relative_l2": 4e-3}
TARGETS = 13
README = """# Title
<!-- report:speed begin -->
<!-- report:speed end -->
"""
DOCUMENT = """# Title
before
<!-- report:counted begin -->
old
<!-- report:counted end -->
between
<!-- report:gpu begin -->
<!-- report:gpu end -->
after
"""


def timed_rows():
    limits = dict(provider="torch", mode="forward", batch=1, seq=1)
    yield dict(limits, group="copy", shape="2 GB", milliseconds=1.0, bytes=4e9)
    yield dict(limits, group="matmul", shape="8192^3", milliseconds=1.0, flops=8e11)
    for group in ("rope_roae", "roae", "attention", "decoder_layer"):
        for case in CASES:
            fused = 0.05 + case["batch"] * case["seq"] * 1e-5
            for provider, factor in SLOWER.items():
                moved = (
                    {"bytes": case["batch"] * case["seq"] * 30000}
                    if (group, provider) == ("rope_roae", "fused")
                    else {}
                )
                yield dict(case, group=group, provider=provider, mode="both", milliseconds=fused * factor, **moved)
                if group in ("rope_roae", "roae"):
                    yield dict(case, group=group, provider=provider, mode="accuracy", **ERRORS)
    for case in CASES[:3]:
        for milliseconds, provider in enumerate(("as it is", "PROGRAMS = 256", "separate"), start=1):
            yield dict(case, group="launch_shape", provider=provider, mode="both", milliseconds=milliseconds)
    for method, (milliseconds, peak) in METHODS.items():
        yield dict(
            group="training_step", provider=method, mode="step", shape="Qwen2.5-7B", batch=2, seq=2048, flops=1.2e14,
            milliseconds=milliseconds, tokens_per_second=4096e3 / milliseconds, peak_bytes=peak, trainable_parameters=7,
        )  # fmt: skip
    for batch in (1, 8):
        for method, milliseconds in (("base", 20.0), ("RoSA", 25.0)):
            yield dict(
                group="decode", provider=method, mode="decode", shape="Qwen2.5-7B", batch=batch, seq=512,
                milliseconds=milliseconds * batch, tokens_per_second=1e3 / milliseconds,
            )  # fmt: skip


def counted_rows():
    labels = dict(group="counted", mode="both", shape="Qwen2.5-7B", batch=1, seq=16)
    for provider in ("frozen (no adapter)", "RoSA"):
        yield dict(labels, provider=provider, forward=38, backward=60, decode=40, saved_per_token=1, saved_besides=0)


@pytest.fixture
def save(tmp_path):
    """Writes a file of results and returns its path."""

    def saved(name, rows, **about):
        path = tmp_path / name
        path.write_text(json.dumps({**ABOUT, **about, "rows": list(rows)}))
        return path

    return saved


@pytest.fixture
def documents(tmp_path):
    """A folder with the two documents, empty of tables."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "benchmarks.md").write_text(DOCUMENT)
    return tmp_path


@pytest.fixture
def runs(save):
    counted = save("counted.json", counted_rows(), device="cpu x86_64")
    return [read(counted), read(save("gpu.json", timed_rows()))]


def test_the_documents_are_what_the_report_makes_of_the_kept_results():
    kept = [read(path) for path in report.kept_results()]
    for file, text in report.filled(report.sections(kept)).items():
        assert file.read_text(encoding="utf-8") == text, "run python -m benchmarks.report"


def test_writes_every_table_and_picture(runs, documents):
    parts = report.write_report(runs, documents)
    page = (documents / "docs" / "benchmarks.md").read_text()
    assert page.startswith("# Title\nbefore\n") and page.endswith("\nafter\n") and "old" not in page
    assert parts["counted"] in page and parts["gpu"] in page
    assert parts["speed"] in (documents / "README.md").read_text() and "| RoSA | 38 |" in parts["speed"]
    pictures = {path.name for path in (documents / "docs").glob("*.png")}
    groups = ("rope_roae", "roae", "attention", "decoder_layer", "training_step")
    assert pictures == {"benchmark_counted.png", *(f"benchmark_nvidia_made_up_1_{group}.png" for group in groups)}
    assert all(f"({name})" in page for name in pictures)
    assert all((documents / "docs" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_tables_hold_the_rows_and_say_where_they_are_from(runs):
    gpu = report.sections(runs)["gpu"]
    assert "| Qwen2.5-7B | 2 x 2,048 | 0.364 | 0.0819 | 0.546 | 0.136 | 0.109 | 0.091 | 34% |" in gpu
    assert "| RoSA skip | 220 | 1.100 | 18,618 | 33.0 | 7 |" in gpu
    assert "| constant | Qwen2.5-7B, 2 x 230, both | Qwen2.5-7B, 2 x 2,048, both | " in gpu
    assert "| PROGRAMS = 256 | 2 | 2 | 2 |" in gpu and "| GEMMs and `rope_roae` | 3 | 3 | 3 |" in gpu
    assert gpu.count("NVIDIA Made-Up 1, driver 1.2, 2020-01-02, commit abc1234, torch 2.11.0") == 9
    assert "| model | batch | prompt | base | RoSA |" in gpu and "| Qwen2.5-7B | 8 | 512 | 160 | 200 |" in gpu


def test_targets_say_met_or_missed_and_what_bounds(runs):
    (machine,) = machines(runs)
    found = {o.target.text: o for o in targets.outcomes(machine)}
    assert len(found) == TARGETS
    eager = found["`rope_roae` at least 8x as fast as eager"]
    assert eager.value == pytest.approx(6.0) and not eager.target.met(eager.value)
    assert eager.target.miss(eager.value) == pytest.approx(0.25)
    assert found["`rope_roae` at least 3x as fast as plain RoPE, Hugging Face"].target.met(4.0)
    floor = found["RoSA skip within 1.05x of the frozen floor's time"]
    assert floor.value == pytest.approx(1.1) and floor.bound == "arithmetic: the base's matrix products are 68%"
    printed = targets.table(machine)
    assert "missed by 25%" in printed and "| met |" in printed


def test_a_target_without_rows_is_not_measured(runs, save):
    """No row of the made-up GPU has Liger's norms, and of the ops alone there is no step."""
    (machine,) = machines(runs)
    unknown = [o.target.text for o in targets.outcomes(machine) if o.value is None]
    assert len(unknown) == 3 and all(text.startswith("RoSA skip") and text.endswith(LIGER) for text in unknown)
    assert targets.table(machine).count("| not measured |") == 3
    ops = [row for row in timed_rows() if row["group"] in ("copy", "rope_roae")]
    (machine,) = machines([read(save("ops.json", ops))])
    unknown = [o.target.text for o in targets.outcomes(machine) if o.value is None]
    assert len(unknown) == 8 and "`roae` at least 8x as fast as eager" in unknown
    assert all(f"| {text} |  | not measured |" in targets.table(machine) for text in unknown)


def test_a_step_is_judged_at_every_number_of_tokens_and_beside_methods_with_ligers_norms_alone(save):
    labels = dict(group="training_step", mode="step", shape="Qwen2.5-7B", batch=2, flops=1.2e14)
    labels |= dict(tokens_per_second=1.0, trainable_parameters=7)
    times = {
        2048: {"frozen floor": 100.0, "RoSA skip": 105.0, "LoRA r=16": 140.0},
        230: {"frozen floor": 50.0, "RoSA skip": 60.0, "LoRA r=16": 80.0},
    }
    rows = [
        dict(labels, provider=f"{method}{end}", seq=seq, milliseconds=milliseconds * factor, peak_bytes=30e9)
        for end, factor in (("", 1.0), (LIGER, 0.5))
        for seq, of_methods in times.items()
        for method, milliseconds in of_methods.items()
    ]
    (machine,) = machines([read(save("gpu.json", rows))])
    found = {o.target.text: o for o in targets.outcomes(machine) if o.value is not None}
    assert len(found) == 6
    for end in ("", LIGER):
        floor = found[f"RoSA skip within 1.05x of the frozen floor's time{end}"]
        assert floor.value == pytest.approx(1.2) and floor.place == "Qwen2.5-7B, 2 x 230"
        lora = found[f"RoSA skip at most 0.75x of LoRA's time{end}"]
        assert lora.value == pytest.approx(0.75) and lora.target.met(lora.value)
        assert found[f"RoSA skip at no more memory than LoRA{end}"].target.met(1.0)


@pytest.mark.parametrize(
    ("provider", "met", "missed"), [("eager", 8.0, 7.9), ("compiled", 1.3, 1.29), ("liger", 0.8, 0.79)]
)
def test_an_op_is_judged_from_two_times_2048_tokens_on(save, provider, met, missed):
    def outcomes(factor):
        rows = []
        for case in CASES[:3]:
            # With few tokens the ratios do not count.
            slower = factor if case["batch"] * case["seq"] >= 4096 else 0.1
            for name, milliseconds in (("fused", 1.0), (provider, slower)):
                rows.append(dict(case, group="rope_roae", provider=name, mode="both", milliseconds=milliseconds))
        found = targets.outcomes(machines([read(save("gpu.json", rows))])[0])
        return [outcome for outcome in found if outcome.value is not None]

    (good,), (bad,) = outcomes(met), outcomes(missed)
    assert good.target.met(good.value) and not bad.target.met(bad.value)


@pytest.mark.parametrize(
    ("few", "many", "moved", "bound"),
    [
        (0.10, 0.12, 1e6, "launches: 9x fewer tokens take 83% of the time"),
        (0.10, 1.00, 3.2e9, "bandwidth: 80% of a copy's"),
        (0.10, 1.00, 8e8, "neither launches nor bandwidth (20% of a copy's): arithmetic or latency within the kernel"),
    ],
)
def test_what_bounds_an_op_is_read_off_the_rows(save, few, many, moved, bound):
    labels = dict(group="rope_roae", provider="fused", mode="both", shape="Qwen2.5-7B", batch=2)
    copy = next(timed_rows())
    large = dict(labels, seq=2048, milliseconds=many, bytes=moved)
    path = save("gpu.json", [copy, dict(labels, seq=230, milliseconds=few), large])
    assert targets.bound(machines([read(path)])[0], large) == bound


def test_the_newest_run_of_a_group_counts(save):
    row = dict(CASES[0], group="roae", provider="fused", mode="both", milliseconds=1.0)
    layer = dict(row, group="decoder_layer")
    old = save("a.json", [row, layer], date="2020-01-01")
    new = save("b.json", [dict(row, milliseconds=2.0)], date="2020-01-03")
    (machine,) = machines([read(new), read(old)])
    assert machine.find("roae", provider="fused")["milliseconds"] == 2.0
    assert machine.find("decoder_layer", provider="fused")["milliseconds"] == 1.0


def test_without_gpu_results_the_readme_says_how_to_get_them(save):
    cpu = read(save("cpu.json", timed_rows(), device="cpu x86_64"))
    assert report.sections([cpu]) == {"gpu": report.NOT_MEASURED}


def test_a_run_that_was_cut_short_makes_what_tables_it_can(save):
    rows = list(timed_rows())[:5]
    gpu = report.sections([read(save("gpu.json", rows))])["gpu"]
    assert "| Qwen2.5-7B | 2 x 230 |" in gpu and "Training step" not in gpu
    assert gpu.count("| not measured |") == TARGETS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", 'object with a list "rows"'),
        ('{"rows": []}', 'names the machine in "device"'),
        ('{"device": "x", "rows": [3]}', "row 1: a row is an object"),
        ('{"device": "x", "rows": [{"group": "roae"}]}', "row 1: lacks provider, mode, shape, batch, seq"),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ResultsError, match=f"bad.json.*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": "speed"}, "group must be one of rope_roae, .*, got 'speed'"),
        ({"milliseconds": 0}, "a time positive, got 0"),
        ({"milliseconds": float("nan")}, "must be finite"),
        ({"milliseconds": "fast"}, "milliseconds must be a number, got 'fast'"),
        ({"seq": None}, "seq must be a number, got None"),
        ({"mode": "accuracy"}, "lacks output_max_abs, output_relative_l2"),
        ({"provider": 3}, "provider must be a text, got 3"),
    ],
)
def test_malformed_rows_are_refused_by_number(save, change, message):
    row = dict(CASES[0], group="roae", provider="fused", mode="both", milliseconds=1.0)
    with pytest.raises(ResultsError, match=f"gpu.json, row 2: .*{message}"):
        read(save("gpu.json", [row, {**row, **change}]))


def test_missing_files_and_markers_are_refused_and_nothing_is_written(runs, documents, tmp_path, capsys):
    assert report.main([str(tmp_path / "none.json")]) == 1
    assert "none.json: no such file" in capsys.readouterr().err
    (documents / "docs" / "benchmarks.md").write_text("no markers")
    with pytest.raises(ResultsError, match="lacks <!-- report:counted begin -->"):
        report.write_report(runs, documents)
    assert not list((documents / "docs").glob("*.png")) and (documents / "README.md").read_text() == README


def test_print_writes_nothing(save, capsys):
    readme = (report.ROOT / "README.md").read_bytes()
    assert report.main(["--print", str(save("gpu.json", timed_rows()))]) == 0
    assert "Targets on NVIDIA Made-Up 1" in capsys.readouterr().out
    assert (report.ROOT / "README.md").read_bytes() == readme
