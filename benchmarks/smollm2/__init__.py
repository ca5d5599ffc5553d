"""The study on real weights: its base and rows, its reports, and the studies of layers, position and variants."""
