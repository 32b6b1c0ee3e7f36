"""Which of several points no other beats in two measures alike."""

from collections.abc import Sequence


def pareto_best(first: Sequence[float], second: Sequence[float]) -> list[int]:
    """Places of the points that no other beats: none is at least as good in both measures and better in one.

    Args:
      first, second: of each point; more is better.

    Returns:
      The places by falling `first`; equal points stand in their order, and are all there.
    """
    points = list(zip(first, second, strict=True))
    front = [
        place
        for place, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]
    return sorted(front, key=lambda place: (-points[place][0], place))
