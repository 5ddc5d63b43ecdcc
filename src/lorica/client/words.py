"""What a typed client and a server agree on beyond the SDK. Imports nothing, for both ends use it.

In: nothing. Out: names. Refuses to know what is sent.
"""

RESERVED = ("method", "config", "targets", "alpha", "lora_alpha")
"""Keys of `user_metadata` that say what a run is; all others are the user's own."""
