"""Exit codes that scripts rely on."""

import pytest

from scionlm.cli.main import explain
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


def test_memory_that_a_gpu_has_not_is_no_fault_of_ours():
    class OutOfMemoryError(RuntimeError):
        """As torch names it."""

    assert errors.exit_code_of(OutOfMemoryError("CUDA out of memory")) == errors.exit_code_of(MemoryError()) == 74
    message, code = explain(OutOfMemoryError("CUDA out of memory"))
    assert (code, "train.micro_batch_size" in message) == (74, True)
    assert explain(RuntimeError("other"))[1] == 1
