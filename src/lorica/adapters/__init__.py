"""Adapters: their sites, their tensors, their files, and combining them. Knows no rows, batches or servers."""
