"""What causal attention on a CPU keeps for the way back. Without torch."""

QUERIES = 64
"""How many are multiplied at once; half a block of what they are multiplied with lies beyond the diagonal."""
KEPT_LENGTH = 512
"""Of longer sequences the softmax is made again on the way back: it grows with the square of the length."""


def kept_softmax(length: int) -> int:
    """Return how many numbers of the softmax are kept of one head of one sequence."""
    if length > KEPT_LENGTH:
        return 0
    return sum((end - start) * end for start, end in blocks(length))


def blocks(length: int) -> list[tuple[int, int]]:
    """Return the first and the last query, not counted, of each block."""
    return [(start, min(start + QUERIES, length)) for start in range(0, length, QUERIES)]
