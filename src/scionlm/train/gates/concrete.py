"""The hard concrete distribution: a gate in [0, 1] that is exactly 0, exactly 1, or in between, and has a gradient.

A gate's parameter is `log_alpha`. Uniform noise u makes s = sigmoid((log u - log(1 - u) + log_alpha) / temperature),
which is stretched from (0, 1) to (GAMMA, ZETA) and cut off at 0 and 1.

Source: Louizos, Welling and Kingma, arXiv:1712.01312, equations 10 to 13; constants of Xia et al. (Sheared LLaMA),
arXiv:2310.06694.
"""

import math

import torch

GAMMA, ZETA = -0.1, 1.1
"""What the distribution is stretched to."""
TEMPERATURE = 2 / 3
"""Of the published code; the paper's appendix A has another."""
LIMIT = math.log(100)
"""`log_alpha` is kept within this of zero: beyond it gradients vanish."""
_EPSILON = 1e-6
_CODE_SHARPNESS = 0.8


def sample(log_alpha: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return gates drawn with uniform `noise` of the same shape."""
    u = noise.clamp(_EPSILON, 1 - _EPSILON)
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / temperature)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def open_probability(log_alpha: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the probability that a gate is not zero: its expected L0 norm."""
    return torch.sigmoid(log_alpha - temperature * math.log(-GAMMA / ZETA))


def reachable(temperature: float) -> tuple[float, float]:
    """Return the lowest and the highest probability to be open that a gate within `LIMIT` has."""
    ends = torch.tensor([-LIMIT, LIMIT], dtype=torch.float64)
    low, high = open_probability(ends, temperature).tolist()
    return low, high


def calibrated(probability: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return a probability on the scale where the lowest that can be reached is zero and the highest one.

    The published constraint counts a gate that is as good as closed as `reachable`'s lower end. To meet it exactly,
    some of the units that are kept have to be closed too; on this scale it is met when none is.
    """
    low, high = reachable(temperature)
    return (probability - low) / (high - low)


def settled(log_alpha: torch.Tensor) -> torch.Tensor:
    """Return the value of each gate without noise (arXiv:1712.01312, equation 13)."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def settled_by_code(log_alpha: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return it as the published code of Sheared LLaMA has it, which never gives zero or one."""
    return torch.sigmoid(_CODE_SHARPNESS * log_alpha / temperature)
