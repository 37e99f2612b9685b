"""What the filtered mode of the LM head left out."""

from typing import NamedTuple


class FilterReport(NamedTuple):
    """Over all filtered calls since the report before."""

    kept_share: float  # tiles kept / tiles: the share of a backward GEMM that was computed
    most_skipped: float  # largest share of a row's probability that its gradient left out


def filter_report() -> FilterReport | None:
    """What calls with ``filter_bound`` kept since the last report; None if there were none.

    Counted on the device; asking waits for it.
    """
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return None
    from dpo_fast_kernels.kept_tiles import take_tally

    found = take_tally()
    return None if found is None else FilterReport(*found)
