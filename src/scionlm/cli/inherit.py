"""`scion inherit`: cut, prove, write."""

from pathlib import Path

from scionlm.core.files import require_free_folder, staged_folder
from scionlm.core.log import format_count


def inherit_command(source: str, out: Path, layers: int | None, keep: str | None, strategy: str | None) -> None:
    """Write the folder `out` with the layers asked for and say what was proven."""
    require_free_folder(out)
    from scionlm import api

    model, plan, proof, folder = api.inherit_proven(source, layers, keep, strategy)

    from scionlm.recipes.card import inherit_card
    from scionlm.recipes.run import command_line
    from scionlm.surgery.export import save_model
    from scionlm.surgery.verify import verify_export

    provenance = {"source": {"name": folder.name, "revision": folder.revision} | folder.facts, "plan": plan.to_dict()}
    parameters = model.num_parameters()
    card = inherit_card(folder.name, folder.license, plan.to_dict(), parameters, command_line())
    with staged_folder(out) as stage:
        save_model(model, stage, folder, card, provenance)
        verify_export(model, stage, proof)
    print(f"{out}: layers {', '.join(map(str, plan.keep))} of {folder.name}, {format_count(parameters)} parameters")
    for check in proof.checks:
        print(f"  proven: {check}")
