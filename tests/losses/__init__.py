"""Tests of dpo_fast.losses."""
