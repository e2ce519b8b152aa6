"""Write a registered or exported classifier in another format, checked before it is there."""

from pathlib import Path
from typing import Any

from jobs.home import home
from jobs.models import locate
from jobs.run import tracking_uri
from pipeline import export
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.publish import MANIFEST, publishing, read_manifest

N_TEXTS = 16
TOLERANCE = 1e-5


def export_model(model: str, format_: str, output: Path, *, force: bool) -> dict[str, Any]:
    """Publish a folder with the model; `{format, output, program, difference, texts, calibration_temperature, files}`.

    `difference` is the largest of any logit between the format's own program and ours, over `texts` texts made of the
    vocabulary. Raises UsageError, EnvironmentProblem, or StageFailed where the difference is too large.
    """
    if format_ not in export.names():
        raise UsageError(f"--format {format_}: there are {', '.join(export.names())}")
    _check_free(output, force)
    export.require(format_)
    subject = export.read(locate(model, home(), tracking_uri()))
    seq_len = subject.loaded.model.cfg.seq_len
    wanted = export.expected(subject.loaded, export.vocabulary_texts(subject.loaded.tokenizer, N_TEXTS, seq_len))
    try:
        with publishing(output, {"format": format_, "model": model}) as scratch:
            gap = export.export(format_, scratch, subject, wanted, TOLERANCE)
    except OSError as error:
        raise EnvironmentProblem(f"{output}: cannot be written: {error.strerror or error}") from error
    return {
        "format": format_,
        "output": str(output),
        "program": export.load(format_).PROGRAM,
        "difference": gap,
        "texts": len(wanted.texts),
        "calibration_temperature": subject.temperature,
        "files": sorted(path.name for path in output.iterdir() if path.name != MANIFEST),
    }


def _check_free(output: Path, force: bool) -> None:
    """Raises UsageError for a place that is taken. Only what such an export has written is ever replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if read_manifest(output) is None:
        raise UsageError(f"{output}: this is no export, so it is not replaced. Give an --output that is not there yet")
    if not force:
        raise UsageError(f"{output}: there is an export already. Give another --output, or --force to replace it")
