"""What goes wrong on one rank of a world, by name: a function of (patch, whether it is this rank); see `World.run`.

`done` counts how often it has: a harm that never comes proves nothing.
"""

import errno
import itertools
import math
import os
from collections import Counter
from typing import Any

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from scionlm.core.errors import DataError
from scionlm.data import SamplePlan
from scionlm.recipes import child, reweighting
from scionlm.recipes import setting as setting_module
from scionlm.train import checkpoint
from scionlm.train import saver as saver_module
from scionlm.train.objective import Objective

done = Counter[str]()


def ends_early(patch: Any, mine: bool) -> None:
    """Let one rank's texts come to their end with the third token, the others' never."""
    write_samples = setting_module.write_samples

    def write(model: Any, tokenizer: Any, places: Any, *rest: Any) -> Any:
        places, passes = list(places), itertools.count()
        ends = [data.tokenizer.separator_id for data, _ in places]

        def push(module: Any, arguments: Any, output: Any) -> None:
            output.logits[..., ends] = 1e9 if mine and next(passes) > 1 else -1e9

        hook = model.register_forward_hook(push)
        try:
            return write_samples(model, tokenizer, places, *rest)
        finally:
            hook.remove()

    patch.setattr(setting_module, "write_samples", write)
    patch.setattr(child, "samples_of", setting_module.samples_of)


def _full(patch: Any, mine: bool, place: Any, name: str, times: float) -> None:
    """Let a call fail so many times as on a full disk; what failed is tried again at once."""
    patch.setattr(saver_module, "_FIRST_WAIT_SECONDS", 0.0)
    calls, real = itertools.count(), getattr(place, name)

    def full(*arguments: Any) -> Any:
        if next(calls) < times:
            done["harm"] += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    if mine:
        patch.setattr(place, name, full)


def full_while_writing(patch: Any, mine: bool) -> None:
    """Let a rank find no room for its first share of a checkpoint."""
    _full(patch, mine, HuggingFaceStorageWriter, "write_data", 1)


def full_while_flushing(patch: Any, mine: bool) -> None:
    """The same, noticed only when the share is flushed."""
    _full(patch, mine, checkpoint, "settle", 1)


def full(patch: Any, mine: bool) -> None:
    """The same for all shares."""
    _full(patch, mine, checkpoint, "settle", float("inf"))


def _failing(patch: Any, mine: bool, error: Exception) -> None:
    calls, real = itertools.count(), SamplePlan.batch

    def batch(*arguments: Any) -> Any:
        if mine and next(calls) == 2:
            raise error
        return real(*arguments)

    patch.setattr(SamplePlan, "batch", batch)


def broken_data(patch: Any, mine: bool) -> None:
    """Let a rank fail by itself, in its third batch."""
    _failing(patch, mine, DataError("what it reads is broken"))


def fault(patch: Any, mine: bool) -> None:
    """The same, with an error that nobody has thought of."""
    _failing(patch, mine, KeyError("alpha"))


def not_finite(patch: Any, mine: bool) -> None:
    """Let the loss of a rank's third pass be no number."""
    calls, real = itertools.count(), Objective._losses

    def losses(*arguments: Any) -> Any:
        loss, *rest = real(*arguments)
        if mine and next(calls) == 2:
            done["harm"] += 1
            loss = loss * math.nan
        return loss, *rest

    patch.setattr(Objective, "_losses", losses)


def own_opinion(patch: Any, mine: bool) -> None:
    """Let a rank measure, decide and read other weights of the domains than the main one."""
    if not mine:
        return
    losses_of, reweight = reweighting.losses_of, reweighting.reweight

    def off(*arguments: Any, **keywords: Any) -> Any:
        done["harm"] += 1
        losses = losses_of(*arguments, **keywords)
        return {name: loss | {"nll": loss["nll"] + number} for number, (name, loss) in enumerate(losses.items())}

    def turned(*arguments: Any) -> Any:
        weights = reweight(*arguments)
        return dict(zip(weights, reversed(weights.values()), strict=True))

    patch.setattr(reweighting, "losses_of", off)
    patch.setattr(reweighting, "reweight", turned)
    patch.setattr(reweighting, "read_jsonl", lambda path: [])
