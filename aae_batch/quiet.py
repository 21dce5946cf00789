"""Keep what libraries print while they load a model from the user."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def quiet() -> Iterator[None]:
    """Show no warnings and progress bars of transformers, diffusers and the hub's client inside the block,
    and restore the user's settings afterwards. Errors are shown, and so is all that the user switched on
    (`TRANSFORMERS_VERBOSITY=info`). Libraries that are not imported yet stay so.
    """
    from huggingface_hub import utils as hub

    libraries = [
        import_module(f"{name}.utils.logging")
        for name in ("transformers", "diffusers")
        if name in sys.modules
    ]
    logs = [*libraries, hub.logging]
    levels = [log.get_verbosity() for log in logs]
    shows = [library.is_progress_bar_enabled() for library in libraries]
    hides = hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log, level in zip(logs, levels, strict=True):
            if level == logging.WARNING:
                log.set_verbosity(logging.ERROR)
        for library in libraries:
            library.disable_progress_bar()
        hub.disable_progress_bars()
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.set_verbosity(level)
            for library, shown in zip(libraries, shows, strict=True):
                if shown:
                    library.enable_progress_bar()
            (hub.disable_progress_bars if hides else hub.enable_progress_bars)()
