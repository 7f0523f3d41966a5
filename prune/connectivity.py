"""Refuses masks that cut a network in two, and warns of layers and filters that they empty."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn

from prune import diagnostics
from prune.budget import EmptyLayerError
from prune.masks import Masks, listed
from prune.paths import reaches_output


class Connectivity:
    """Looks at the masks of a network as they change: an error where no path is left, a warning where little is.

    Args:
        model: the network.
        depthwise: names of the layers each of whose filters reads one channel; of these, filters without a weight are
            warned of.
        warn: is called with a sentence.

    Attributes:
        input_shape: of one input; without it any layer without a weight is refused.
        figures: effective sparsity and dead units, see `diagnostics.path_figures`; none of dense masks.
    """

    def __init__(self, model: nn.Module, depthwise: Collection[str], warn: Callable[[str], None]):
        self._model, self._depthwise, self._warn = model, depthwise, warn
        self.input_shape: tuple[int, ...] | None = None
        self.figures: dict[str, float] = {}
        self._seen = -1  # version of the masks
        self._warned: set[str] = set()
        self._lost_filters = 0

    def check(self, masks: Masks, ways: Callable[[], list[str]], warn_of_filters: bool) -> None:
        """Look at masks that have changed. Waits for the device.

        Args:
            masks: of the network's weights, looked at once in each version.
            ways: returns what mends masks that leave no path, in phrases.
            warn_of_filters: whether to warn of depthwise filters without a weight.

        Raises:
            EmptyLayerError: no path of living weights leads from the input to the output, or a layer is empty and
                the shape of the input is not known.
        """
        if self._seen == masks.version:
            return
        alive = masks.alive()
        empty = [name for name, count in alive.items() if count == 0]
        sparse = any(count < masks.weights[name].numel() for name, count in alive.items())
        figures = diagnostics.path_figures(self._model, masks, self.input_shape) if sparse else {}
        # A weight on a path proves that there is one. Where none is known, as with layer normalisation, ask for the path.
        proven = figures.get("effective_sparsity", 1.0) < 1
        if sparse and not proven and not self.connects(masks.masks):
            raise self._cut(empty, ways())
        if new := [name for name in empty if name not in self._warned]:
            self._warn(f"no weight is left in {listed(new)}; other layers still lead from the input to the output")
            self._warned.update(new)
        if warn_of_filters:
            self._warn_of_filters(masks)
        self.figures = figures
        sentence = diagnostics.collapse(self.figures, masks.sparsity())
        if sentence and "collapse" not in self._warned:
            self._warned.add("collapse")
            self._warn(sentence)
        self._seen = masks.version

    def connects(self, alive: Mapping[str, Tensor]) -> bool:
        """Return whether masks leave a path through the network or, where its input is not known, no layer empty."""
        if self.input_shape is None:
            return all(bool(mask.any()) for mask in alive.values())
        return reaches_output(self._model, alive, self.input_shape)

    def _cut(self, empty: list[str], ways: list[str]) -> EmptyLayerError:
        """Return the error for masks that leave layers, or all paths, without a weight."""
        what = f"layer '{empty[0]}' without a weight" if empty else "no path of weights through the network"
        reason = "no path leads from the input to the output; " if empty else ""
        if self.input_shape is None:
            reason = "give choose_masks a sample if other layers lead around it, "
        return EmptyLayerError(
            f"this sparsity leaves {what}: {reason}{', or '.join(ways)}, or keep layers dense by name"
        )

    def _warn_of_filters(self, masks: Masks) -> None:
        """Warn of depthwise filters without a weight, where there are more than before."""
        empty, filters = diagnostics.empty_filters(self._model, masks, self._depthwise)
        if empty > self._lost_filters:
            self._lost_filters = empty
            self._warn(
                f"{empty:,} of {filters:,} depthwise filters have no weight, which cuts their channels off; to keep them, name "
                "depthwise among the dense layers"
            )
