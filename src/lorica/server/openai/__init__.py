"""Inference as OpenAI's clients know it: completions, conversations and models, over the same engines and adapters."""
