"""From a recipe to the order of its samples: mixture, packing, replay, and what the ledger says of them."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scionlm.core.errors import DataError, UsageError
from scionlm.core.log import warn
from scionlm.core.records import Record
from scionlm.data import DataFolder, Mixture, Order, SamplePlan
from scionlm.data.mixing.ledger import Consumed, as_consumed, plan_facts, read_consumed
from scionlm.data.mixing.mixture import by_temperature
from scionlm.data.mixing.replay import LedgerReplay
from scionlm.recipes.stages import MAIN, Stage

_MUCH_PADDING = 0.05
_REPLAYED_BY = ("run", "stage", "data", "domains", "order", "offset", "seed")


@dataclass(frozen=True)
class Sampling:
    """A stage's data, ready to be drawn from.

    Attributes:
        data: The data folder.
        mixture: Share of each domain.
        order: What else decides the order.
        replay: Where earlier data come from, as manifest and ledger record it.
    """

    data: DataFolder
    mixture: Mixture
    order: Order
    replay: Record | None

    @property
    def domains(self) -> list[str]:
        """The domains of the mixture."""
        return self.mixture.names

    @property
    def windows_id(self) -> str:
        """What two stages have in common that draw from the same windows: the later goes on where the other stopped."""
        order = self.order
        return f"{self.data.fingerprint}/{order.seq_len}/{order.packing}/{order.seed}"

    @property
    def replay_id(self) -> str | None:
        """What two stages have in common that replay the same: the later goes on where the other stopped."""
        if self.replay is None:
            return None
        found = {key: self.replay[key] for key in _REPLAYED_BY} | {"seq_len": self.order.seq_len}
        return json.dumps(found | ({"run": None} if found["stage"] is not None else {}))  # of its own: it may be moved

    @staticmethod
    def replays_itself(replay_id: str) -> bool:
        """Whether the id of a replay is of what a run saw itself: in another run's folder that is other text."""
        return replay_id.startswith("{") and json.loads(replay_id)["stage"] is not None

    def going_on(self, cursors: Mapping[str, Record]) -> "tuple[Sampling, dict[str, int]]":
        """Return the sampling with the order, and the counts, of earlier stages that had the same windows or replay."""
        cursor, replayed = cursors.get(self.windows_id), cursors.get(self.replay_id or "", {"counts": {}})
        if cursor is None:
            return self, dict(replayed["counts"])
        order = replace(self.order, stage=cursor["order"])
        return replace(self, order=order), {**cursor["counts"], **replayed["counts"]}

    def plan(self, start: dict[str, int] | None = None) -> SamplePlan:
        """Return the order of samples, at its beginning.

        Args:
            start: How many samples of each domain were taken before.

        Raises:
            DataError: A domain is shorter than one window, or a shard is broken.
        """
        streams = {name: self.data.stream(name, "train") for name in self.domains}
        return SamplePlan(streams, self.mixture, self.order, _open_replay(self.replay, self.order), start)

    def replayed(self) -> Record | None:
        """Return what tells the earlier data from others: their hash, and how many samples there are."""
        data = replayed_data(self)
        replay = _open_replay(self.replay, self.order) if data else None
        return {"data": data.fingerprint, "samples": replay.num_samples} if data and replay else None

    def replayed_domains(self) -> list[str]:
        """Return the domains that earlier data come from, where these are not the run's own."""
        if self.replay is None or self.replay["stage"] is not None:
            return []
        consumed = _consumed(self.replay, self.order)
        return [name for name, count in consumed.counts.items() if count]

    def facts(self, start: dict[str, int] | None = None) -> Record:
        """Return what the ledger records of it."""
        return plan_facts(self.data, self.domains, self.order, self.replay, start)


