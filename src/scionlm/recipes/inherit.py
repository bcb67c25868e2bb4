"""One-shot surgery on request: sources, plan, proof, and the folder that comes out of it."""

import contextlib
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scionlm.analysis.ranking import CRITERIA, WAYS
from scionlm.core.config import nearest
from scionlm.core.errors import UsageError
from scionlm.core.files import require_free_folder, staged_folder
from scionlm.core.log import warn
from scionlm.core.records import Record
from scionlm.families import ModelShape
from scionlm.recipes.card import inherit_card
from scionlm.recipes.measured import MEASURED
from scionlm.recipes.run import command_line
from scionlm.recipes.scores import Scorer
from scionlm.sources import ModelFolder, resolve
from scionlm.surgery.depth import STRATEGIES
from scionlm.surgery.lineage import plan_origins
from scionlm.surgery.mergekit import plan_slices, read_slices
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.request import (
    BLOCK_INFLUENCE,
    InheritOptions,
    check_options,
    complete_plan,
    layer_plan,
)
from scionlm.surgery.vocabulary import trim_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scionlm.surgery.proof import Proof
    from scionlm.surgery.surgery import Surgery


Verify = bool | Literal["layers"]


@dataclass(frozen=True)
class Request:
    """A request for surgery, checked and planned.

    Attributes:
        folders: The donors.
        plan: What to make of them.
        tokenizer: Folder of the result's tokenizer, where it is not the source's.
    """

    folders: list[ModelFolder]
    plan: SurgeryPlan
    tokenizer: Path | None


@contextmanager
def open_request(source: str, options: InheritOptions) -> Generator[Request, None, None]:
    """Resolve the sources and plan; a trimmed tokenizer lives as long as the block.

    Args:
        source: A MODEL, or a YAML file with mergekit's slices.
        options: What is asked for.

    Raises:
        UsageError: The request is wrong.
        DataError: A source is broken, or does not fit the request.
    """
    pickle = bool(options.get("allow_pickle"))
    _refuse_measured(options.get("strategy") or "", source)
    check_options(options)
    if source.endswith((".yaml", ".yml")) and Path(source).is_file():
        if any(options.get(key) is not None for key in ("layers", "keep", "strategy", "scores", "grow", "donor")):
            raise UsageError(f"{source} names the layers already; leave layers, keep, strategy, scores and grow out")
        slices = read_slices(Path(source))
        folders = [resolve(name, allow_pickle=pickle, weights=False) for name in slices.models]
        plan = plan_slices(slices, [_shape(folder).num_hidden_layers for folder in folders])
        scorer = Scorer(folders[0], options.get("data"))
    else:
        first = resolve(source, allow_pickle=pickle, weights=False)
        donor = options.get("donor")
        second = None if donor is None else resolve(donor, allow_pickle=pickle, weights=False)
        folders = [first] if second is None else [first, second]
        for folder in folders:
            _shape(folder)
        plan = _layers(options, first, second, scorer := Scorer(first, options.get("data")))
    with tempfile.TemporaryDirectory(prefix="scion-") as room:
        tokenizer, vocab = options.get("tokenizer"), None
        where = None if tokenizer is None else Path(tokenizer)
        size = options.get("vocab_size")
        if size is not None and tokenizer is None:
            where = Path(room)
            vocab = trim_tokenizer(folders[0].path, size, where)
        complete_plan(plan, options, folders[0], None, vocab)  # a wrong request is refused before scores are collected
        rule = options.get("importance") or "first"
        scores = None if rule in ("first", "random") else scorer.get(rule)
        yield Request(folders, complete_plan(plan, options, folders[0], scores, vocab), where)


def _shape(folder: ModelFolder) -> ModelShape:
    """Return the sizes of a source; what is wrong with them is said of its file."""
    return ModelShape.of(folder.config, folder.path / "config.json")


def _layers(options: InheritOptions, source: ModelFolder, donor: ModelFolder | None, scorer: Scorer) -> SurgeryPlan:
    """Return the plan for the layers; those of the most influence are measured where that is asked for.

    Raises:
        UsageError: The strategy is unknown, or as `layer_plan` has it.
    """
    name = (options.get("strategy") or "first").partition(":")[0]
    known = [*STRATEGIES, BLOCK_INFLUENCE]
    if name not in known:
        raise UsageError(f"strategy {name!r} is unknown{nearest(name, known)} (known: {', '.join(known)})")
    if options.get("strategy") != BLOCK_INFLUENCE:
        return layer_plan(options, source, donor)
    if options.get("scores") is not None:
        raise UsageError(f"strategy {BLOCK_INFLUENCE} measures its scores; leave scores out")
    total = ModelShape.of(source.config).num_hidden_layers
    by_score: InheritOptions = {**options, "strategy": None, "scores": [0.0] * total}
    layer_plan(by_score, source, donor)  # a wrong request is refused before anything is measured
    by_score["scores"] = scorer.get("activation")["layers"].tolist()
    return replace(layer_plan(by_score, source, donor), strategy=BLOCK_INFLUENCE)


