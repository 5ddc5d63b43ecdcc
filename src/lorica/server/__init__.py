"""The API process: wire formats, auth, limits, futures, routes. Knows no tensors; the engine is at the other end of a socket."""
