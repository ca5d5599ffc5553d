"""Distributed interchange intervention: its formula, and a trained network whose causal variable it finds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

import rosa
from rosa_kernels.road_reference import road_reference

SYMBOLS, HALF = 4, 8


def rows(dimensions, d=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    full, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return full[:dimensions]


def states(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dimensions", [0, 1, 3, 8])
def test_it_is_its_formula_for_every_vector(dimensions):
    R, b, s = rows(dimensions), states(1, 2, 5, 8), states(2, 2, 5, 8)
    found = rosa.dii(b, s, R)
    for i in range(2):
        for j in range(5):
            torch.testing.assert_close(found[i, j], b[i, j] + R.T @ (R @ s[i, j] - R @ b[i, j]))


def test_inside_the_subspace_the_source_shows_and_outside_of_it_the_base():
    full = rows(8)
    R, rest = full[:3], full[3:]
    b, s = states(1, 4, 8), states(2, 1, 8)
    found = rosa.dii(b, s, R)
    torch.testing.assert_close(found @ R.T, (s @ R.T).expand(4, -1))
    torch.testing.assert_close(found @ rest.T, b @ rest.T)
    torch.testing.assert_close(rosa.dii(b, b, R), b)
    torch.testing.assert_close(rosa.dii(b, s, full), s.expand(4, -1))


def test_road_with_scales_of_one_has_its_form():
    theta, one = states(3, 4), torch.ones(4, dtype=torch.float64)
    h = states(4, 5, 8)
    R = road_reference(torch.eye(8, dtype=torch.float64), theta, one, variant=1).T
    turned = road_reference(h, theta, one, variant=1)
    torch.testing.assert_close(rosa.dii(h, turned, R.T), h + (h - h @ R) @ R.T)  # R^T s is h
    torch.testing.assert_close(rosa.dii(h, turned, R.T), turned)


def test_shapes_that_do_not_fit_are_refused():
    b = states(0, 2, 8)
    for s, R in ((b, rows(3, d=6)), (states(0, 2, 6), rows(3)), (b, rows(3).T), (b, rows(1)[0])):
        with pytest.raises(ValueError, match=r"R must be \[dimensions, d\] with at most d rows"):
            rosa.dii(b, s, R)


class Equalities(nn.Module):
    """Four symbols in, whether (a = b) = (c = d) out.

    By its build the first layer computes with a and b in one half of its state, which a rotation then hides. The second
    layer mixes the halves.
    """

    def __init__(self):
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(nn.Linear(2 * SYMBOLS, HALF), nn.ReLU()) for _ in range(2))
        self.rotation = rows(2 * HALF, 2 * HALF).float()
        self.mixed = nn.Sequential(nn.Linear(2 * HALF, 4 * HALF), nn.ReLU())
        self.last = nn.Linear(4 * HALF, 2)

    def state(self, symbols, layer):
        """The state behind layer 1 or 2."""
        seen = F.one_hot(symbols, SYMBOLS).float().unflatten(1, (2, 2)).flatten(2)
        first = torch.cat([part(seen[:, i]) for i, part in enumerate(self.pairs)], 1) @ self.rotation
        return first if layer == 1 else self.mixed(first)

    def answer(self, state, layer):
        return self.last(self.mixed(state) if layer == 1 else state)


def draw(count, generator):
    """Rows of four symbols; a and b are equal in half of them, and c and d."""
    symbols = torch.randint(SYMBOLS, (count, 4), generator=generator)
    same = torch.rand(count, 2, generator=generator) < 0.5
    symbols[:, 1] = torch.where(same[:, 0], symbols[:, 0], symbols[:, 1])
    symbols[:, 3] = torch.where(same[:, 1], symbols[:, 2], symbols[:, 3])
    return symbols


def equal(symbols, one, other):
    return symbols[:, one] == symbols[:, other]


def both_equal(symbols, source=None):
    """The answer; with a source, the one that would be right if a and b were equal as they are there."""
    return (equal(symbols if source is None else source, 0, 1) == equal(symbols, 2, 3)).long()


def another_answer(symbols, source):
    """As if the network compared a with c and b with d, which it does not, and the first came from the source."""
    return (equal(source, 0, 2) == equal(symbols, 1, 3)).long()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model, generator = Equalities(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        symbols = draw(256, generator)
        optimizer.zero_grad()
        F.cross_entropy(model.answer(model.state(symbols, 1), 1), both_equal(symbols)).backward()
        optimizer.step()
    return model.requires_grad_(False)


def accuracy(model, layer, R, expected):
    """How often the network answers as expected when the dimensions of R come from another row."""
    generator = torch.Generator().manual_seed(5)
    base, source = draw(4000, generator), draw(4000, generator)
    changed = rosa.dii(model.state(base, layer), model.state(source, layer), R)
    return (model.answer(changed, layer).argmax(1) == expected(base, source)).float().mean().item()


def learnt(model, layer, dimensions, expected):
    """Rows of a rotation, learnt so that the network answers as expected."""
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(3)
    width = model.state(torch.zeros(1, 4, dtype=torch.long), layer).shape[1]
    rotation = orthogonal(nn.Linear(width, width, bias=False))
    optimizer = torch.optim.AdamW(rotation.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(150):
        base, source = draw(256, generator), draw(256, generator)
        changed = rosa.dii(model.state(base, layer), model.state(source, layer), rotation.weight[:dimensions])
        optimizer.zero_grad()
        F.cross_entropy(model.answer(changed, layer), expected(base, source)).backward()
        optimizer.step()
    return rotation.weight[:dimensions].detach()


def test_interchange_finds_the_variable_that_a_network_computes_with(network):
    known = network.rotation[:HALF]
    assert accuracy(network, 1, known[:0], lambda base, source: both_equal(base)) > 0.99  # it has learnt the task
    assert accuracy(network, 1, known, both_equal) > 0.99
    assert accuracy(network, 1, learnt(network, 1, HALF, both_equal), both_equal) > 0.95


def test_elsewhere_it_finds_little_more_than_chance(network):
    assert accuracy(network, 1, rows(HALF, 2 * HALF, seed=9).float(), both_equal) < 0.7  # another subspace
    assert accuracy(network, 1, learnt(network, 1, HALF, another_answer), another_answer) < 0.7
    assert accuracy(network, 2, learnt(network, 2, 2 * HALF, both_equal), both_equal) < 0.75  # halves are mixed there
