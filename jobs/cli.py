"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from jobs import cli_cluster
from jobs.cli_shared import CONFIG, MODELS, RUN, RUNS, Inline, Json, NoColor, Overrides, Quiet, build, emit
from pipeline.errors import GristmillError

app = App(
    name="gristmill",
    help="Raw text in, a registered, fine-tuned classifier out, from one config file.",
    help_epilogue="""Start here:

* `gristmill run configs/quickstart.yaml`: build what is missing, reuse the rest
* `gristmill plan configs/quickstart.yaml`: what a run would do, and why
* `gristmill predict quickstart "a small furry animal"`
* `gristmill ui`: follow the experiments in MLflow

On a cluster:

* `gristmill submit configs/quickstart.yaml --to local --watch`: as a job, on a Ray of this machine
* `gristmill submit configs/quickstart.yaml --to http://head:8265`: on any Ray cluster
* `gristmill status`, `gristmill logs RUN -f`, `gristmill cancel RUN`, `gristmill resume RUN`

GRISTMILL_HOME (default ./runs) holds artifacts, journals and mlflow.db. Exit codes: 0 ok, 2 usage or config,
3 environment, auth or connection, 5 failed, 6 cancelled, 8 preempted and resumable, 130 interrupted.""",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
config_app = App(name="config", help="Look into a config: what it resolves to, and what each key means.", group=CONFIG)
app.command(config_app)


@app.command(group=RUN)
def run(
    config: Path,
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
def plan(config: Path, *, set_: Overrides = None, json_: Json = False) -> None:
    """Say what a run would build or reuse, and why, without spending anything."""
    from jobs.plan import plan_rows, print_plan

    rows = plan_rows(config, set_ or [])
    emit(rows) if json_ else print_plan(rows)


@app.command(group=RUN)
def why(config: Path, stage: str, *, set_: Overrides = None, json_: Json = False) -> None:
    """Say why a stage would be built or reused: the fields that differ from the newest artifact of its kind."""
    from jobs.plan import find_row, plan_rows, print_plan

    row = find_row(plan_rows(config, set_ or []), stage)
    emit(row) if json_ else print_plan([row])


@app.command(group=MODELS)
def predict(
    model: str,
    texts: Annotated[list[str], Parameter(help="Texts to label; `-` reads lines from standard input.")],
    *,
    json_: Json = False,
) -> None:
    """Label texts with a registered name, a models:/ URI or an export folder."""
    from jobs.use import predict as predict_texts
    from jobs.use import print_predictions

    rows = predict_texts(model, texts)
    emit(rows) if json_ else print_predictions(rows)


@app.command(group=MODELS)
def generate(
    model: str,
    prompts: Annotated[list[str] | None, Parameter(help="Texts to continue; none starts from nothing.")] = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Continue prompts with a pretrained model: the name of a pipeline, a pretrain artifact or a Llama folder.

    Temperature 0 is greedy.
    """
    from jobs.use import continue_prompts

    rows = continue_prompts(model, prompts or [""], max_new_tokens, temperature, top_k, top_p, seed)
    if json_:
        emit(rows)
    for row in () if json_ else rows:
        sys.stdout.write(f"{row['prompt']}{row['text']}\n")


@app.command(group=RUNS)
def ui(*, host: str = "127.0.0.1", port: int = 5000, uri: str | None = None) -> None:
    """Serve the MLflow UI over the experiments of GRISTMILL_HOME, on this machine only."""
    from jobs.home import home
    from jobs.run import tracking_uri
    from jobs.ui import serve_ui

    serve_ui(home(), uri or tracking_uri(), host, port)


@app.command(group=RUNS)
def sync(run: str | None = None, *, json_: Json = False) -> None:
    """Bring MLflow in line with the records on disk, after an outage. Without a name: every run."""
    from jobs.home import home
    from jobs.use import sync_runs

    rows = sync_runs(home(), run)
    if json_:
        emit(rows)
    for row in () if json_ else rows:
        sys.stdout.write(f"{row['run']}: in line with {row['tracking_uri']}\n")


cli_cluster.register(app)


@config_app.command
def show(
    config: Path,
    *,
    set_: Overrides = None,
    origin: Annotated[bool, Parameter(help="Say where each value comes from.", negative="")] = False,
    json_: Json = False,
) -> None:
    """Print a config with every default and `extends:` filled in."""
    from jobs.explain import show_config

    show_config(config, set_ or [], origin=origin, as_json=json_)


@config_app.command
def explain(key: str = "") -> None:
    """Say what a key means: type, default, range. Without a key: every key."""
    from jobs.explain import explain_key

    sys.stdout.write(explain_key(key))


@config_app.command
def schema() -> None:
    """Print the JSON Schema that editors complete configs from."""
    from pipeline.assemble import PipelineConfig
    from pipeline.config import schema as config_schema

    sys.stdout.write(json.dumps(config_schema(PipelineConfig), indent=2) + "\n")


def main() -> int:
    """Run a command; return its exit code. A user's mistake is one message, never a traceback."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("gristmill").setLevel(logging.INFO)
    try:
        app(exit_on_error=False, print_error=True)
    except CycloptsError:
        return 2
    except GristmillError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. The same command goes on where it stopped.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
