"""Sampling: from logits to the next token. Knows no models, caches or adapters."""
