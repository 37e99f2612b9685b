"""The LM head in chunks of rows, for any device."""

from dpo_fast.chunked.backend import ChunkedBackend

__all__ = ["ChunkedBackend"]
