"""RoAE with one thing changed at a time, trained on real weights: which of its choices cost, and what each is worth.

    make base && python -m benchmarks.smollm2.variants --run    trains what is not kept yet, and prints the table
    python -m benchmarks.smollm2.variants                       prints the table of what is kept

Each run is one of the study's tuning runs (configs/smollm2/arithmetic.yaml: 100 steps of 4 rows, the same held-out
rows) of RoAE without layer selection, at the rate of the study's and 0.001 for the norms. The changes are made here
alone: the signals are computed in plain PyTorch, and the package's own op puts Eq. 4 on the rotated queries and keys. A
variant's adapter is written to runs/roae_variants, and `load` reads it again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.smollm2.held_out import held_out, losses
from benchmarks.tables import markdown
from rosa.adapters import roae_plan
from rosa.adapters.pretrained import load_model
from rosa.adapters.roae import RoAE
from rosa.comparison.cell import OF_THE_MACHINE
from rosa.comparison.plan import slug
from rosa.storage.files import replace_text
from rosa.storage.settings import as_arguments, load_settings
from rosa.training import finetune as job_module
from rosa.training.methods import load_trained, trainable
from rosa.training.parsing import parse
from rosa.training.trainer import RosaTrainer
from rosa_kernels import rope_roae

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "roae_variants" / "outcomes.jsonl"
ADAPTERS = Path("runs/roae_variants")
VARIANT_NAME = "variant.json"  # beside an adapter: which variant's it is
PACKAGES = ("torch", "transformers")

COMMON = {"model": "runs/smollm2/SmolLM2-135M-Instruct", "seed": 1, "max_steps": 100}
UNSELECTED = {"dls": False, "norm_learning_rate": 1e-3}
BASES = {
    "alpha 1": {"alpha": 1.0, "learning_rate": 3e-3},
    "alpha 0.1": {"alpha": 0.1, "learning_rate": 3e-3},
}


class PlainRoAE(RoAE):
    """RoAE with its signals in plain PyTorch: what the variants change parts of."""

    rotate_one = None  # of families that rotate queries and keys apart, which are not studied here
    activation = staticmethod(F.silu)

    def forward(self, q, k, cos, sin, hidden_states):
        S, S_K = (self.columns(s) for s in self.signals(hidden_states.to(q.dtype)))
        rotary = self.layout.pairwise(cos, sin)
        q, k = (self._enhanced(x, s, rotary) for x, s in ((q, S), (k, S_K)))
        return self.layout.heads_first(q), self.layout.heads_first(k)

    def signals(self, H: Tensor) -> tuple[Tensor, Tensor]:
        """S of Eq. 2, in float32 at least, and S_K of Eq. 3; products in H's dtype."""
        with torch.autocast(H.device.type, enabled=False):
            U = F.linear(F.linear(H, self.down.to(H.dtype)), self.up.to(H.dtype))
            S = self.activation(U.float() if U.dtype != torch.float64 else U)
            if self.gqa_down is None:
                return S, S
            latent = F.linear(self.activation(U), self.gqa_down.to(H.dtype))
            return S, F.linear(latent, self.gqa_up.to(H.dtype))

    def columns(self, s: Tensor) -> Tensor:
        """Signals as Eq. 4 takes them: n real parts and n imaginary ones a head."""
        return s

    def _enhanced(self, x: Tensor, s: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = self._arranged(x)
        # As keys, since of these the op takes signals that need no activation.
        return rope_roae(x[:, :0], x, *rotary, s[..., :0], s, **self._options)[1]


class OneGain(PlainRoAE):
    """Both parts of a pair get the same gain, which commutes with RoPE: attention sees distances alone."""

    @staticmethod
    def shapes(config, hidden_size, heads, key_heads, layout):
        shapes = RoAE.shapes(config, hidden_size, heads, key_heads, layout)
        halved = {"up": 0, "gqa_down": 1, "gqa_up": 0}  # along which dimension a number a part stood
        return {
            name: tuple(size // 2 if at == halved.get(name) else size for at, size in enumerate(shape))
            for name, shape in shapes.items()
        }

    def columns(self, s):
        n = self.up.shape[0] // self.heads
        return s.unflatten(-1, (-1, 1, n)).expand(-1, -1, -1, 2, -1).flatten(-3)


class Tanh(PlainRoAE):
    """Twice as steep at zero as SiLU, and without its floor."""

    activation = staticmethod(torch.tanh)


class HalfTanh(PlainRoAE):
    """As steep at zero as SiLU is, and without its floor."""

    activation = staticmethod(lambda U: torch.tanh(U) / 2)


class Half(PlainRoAE):
    activation = staticmethod(lambda U: U / 2)


class RandomUp(PlainRoAE):
    """Z* is not Z at the start: SiLU of anything but zero is not zero."""

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.normal_(self.up, std=0.02)


class ZeroDown(PlainRoAE):
    """The zeros stand in W_down in W_up's place: Z* is Z at the start just as well."""

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.down)
        nn.init.kaiming_uniform_(self.up, a=5**0.5)


class GroupMean(PlainRoAE):
    """W_GQA begins as the mean over the query heads that share a key head. Rows that are left of gqa_down stay random,
    and gqa_up passes none of them on at first."""

    def reset_parameters(self):
        super().reset_parameters()
        wanted, rank = self.gqa_up.shape
        if rank < wanted:
            raise ValueError(f"the mean over groups is of rank {wanted}, and W_GQA of rank {rank}")
        d_low = self.up.shape[0] // self.heads
        key_heads = wanted // d_low
        mean = torch.eye(key_heads).repeat_interleave(self.heads // key_heads, dim=1) * key_heads / self.heads
        with torch.no_grad():
            self.gqa_down[:wanted] = torch.kron(mean, torch.eye(d_low))
            self.gqa_up.copy_(torch.eye(wanted, rank))


class Redrawn(PlainRoAE):
    def reset_parameters(self):
        super().reset_parameters()
        super().reset_parameters()


class Variant(NamedTuple):
    """A variant: its module, and how many times the learning rate a parameter of it gets."""

    module: type[RoAE] = PlainRoAE
    rates: Mapping[str, float] = {}


AS_IT_IS, ONE_GAIN = "as it is", "one gain a pair"
VARIANTS = {
    AS_IT_IS: Variant(),
    ONE_GAIN: Variant(OneGain),
    "other first weights, nothing changed": Variant(Redrawn),
    "tanh in SiLU's place": Variant(Tanh),
    "half of tanh in SiLU's place": Variant(HalfTanh),
    "W_up at 4 times the rate": Variant(rates={"up": 4.0}),
    "W_GQA begins as the mean of a group": Variant(GroupMean),
    "half of U itself, no activation": Variant(Half),
    "W_down at 4 times the rate": Variant(rates={"down": 4.0}),
    "W_down begins at zero, W_up does not": Variant(ZeroDown),
    "W_up begins at random, 0.02": Variant(RandomUp),
}


class RatesApart(RosaTrainer):
    """A RosaTrainer that gives some of RoAE's parameters a multiple of the learning rate."""

    def __init__(self, *args: Any, rates: Mapping[str, float], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rates = rates

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        modules = [module for module in self.model.modules() if isinstance(module, RoAE)]
        for name, times in self.rates.items():
            own = {id(getattr(module, name)) for module in modules}
            for group in list(optimizer.param_groups):
                apart = [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
                if apart:
                    optimizer.param_groups.append({**group, "params": apart, "lr": times * group["lr"]})
        return optimizer


@contextmanager
def changed(variant: Variant) -> Iterator[None]:
    """Within, `rosa.patch`, `load_trained` and `finetune` make RoAE of this variant."""
    trainer = functools.partial(RatesApart, rates=variant.rates)
    with (
        mock.patch.object(roae_plan, "RoAE", variant.module),
        mock.patch.object(job_module, "RosaTrainer", trainer),
    ):
        yield


def load(model: nn.Module, folder: Path) -> nn.Module:
    """`load_trained`, which reads a variant's adapter too."""
    file = folder / VARIANT_NAME
    if not file.exists():
        return load_trained(model, folder)
    with changed(VARIANTS[json.loads(file.read_text(encoding="utf-8"))]):
        return load_trained(model, folder)


def train(name: str, settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Train a variant; its adapter goes to `output`.

    Args:
        name (str): one of VARIANTS.
        settings (mapping): options of `rosa train`.
        output (Path): a folder, whose earlier adapter is replaced.

    Returns:
        dict: parameters that train, the loss on the held-out rows and the course of training; or that it diverged.
    """
    with changed(VARIANTS[name]):
        job, args = parse([*as_arguments({**settings, "output": str(output)}), "--overwrite"])
        try:
            trainer = job_module.finetune(job, args)
        except FloatingPointError as error:
            return {"diverged": str(error)}
    replace_text(output / VARIANT_NAME, json.dumps(name))
    return {
        "trainable": trainable(trainer.model)[0],
        "validation_loss": trainer.evaluate()["eval_loss"],
        "course": {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log},
    }


def settings_of(base: str) -> dict[str, Any]:
    """The options of a run: those of the study, without those of the machine, checkpoints and losses on the way."""
    study = load_settings(ROOT / "configs" / "smollm2" / "train_arithmetic.yaml")
    left_out = ("eval_", "save_", *OF_THE_MACHINE)
    kept = {name: value for name, value in study.items() if not name.startswith(left_out)}
    return {**kept, **COMMON, **UNSELECTED, **BASES[base], "eval_strategy": "no", "save_strategy": "no"}


def run() -> None:
    """Train whatever has no outcome yet."""
    for base in BASES:
        for name in VARIANTS:
            if read_kept(base, name):
                continue
            settings = settings_of(base)
            folder = ADAPTERS / slug(base) / slug(name)
            outcome = train(name, settings, folder)
            if "diverged" not in outcome:
                outcome["row_losses"] = row_losses(folder)
            about = {"base": base, "variant": name, "settings": settings, "versions": {p: version(p) for p in PACKAGES}}
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            replace_text(KEPT, "".join(json.dumps(one) + "\n" for one in (*_kept(), about | outcome)))
            print(f"{base}, {name}: {outcome.get('validation_loss', 'diverged')}", flush=True)


def row_losses(folder: Path) -> list[float]:
    """The loss on each of the held-out rows of the adapter in a folder, in float32."""
    model = load(load_model(COMMON["model"], dtype="float32"), folder).float().eval()
    return [round(losses(model, [row])[0], 4) for row in held_out(COMMON["model"], COMMON["seed"])]


def table() -> str:
    """The loss on held-out rows of every variant, by base, and what it is above that of the first variant, in the mean
    over rows with the standard error of that, paired by row."""
    rows = []
    for name in VARIANTS:
        outcomes = [read_kept(base, name) for base in BASES]
        if any(outcomes):
            number = next((outcome["trainable"] for outcome in outcomes if "trainable" in outcome), None)
            found = ((_loss(o), _above(o, read_kept(base, AS_IT_IS))) for base, o in zip(BASES, outcomes, strict=True))
            rows.append((name, number and f"{number:,}", *(cell for pair in found for cell in pair)))
    heads = ((f"{base}, lr {settings['learning_rate']:g}", f"above {AS_IT_IS!r}") for base, settings in BASES.items())
    return markdown(("RoAE alone", "trained parameters", *(head for pair in heads for head in pair)), rows)


def read_kept(base: str, name: str) -> dict[str, Any]:
    """The outcome of a run; nothing if it has none."""
    return next((one for one in _kept() if (one["base"], one["variant"]) == (base, name)), {})


def _kept() -> list[dict[str, Any]]:
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    return [json.loads(line) for line in lines]


def _loss(outcome: dict[str, Any]) -> str:
    if not outcome:
        return "not run"
    return "diverged" if "diverged" in outcome else f"{outcome['validation_loss']:.3f}"


def _above(outcome: dict[str, Any], reference: dict[str, Any]) -> str:
    if outcome == reference or "row_losses" not in outcome or "row_losses" not in reference:
        return "-"
    found = [a - b for a, b in zip(outcome["row_losses"], reference["row_losses"], strict=True)]
    return f"{statistics.fmean(found):+.4f} ± {statistics.stdev(found) / math.sqrt(len(found)):.4f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", action="store_true", help="train what is not kept yet, one run after another")
    if parser.parse_args().run:
        run()
    print(table())


if __name__ == "__main__":
    main()
