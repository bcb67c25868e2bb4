"""Exit codes that scripts rely on."""

import pytest

from scionlm.core import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ScionError, 1),
        (errors.UsageError, 2),
        (errors.DivergenceError, 3),
        (errors.DataError, 65),
        (errors.StorageError, 74),
        (errors.StoppedError, 75),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(kind, code):
    assert kind("why").exit_code == code
    assert isinstance(kind("why"), errors.ScionError)


def test_no_two_kinds_share_a_code():
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ScionError)]
    kinds = [kind for kind in found if kind.__base__ in (Exception, errors.ScionError)]
    assert len({kind.exit_code for kind in kinds}) == len(kinds) == 6
    assert all(kind.exit_code == kind.__base__.exit_code for kind in found if kind not in kinds)  # special cases
