"""Measuring robustness: programs, cascades of attacks, their evidence, checks, the card."""
