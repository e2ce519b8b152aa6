"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from pipeline.errors import GristmillError

app = App(
    name="gristmill",
    help="Raw text in, a registered, fine-tuned classifier out, from one config file.",
    help_epilogue="""Start here:

* `gristmill run configs/quickstart.yaml`: build what is missing, reuse the rest
* `gristmill plan configs/quickstart.yaml`: what a run would do, and why
* `gristmill predict quickstart "a small furry animal"`
* `gristmill ui`: follow the experiments in MLflow

GRISTMILL_HOME (default ./runs) holds artifacts, journals and mlflow.db. Exit codes: 0 ok, 2 usage or config,
3 environment, 5 a stage failed, 130 interrupted.""",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
config_app = App(name="config", help="Look into a config: what it resolves to, and what each key means.")
app.command(config_app)

Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", help="Replace one value: --set pretrain.lr=1e-3. Repeatable.", negative=""),
]
Json = Annotated[
    bool, Parameter(name="--json", help="End with one JSON line on stdout; progress goes to stderr.", negative="")
]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], help="No progress.", negative="")]
NoColor = Annotated[bool, Parameter(name="--no-color", help="No colours.", negative="")]


@app.command
def run(
    config: Path,
    *,
    set_: Overrides = None,
    inline: Annotated[
        bool, Parameter(help="Run in this process instead of on Ray, for debugging.", negative="")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Build everything a config asks for: tokenizer, shards, pretraining, fine-tuning, evaluation, export.

    Finished stages are reused; a run that was killed goes on from its last checkpoint when given again.
    """
    start = time.monotonic()
    from jobs import run as runs
    from jobs.console import RunView, print_result
    from pipeline.store import Store

    view = RunView(Store(runs.home()), quiet=quiet, no_color=no_color)
    try:
        result = runs.run(config, set_ or [], inline=inline, view=view)
    except (GristmillError, KeyboardInterrupt) as error:
        if json_:
            _emit(runs.failed(error, time.monotonic() - start))
        raise runs.cause(error) from None
    if json_:
        _emit(result)
    else:
        print_result(result)


@app.command
def plan(config: Path, *, set_: Overrides = None, json_: Json = False) -> None:
    """Say what a run would build or reuse, and why, without spending anything."""
    from jobs.plan import plan_rows, print_plan

    rows = plan_rows(config, set_ or [])
    _emit(rows) if json_ else print_plan(rows)


@app.command
def why(config: Path, stage: str, *, set_: Overrides = None, json_: Json = False) -> None:
    """Say why a stage would be built or reused: the fields that differ from the newest artifact of its kind."""
    from jobs.plan import find_row, plan_rows, print_plan

    row = find_row(plan_rows(config, set_ or []), stage)
    _emit(row) if json_ else print_plan([row])


@app.command
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
    _emit(rows) if json_ else print_predictions(rows)


@app.command
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
        _emit(rows)
    for row in () if json_ else rows:
        sys.stdout.write(f"{row['prompt']}{row['text']}\n")


@app.command
def ui(*, host: str = "127.0.0.1", port: int = 5000, uri: str | None = None) -> None:
    """Serve the MLflow UI over the experiments of GRISTMILL_HOME, on this machine only."""
    from jobs.run import home, tracking_uri
    from jobs.ui import serve_ui

    serve_ui(home(), uri or tracking_uri(), host, port)


@app.command
def sync(run: str | None = None, *, json_: Json = False) -> None:
    """Bring MLflow in line with the records on disk, after an outage. Without a name: every run."""
    from jobs.run import home
    from jobs.use import sync_runs

    rows = sync_runs(home(), run)
    if json_:
        _emit(rows)
    for row in () if json_ else rows:
        sys.stdout.write(f"{row['run']}: in line with {row['tracking_uri']}\n")


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


def _emit(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


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
