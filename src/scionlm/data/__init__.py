"""From files of text to batches of tokens: read, tokenize, shard, split, mix.

    files -> documents -> token shards (train, held_out) -> windows -> sample plan -> batches

A domain is one folder of shards. Which window of which domain stands in which slot of training is a pure function of
the seed, the stage, the slot and the weights.
"""

from scionlm.data.folder import DataFolder, DocumentRange, TokenStream
from scionlm.data.mixing.ledger import Ledger
from scionlm.data.mixing.mixture import Mixture
from scionlm.data.mixing.plan import Order, Sample, SamplePlan
from scionlm.data.mixing.windows import Batch
from scionlm.data.preparing.prepare import prepare
from scionlm.data.reading.corpora import Corpora, DomainConfig, HeldOut, load_corpora

__all__ = [
    "Batch",
    "Corpora",
    "DataFolder",
    "DocumentRange",
    "DomainConfig",
    "HeldOut",
    "Ledger",
    "Mixture",
    "Order",
    "Sample",
    "SamplePlan",
    "TokenStream",
    "load_corpora",
    "prepare",
]
