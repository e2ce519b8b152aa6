"""The commands that put a model to use: predict, serve, export, generate."""

import sys
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter, validators

from jobs.cli_shared import MODELS, Json, emit
from pipeline.classes import SEPARATOR
from pipeline.errors import UsageError

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]

Model = Annotated[
    str, Parameter(help="A registered name, NAME@ALIAS, a models:/ URI, an export folder or a classifier artifact.")
]
Texts = Annotated[
    list[str] | None,
    Parameter(
        help="Texts to label; `-` labels each line of standard input, blank ones too.",
        negative="",
        allow_leading_hyphen=True,
    ),
]
Input = Annotated[
    str | None, Parameter(help="A file to label: jsonl, csv, tsv or parquet; also .gz or .zst.", name="--input")
]
Output = Annotated[
    Path | None, Parameter(help="Where the labelled rows go. Default: data.jsonl becomes data.predictions.jsonl.")
]
Text = Annotated[str, Parameter(help="The column that holds the text.")]
Probabilities = Annotated[bool, Parameter(help="Also a column p_LABEL for every label.", negative="")]
Prefix = Annotated[str, Parameter(help="Put before the names of the new columns, such as predicted_.")]
Separator = Annotated[
    str, Parameter(help="What stands between the labels of a row in csv and tsv, where a text may have several.")
]
Workers = Annotated[
    int, Parameter(help="Processes of this machine that label the file.", validator=validators.Number(gte=1, lte=256))
]
Precision = Annotated[
    Literal["fp32", "bf16", "auto"],
    Parameter(help="fp32 gives the probabilities of the evaluation; bf16 is faster where the hardware has it (auto)."),
]
Force = Annotated[bool, Parameter(help="Replace an output that is there.", negative="")]


def register(app: App) -> None:
    """Give these commands to the app, in the order of the help page."""
    commands: dict[str, Callable[..., Any]] = {
        "predict": predict,
        "serve": serve,
        "export": export,
        "generate": generate,
    }
    for place, (name, command) in enumerate(commands.items()):
        app.command(command, name=name, group=MODELS, sort_key=place - len(commands))  # before those of the registry


