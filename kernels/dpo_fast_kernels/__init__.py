"""Triton device code and its launchers for dpo_fast. Imports torch and triton only, each submodule at first use."""
