"""What a comparison runs: its YAML file, checked, and its cells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from rosa.comparison.narrowing import changed, only
from rosa.comparison.printed import Printed, read_printed
from rosa.miniature.make import MiniatureRecipe
from rosa.storage.settings import as_arguments, check_keys, load_settings, mapping, mapping_or_file
from rosa.training.finetune_arguments import unread_options
from rosa.training.methods import OURS, ROSA
from rosa.training.parsing import option_names

BASE = "base"  # the row of the model as it is
GRID = "learning_rates"

# Options of `rosa train` that the comparison gives each cell itself, and those of other data than it trains on, which
# is instructions that are read whole.
_OF_THE_CELL = {"config", "help", "model", "output", "seed", "resume", "overwrite"}
_OF_OTHER_DATA = {"data_format", "data_split", "data_config", "data_revision", "streaming", "dry_run"}


@dataclass(frozen=True)
class Cell:
    """One method, trained with one seed at one learning rate, and evaluated; or the base as it is, evaluated.

    Attributes:
        folder (Path): for all that it leaves behind.
        model (str): folder or Hub name of the base.
        method (str): its name in the table.
        settings (mapping): options of `rosa train`, all but `output`; of the base, its name and how it is loaded.
        trains (bool): whether anything is trained: not the base.
        tests (bool): whether it is tested. A cell that serves the choice of a learning rate is not: its validation
            loss is taken.
    """

    folder: Path
    model: str
    method: str
    settings: Mapping[str, Any]
    trains: bool = True
    tests: bool = True

    @property
    def load_in(self) -> str | None:
        """How the base is quantized."""
        return self.settings.get("load_in")

    @property
    def arguments(self) -> list[str]:
        """The command line of `rosa train`, without what the comparison's `train` says to other methods."""
        unread = _unread(self.settings)
        read = {name: value for name, value in self.settings.items() if name not in unread}
        return as_arguments({**read, "output": str(self.folder)})


@dataclass(frozen=True)
class Decoding:
    """How answers are made, and to how many rows.

    Args:
        batch_size (int): prompts decoded together.
        max_new_tokens (int): most tokens of an answer.
        limit (int or None): rows of each task, from its first; None takes all.
    """

    batch_size: int = 16
    max_new_tokens: int = 256
    limit: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (isinstance(value, int) and value >= 1) and not (name == "limit" and value is None):
                raise ValueError(f"decoding: {name} must be a whole number from 1, got {value!r}")


@dataclass(frozen=True)
class Forgetting:
    """Rows of another kind than those trained on: by how much their loss rises, a model has forgotten.

    Args:
        data (str): as in `rosa train --data`.
        rows (int): how many, from the first.
    """

    data: str
    rows: int = 200

    def __post_init__(self):
        if not (isinstance(self.rows, int) and self.rows >= 1):
            raise ValueError(f"forgetting: rows must be a whole number from 1, got {self.rows!r}")


