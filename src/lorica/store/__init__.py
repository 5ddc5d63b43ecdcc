"""Records (SQLite, or Postgres by URL) and artifacts (a directory, or any fsspec URL). Knows no tensors and no HTTP.

`database` runs functions of a connection: those of `keys`, `sessions`, `runs`, `checkpoints`, `usage`, `journal` and
`replay`. `artifacts` keeps files and folders; `check` compares the two.
"""
