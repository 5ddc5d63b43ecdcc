"""Losses, optimisers and schedules over adapters. Knows no batches of tenants, files of runs or servers."""
