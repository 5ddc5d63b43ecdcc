"""Clients: what a recipe talks to. Here in-process; the HTTP client will speak the same verbs."""
