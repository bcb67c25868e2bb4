"""What goes wrong on one rank of a world, by name: a function of (patch, whether it is this rank); see `World.run`."""

import itertools
from typing import Any

from scionlm.recipes import inheritune
from scionlm.recipes import setting as setting_module


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
    patch.setattr(inheritune, "samples_of", setting_module.samples_of)
