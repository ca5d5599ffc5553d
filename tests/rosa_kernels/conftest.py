"""Tests that change a constant of the launch functions have launches of their own kept."""

import pytest

from rosa_kernels import kept


@pytest.fixture(autouse=True)
def _none_kept(monkeypatch):
    monkeypatch.setattr(kept, "KEPT", {})
