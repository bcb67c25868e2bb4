"""Which layer of a student learns from which of its teacher's."""

from scionlm.core.errors import UsageError
from scionlm.core.log import warn
from scionlm.families import ModelShape
from scionlm.recipes.config_distill import DistillConfig
from scionlm.sources import ModelFolder
from scionlm.surgery.lineage import Origins


def layer_map(config: DistillConfig, teacher: ModelFolder, origins: Origins) -> dict[int, int]:
    """Return which layer of the student learns from which of the teacher's.

    Args:
        config: Says how they are matched.
        teacher: The teacher.
        origins: Where the student's layers come from.

    Raises:
        UsageError: A layer is not there.
    """
    if config.hidden is None:
        return {}
    wanted, mine, theirs = config.hidden.layers, len(origins), ModelShape.of(teacher.config).num_hidden_layers
    if not isinstance(wanted, str):
        if len(dict(wanted)) < len(wanted):
            raise UsageError("distill.hidden.layers names a layer of the student twice")
        for layer, taught in wanted:
            if not (0 <= layer < mine and 0 <= taught < theirs):
                raise UsageError(
                    f"distill.hidden.layers [{layer}, {taught}]: the student has layers 0-{mine - 1}, the teacher "
                    f"0-{theirs - 1}"
                )
        return dict(wanted)
    # A model of this name with another number of layers was another model.
    known = [
        next((step["index"] for step in steps if (step["name"], step["of"]) == (teacher.name, theirs)), None)
        for steps in origins
    ]
    by_depth = not any(index is not None for index in known)
    if by_depth and wanted != "uniform":
        warn(f"no layer is known to come from {teacher.name}: hidden states are matched by depth")
    if by_depth or wanted == "uniform":
        return {layer: (layer + 1) * theirs // mine - 1 for layer in range(mine) if (layer + 1) * theirs >= mine}
    if wanted == "next":
        # What the next layer was made to read: the output of the layer before it in the teacher.
        known = [*(None if index is None else index - 1 for index in known[1:]), theirs - 1]
    return {layer: index for layer, index in enumerate(known) if index is not None and index >= 0}
