"""What was proven, in words; a check that fails ends everything."""

from dataclasses import dataclass, field

from scionlm.core.errors import ScionError


@dataclass
class Proof:
    """The checks that were made and passed, in words."""

    checks: list[str] = field(default_factory=lambda: [])

    def require(self, name: str, holds: bool, detail: str = "") -> None:
        """Record a check.

        Raises:
            ScionError: It does not hold; the result must not be used.
        """
        if not holds:
            raise ScionError(f"surgery failed its own proof: {name}{detail and ' ' + detail}; nothing was written")
        self.checks.append(name)
