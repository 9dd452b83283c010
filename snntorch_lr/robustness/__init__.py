"""Robustness of spiking networks: an attackable view of a network for attack libraries."""

from .view import AttackableView

__all__ = ["AttackableView"]
