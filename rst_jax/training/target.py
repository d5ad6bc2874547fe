"""What is trained of a state, which weights the network gets from it, and what an update may touch.

A search trains the scores of frozen weights; training under a fixed mask, or under none, trains the weights.
"""

import dataclasses
from typing import Literal

from jaxtyping import PyTree

from rst_jax import subnet
from rst_jax.training.state import TicketState


@dataclasses.dataclass(frozen=True)
class Target:
    """The base of all targets: values that the step is made from.

    Attributes:
      collection: of the state; what optax updates.
    """

    collection: Literal["scores", "params"]

    def trained(self, state: TicketState) -> PyTree:
        """What the gradient is taken of."""
        return getattr(state, self.collection)

    def masks(self, state: TicketState, selection: PyTree) -> PyTree:
        """The masks of a step; `selection` as the target takes it."""
        raise NotImplementedError

    def weights(self, state: TicketState, trained: PyTree, masks: PyTree) -> PyTree:
        """The weights of the network, differentiable in `trained`."""
        raise NotImplementedError

    def allowed(self, updates: PyTree, masks: PyTree) -> PyTree:
        """What an update may touch; zero elsewhere."""
        return updates

    def updated(self, state: TicketState, trained: PyTree) -> TicketState:
        """The state with `trained` in its place."""
        return state.replace(**{self.collection: trained})  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Scores(Target):
    """Search: the scores of frozen weights, straight through their mask; `selection` is every layer's kept count."""

    collection: Literal["scores"] = "scores"

    def masks(self, state: TicketState, selection: PyTree) -> PyTree:
        """The largest scores of each layer."""
        return subnet.masks(state.scores, selection)

    def weights(self, state: TicketState, trained: PyTree, masks: PyTree) -> PyTree:
        """The frozen weights under the mask."""
        return subnet.materialise(state.params, trained, masks)


@dataclasses.dataclass(frozen=True)
class Weights(Target):
    """Fine-tuning and dense training: the weights under the fixed masks `selection` ({} for a dense network)."""

    collection: Literal["params"] = "params"

    def masks(self, state: TicketState, selection: PyTree) -> PyTree:
        """As they are given."""
        return selection

    def weights(self, state: TicketState, trained: PyTree, masks: PyTree) -> PyTree:
        """The trained weights under the mask."""
        return subnet.apply_masks(trained, masks)

    def allowed(self, updates: PyTree, masks: PyTree) -> PyTree:
        """What the masks keep; what they do not stays as it is, decay and momentum included."""
        return subnet.apply_masks(updates, masks)
