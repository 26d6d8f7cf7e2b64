"""Named configurations of both stages, each saying where its numbers come from."""

from calm.presets.presets import Preset as Preset
from calm.presets.presets import get as get
from calm.presets.presets import names as names
