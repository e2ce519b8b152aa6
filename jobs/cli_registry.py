"""The commands about registered models: where one comes from, and which one is the champion."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter, validators

from jobs.cli_shared import MODELS, Json, emit

if TYPE_CHECKING:
    from jobs.promote import Promotion

Score = Annotated[
    float | None,
    Parameter(help="Refuse a model whose macro-F1 is lower.", validator=validators.Number(gte=0, lte=1)),
]
Version = Annotated[str | None, Parameter(help="The version to promote. Default: the one with the alias `candidate`.")]
Force = Annotated[bool, Parameter(help="Promote it although it does not beat the best baseline.", negative="")]
Data = Annotated[
    Path | None,
    Parameter(
        help="Labelled texts on which it is compared with the champion, in columns `text` and `label`. Default: the "
        "test split that it was evaluated on, if that is in GRISTMILL_HOME."
    ),
]
Rollback = Annotated[bool, Parameter(help="Put the champion before this one back.", negative="")]


def register(app: App) -> None:
    """Give these commands to the app, in the order of the help page."""
    for place, command in enumerate((lineage, promote)):
        app.command(command, group=MODELS, sort_key=place)


def lineage(
    model: Annotated[
        str, Parameter(help="NAME, NAME@ALIAS, models:/NAME/3, a run's name, or the id of an MLflow run.")
    ],
    *,
    json_: Json = False,
) -> None:
    """Walk from a registered model back to the raw data: each stage's run, key, digests, settings and commit.

    * `gristmill lineage quickstart`: the champion, else the candidate, else the newest version
    * `gristmill lineage quickstart@previous`, `gristmill lineage models:/quickstart/3`
    * `gristmill lineage quickstart --json`: with the settings of every stage, for programs

    It asks the tracking server and nothing else, so it works where the artifacts are not. Of a raw file the BLAKE3 is
    told, as `b3sum FILE` gives it; of several, a digest of theirs, and in the JSON each one's.
    """
    from jobs.lineage import lineage as follow
    from jobs.run import tracking_uri
    from jobs.show_lineage import print_lineage

    found = follow(model, tracking_uri())
    emit(found.to_json()) if json_ else print_lineage(found)


def promote(
    name: Annotated[str, Parameter(help="A registered model.")],
    *,
    version: Version = None,
    min_macro_f1: Score = None,
    data: Data = None,
    force: Force = False,
    rollback: Rollback = False,
    json_: Json = False,
) -> None:
    """Make the candidate the champion, if it passes the gates; the old champion becomes `previous`.

    * `gristmill promote quickstart`
    * `gristmill promote quickstart --version 3 --min-macro-f1 0.8`
    * `gristmill promote quickstart --rollback`: the previous champion is champion again; the one it replaces is
      proposed by no run any more, and promoted by `--version` alone

    The gates: macro-F1 on its test split is at least --min-macro-f1; it is above that of the best baseline that was
    measured beside it (`evaluate.baselines`); and it is not worse than the champion's on the same texts, by a paired
    bootstrap: the 95 % interval of the difference reaches zero or lies above it. Any gate that fails changes nothing
    and is told, and the exit code is 4. Promoting twice is promoting once. What was found is kept in tags of the
    version.
    `register.promote: true` in a config does this at the end of every run.
    """
    from jobs.home import home
    from jobs.promote import Wanted, promote_version, roll_back
    from jobs.run import tracking_uri
    from pipeline.errors import GateFailed, UsageError

    if rollback and (version or data or force or min_macro_f1 is not None):
        raise UsageError("--rollback takes no other option: it puts the previous champion back, without gates")
    if rollback:
        done = roll_back(name, home(), tracking_uri())
    else:
        wanted = Wanted(name=name, version=version, min_macro_f1=min_macro_f1, data=data, force=force)
        done = promote_version(wanted, home(), tracking_uri())
    _show(done, json_)
    if not done.ok:
        raise GateFailed(f"{done.model} version {done.version} was not promoted; nothing has been changed")


def _show(done: "Promotion", json_: bool) -> None:
    if json_:
        emit(done.to_json())
        return
    for gate in done.gates:
        sys.stdout.write(f"{'passed' if gate.passed else 'FAILED'}  {gate.verdict}\n")
    if done.ok:
        sys.stdout.write(f"{done.summary}\n")
