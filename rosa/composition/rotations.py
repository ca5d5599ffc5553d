"""RoAd_1 adapters as numbers: a pair's a R(t) is the complex number a e^(it), so that they multiply and have powers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rotations(NamedTuple):
    """The angles and scales of pairs: a_i R(t_i) of each, R(t) turning by t radians."""

    theta: Tensor
    alpha: Tensor


def product(*rotations: Rotations) -> Rotations:
    """What the rotations do one after the other, in any order: angles add, scales multiply.

    Args:
        rotations (Rotations): at least one, of the same shape.

    Returns:
        Rotations: of their shape.
    """
    first, *others = rotations
    theta, alpha = first
    for other in others:
        theta, alpha = theta + other.theta, alpha * other.alpha
    return Rotations(theta, alpha)


def scaled(rotations: Rotations, factor: float) -> Rotations:
    """The rotations with every scale times `factor`."""
    return Rotations(rotations.theta, rotations.alpha * factor)


def power(rotations: Rotations, s: float) -> Rotations:
    """(a R(t))^s = a^s R(s t): for s from 0 to 1 the way from the identity to the rotations, for -1 their inverse.

    Args:
        rotations (Rotations): with scales above 0.
        s (float): the exponent.

    Raises:
        ValueError: a scale is not above 0, so that it has no such power.
    """
    theta, alpha = rotations
    if not bool((alpha > 0).all()):
        raise ValueError(
            f"scales must be above 0 to have powers, the least is {alpha.min().item():g}: a scale below 0 is one above "
            "0 with pi added to its angle"
        )
    return Rotations(s * theta, alpha**s)


def interpolate(one: Rotations, other: Rotations, s: float) -> Rotations:
    """The rotations at s on the way from one, s = 0, to another, s = 1: angles evenly, scales by equal factors.

    Args:
        one, other (Rotations): of the same shape, with scales above 0.
        s (float): beyond 0 and 1 it goes on the same way.

    Raises:
        ValueError: a scale is not above 0, so that it has no powers.
    """
    return product(power(one, 1 - s), power(other, s))
