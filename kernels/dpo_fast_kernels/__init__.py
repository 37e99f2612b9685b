"""Triton device code and its launchers for dpo_fast; imports torch and triton only.

Nothing is imported here: each submodule is at its first use.
"""
