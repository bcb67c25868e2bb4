"""Importance of a source's layers, heads and channels, measured once for a request."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError
from scionlm.core.log import Progress, warn
from scionlm.families.shape import context_length
from scionlm.planning.memory import TIGHT
from scionlm.sources import ModelFolder

# A pass over this much text, spread evenly over the domains' training part.
_TOKENS, _LENGTH, _BATCH = 32_768, 256, 4

Scores = dict[str, NDArray[np.float64]]


class Scorer:
    """Scores of a model, each kind collected on first request.

    Args:
        source: The model.
        data: Data folder that `activation` and `taylor` are measured on.
        domains: Which of its domains; None takes all.
    """

    def __init__(self, source: ModelFolder, data: str | None, domains: Sequence[str] | None = None) -> None:
        self._source, self._data, self._domains = source, data, domains
        self._found: dict[str, Scores] = {}

    def get(self, rule: str) -> Scores:
        """Return the scores by `magnitude`, `activation` (with `layers`: block influence) or `taylor`.

        Raises:
            DataError: The data was made with another tokenizer, or is too short.
        """
        if rule not in self._found:
            self._source.fetch()
            self._found[rule] = self._magnitude() if rule == "magnitude" else self._measured(rule)
        return self._found[rule]

    def _magnitude(self) -> Scores:
        from scionlm.analysis.magnitude import magnitude_scores
        from scionlm.families.weights import FolderWeights
        from scionlm.sources.tensors import FolderTensors

        config, path = self._source.config, self._source.path
        with FolderTensors(path) as tensors:
            return magnitude_scores(config, FolderWeights(config, tensors, path))

    def _measured(self, rule: str) -> Scores:
        import torch

        from scionlm.analysis.importance import activation_scores, taylor_scores
        from scionlm.data import DataFolder
        from scionlm.parallel.runtime import measuring_alone
        from scionlm.recipes.inputs import check_tokenizer
        from scionlm.sources import load_hf_model

        assert self._data is not None
        data = DataFolder(Path(self._data))
        check_tokenizer(self._source, data)
        length = min(_LENGTH, context_length(self._source.config) or _LENGTH)
        streams = [data.stream(domain, "train") for domain in self._domains or data.domains]
        windows = max(1, _TOKENS // length // len(streams))
        taken = [
            torch.from_numpy(stream.read(start, length))
            for stream in streams
            for start in _starts(stream.num_tokens, windows, length)
        ]
        if not taken:
            raise DataError(
                f"data {data.path}: no domain has the {length} tokens of one window to measure importance on"
            )
        batches = [torch.stack(taken[i : i + _BATCH]) for i in range(0, len(taken), _BATCH)]
        model: Any = load_hf_model(self._source, torch.float32)
        collect, held = (activation_scores, 1) if rule == "activation" else (taylor_scores, 2)  # with its gradients
        title, size = f"measuring importance by {rule}", 4 * held * sum(p.numel() for p in model.parameters())
        with measuring_alone() as runtime, Progress(title, len(taken) * length) as progress:
            if runtime.kind == "cuda" and size > TIGHT * (runtime.memory() or 0):
                warn(f"{title} on the processor: the {size:,} bytes that it takes are more than the GPU has")
            else:
                model.to(runtime.device)
            return collect(model, batches, progress.update)


def _starts(num_tokens: int, windows: int, length: int) -> list[int]:
    """Return where windows start that are spread evenly over a stream."""
    room = num_tokens - length
    if room < 0:
        return []
    windows = min(windows, 1 + room // length)
    return [room * i // max(1, windows - 1) for i in range(windows)]
