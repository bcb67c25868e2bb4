"""`scion inherit`: cut, prove, write; or say what would be done."""

import re
from pathlib import Path

from scionlm.core.errors import UsageError
from scionlm.core.log import format_count
from scionlm.core.records import Record
from scionlm.recipes.inherit import Verify
from scionlm.surgery.request import InheritOptions

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str, flag: str) -> int:
    """Return a size such as `5GB` or `500 MB` in bytes.

    Raises:
        UsageError: It is not one, or less than a megabyte.
    """
    match = re.fullmatch(r"\s*(\d{1,12})\s*([kmgt]?)b?\s*", text.lower(), re.ASCII)
    size = int(match[1]) * _UNITS.get(match[2], 1) if match else 0
    if size < 10**6:
        raise UsageError(f"{flag} {text[:40]!r} is not a size of at least 1MB such as 5GB")
    return size


def inherit_command(
    source: str, out: Path | None, options: InheritOptions, dry_run: bool, verify: Verify, shard_size: str, json: bool
) -> None:
    """Carry out a request, or print what it would do."""
    from scionlm.cli.tables import print_json
    from scionlm.recipes.inherit import describe_request, inherit_folder, open_request

    shard_bytes = parse_bytes(shard_size, "shard-size")
    if dry_run:
        with open_request(source, options) as request:
            facts = describe_request(request)
    elif out is None:
        raise UsageError("say where the result goes (-o OUT), or --dry-run")
    else:
        facts = inherit_folder(source, out, options, verify, shard_bytes)
    if json:
        print_json(facts)
    else:
        print_surgery(facts, None if dry_run else out)


def print_surgery(facts: Record, out: Path | None) -> None:
    """Print what was done, or would be (`out` is None then)."""
    from scionlm.surgery.indices import format_indices

    plan, before, after = facts["plan"], facts["source_shape"], facts["target_shape"]
    donors = {layer["donor"] for layer in plan["layers"]}
    size = f"{format_count(facts['num_parameters'])} parameters, {facts['bytes'] / 1e6:,.0f} MB"
    source_size = f"{format_count(facts['source_parameters'])} parameters"
    print(f"{out or 'would write'}: {size}, from {facts['source']} ({source_size})")
    if len(donors) == 1 and all(layer["init"] == "source" for layer in plan["layers"]):
        print(f"  layers     {format_indices(plan['keep'])} of {plan['num_source_layers']}  ({plan['strategy']})")
    else:
        print(f"  layers     {', '.join(_layer(layer, plan) for layer in plan['layers'])}  ({plan['strategy']})")
    for key, value in after.items():
        if value != before[key] and key != "num_hidden_layers":
            chosen = f"  ({plan['width']})" if plan["width"] and key != "vocab_size" else ""
            print(f"  {key:<22} {before[key]} -> {value}{chosen}")
    if plan["fresh"]:
        print(f"  fresh      {', '.join(plan['fresh'])}  (seed {plan['seed']})")
    for kind, counts in facts["tensors"].items():
        print(f"  {kind:<10} {counts['tensors']} tensors, {format_count(counts['parameters'])} parameters")
    print(f"  dropped    {facts['dropped_tensors']} tensors of the source")
    for check in facts.get("checks", ()):
        print(f"  proven: {check}")


def _layer(layer: Record, plan: Record) -> str:
    if layer["init"] != "source":
        return str(layer["init"])
    return f"{layer['index']} of {plan['donors'][layer['donor']]['name']}" if layer["donor"] else str(layer["index"])
