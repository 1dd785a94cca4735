"""L5, the OpenAI-compatible HTTP API: text in, text out.

Knows `types` and the `Gateway` port, and imports neither torch nor transformers.
"""
