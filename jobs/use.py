"""Models at work: label texts, and continue prompts."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.home import home
from jobs.run import tracking_uri
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from pipeline.weights import LoadedClassifier

SHOWN_LABELS = 3
NO_LABEL = "\N{EN DASH}"

BASES = ("pretrain", "importmodel")
"""Kinds of stages that make a language model."""


def predict(model: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """`[{"text", "label", "probabilities": {label: p}}]`, a row a text, with a registered or exported classifier.

    The one text `-` means the lines of standard input. Raises DataError for what is not UTF-8.
    One that may give a text several labels has `"labels"`, a list, in place of `"label"`.
    """
    lines = _lines() if list(texts) == ["-"] else _given(texts)
    if not lines:
        return []
    from jobs.scoring import scorer

    loaded = classifier(model)
    table = scorer(loaded, "fp32")(lines)
    answers = predictions(loaded.labels, table, multi_label=loaded.multi_label)
    return [{"text": text, **answer} for text, answer in zip(lines, answers, strict=True)]


def classifier(model: str) -> "LoadedClassifier":
    """A registered or exported classifier, as `jobs.scoring.scorer` takes it. Raises UsageError."""
    from jobs.models import locate
    from pipeline import export

    return export.read(locate(model, home(), tracking_uri())).loaded


def _lines() -> list[str]:
    """Those of standard input, blank ones too, so that answers stand in line with what was asked."""
    from pipeline.readers import BOM
    from pipeline.text import normalise

    lines = normalise(_decoded(sys.stdin.buffer.read().removeprefix(BOM), "standard input")).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _given(texts: Sequence[str]) -> list[str]:
    """Arguments of the command line, in which Python hides bytes that are no UTF-8. Raises UsageError for an option."""
    if option := next((text for text in texts if text.startswith("--")), None):
        raise UsageError(f"{option}: no such option. A text that begins with -- goes through a file or standard input")
    return [_decoded(text.encode(errors="surrogateescape"), f"text {n}") for n, text in enumerate(texts, 1)]


def _decoded(data: bytes, where: str) -> str:
    from pipeline.text import decode

    return decode(data, where, 1, repair=False, counts=Counter())


def predictions(labels: Sequence[str], table: "np.ndarray", *, multi_label: bool) -> list[dict[str, Any]]:
    """`{"label", "probabilities": {label: p}}` of each text, a row of the table; several labels under `"labels"`."""
    from pipeline.targets import answered, decode

    name = "labels" if multi_label else "label"
    answers = decode(answered(table, multi_label=multi_label), labels)
    rows = zip(answers, table.tolist(), strict=True)
    return [{name: answer, "probabilities": dict(zip(labels, row, strict=True))} for answer, row in rows]


def print_predictions(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a text: the label or the labels, how sure the model is, and the runners-up."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        answer = row["labels"] if "labels" in row else [row["label"]]
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        sure = ", ".join(f"{p:.2f}" for name, p in ranked if name in answer)
        others = [f"{name} {q:.2f}" for name, q in ranked if name not in answer][: SHOWN_LABELS - 1]
        chosen = ", ".join(name for name, _ in ranked if name in answer) or NO_LABEL
        table.add_row(Text(chosen, "bold"), sure, Text(", ".join(others), "dim"), Text(row["text"]))
    Console(file=sys.stdout, highlight=False).print(table)


def continue_prompts(
    model: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    beams: int,
    precision: str,
) -> list[dict[str, str]]:
    """`[{"prompt", "text"}]`: what a language model writes after each prompt, from weights of that precision."""
    import torch

    from model.beam_search import beam_search
    from model.decode import freeze
    from model.decoding import chain
    from model.generate import generate
    from pipeline.tokens import encode_documents, special_ids

    prompts = _given(prompts)
    loaded = _language_model(model)
    if not loaded.model.cfg.causal:
        raise UsageError(f"{model} reads both ways (pretrain.objective), so it cannot write from left to right")
    rules: dict[str, float] = {"greedy": 1} if temperature == 0 else {"temperature": temperature}
    rules |= {name: value for name, value in (("top_k", top_k), ("top_p", top_p)) if value is not None and temperature}
    ids = [document[:-1].tolist() for document in encode_documents(loaded.tokenizer, prompts)]
    ends = special_ids(loaded.tokenizer)
    ids = [tokens if prompt else [ends.bos] for prompt, tokens in zip(prompts, ids, strict=True)]
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_id": ends.eos}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    frozen = freeze(loaded.model, dtypes[precision])
    if beams > 1:
        answers = beam_search(frozen, ids, beams=beams, **how)
    else:
        answers = generate(frozen, ids, transforms=chain(rules), seed=seed, **how)
    return [
        {"prompt": prompt, "text": loaded.tokenizer.decode(answer)}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def can_write(name: str) -> bool:
    """Whether the pipeline of that name has a base that continues prompts."""
    from pipeline.weights import LanguageModelFiles

    try:
        return LanguageModelFiles(_base_of_pipeline(name)).config.causal
    except UsageError:
        return False


def _language_model(model: str) -> Any:
    """A pretrain artifact, a Llama folder, or a base model of the pipeline of that name. Raises UsageError."""
    from model.interchange import read_causal_lm
    from pipeline.tokens import import_tokenizer
    from pipeline.weights import CONFIG, LanguageModelFiles, LoadedLanguageModel

    folder = Path(model)
    if not folder.is_dir():
        folder = _base_of_pipeline(model)
    if (folder / CONFIG).exists():
        return LanguageModelFiles(folder).load()
    try:
        return LoadedLanguageModel(read_causal_lm(folder), import_tokenizer(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{model}: no language model that can be read: {error}") from error


def _base_of_pipeline(name: str) -> Path:
    """The last base that its newest run made and that can write; where none can, the last."""
    from jobs.record import list_records
    from pipeline.store import Store
    from pipeline.weights import LanguageModelFiles

    records = [record for record in list_records(home()) if record.name == name]
    stages = [stage for record in records for stage in reversed(record.stages) if stage.kind in BASES and stage.key]
    folders = [Store(home()).path(stage.kind, str(stage.key)) for stage in stages]
    if there := [folder for folder in folders if folder.is_dir()]:
        return next((folder for folder in there if LanguageModelFiles(folder).config.causal), there[0])
    known = ", ".join(sorted({record.name for record in list_records(home())}))
    others = f"the pipelines there are {known}" if known else "nothing has been run there yet: gristmill run CONFIG"
    raise UsageError(
        f"{name!r} is no folder, and no pipeline of that name has a pretrained model in {home().resolve()}; {others}"
    )
