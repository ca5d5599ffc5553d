"""Methods x seeds on the same data: training and evaluating every cell once, and the table of them all."""
