"""What of a config is shown as the params of a run: what makes one run differ from another."""

from collections.abc import Mapping
from typing import Any

from pipeline.config import flat
from pipeline.identity import canonical
from pipeline.pipeline_config import PipelineConfig

HOW_FILES_ARE_READ = {"name", "corpus.text", "corpus.document", "labels.text", "labels.label", "labels.separator"}
NOT_SHOWN = ("invalid_utf8", "export.")


def shown_params(config: PipelineConfig) -> Mapping[str, Any]:
    """Every setting that decides what is made and has a value, some sixty; the whole config is in resolved.yaml.

    Knobs are left out: a run that goes on may have others, and MLflow refuses a param that changes.
    """
    values = dict(flat(canonical(config)))
    return {name: value for name, value in values.items() if value is not None and not _is_detail(name)}


def _is_detail(name: str) -> bool:
    return name in HOW_FILES_ARE_READ or any(word in name for word in NOT_SHOWN)
