"""Quantised weights: formats, the packed linear module, and putting it into a backbone. Importing this is free."""
