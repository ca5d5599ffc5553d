"""Distributed interchange intervention: its formula, and a trained network whose causal variable it finds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

import rosa
from rosa_kernels.road_reference import road_reference

SYMBOLS, WIDTH, SUBSPACE = 6, 32, 8


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
    """Four symbols in, whether (a = b) = (c = d) out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4 * SYMBOLS, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 2)

    def hidden(self, symbols):
        return torch.relu(self.first(F.one_hot(symbols, SYMBOLS).flatten(1).float()))

    def answer(self, hidden):
        return self.last(torch.relu(self.second(hidden)))


def draw(count, generator):
    """Rows of four symbols; a and b are equal in half of them, and c and d."""
    symbols = torch.randint(SYMBOLS, (count, 4), generator=generator)
    same = torch.rand(count, 2, generator=generator) < 0.5
    symbols[:, 1] = torch.where(same[:, 0], symbols[:, 0], symbols[:, 1])
    symbols[:, 3] = torch.where(same[:, 1], symbols[:, 2], symbols[:, 3])
    return symbols


def equal(symbols, one, other):
    return symbols[:, one] == symbols[:, other]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model, generator = Equalities(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(800):
        symbols = draw(256, generator)
        truth = (equal(symbols, 0, 1) == equal(symbols, 2, 3)).long()
        optimizer.zero_grad()
        F.cross_entropy(model.answer(model.hidden(symbols)), truth).backward()
        optimizer.step()
    return model.requires_grad_(False)


def interchange_accuracy(model, kept, other, steps):
    """How often the network answers as if its variable `kept` were the source's, in a subspace that is learnt to.

    `kept` and `other` name the two equalities that a hypothesis takes the answer to be made of."""
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(3)
    rotation = orthogonal(nn.Linear(WIDTH, WIDTH, bias=False))
    optimizer = torch.optim.AdamW(rotation.parameters(), lr=1e-2, weight_decay=0.0)

    def answers(base, source):
        return model.answer(rosa.dii(model.hidden(base), model.hidden(source), rotation.weight[:SUBSPACE]))

    def pairs():
        base, source = draw(256, generator), draw(256, generator)
        return base, source, (equal(source, *kept) == equal(base, *other)).long()

    for _ in range(steps):
        base, source, expected = pairs()
        optimizer.zero_grad()
        F.cross_entropy(answers(base, source), expected).backward()
        optimizer.step()
    scores = []
    with torch.no_grad():
        for _ in range(8):
            base, source, expected = pairs()
            scores.append((answers(base, source).argmax(1) == expected).float().mean())
    return torch.stack(scores).mean().item()


def test_interchange_finds_the_variable_that_a_network_computes_with(network):
    symbols = draw(2000, torch.Generator().manual_seed(4))
    right = network.answer(network.hidden(symbols)).argmax(1) == (equal(symbols, 0, 1) == equal(symbols, 2, 3)).long()
    assert right.float().mean() > 0.95
    trained = interchange_accuracy(network, (0, 1), (2, 3), steps=300)
    untrained = interchange_accuracy(network, (0, 1), (2, 3), steps=0)
    wrong = interchange_accuracy(network, (0, 2), (1, 3), steps=300)
    print(right.float().mean(), trained, untrained, wrong)
    assert trained > 0.9
    assert untrained < 0.75 and wrong < 0.75
