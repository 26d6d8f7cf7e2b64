"""What adaptation costs, in FLOPs, and what the same FLOPs would buy without it.

Matrix products count, a backward pass twice its forward pass where weights learn and once where a slope only passes through
(`calm.evaluate.flops`). A critic that reads what the decoder makes of latents runs the decoder once more, which counts, in the
choice among texts too; other critics here are thousands of times cheaper than what they judge, and of one's own nobody knows.
"""

import dataclasses

from calm.core.autoencoder import AutoencoderConfig
from calm.core.latent_lm import LatentLMConfig
from calm.ttt.seal import SealConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentCost:
    """FLOPs for one prompt."""

    rewire: float
    """reading the prompt for it, imagining, and the gradient steps"""
    text: float
    """reading the prompt and writing one text"""
    judging: float = 0.0
    """the critic's opinion of one text"""
    written: int = 1
    """texts that the adapted weights write, each judged where one of several is kept"""

    @property
    def total(self) -> float:
        return self.rewire + self.written * (self.text + (self.judging if self.written > 1 else 0.0))

    @property
    def texts(self) -> int:
        """How many texts could be written and judged without adaptation for what adaptation and its texts cost."""
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
    """The cost of `config` for a prompt of so many chunks, and of a text of `num_chunks`, by a critic that `reads_chunks` or
    not."""
    encoder = codec.encoder_flops() if lm.stem != "discrete" else 0
    writer = codec.decoder_flops() + codec.vocabulary_flops() if lm.context_decoder is None else lm.writing_flops(1)

    def parts(length: int) -> tuple[int, int]:
        """Of one chunk behind `length` chunks: reading it, and the head."""
        reading = lm.flops(length, 0)
        return reading + encoder, lm.flops(length, 1) - reading

    reading, head = parts(prompt_chunks + num_chunks)
    text = prompt_chunks * reading + num_chunks * (reading + head + writer)

    reading, head = parts(prompt_chunks + config.chunks)
    imagined, everything = config.samples * config.chunks, config.fast.part == "all"
    through = config.feedback != "constant"
    forward = imagined * (reading + head + writer)
    backward = imagined * (2 * head + (2 * reading if everything else reading if through else 0))
    judge = writer if reads_chunks else 0
    forward, backward = forward + imagined * judge, backward + imagined * judge
    if through and lm.stem != "continuous":
        expected = codec.vocabulary_flops() + 2 * lm.chunk_size * lm.vocab_size * lm.backbone.dim
        forward, backward = forward + imagined * expected, backward + 2 * imagined * expected
    prompt = prompt_chunks * reading
    per_step = forward + backward + (3 * prompt if everything else 0)
    if config.brakes.max_drift is not None:
        per_step += config.samples * head + (prompt if everything else 0)
    if config.brakes.penalty:
        per_step += 3 * config.samples * head
    rewire = config.inner_steps * per_step + prompt
    return AlignmentCost(rewire=float(rewire), text=float(text), judging=float(num_chunks * judge), written=config.texts)
