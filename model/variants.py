"""A folder is a registry: the module `model/attention/sdpa.py` is the variant named "sdpa"."""

import importlib
import importlib.util
import pkgutil
from types import ModuleType


def names(package: str) -> list[str]:
    """The variants a package offers: its public modules, sorted. Reads the folder only and imports none of them."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not a package"
    folders = spec.submodule_search_locations or []
    return sorted(module.name for module in pkgutil.iter_modules(folders) if not module.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Import one variant by name. Only names that exist in the folder are ever imported.

    Raises ValueError, listing the choices, for any other name.
    """
    choices = names(package)
    if name not in choices:
        new_file = f"{package.replace('.', '/')}/{name}.py"
        raise ValueError(f"unknown {package} variant {name!r}; choose one of {', '.join(choices)}, or add {new_file}")
    return importlib.import_module(f"{package}.{name}")
