"""Where everything is kept."""

import os
from pathlib import Path

from pipeline.errors import UsageError


def home() -> Path:
    """GRISTMILL_HOME, or `runs` in the current directory. Raises UsageError where no folder can be."""
    place = Path(os.environ.get("GRISTMILL_HOME") or "runs").absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"GRISTMILL_HOME={place}: {there} is a file. Name a folder")
    return place
