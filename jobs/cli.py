"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

import json
import logging
import os
import select
import signal
import sys
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, validators

from jobs import cli_cluster, cli_quality, cli_registry, cli_use
from jobs.cli_shared import CONFIG, RUN, RUNS, Config, Inline, Json, NoColor, Overrides, Quiet, build, emit
from pipeline.errors import EnvironmentProblem, GristmillError, lacking


def installed_version() -> str:
    """Return the version that is installed here."""
    from importlib.metadata import version

    return version("gristmill")


app = App(
    name="gristmill",
    help="Raw text in, a registered, fine-tuned classifier out, from one config file.",
    help_epilogue="""Start here:

* `gristmill run configs/quickstart.yaml`: build what is missing, reuse the rest
* `gristmill plan configs/quickstart.yaml`: what a run would do, and why
* `gristmill predict quickstart "a small furry animal"`, or `--input FILE`; `gristmill serve quickstart`
* `gristmill ui`: follow the experiments in MLflow

On a cluster:

* `gristmill submit configs/quickstart.yaml --to local --watch`: as a job, on a Ray of this machine
* `gristmill submit configs/quickstart.yaml --to http://head:8265`: on any Ray cluster
* `gristmill status`, `gristmill logs RUN -f`, `gristmill cancel RUN`, `gristmill resume RUN`

GRISTMILL_HOME (default ./runs) holds artifacts, journals and mlflow.db; MLFLOW_TRACKING_URI names another MLflow.
Exit codes: 0 ok, 2 usage or config, 3 environment, auth or connection, 4 a quality gate failed, 5 failed,
6 cancelled, 8 preempted and resumable, 130 interrupted.""",
    version=installed_version,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
config_app = App(name="config", help="Look into a config: what it resolves to, and what each key means.", group=CONFIG)
app.command(config_app)


@app.command(group=RUN)
def run(
    config: Config,
    *,
    set_: Overrides = None,
    inline: Inline = False,
    json_: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Build everything a config asks for: tokenizer, shards, pretraining, fine-tuning, evaluation, export.

    Finished stages are reused; a run that was killed goes on from its last checkpoint when given again.
    """
    build(config, set_ or [], inline=inline, json_=json_, quiet=quiet, no_color=no_color)


@app.command(group=RUN)
def plan(config: Config, *, set_: Overrides = None, json_: Json = False) -> None:
    """Say what a run would build or reuse, and why, without spending anything."""
    from jobs.plan import plan_rows, print_plan

    rows = plan_rows(config, set_ or [])
    emit(rows) if json_ else print_plan(rows)


@app.command(group=RUN)
def why(
    config: Config,
    stage: Annotated[str, Parameter(help="As `plan` names it.")],
    *,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Say why a stage would be built or reused: the fields that differ from the newest artifact of its kind."""
    from jobs.plan import find_row, plan_rows, print_plan

    row = find_row(plan_rows(config, set_ or []), stage)
    emit(row) if json_ else print_plan([row])


@app.command(group=RUN)
def tune(
    config: Config,
    *,
    search: Annotated[
        list[str] | None,
        Parameter(
            help="key=low:high, key=log:low:high or key=a,b,c. Repeatable; default: rates and dropout.", negative=""
        ),
    ] = None,
    trials: Annotated[int, Parameter(help="How many settings to try.", validator=validators.Number(gte=1))] = 20,
    parallel: Annotated[
        int, Parameter(help="Trials at a time; they share the CPU cores.", validator=validators.Number(gte=1))
    ] = 1,
    metric: Annotated[Literal["macro_f1", "accuracy"], Parameter(help="Of the validation texts.")] = "macro_f1",
    task: Annotated[str | None, Parameter(help="Which of several tasks.")] = None,
    seed: Annotated[int, Parameter(help="Another one tries other settings.", validator=validators.Number(gte=0))] = 0,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Search for better settings of fine-tuning, with Ray Tune and Optuna, each trial a run in MLflow.

    A trial is scored as the classifier that a run makes: with its n-grams, where the config has them.

    gristmill tune configs/quickstart.yaml --trials 10 --search finetune.lr=log:1e-4:1e-2 --search finetune.epochs=2:5
    """
    from jobs.tune import print_search
    from jobs.tune import tune as search_for

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    result = search_for(
        config,
        set_ or [],
        words=search or [],
        trials=trials,
        parallel=parallel,
        metric=metric,
        task=task,
        seed=seed,
        say=say,
    )
    emit(result) if json_ else print_search(result, config, set_ or [])


@app.command(group=RUNS)
def ui(
    *,
    host: Annotated[str, Parameter(help="The loopback address to listen on; no other is taken.")] = "127.0.0.1",
    port: Annotated[
        int, Parameter(help="Where to point a browser.", validator=validators.Number(gte=1, lte=65535))
    ] = 5000,
    uri: Annotated[str | None, Parameter(help="Another store of experiments. Default: that of GRISTMILL_HOME.")] = None,
) -> None:
    """Serve the MLflow UI over the experiments of GRISTMILL_HOME, on this machine only."""
    from jobs.home import home
    from jobs.run import tracking_uri
    from jobs.ui import serve_ui

    serve_ui(home(), uri or tracking_uri(), host, port)


@app.command(group=RUNS)
def sync(
    run: Annotated[str | None, Parameter(help="A run of this GRISTMILL_HOME. Default: every run.")] = None,
    *,
    json_: Json = False,
) -> None:
    """Bring MLflow in line with the records on disk, after an outage. Without a name: every run, the oldest first."""
    from jobs.home import home
    from jobs.run import tracking_uri
    from jobs.track_mlflow import sync_all

    rows = sync_all(home(), tracking_uri(), run)
    failed = [f"{row['run']}: {row['error']}" for row in rows if "error" in row]
    if json_:
        emit(rows)
    for row in () if json_ else rows:
        if "error" not in row:
            sys.stdout.write(f"{row['run']}: in line with {row['tracking_uri']}\n")
    if failed:
        raise EnvironmentProblem("\n".join(failed))


cli_cluster.register(app)
cli_use.register(app)
cli_registry.register(app)
cli_quality.register(app)


@config_app.command
def show(
    config: Config,
    *,
    set_: Overrides = None,
    origin: Annotated[bool, Parameter(help="Say where each value comes from.", negative="")] = False,
    json_: Json = False,
) -> None:
    """Print a config with every default and `extends:` filled in."""
    from jobs.explain import show_config

    show_config(config, set_ or [], origin=origin, as_json=json_)


@config_app.command
def explain(
    key: Annotated[str, Parameter(help="A key or a section: finetune.lr, or pretrain. Default: all.")] = "",
) -> None:
    """Say what a key means: type, default, range. Without a key: every key."""
    from jobs.explain import explain_key

    sys.stdout.write(explain_key(key))


@config_app.command
def schema() -> None:
    """Print the JSON Schema that editors complete configs from."""
    from pipeline.config import schema as config_schema
    from pipeline.pipeline_config import PipelineConfig

    sys.stdout.write(json.dumps(config_schema(PipelineConfig), indent=2) + "\n")


for command in app.subapps:
    command.help_epilogue = ""  # where to start is told once, by `gristmill --help`


def main() -> int:
    """Run a command; return its exit code. A user's mistake is one message, never a traceback."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("gristmill").setLevel(logging.INFO)
    try:
        app(exit_on_error=False, print_error=True)
        sys.stdout.flush()
    except CycloptsError:
        return 2
    except GristmillError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 128 + signal.SIGPIPE
    except OSError as error:
        problem = lacking(error)
        if problem is None:
            raise
        sys.stderr.write(f"{problem}\n")
        return problem.exit_code
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"{str(interrupt) or 'Interrupted. The same command goes on where it stopped.'}\n")
        return 130
    return 0


def _reader_has_gone() -> bool:
    """Whether nobody reads stdout on, as after `| head -1`. Another pipe that breaks is an error like any other."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
