"""Fused time steps of neurons, and their noise."""

LOGISTIC_ESCAPE, GAUSSIAN_ESCAPE, GAUSSIAN, LAPLACE, LOGISTIC = range(5)
"""Kinds of noise; those of escape noise need uniform numbers only."""
SUBTRACT, ZERO, ERASE, NONE = range(4)
"""Mechanisms of reset: subtract the threshold; to zero, before the current is added or after that; none."""
