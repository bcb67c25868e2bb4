"""What a model is worth on held-out text: losses per domain, per document, and text that it writes."""

from scionlm.evaluation.generate import write_samples
from scionlm.evaluation.loss import DomainLoss, TokenNll, domain_losses, mean_nll, model_token_nll
from scionlm.evaluation.rolling import rolling_losses

__all__ = [
    "DomainLoss",
    "TokenNll",
    "domain_losses",
    "mean_nll",
    "model_token_nll",
    "rolling_losses",
    "write_samples",
]
