"""FLOPs of adaptation, and the number of texts that they would buy without it.

Matrix products count, a backward pass twice its forward pass where weights learn and once where a gradient only passes
through (`calm.evaluate.flops`). A critic that reads the decoder's distributions runs the decoder once more, also for the
choice among texts; other critics here are thousands of times cheaper, and the cost of a user's own is unknown.
"""

import dataclasses

from calm.core.autoencoder import AutoencoderConfig
from calm.core.latent_lm import LatentLMConfig
from calm.ttt.seal import SealConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentCost:
    """FLOPs for one prompt."""

    adaptation: float
    """reading the prompt, futures, and the gradient steps"""
    text: float
    """reading the prompt and writing one text"""
    judging: float = 0.0
    """reward of one text"""
    written: int = 1
    """texts of the adapted weights, each judged where one of several is kept"""

    @property
    def total(self) -> float:
        return self.adaptation + self.written * (self.text + (self.judging if self.written > 1 else 0.0))

    @property
    def texts(self) -> int:
        """Number of texts that could be written and judged without adaptation at the same cost."""
        return max(1, int(self.total // (self.text + self.judging)))


def alignment_cost(
    config: SealConfig,
    lm: LatentLMConfig,
    codec: AutoencoderConfig,
    *,
    prompt_chunks: int,
    num_chunks: int,
    reads_chunks: bool = False,
) -> AlignmentCost:
    """Cost for a prompt of `prompt_chunks` chunks and texts of `num_chunks`."""
    encoder = codec.encoder_flops() if lm.stem != "discrete" else 0
    writer = codec.decoder_flops() + codec.vocabulary_flops() if lm.context_decoder is None else lm.writing_flops(1)

    def parts(length: int) -> tuple[int, int]:
        """FLOPs of one chunk after `length` chunks: reading it, and the head."""
        reading = lm.flops(length, 0)
        return reading + encoder, lm.flops(length, 1) - reading

    reading, head = parts(prompt_chunks + num_chunks)
    text = prompt_chunks * reading + num_chunks * (reading + head + writer)

    reading, head = parts(prompt_chunks + config.chunks)
    positions, everything = config.samples * config.chunks, config.fast.part == "all"
    through = config.feedback != "constant"
    forward = positions * (reading + head + writer)
    backward = positions * (2 * head + (2 * reading if everything else reading if through else 0))
    judge = writer if reads_chunks else 0
    forward, backward = forward + positions * judge, backward + positions * judge
    if through and lm.stem != "continuous":
        expected = codec.vocabulary_flops() + 2 * lm.chunk_size * lm.vocab_size * lm.backbone.dim
        forward, backward = forward + positions * expected, backward + 2 * positions * expected
    prompt = prompt_chunks * reading
    per_step = forward + backward + (3 * prompt if everything else 0)
    if config.brakes.max_drift is not None:
        per_step += config.samples * head + (prompt if everything else 0)
    if config.brakes.penalty:
        per_step += 3 * config.samples * head
    adaptation = config.inner_steps * per_step + prompt
    return AlignmentCost(
        adaptation=float(adaptation), text=float(text), judging=float(num_chunks * judge), written=config.texts
    )
