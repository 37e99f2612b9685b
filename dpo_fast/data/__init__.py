"""Preference rows to batches: formats, tokenisation, preparation, collation and loading."""