def sampling_of(stage: Stage, data: DataFolder, seed: int, run: Path) -> Sampling:
    """Return how a stage draws from its data.

    Args:
        stage: The stage.
        data: Its data folder.
        seed: Of the order.
        run: The run folder, where the ledgers of earlier stages are.

    Raises:
        UsageError: A domain, the replayed run or its data are not there, or what is replayed would be new text too.
    """
    config = stage.data
    domains = list(config.mixture or data.domains)
    domains += [name for name in (config.ramp.start if config.ramp else ()) if name not in domains]
    limits = config.max_epochs
    for key, names in (("mixture", domains), ("max_epochs", limits if isinstance(limits, dict) else ())):
        data.require(names, f"data.{key}: domain", "; data.mixture=null takes all" if key == "mixture" else "")
    sizes = {name: data.num_tokens(name, "train") for name in domains}
    shares = config.mixture or by_temperature(sizes, config.temperature)
    ramp = config.ramp
    mixture = Mixture(
        {name: shares.get(name, 0.0) for name in domains},
        {name: ramp.start.get(name, 0.0) for name in domains} if ramp else None,
        max(stage.steps(ramp.over) * stage.sequences_per_step, 1) if ramp else 0,
    )
    order = Order(
        config.seq_len,
        seed,
        stage.name,
        packing=config.packing,
        document_mask=config.document_mask,
        max_epochs=limits if isinstance(limits, dict) or limits is None else dict.fromkeys(domains, limits),
        exhausted=config.exhausted,
    )
    return Sampling(data, mixture, order, _replay_facts(stage, data, seed, run))


def _replay_facts(stage: Stage, data: DataFolder, seed: int, run: Path) -> Record | None:
    replay = stage.replay
    if replay is None:
        return None
    facts = replay.model_dump(mode="json") | {"seed": seed}
    if replay.stage is not None:
        facts["run"] = str(stage_folder(run, replay.stage))
    if facts["run"] is None and facts["data"] is None:
        facts["data"] = str(data.path)
        known = [name for name in replay.domains or [] if name in data.domains]
        new = [name for name in data.domains if name not in known]
        if known and new and stage.data.mixture is None:
            raise UsageError(
                f"replay.domains: {', '.join(known)} would be trained on as new text too, since data.mixture "
                f"names no domains; set data.mixture={{{', '.join(f'{name}: 1' for name in new)}}}"
            )
    return facts | {"proxy": facts["run"] is None}


def stage_folder(run: Path, name: str) -> Path:
    """Return where what belongs to a stage is: the run folder itself for the one stage of a recipe without stages."""
    return run if name == MAIN else run / "stages" / name


def _open_replay(facts: Record | None, order: Order) -> LedgerReplay | None:
    if facts is None:
        return None
    keys = ("fraction", "order", "offset", "repeat", "seed")
    return LedgerReplay(_consumed(facts, order), **{key: facts[key] for key in keys})


def _consumed(facts: Record, order: Order) -> Consumed:
    """Return what there is to replay."""
    folder = DataFolder(Path(facts["data"])) if facts["data"] else None
    if facts["run"] is None:
        assert folder is not None
        proxied = Order(order.seq_len, order.seed, "replay", order.packing)
        folder.require(facts.get("domains") or [], "replay.domains:")
        consumed = as_consumed(folder, proxied, facts.get("domains"))
    else:
        consumed = read_consumed(Path(facts["run"]), folder)
    if consumed.seq_len != order.seq_len:
        raise UsageError(
            f"replay: {facts['run']} was trained on sequences of {consumed.seq_len} tokens; "
            f"set data.seq_len={consumed.seq_len} to replay them"
        )
    return consumed


