"""What a typed client and a server agree on beyond the SDK. Imports nothing, for both ends use it.

In: nothing. Out: names. Refuses to know what is sent.
"""

RESERVED = ("method", "config", "targets", "alpha", "lora_alpha")
"""Keys of `user_metadata` that say what a run is. With `config` all others are notes of the user's own; with `method`
and without `config` those that are settings of the method say it too.
"""
