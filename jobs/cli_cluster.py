"""The commands about runs and jobs: submit, list, status, logs, cancel, resume, and the Ray head of this machine."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from jobs.cli_shared import RUNS, Config, Inline, Json, NoColor, Overrides, Quiet, build, emit
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from jobs.manage import Found
    from jobs.ray_jobs import Jobs
    from jobs.submit_ray import Submitted

INTERRUPTED = 130

head_app = App(
    name="head",
    help="The Ray head that `--to local` starts on this machine: look at it, end it.",
    group=RUNS,
    sort_key=10,
)

To = Annotated[str, Parameter(help="`local`, or the address of a Ray dashboard: http://head:8265.")]
Where = Annotated[str | None, Parameter(name="--to", help="The cluster, for a job that was submitted from elsewhere.")]
Watch = Annotated[bool, Parameter(help="Show the job's log to its end, and exit with its code.", negative="")]
Follow = Annotated[bool, Parameter(name=["--follow", "-f"], help="To the job's end; exit with its code.", negative="")]
Run = Annotated[str, Parameter(help="A run of this GRISTMILL_HOME, or the id of a job.")]
AnyRun = Annotated[str | None, Parameter(help="A run of this GRISTMILL_HOME, or the id of a job. Default: the newest.")]
Key = Annotated[
    str | None,
    Parameter(
        help="The id of the job. While a job of this id is alive, submitting it again changes nothing. Default: a "
        "digest of the config, the code and the inputs."
    ),
]
Env = Annotated[
    list[str] | None,
    Parameter(
        name="--env",
        negative="",
        help="A variable that the cluster's own environment must have, or NAME=file:PATH to read it there. Values are "
        "never sent. Repeatable.",
    ),
]
ThereHome = Annotated[
    str | None, Parameter(name="--home", help="GRISTMILL_HOME on the cluster: a folder that every machine of it sees.")
]


def register(app: App) -> None:
    """Give these commands to the app, in the order of the help page."""
    commands = {"submit": submit, "status": status, "list": list_, "logs": logs, "cancel": cancel, "resume": resume}
    for place, (name, command) in enumerate(commands.items()):
        app.command(command, name=name, group=RUNS, sort_key=place)
    app.command(head_app)


def submit(
    config: Config,
    *,
    to: To,
    set_: Overrides = None,
    watch: Watch = False,
    key: Key = None,
    env: Env = None,
    home: ThereHome = None,
    inline: Inline = False,
    json_: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> int:
    """Run a config as a job of a Ray cluster.

    * `gristmill submit configs/quickstart.yaml --to local --watch`
    * `gristmill submit my.yaml --to http://head:8265 --home /shared/gristmill --env MLFLOW_TRACKING_PASSWORD`

    The code, the resolved config and the files it names by relative paths are sent along. The same command again,
    while the job is alive, gives the same job. Ctrl-C under --watch leaves the job running.
    """
    from jobs.submit_ray import Order
    from jobs.submit_ray import submit as submit_config

    say = _say(quiet, no_color)
    order = Order(to=to, key=key, home=home, env=tuple(env or ()), inline=inline)
    return _show_submitted(submit_config(config, set_ or [], order, _home(), say), watch, json_, say)


def list_(*, to: Where = None, json_: Json = False) -> None:
    """List runs and jobs, the newest first. With --to: every job of that cluster."""
    from jobs.manage import rows
    from jobs.show import runs_table

    found = rows(_home(), to, _say())
    emit(found) if json_ else runs_table(found)


def status(run: AnyRun = None, *, to: Where = None, json_: Json = False) -> None:
    """Say how far a run or job is: its stage, step, and the time that is left."""
    from jobs import manage
    from jobs.show import status_lines

    found = manage.find(_home(), run, to)
    seen = manage.status(_home(), found, _say())
    emit(asdict(seen)) if json_ else status_lines(seen, found.to)


def logs(run: AnyRun = None, *, follow: Follow = False, to: Where = None) -> int:
    """Show what a job has printed. With -f: go on to its end, through lost connections, and exit with its code."""
    from jobs import manage
    from jobs.ray_jobs import Jobs, target
    from jobs.status import hide

    found = manage.find(_home(), run, to)
    if found.job_id is None:
        raise UsageError(
            f"{found.name} ran in a terminal of this machine, where its output was shown; only jobs have logs"
        )
    jobs = Jobs(target(found.to or "", _home(), _say()))
    if follow:
        return _watch(jobs, found.job_id, _say())
    if jobs.find(found.job_id) is None:
        raise UsageError(f"{jobs.target.address} has no job {found.job_id}")
    sys.stdout.write(hide(jobs.log(found.job_id)))
    return 0


def cancel(
    run: Run,
    *,
    to: Where = None,
    wait: Annotated[float, Parameter(help="Seconds to wait until it has stopped.")] = 140.0,
    json_: Json = False,
) -> None:
    """Have a run or job write a checkpoint and stop, and wait until it has. `gristmill resume` goes on from there."""
    from jobs import manage
    from jobs.show import status_lines

    found = manage.find(_home(), run, to)
    seen = manage.cancel(_home(), found, wait, _say())
    emit(asdict(seen)) if json_ else status_lines(seen, found.to)


def resume(
    run: AnyRun = None,
    *,
    to: Where = None,
    watch: Watch = False,
    inline: Inline = False,
    json_: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> int:
    """Go on with a run that failed or was cancelled, from its last checkpoint, with the config it began with.

    A job is submitted again to where it went; a run of this machine runs here again.
    """
    from jobs import manage
    from jobs.record import folder

    say = _say(quiet, no_color)
    found = manage.find(_home(), run, to)
    manage.check_resumable(found, manage.status(_home(), found, say))
    from_step = {"resumed_from_step": _from_step(found)}
    if found.job_id is None and to is None:
        config = folder(_home(), found.name) / "resolved.yaml"
        build(config, [], inline=inline, json_=json_, quiet=quiet, no_color=no_color, more=from_step)
        return 0
    return _show_submitted(_again(found, to, inline, say), watch, json_, say, from_step)


def _again(found: "Found", to: str | None, inline: bool, say: Callable[[str], None]) -> "Submitted":
    from jobs.record import folder
    from jobs.submit_ray import Order, again
    from jobs.submit_ray import submit as submit_config

    if found.submission is not None:
        return again(found.submission, _home(), say, to)
    if found.run is None:
        raise UsageError(f"{found.name} was submitted from another home, and its config is there: resume it from there")
    config = folder(_home(), found.run) / "resolved.yaml"
    return submit_config(config, [], Order(to=to or "", inline=inline), _home(), say)


def _from_step(found: "Found") -> int | None:
    from jobs.manage import resumed_from

    there = Path(found.submission.home) if found.submission and found.submission.home else _home()
    return resumed_from(there, found.run) if found.run else None


@head_app.command(name="status")
def head_status(*, json_: Json = False) -> None:
    """Say whether the head of this home is alive, and where it listens."""
    from jobs import head

    there = head.find(_home())
    if json_:
        emit({"alive": there is not None, **(asdict(there) if there else {})})
    elif there:
        sys.stdout.write(f"alive at {there.address} (process {there.pid}, logs in {there.temp})\n")
    else:
        sys.stdout.write("none is alive; `gristmill submit CONFIG --to local` starts one\n")


@head_app.command(name="stop")
def head_stop(*, json_: Json = False) -> None:
    """End the head of this home with everything it started. Its jobs end too, and can be resumed."""
    from jobs import head

    ended = head.stop(_home())
    if json_:
        emit({"stopped": ended is not None})
    else:
        sys.stdout.write(f"ended the head at {ended.address}\n" if ended else "none is alive\n")


def _show_submitted(
    done: "Submitted", watch: bool, json_: bool, say: Callable[[str], None], more: dict[str, Any] | None = None
) -> int:
    job, code, result = done.submission.job_id, 0, {"to": done.submission.to, "new": done.new, **(more or {})}
    if watch:
        code = _watch(done.jobs, job, say)
    else:
        say(f"{job} is on its way to {done.submission.to}. Next:")
        for command in (f"gristmill logs {job} -f", f"gristmill status {job}", f"gristmill cancel {job}"):
            say(f"  {command}")
    if json_:
        seen = done.jobs.find(job) if code != INTERRUPTED else None
        emit(
            {"job_id": job, "state": seen.state if seen else "unknown", **result}
            | ({"exit_code": code} if watch else {})
        )
    elif not watch:
        sys.stdout.write(f"{job}\n")
    return code


def _watch(jobs: "Jobs", job: str, say: Callable[[str], None]) -> int:
    """Follow a job to its end; its exit code. Ctrl-C lets go of it."""
    from jobs.follow import follow
    from jobs.ray_jobs import FAILED

    try:
        ended = follow(jobs, job, _write, say)
    except KeyboardInterrupt:
        say(f"The job goes on. Again: gristmill logs {job} -f    End it: gristmill cancel {job}")
        return INTERRUPTED
    if ended is None:
        say(f"{jobs.target.address} no longer knows {job}: its head was started anew. `gristmill resume {job}` goes on")
        return FAILED
    if ended.state != "succeeded":
        say(f"{job}: {ended.state}. {ended.message}. Go on: gristmill resume {job}")
    return FAILED if ended.exit_code is None else ended.exit_code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(quiet: bool = False, no_color: bool = False) -> Callable[[str], None]:
    """How commands talk to a person: lines on stderr."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet, no_color=no_color, highlight=False)
    return lambda text: console.print(text, soft_wrap=True, markup=False)


def _home() -> Path:
    from jobs.home import home

    return home()