def check_supply(stages: Sequence[tuple[Stage, Sampling]]) -> None:
    """Find out beforehand what would run out, as far as the weights are known beforehand.

    Raises:
        UsageError: Replay would begin a second pass.
        DataError: A domain would be exhausted where the recipe says to stop.
    """
    wanted: Counter[tuple[str, str]] = Counter()  # of each domain's windows, over the stages
    replayed: Counter[tuple[str | None, int]] = Counter()  # of each replay's samples
    seen: Counter[str] = Counter()
    for stage, sampling in stages:
        early = stage.replay is not None and stage.replay.stage is not None  # its ledger is not written yet
        plan = (replace(sampling, replay=None) if early else sampling).plan()
        slots = stage.total_steps * stage.sequences_per_step
        demand = sampling.mixture.demand()
        share = 1 - (stage.replay.fraction if stage.replay else 0.0)
        for index, name in enumerate(sampling.domains):
            key = (sampling.windows_id, name)
            wanted[key] += share * demand.total(index, slots) / demand.scale  # pyright: ignore[reportArgumentType]
            allowed = (sampling.order.max_epochs or {}).get(name)
            fixed = stage.data.exhausted == "stop" and stage.reweight is None
            # What is asked for exactly may come out a hair above, because weights are whole numbers of a small unit.
            if fixed and allowed is not None and wanted[key] > int(allowed * plan.num_windows(name)) + 1e-3:
                raise DataError(
                    f"domain {name!r} would be gone through {wanted[key] / plan.num_windows(name):.3g} times, "
                    f"data.max_epochs allows {allowed:g}; add text, lower its share, or set data.exhausted to "
                    "repeat or redistribute"
                )
        _check_redistributed(stage, sampling, plan, wanted)
        if stage.replay:
            supply = plan.replay.num_samples if plan.replay else _own_samples(stages, stage.replay.stage or "")
            # A stage of each round of growth has a ledger of its own.
            key = (sampling.replay_id, seen[stage.name] if early else 0)
            replayed[key] += stage.replay.fraction * slots  # pyright: ignore[reportArgumentType]
            _check_replay(stage, replayed[key], supply)
        seen[stage.name] += 1
        for name, padding in plan.padding().items():
            if padding > _MUCH_PADDING:
                warn(f"{100 * padding:.0f} % of domain {name!r} is padding: its documents leave gaps")


def _check_redistributed(
    stage: Stage, sampling: Sampling, plan: SamplePlan, wanted: Mapping[tuple[str, str], float]
) -> None:
    """Refuse a demand that is more than all domains have between them, where one takes the place of another."""
    limits = sampling.order.max_epochs or {}
    if stage.data.exhausted != "redistribute" or any(limits.get(name) is None for name in sampling.domains):
        return
    supply = sum(int(limits[name] * plan.num_windows(name)) for name in sampling.domains)
    demand = sum(wanted[sampling.windows_id, name] for name in sampling.domains)
    if demand > supply + 1e-3:
        raise DataError(
            f"stage {stage.name} wants {demand:,.0f} windows by its end, all domains together have {supply:,} within "
            "data.max_epochs; add text, raise it, or lower the budget"
        )


def _own_samples(stages: Sequence[tuple[Stage, Sampling]], name: str) -> int:
    """Return how many samples a stage takes that it does not replay itself."""
    stage = next(stage for stage, _ in stages if stage.name == name)
    slots = stage.total_steps * stage.sequences_per_step
    return slots - math.ceil((stage.replay.fraction if stage.replay else 0.0) * slots)


def _check_replay(stage: Stage, wanted: float, supply: int) -> None:
    assert stage.replay is not None
    ahead = 2 if stage.reweight else 0  # rounded periods may run so far ahead
    if not stage.replay.repeat and wanted + ahead > supply:
        raise UsageError(
            f"replay.fraction {stage.replay.fraction} comes to {wanted:,.0f} sequences by the end of stage "
            f"{stage.name}, more than the {supply:,} that there are to replay; lower it, or allow a second pass with "
            "replay.repeat=true"
        )


def replayed_data(sampling: Sampling) -> DataFolder | None:
    """Return the data folder that earlier data come from, where it is not one of the run's own."""
    facts = sampling.replay
    if facts is None or facts["stage"] is not None:
        return None
    return DataFolder(Path(facts["data"])) if facts["data"] else read_consumed(Path(facts["run"])).data
