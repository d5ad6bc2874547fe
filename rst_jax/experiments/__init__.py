"""Runs: the stages of a draw, each a function of the run."""
