"""Adapters: which sites, where their tensors live, their files, and combining them. Knows no rows, batches or servers."""
