"""LM heads as training steps of a DPO head, on the same inputs, and their float64 gold."""
