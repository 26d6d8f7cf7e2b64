"""From a trained model to text: samplers, and one compiled generation loop."""

from calm.sampling.choose import from_temperature as from_temperature
from calm.sampling.counts import BestOfN as BestOfN
from calm.sampling.counts import Filters as Filters
from calm.sampling.exact import ExactTemperature as ExactTemperature
from calm.sampling.generate import Generated as Generated
from calm.sampling.generate import SpecialIds as SpecialIds
from calm.sampling.generate import generate as generate
from calm.sampling.generate import stream as stream
from calm.sampling.sampler import OutOfDraws as OutOfDraws
from calm.sampling.sampler import PlainSampler as PlainSampler
from calm.sampling.sampler import Sampler as Sampler
from calm.sampling.temperature import BatchTemperature as BatchTemperature
from calm.sampling.temperature import exact_temperature as exact_temperature
