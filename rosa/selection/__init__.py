"""DLS (Dynamic Layer Selection): the optimizer wrapper, the scores, and the engines of several processes."""
