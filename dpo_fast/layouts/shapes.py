"""Lengths of packed rows rounded up to few sizes, so that compiled code meets few shapes."""

BLOCK = 128
_STEPS = 32  # sizes between a power of two and the next


def rounded_length(length: int) -> int:
    """The next of a few sizes: multiples of 128, and above 4096 32 to an octave.

    At most 1/32 of a row longer than 4096 is added, 1/64 on average; one of 128 tokens or less has
    128.
    """
    if length < 1:
        raise ValueError(f"length={length}: a row has one token or more")
    step = max(BLOCK, 2 ** (length.bit_length() - 1) // _STEPS)
    return -(-length // step) * step
