"""The executor: one backbone, many adapters, mixed batches. Knows no HTTP, SQL, user or tokenizer."""
