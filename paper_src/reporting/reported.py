"""The values of the earlier report that the paper re-examines; nothing here is a result of ours.

The report names no model. It had 32 layers; scores came from Fisher information, gradient norms and
activation statistics.
"""

DEPTH = 32
TOP10 = {
    0: 0.9941, 1: 0.9897, 2: 0.9744, 3: 0.9543, 4: 0.9415, 5: 0.9203, 6: 0.9110, 7: 0.9084, 31: 0.9047, 8: 0.9046,
}  # fmt: skip
RECOMMENDED = (0, 1, 8, 12, 20, 21, 29, 31)  # its distributed_8
LAYER_COMPRESSION = 4.00
PARAMETER_COMPRESSION = 2.27
SPEEDUP = 3.14
SPEEDUP_RANGE = (2.3, 3.1)
COMPRESSION_RANGE = (2.7, 4.0)
COSINE_RANGE = (0.24, 0.29)
COSINE_TARGET = 0.9


def at_depth(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Layers of the 32-layer model carried over to ``depth`` layers by relative position.

    Example:
        >>> at_depth((0, 1, 8, 31), 16)
        (0, 4, 15)
    """
    return tuple(sorted({round(layer * (depth - 1) / (DEPTH - 1)) for layer in layers}))
