"""Keep transformers' own bars and notes off the screen; what matters is checked and said by Scion."""

import contextlib
import io
import warnings
from collections.abc import Generator

from scionlm.core.errors import DataError


@contextlib.contextmanager
def quiet_transformers() -> Generator[None, None, None]:
    """Silence transformers' logging, progress bars and warnings inside the block."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Its GGUF reader draws a bar that no switch turns off; errors are raised, not printed.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def refusals() -> Generator[None, None, None]:
    """Keep transformers quiet, and say of a configuration that it refuses that it does.

    Raises:
        DataError: It does.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet_transformers():
            yield
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise DataError(f"config.json: transformers refuses it: {' '.join(str(error).split())[:300]}") from error
