"""Named configurations of both stages, each saying where its numbers come from."""

from calm.presets.presets import LossKind as LossKind
from calm.presets.presets import Preset as Preset
from calm.presets.presets import get as get
from calm.presets.presets import loss_of_kind as loss_of_kind
from calm.presets.presets import names as names
