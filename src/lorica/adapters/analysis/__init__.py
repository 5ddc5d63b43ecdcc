"""Measures of what adapters do to weights: one file for each family of measures."""
