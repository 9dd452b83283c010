"""Studies: the networks of a plan, trained, attacked and compared; the commands ``study`` and ``report``."""
