"""From a recipe to the order of its samples: mixture, packing, replay, and what the ledger says of them."""

from dataclasses import dataclass
from pathlib import Path

from scionlm.core.config import nearest
from scionlm.core.errors import DataError, UsageError
from scionlm.core.log import warn
from scionlm.core.records import Record
from scionlm.data import DataFolder, Mixture, Order, SamplePlan
from scionlm.data.mixing.ledger import as_consumed, plan_facts, read_consumed
from scionlm.data.mixing.mixture import by_temperature
from scionlm.data.mixing.replay import LedgerReplay
from scionlm.recipes.config import Recipe

_MUCH_PADDING = 0.05


@dataclass(frozen=True)
class Sampling:
    """A recipe's data, ready to be drawn from.

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

    def plan(self) -> SamplePlan:
        """Return the order of samples, at its beginning.

        Raises:
            DataError: A domain is shorter than one window, or a shard is broken.
        """
        streams = {name: self.data.stream(name, "train") for name in self.domains}
        return SamplePlan(streams, self.mixture, self.order, _open_replay(self.replay, self.order))

    def facts(self) -> Record:
        """Return what the ledger records of it."""
        return plan_facts(self.data, self.domains, self.order, self.replay)


def sampling_of(recipe: Recipe, data: DataFolder) -> Sampling:
    """Return how a recipe draws from its data.

    Raises:
        UsageError: A domain, the replayed run or its data are not there.
        DataError: A domain is too short, or would be exhausted where the recipe says to stop.
    """
    config = recipe.data
    domains = list(config.mixture or data.domains)
    domains += [name for name in (config.ramp.start if config.ramp else ()) if name not in domains]
    limits = config.max_epochs
    for key, names in (("mixture", domains), ("max_epochs", limits if isinstance(limits, dict) else ())):
        for name in names:
            if name not in data.domains:
                raise UsageError(
                    f"data.{key}: domain {name!r} is not in {data.path}{nearest(name, data.domains)} "
                    f"(has: {', '.join(data.domains)})"
                )
    sizes = {name: data.num_tokens(name, "train") for name in domains}
    shares = config.mixture or by_temperature(sizes, config.temperature)
    ramp = config.ramp
    mixture = Mixture(
        {name: shares.get(name, 0.0) for name in domains},
        {name: ramp.start.get(name, 0.0) for name in domains} if ramp else None,
        max(recipe.steps(ramp.over) * recipe.sequences_per_step, 1) if ramp else 0,
    )
    order = Order(
        config.seq_len,
        recipe.seed,
        packing=config.packing,
        document_mask=config.document_mask,
        max_epochs=limits if isinstance(limits, dict) or limits is None else dict.fromkeys(domains, limits),
        exhausted=config.exhausted,
    )
    replay = recipe.replay
    facts = replay.model_dump(mode="json") | {"proxy": replay.run is None, "seed": recipe.seed} if replay else None
    sampling = Sampling(data, mixture, order, facts)
    _check_supply(sampling, recipe)
    return sampling


def _open_replay(facts: Record | None, order: Order) -> LedgerReplay | None:
    if facts is None:
        return None
    folder = DataFolder(Path(facts["data"])) if facts["data"] else None
    if facts["run"] is None:
        assert folder is not None
        proxied = Order(order.seq_len, order.seed, "replay", order.packing)
        consumed = as_consumed(folder, proxied)
    else:
        consumed = read_consumed(Path(facts["run"]), folder)
    if consumed.seq_len != order.seq_len:
        raise UsageError(
            f"replay: {facts['run']} was trained on sequences of {consumed.seq_len} tokens; "
            f"set data.seq_len={consumed.seq_len} to replay them"
        )
    keys = ("fraction", "order", "offset", "repeat", "seed")
    return LedgerReplay(consumed, **{key: facts[key] for key in keys})


def _check_supply(sampling: Sampling, recipe: Recipe) -> None:
    """Find out beforehand what would run out, as far as the weights are known beforehand."""
    plan = sampling.plan()
    slots = recipe.total_steps * recipe.sequences_per_step
    demand = sampling.mixture.demand()
    share = 1 - (recipe.replay.fraction if recipe.replay else 0.0)
    if recipe.data.exhausted == "stop" and recipe.reweight is None:
        for index, name in enumerate(sampling.domains):
            wanted = share * demand.total(index, slots) / demand.scale
            allowed = (sampling.order.max_epochs or {}).get(name)
            # What is asked for exactly may come out a hair above, because weights are whole numbers of a small unit.
            if allowed is not None and wanted > int(allowed * plan.num_windows(name)) + 1e-3:
                raise DataError(
                    f"domain {name!r} would be gone through {wanted / plan.num_windows(name):.3g} times, "
                    f"data.max_epochs allows {allowed:g}; add text, lower its share, or set data.exhausted to "
                    "repeat or redistribute"
                )
    replay = plan.replay
    ahead = 2 if recipe.reweight else 0  # rounded periods may run so far ahead
    if recipe.replay and replay and not replay.repeat and recipe.replay.fraction * slots + ahead > replay.num_samples:
        raise UsageError(
            f"replay.fraction {recipe.replay.fraction} of {slots} sequences is more than the {replay.num_samples} that "
            "there are to replay; lower it, or allow a second pass with replay.repeat=true"
        )
    for name, padding in plan.padding().items():
        if padding > _MUCH_PADDING:
            warn(f"{100 * padding:.0f} % of domain {name!r} is padding: its documents leave gaps")


def replayed_data(sampling: Sampling) -> DataFolder | None:
    """Return the data folder that earlier data come from."""
    facts = sampling.replay
    if facts is None:
        return None
    return DataFolder(Path(facts["data"])) if facts["data"] else read_consumed(Path(facts["run"])).data
