"""What a run carries from step to step."""

from typing import Any

import flax.struct

Tree = Any


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
    params: Tree
    scores: Tree
    batch_stats: Tree
    opt_state: Tree