@dataclass(frozen=True)
class Comparison:
    """A comparison as its file describes it, key by key.

    Args:
        output (Path): folder for the cells and the tables.
        methods (mapping): the table's rows: a name, and options of `rosa train` (`method`, `peft`, `r_low`, ...).
        seeds (tuple of int): each method is trained with each.
        train (mapping): options of `rosa train` for all methods. In the file, `methods` and `train` may also be the
            names of YAML files, as seen from it.
        models (tuple of str): folders or Hub names of the bases.
        tasks (str): as in `rosa evaluate --tasks`, in the file a list of names too; all their rows together make the
            micro-average.
        side_tasks (str): tasks outside the micro-average, named likewise; empty for none.
        data_dir (Path or None): the tasks' folders; None takes the data sets from the hub.
        learning_rates (tuple of float): the grid from which each method gets its own, by validation loss; a method with
            `learning_rates` among its options has a grid of its own. Empty for none: the options' learning rate counts.
        tuning_seed (int): the seed of that choice, none of `seeds`.
        tuning_steps (int or None): steps of a run of that choice; None takes as many as `train` says.
        decoding (Decoding): how answers are made.
        forgetting (Forgetting or None): rows whose loss is measured beside the tests, `forgetting_loss` of an outcome.
        printed (Printed): figures to set beside those measured; in the file, the name of a CSV file as seen from it.
        miniature (MiniatureRecipe or None): makes the base, the data and the tasks, which are then not given.

    Raises:
        ValueError: a value is of the wrong form, or two of them contradict each other.
    """

    output: Path
    methods: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    train: Mapping[str, Any]
    models: tuple[str, ...] = ()
    tasks: str = ""
    side_tasks: str = ""
    data_dir: Path | None = None
    learning_rates: tuple[float, ...] = ()
    tuning_seed: int = 0
    tuning_steps: int | None = None
    decoding: Decoding = field(default_factory=Decoding)
    forgetting: Forgetting | None = None
    printed: Printed = field(default_factory=Printed)
    miniature: MiniatureRecipe | None = None

    def __post_init__(self):
        if not self.methods:
            raise ValueError("methods: name at least one")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(isinstance(s, int) for s in self.seeds):
            raise ValueError(f"seeds must be different whole numbers, at least one, got {list(self.seeds)}")
        if any(not 0 <= seed < 2**32 for seed in (*self.seeds, self.tuning_seed)):
            raise ValueError(f"seeds must lie in 0 to 2**32 - 1, got {[*self.seeds, self.tuning_seed]}")
        given = [name for name in ("models", "tasks", "side_tasks", "data_dir") if getattr(self, name)]
        if self.miniature is not None and given:
            raise ValueError(f"the miniature makes its own model, data and tasks: leave out {', '.join(given)}")
        if self.miniature is None and not (self.models and self.tasks):
            raise ValueError("name at least one of the models and the tasks, or give miniature")
        grids = [self.learning_rates, *map(self.rates, self.methods)]
        for grid in grids:
            if any(rate <= 0 for rate in grid):
                raise ValueError(f"learning_rates must be above 0, got {list(grid)}")
        if any(grids) and not all(grids[1:]):
            raise ValueError("learning_rates: all methods choose theirs, or none")
        if self.tuning_steps is not None and not (isinstance(self.tuning_steps, int) and self.tuning_steps >= 1):
            raise ValueError(f"tuning_steps must be a whole number from 1, got {self.tuning_steps!r}")
        if any(grids) and self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed {self.tuning_seed} is one of the seeds: the test must be of runs unseen")
        if any(grids) and not self.train.get("val_size"):
            raise ValueError("learning_rates are chosen by the loss on held-out rows: give train.val_size")
        for folders, what in (([BASE, *map(slug, self.methods)], "methods"), (map(_base_name, self.models), "models")):
            names = list(folders)
            if len(set(names)) < len(names):
                raise ValueError(
                    f"{what} must differ in their names' letters and digits, which name their folders, and none of the "
                    f"methods may be called {BASE}, which is the model as it is"
                )

    def base_cell(self, model: str) -> Cell:
        """The cell of a base as it is, quantized if `train` has it so."""
        settings = {"model": model, **({"load_in": self.train["load_in"]} if self.train.get("load_in") else {})}
        return Cell(self.output / "cells" / _base_name(model) / BASE, model, BASE, settings, trains=False)

    def cell(self, model: str, method: str, seed: int, learning_rate: float | None = None) -> Cell:
        """The cell of a model, method and seed; a learning rate, if given, takes the place of the options' own."""
        options = {name: value for name, value in self.methods[method].items() if name != GRID}
        settings = {**self.train, **options, "model": model, "seed": seed}
        if learning_rate is not None:
            settings["learning_rate"] = learning_rate
        return Cell(self._folder(model, method) / f"seed-{seed}", model, method, settings)

    def tuning_cell(self, model: str, method: str, learning_rate: float) -> Cell:
        """The cell that tries a learning rate."""
        cell = self.cell(model, method, self.tuning_seed, learning_rate)
        steps = {} if self.tuning_steps is None else {"max_steps": self.tuning_steps}
        folder = self._folder(model, method) / f"tuning-{learning_rate:g}"
        return replace(cell, settings={**cell.settings, **steps}, folder=folder, tests=False)

    def rates(self, method: str) -> tuple[float, ...]:
        """The learning rates from which a method gets its own."""
        return tuple(self.methods[method].get(GRID, self.learning_rates))

    def _folder(self, model: str, method: str) -> Path:
        return self.output / "cells" / _base_name(model) / slug(method)

    def is_baseline(self, method: str) -> bool:
        """Whether a method is one that RoSA and RoAd are to beat: one of peft's, without RoSA's layer selection."""
        options = {**self.train, **self.methods[method]}
        return options.get("method", ROSA) not in OURS and not options.get("dls")


