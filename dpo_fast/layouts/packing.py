"""Items into few bins of a capacity, and pairs into groups of equal number and similar weight."""

import heapq
from collections.abc import Sequence


def first_fit_decreasing(weights: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item indices: the heaviest item first, each into the first bin that has room.

    Uses at most 11/9 of the fewest possible bins, plus 6/9 of one (Dósa 2007,
    10.1007/978-3-540-74450-4_1). An item heavier than the capacity has a bin of its own. Ties go to
    the lower index; indices rise within a bin, and bins are in the order of their lowest index.

    Raises:
        ValueError: ``capacity`` is smaller than 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} holds nothing; use a positive number")
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        weight = weights[item]
        place = next((b for b, free in enumerate(room) if free >= weight), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= weight
    return sorted(sorted(b) for b in bins)


def balanced_groups(weights: Sequence[int], num_groups: int) -> list[list[int]]:
    """Groups of item indices, equal in number and close in weight: heaviest first, to the lightest.

    Indices rise within a group. The heaviest group exceeds the lightest by at most the heaviest
    item where the greedy rule is not stopped by a full group.

    Raises:
        ValueError: the items do not divide into ``num_groups``.
    """
    if num_groups < 1 or len(weights) % num_groups:
        raise ValueError(f"{len(weights)} items do not divide into {num_groups} equal groups")
    size = len(weights) // num_groups
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    heap = [(0, g) for g in range(num_groups)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        load, g = heapq.heappop(heap)
        groups[g].append(item)
        if len(groups[g]) < size:
            heapq.heappush(heap, (load + weights[item], g))
    return [sorted(group) for group in groups]
