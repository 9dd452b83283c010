"""Fused time steps of leaky neurons, and their noise."""

LOGISTIC_ESCAPE, GAUSSIAN_ESCAPE, GAUSSIAN, LAPLACE, LOGISTIC = range(5)
"""Kinds of noise; those of escape noise need uniform numbers only."""
SUBTRACT, ZERO, NONE = range(3)
"""Mechanisms of reset."""
