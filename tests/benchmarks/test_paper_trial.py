"""The trial of the paper's configurations: a cell of every file, by a command that the file takes."""

from pathlib import Path

import pytest

from benchmarks import paper_trial
from benchmarks.paper_counts import CONFIGS
from rosa.comparison.fit import check_options
from rosa.comparison.narrowing import parse_changes
from rosa.comparison.plan import load_comparison


@pytest.mark.parametrize("name", paper_trial.CELLS)
def test_the_command_of_a_trial_runs_one_cell_of_its_file(name):
    _, _, config, _, method, _, *changes = paper_trial.command(name, "benchmarks")
    comparison = load_comparison(Path(config), parse_changes(changes), [method])
    assert (comparison.models, comparison.seeds) == ((str(paper_trial.MODEL),), (2333,))
    cell = comparison.cell(str(paper_trial.MODEL), method, 2333)
    assert (cell.settings["max_steps"], comparison.decoding.limit) == (20, 10)
    check_options(cell)


def test_every_file_with_printed_figures_has_its_trial():
    printed = {file.stem for file in CONFIGS.glob("*.csv")}
    assert paper_trial.CELLS.keys() == printed == {name for name in paper_trial.CELLS if list(paper_trial.rows(name))}