def _refuse_measured(strategy: str, source: str) -> None:
    """Refuse a strategy that another command measures, and say how its layers are come by.

    Raises:
        UsageError: It is one.
    """
    name = strategy.partition(":")[0]
    if name not in MEASURED or name in (*STRATEGIES, BLOCK_INFLUENCE):
        return
    analyze, how = f"scion analyze {source} --data DATA --layers N -o ANALYSIS", ""
    if name == "greedy":
        analyze += " --greedy M (the number that goes)"
    if name in (*CRITERIA, *WAYS):
        how = f": {analyze} lists the layers that it keeps, for --keep"
    raise UsageError(f"strategy {name} is measured{how}; in a recipe inherit.strategy measures it by itself")


def describe_request(request: Request) -> Record:
    """Return what a surgery would do, from configurations alone: plan, sizes, and what becomes of the tensors."""
    from scionlm.families.shape import count_parameters, expected_tensors
    from scionlm.surgery.operations import operations, summarize
    from scionlm.surgery.target import target_config

    configs = [folder.config for folder in request.folders]
    target = target_config(configs, request.plan)
    found = operations(configs, target, request.plan)
    names = [{place.name for place in expected_tensors(config)} for config in configs]
    summary = summarize(found, names, request.folders[0].bytes_each())
    return {
        "source": request.folders[0].name,
        "plan": request.plan.to_dict(),
        "source_parameters": count_parameters(configs[0])["total"],
        "source_shape": ModelShape.of(configs[0]).to_dict(),
        "target_shape": ModelShape.of(target).to_dict(),
        **summary,
    }


def inherit_model(source: str, options: InheritOptions) -> "tuple[PreTrainedModel, Proof]":
    """Return the model that a request means, in the source's type, and the proof of it."""
    import torch

    from scionlm.surgery.surgery import open_surgery

    with open_request(source, options) as request, open_surgery(request.folders, request.plan) as surgery:
        model = surgery.build(torch.float32)
        proof = surgery.prove(model)
        return model.to(surgery.dtype), proof  # pyright: ignore[reportArgumentType]


def inherit_folder(source: str, out: Path, options: InheritOptions, verify: Verify, shard_bytes: int) -> Record:
    """Carry out a request into the folder `out`; return the summary with the checks that were made.

    Args:
        source: A MODEL, or a YAML file with mergekit's slices.
        out: Folder for the result, absent or empty.
        options: What is asked for.
        verify: True proves the result in memory, as a whole; `layers` one layer of each kind, alone; False compares
            rows of each tensor of each layer with the donors'. All of them look at the written files.
        shard_bytes: Largest size of a weight file.

    Raises:
        ScionError: A check failed; nothing was written.
    """
    require_free_folder(out)
    with open_request(source, options) as request:
        facts = describe_request(request)
        from scionlm.surgery.surgery import SHARD_BYTES, open_surgery  # and with it torch: only now

        with open_surgery(request.folders, request.plan) as surgery, staged_folder(out) as stage:
            # Writing waits for the disk most of the time: what the proof needs is imported meanwhile.
            imports = threading.Thread(target=_import_model, args=(surgery.config,), daemon=True)
            if verify:
                imports.start()
            written = surgery.write(stage, shard_bytes or SHARD_BYTES)
            if verify:
                imports.join()
            proof = check(surgery, stage, verify)
            facts |= {"files": written.files, "checks": proof.checks}
            _finish(stage, request, surgery, facts)
    return facts


def _import_model(config: Record) -> None:
    """Import what the proof needs, transformers' code of the model included; if that fails, the proof says so."""
    with contextlib.suppress(Exception):
        from transformers import AutoConfig, AutoModelForCausalLM

        import scionlm.surgery.files
        import scionlm.surgery.probe  # noqa: F401

        AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(config["model_type"]))]


def check(surgery: "Surgery", stage: Path, verify: Verify) -> "Proof":
    """Return the proof of the files in `stage`; see `inherit_folder`."""
    from scionlm.families.weights import FolderWeights
    from scionlm.sources.tensors import FolderTensors
    from scionlm.surgery.files import check_files

    with FolderTensors(stage) as tensors:
        written = FolderWeights(surgery.config, tensors, stage)
        proof = check_files(surgery, written, sample=verify is not True)
        if verify == "layers":
            from scionlm.surgery.probe import probe_layers

            probe_layers(surgery, written, proof)
        if verify is not True:
            return proof
    import torch

    from scionlm.sources import load_hf_model, open_folder
    from scionlm.surgery.verify import require_ties

    target = load_hf_model(open_folder(stage), torch.float32)
    require_ties(target, proof)
    proof.checks += surgery.prove(target).checks
    return proof


def _finish(stage: Path, request: Request, surgery: "Surgery", facts: Record) -> None:
    from scionlm.surgery.export import write_companions
    from scionlm.surgery.target import unusual_settings

    unusual = unusual_settings(request.folders[0].config, surgery.config)
    if unusual:
        warn(
            f"{', '.join(unusual)}: not what is usual for a model of these sizes; programs that work it out for "
            "themselves instead of reading config.json (llama.cpp does, for some) would run this model wrongly"
        )
    sources = [{"name": f.name, "revision": f.revision} | f.facts for f in request.folders]
    provenance = {
        "source": sources[0],
        "donors": sources,
        "plan": request.plan.to_dict(),
        "origins": plan_origins(request.folders, request.plan),
        "sha256": facts["files"],
        "checks": facts["checks"],
        "unusual_settings": unusual,
    }
    folder = request.folders[0]
    card = inherit_card(request.folders, facts, command_line())
    write_companions(stage, folder, card, provenance, request.tokenizer, request.folders[1:])
