"""Benchmarks of RoSA beside its peers. `pytest benchmarks` runs them; results are kept as data in `results/`."""
