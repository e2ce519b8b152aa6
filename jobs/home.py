"""Where everything is kept."""

import os
from pathlib import Path


def home() -> Path:
    """GRISTMILL_HOME, or `runs` in the current directory."""
    return Path(os.environ.get("GRISTMILL_HOME") or "runs").absolute()
