"""What a run carries from step to step."""

from typing import Any

import flax.struct
from jaxtyping import PyTree


@flax.struct.dataclass
class TicketState:
    """Everything that a step reads and writes.

    Attributes:
      step: steps done, int32 [].
      params: the weights; frozen in a search.
      scores: what a search trains; fixed in fine-tuning and dense training.
      batch_stats: running statistics.
      opt_state: optax's.
    """

    step: Any
    params: PyTree
    scores: PyTree
    batch_stats: PyTree
    opt_state: PyTree
