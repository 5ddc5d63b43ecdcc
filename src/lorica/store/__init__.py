"""Records (SQLite, or Postgres by URL) and artifacts (a directory, or any fsspec URL). Knows no tensors and no HTTP."""
