"""Losses: pure functions of arrays, per position and unreduced unless their docstring says why not."""

from calm.losses.clipped_kl import clipped_kl as clipped_kl
from calm.losses.cross_entropy import fused_cross_entropy as fused_cross_entropy
from calm.losses.cross_entropy import plain_cross_entropy as plain_cross_entropy
from calm.losses.cross_entropy import target_log_prob as target_log_prob
from calm.losses.direction import DirectionFrom as DirectionFrom
from calm.losses.direction import direction_loss as direction_loss
from calm.losses.energy_score import FIDELITIES as FIDELITIES
from calm.losses.energy_score import Fidelity as Fidelity
from calm.losses.energy_score import diversity as diversity
from calm.losses.energy_score import energy_loss as energy_loss
from calm.losses.energy_score import energy_parts as energy_parts
from calm.losses.energy_score import plain_energy_loss as plain_energy_loss
