"""Tests of the batch layouts."""
