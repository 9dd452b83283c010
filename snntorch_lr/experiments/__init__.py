"""The experiments of this package: training, evaluation, and the command ``snntorch-lr``."""