def predict(
    model: Model,
    texts: Texts = None,
    *,
    input_: Input = None,
    output: Output = None,
    text: Text = "text",
    probabilities: Probabilities = False,
    prefix: Prefix = "",
    separator: Separator = SEPARATOR,
    precision: Precision = "fp32",
    workers: Workers = 1,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Label texts, or every row of a file, with a registered or exported classifier.

    * `gristmill predict quickstart "a small furry animal" "a hard metal"`
    * `cut -f2 notes.tsv | gristmill predict quickstart -`
    * `gristmill predict quickstart --input reviews.csv --text body`: writes reviews.predictions.csv
    * `gristmill predict quickstart@champion --input big.jsonl.zst --output labelled.jsonl.gz --workers 4 --json`

    A file is streamed: rows stay in their order and keep all they have, and get a label and its confidence. The output
    appears when it is whole. A row whose text is null is labelled as an empty text. Where a text may have several
    labels, or none, each of probability 1/2 or more is given: a list, or a string in csv and tsv. Probabilities are
    calibrated, but for those of a classifier artifact, which is the network as it was trained.
    """
    of_files: dict[str, Any] = {
        "output": output,
        "text": text,
        "probabilities": probabilities,
        "prefix": prefix,
        "separator": separator,
        "precision": precision,
        "workers": workers,
        "force": force,
    }
    if input_ is None:
        _predict_texts(model, texts, of_files, json_)
        return
    if texts:
        raise UsageError(f"texts and --input {input_} at once: give one of them")
    from jobs.predict_files import Order, predict_file

    result = predict_file(Order(model=model, input=input_, **of_files))
    emit(result) if json_ else _print_summary(result)


def _predict_texts(model: str, texts: list[str] | None, of_files: Mapping[str, Any], json_: bool) -> None:
    """Raises UsageError where an option that is for files alone has another value than its default."""
    defaults = signature(predict).parameters
    if idle := [f"--{name}" for name, value in of_files.items() if value != defaults[name].default]:
        raise UsageError(f"{', '.join(idle)}: only with --input FILE")
    if not texts:
        raise UsageError(f'nothing to label: gristmill predict {model} "a text", or --input FILE')
    from jobs.use import predict as predict_texts
    from jobs.use import print_predictions

    rows = predict_texts(model, texts)
    emit(rows) if json_ else print_predictions(rows)


def _print_summary(result: dict[str, Any]) -> None:
    for label, count in sorted(result["labels"].items(), key=lambda item: -item[1]):
        sys.stdout.write(f"{count:>10,}  {label}\n")
    speed = f"{result['seconds']:.1f} s ({result['rows_per_second']:,.0f} rows/s)"
    sys.stdout.write(f"{result['rows']:>10,}  rows in {speed}, in {result['output']}\n")


def serve(
    model: Model,
    *,
    host: Annotated[str, Parameter(help="Address to listen on. The default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="0 takes a free one.", validator=validators.Number(gte=0, lte=65535))] = 5001,
    max_batch: Annotated[Count, Parameter(help="Texts after which a forward pass waits for no more.")] = 64,
    max_wait_ms: Annotated[
        float, Parameter(help="How long a pass waits for more texts.", validator=validators.Number(gte=0, lte=1000))
    ] = 1.0,
    max_body_mib: Annotated[Count, Parameter(help="A larger request is refused (413).")] = 16,
    precision: Precision = "fp32",
) -> None:
    """Answer requests over HTTP as `mlflow models serve` does, in this process, until Ctrl-C or SIGTERM.

    * `gristmill serve quickstart`
    * `curl 127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d '{"inputs": ["a small furry animal"]}'`

    POST /invocations takes {"inputs": [...]}, {"instances": [...]}, {"dataframe_records": [...]}, {"dataframe_split":
    {...}} or CSV, and answers {"predictions": [{"label": ..., "probabilities": {...}}]}, with "labels", a list, where a
    text may have several. GET /ping, /health, /version.
    Requests of the same moment share a forward pass. There is no password: open it to no network you do not trust.
    """
    from jobs.serve import ServeOptions
    from jobs.serve import serve as serve_model

    options = ServeOptions(
        host=host,
        port=port,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_body_mib=max_body_mib,
        precision=precision,
    )
    serve_model(model, options, _say)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def export(
    model: Model,
    *,
    format_: Annotated[str, Parameter(name="--format", help="hf, onnx or gguf.")],
    output: Annotated[Path, Parameter(help="A folder that is not there yet.")],
    force: Force = False,
    json_: Json = False,
) -> None:
    """Write a classifier for another program, which must compute our logits from it before the folder appears.

    * `gristmill export quickstart --format hf --output out/`: transformers, LlamaForSequenceClassification
    * `gristmill export quickstart --format onnx --output out/`: onnxruntime; any pooling, bodies that read both ways
    * `gristmill export quickstart --format gguf --output out/`: llama.cpp, tokenizer inside

    The probabilities are calibrated in all of them, the head being divided by the temperature of the evaluation, unless
    MODEL is a classifier artifact, which knows of none. onnx and gguf need the extra of their name:
    pip install 'gristmill[onnx]'.
    """
    from jobs.export_model import export_model

    result = export_model(model, format_, output, force=force)
    if json_:
        emit(result)
        return
    checked = f"{result['program']} gives our logits within {result['difference']:.0e} on {result['texts']} texts"
    sys.stdout.write(f"{result['output']}: {', '.join(result['files'])}\n{checked}\n")


def generate(
    model: Annotated[str, Parameter(help="The name of a pipeline, a pretrain artifact or a Llama folder.")],
    prompts: Annotated[
        list[str] | None,
        Parameter(
            help="Texts to continue. Default: one that begins with nothing.", negative="", allow_leading_hyphen=True
        ),
    ] = None,
    *,
    max_new_tokens: Annotated[Count, Parameter(help="Tokens after which a text ends, if it has not by itself.")] = 64,
    temperature: Annotated[
        float,
        Parameter(help="0 takes the likeliest token; 1 draws as the model says.", validator=validators.Number(gte=0)),
    ] = 0.8,
    top_k: Annotated[Count | None, Parameter(help="Draw among so many tokens, the likeliest.")] = 50,
    top_p: Annotated[
        float | None,
        Parameter(
            help="Draw among the likeliest tokens that together have this probability.",
            validator=validators.Number(gt=0, lte=1),
        ),
    ] = None,
    seed: Annotated[
        int, Parameter(help="Another one draws another text.", validator=validators.Number(gte=0, lte=2**62))
    ] = 0,
    beams: Annotated[Count, Parameter(help="Above 1: search with so many lines for the likeliest text.")] = 1,
    precision: Annotated[
        Literal["fp32", "bf16", "int8"],
        Parameter(
            help="Of the weights: int8 is the fastest for few prompts at a time. bf16 and int8 round, and not the same "
            "for few prompts as for many, so that an answer may depend on how many there are."
        ),
    ] = "fp32",
    json_: Json = False,
) -> None:
    """Continue prompts with a pretrained model."""
    from jobs.use import continue_prompts

    rows = continue_prompts(model, prompts or [""], max_new_tokens, temperature, top_k, top_p, seed, beams, precision)
    if json_:
        emit(rows)
    for row in () if json_ else rows:
        sys.stdout.write(f"{row['prompt']}{row['text']}\n")
