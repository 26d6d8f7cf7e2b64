"""Hidden to hidden: layers that know nothing of text, chunks or losses."""

from calm.nn.attention import CausalAttention as CausalAttention
from calm.nn.backbone import Backbone as Backbone
from calm.nn.backbone import BackboneConfig as BackboneConfig
from calm.nn.backbone import BackboneState as BackboneState
from calm.nn.dense import Dense as Dense
from calm.nn.dense import Precision as Precision
from calm.nn.mlp import SwiGLU as SwiGLU
from calm.nn.segment_reasoner import SegmentReasoner as SegmentReasoner
from calm.nn.stack import Stack as Stack
