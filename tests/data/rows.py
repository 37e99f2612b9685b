"""Tokenised rows by their lengths."""

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def tokens(*lengths: tuple[int, int, int]) -> list[dict[str, list[int]]]:
    """Tokenised rows with the given lengths of prompt, chosen and rejected."""
    return [{name: [7] * n for name, n in zip(IDS, row, strict=True)} for row in lengths]