def load_comparison(file: Path, changes: Mapping[str, Any] | None = None, methods: Sequence[str] = ()) -> Comparison:
    """Read and check the YAML file of a comparison; its keys are those of Comparison.

    Args:
        file (Path): the file. Paths in it are seen from the current folder, but for `methods`, `train` and `printed`.
        changes (mapping, optional): other values by key, which may lead into a mapping (`train.max_steps`).
        methods (sequence of str): the names of those to run; none for all.

    Returns:
        Comparison: nothing of it has been made or run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown key, a value of the wrong form, or a contradiction.
    """
    given = changed(load_settings(file), changes or {}, file.parent)
    check_keys(given, [f.name for f in fields(Comparison)], str(file))
    missing = {"output", "methods", "seeds"} - given.keys()
    if missing:
        raise ValueError(f"{file} must give {', '.join(sorted(missing))}")
    try:
        comparison = Comparison(**_converted(given, file))
        return replace(comparison, methods=only(comparison.methods, methods))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def slug(name: str) -> str:
    """A name as a folder: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _unread(settings: Mapping[str, Any]) -> set[str]:
    return unread_options(settings.get("method", ROSA), settings.get("dls"))


def _base_name(model: str) -> str:
    return slug(Path(model).name)


def _converted(given: dict[str, Any], file: Path) -> dict[str, Any]:
    train, methods = (mapping_or_file(given.get(name), name, file.parent) for name in ("train", "methods"))
    options = option_names() - _OF_THE_CELL - _OF_OTHER_DATA
    check_keys(train, options | {"seed"}, "train")  # the seed of a single run, where `train` is a file
    methods = {name: mapping(value, f"methods: {name}") for name, value in methods.items()}
    for name, value in methods.items():
        check_keys(value, options | {GRID}, f"methods: {name}")
        if GRID in value:
            value[GRID] = _rates(value[GRID], f"methods: {name}: {GRID}")
        unread = sorted(value.keys() & _unread({**train, **value}))
        if unread:
            raise ValueError(f"methods: {name}: nothing reads {', '.join(unread)} in a run of this method")
    values = given | {"output": Path(given["output"]), "train": train, "methods": methods}
    values |= {name: tuple(_listed(given[name], name)) for name in ("seeds", "models") if name in given}
    if GRID in given:
        values[GRID] = _rates(given[GRID], GRID)
    values |= {name: _names(given[name], name) for name in ("tasks", "side_tasks") if name in given}
    if given.get("data_dir") is not None:
        values["data_dir"] = Path(given["data_dir"])
    if given.get("printed") is not None:
        if not isinstance(given["printed"], str):
            raise ValueError(f"printed must be the name of a file, got {given['printed']!r}")
        values["printed"] = read_printed(file.parent / given["printed"], values.get("tasks", "").split(","))
    for name, made in (("decoding", Decoding), ("forgetting", Forgetting), ("miniature", MiniatureRecipe)):
        if name in given:
            values[name] = _built(made, given[name], name)
    return values


def _built(made: type, value: object, place: str) -> Any:
    """A dataclass from a mapping of its fields, and so on where a field is one itself."""
    parts, types = mapping(value, place), get_type_hints(made)
    check_keys(parts, types, place)
    missing = [f.name for f in fields(made) if f.default is f.default_factory is MISSING and f.name not in parts]
    if missing:
        raise ValueError(f"{place} must give {', '.join(missing)}")
    nested = {key: _built(types[key], parts[key], f"{place}: {key}") for key in parts if is_dataclass(types[key])}
    return made(**{**parts, **nested})


def _names(value: object, name: str) -> str:
    """Names with commas between, or a list of them, as one string."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(part, str) for part in names):
        raise ValueError(f"{name} must be names with commas between, or a list of them, got {value!r}")
    return ",".join(names)


def _rates(value: object, name: str) -> tuple[float, ...]:
    return tuple(float(rate) for rate in _listed(value, name))


def _listed(value: object, name: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return value
