"""Tests of dpo_fast.reference."""
