"""From a trained model to text: samplers, and one compiled generation loop."""

from calm.sampling.generate import Generated as Generated
from calm.sampling.generate import SpecialIds as SpecialIds
from calm.sampling.generate import generate as generate
from calm.sampling.generate import stream as stream
from calm.sampling.temperature import BatchTemperature as BatchTemperature
from calm.sampling.temperature import PlainSampler as PlainSampler
from calm.sampling.temperature import Sampler as Sampler
from calm.sampling.temperature import from_temperature as from_temperature
