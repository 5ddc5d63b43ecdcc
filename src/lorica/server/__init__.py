"""The API process: HTTP, keys, limits, the journal's use, and the way of every request to an engine.

Knows no tensor and imports no torch.
"""
