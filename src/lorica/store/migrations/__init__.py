"""Alembic revisions, one file for each change of `lorica.store.tables`. They ship in the package."""
