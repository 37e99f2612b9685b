"""Whole DPO steps of the naive loop, the peers and dpo_fast, and their float64 gold."""
