"""Tokens a second of generation, greedy and by beams, beside transformers and llama.cpp.

`python -m benchmarks.generate [--shape 10M]`. Prompts of 16 tokens, 128 new tokens for each, never ended early. All run
random weights of one shape: transformers its own LlamaForCausalLM; llama.cpp our weights, by the server object of
xllamacpp, which takes each prompt as a request and decodes those of a batch together.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.harness import KEPT_MEMORY, Contender, Race, Turn, command_line
from model.beam_search import beam_search
from model.decode import freeze
from model.generate import generate
from model.heads import Classifier, LanguageModel
from model.init import initialize
from pipeline.bpe import TokenizerConfig, by_reference
from pipeline.export import Subject, gguf
from pipeline.training import prepare_process
from pipeline.weights import LoadedClassifier

PROMPT, NEW = 16, 128
GOALS = {
    "batch 1": {"transformers": 2.0},
    "batch 16": {"transformers": 2.0, "llama.cpp f32": 1.0},
    "4 beams": {"transformers": 1.5},
}


def prompts(shape: str, rows: int) -> list[list[int]]:
    return shapes.tokens(shape)[:rows, :PROMPT].tolist()


def language_model(shape: str) -> LanguageModel:
    model = LanguageModel(shapes.ours(shape))
    initialize(model, 0)
    return model


def ours(turn: Turn, shape: str, rows: int, beams: int, dtype: str) -> None:
    prepare_process(torch.get_num_threads())
    frozen = freeze(language_model(shape), getattr(torch, dtype))
    write = partial(beam_search, frozen, beams=beams) if beams > 1 else partial(generate, frozen)
    while True:
        write(prompts(shape, rows), max_new_tokens=NEW)
        turn(rows * NEW)


def transformers(turn: Turn, shape: str, rows: int, beams: int) -> None:
    from transformers import LlamaForCausalLM

    config = shapes.llama(shape)
    config.use_cache = True
    model: Any = LlamaForCausalLM(config).eval()
    ids = torch.tensor(prompts(shape, rows))
    while True:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            do_sample=False,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            pad_token_id=2,
        )
        turn(rows * NEW)


def llama_cpp(turn: Turn, shape: str, rows: int) -> None:
    """The same weights: a classifier whose labels are tokens is a language model to llama.cpp."""
    model = language_model(shape)
    cfg = model.cfg
    n_labels = cfg.vocab_size - 1
    classifier = Classifier(model.body, n_labels, "last")
    with torch.no_grad():
        classifier.head.score.weight.copy_(model.head.weight[:n_labels])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = by_reference(
            ["words that merge"], TokenizerConfig(vocab_size=270, min_frequency=1, lowercase=False)
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        labels = [str(label) for label in range(n_labels)]
        gguf.write(folder, Subject(LoadedClassifier(classifier, tokenizer, labels), folder / "tokenizer.json", 1.0))
        server = _server(folder / gguf.FILE, rows)
        asked = [
            {"prompt": prompt, "n_predict": NEW, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
            for prompt in prompts(shape, rows)
        ]
        with ThreadPoolExecutor(rows) as threads:
            while True:
                for answer in threads.map(server.handle_completions, asked):
                    assert "choices" in answer or "content" in answer, answer
                turn(rows * NEW)


def _server(file: Path, rows: int) -> Any:
    import importlib

    xllamacpp: Any = importlib.import_module("xllamacpp")  # compiled, without types
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = rows * (PROMPT + NEW + 8)
    params.n_parallel = rows
    params.n_gpu_layers = 0
    params.verbosity = -1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = torch.get_num_threads()
    return xllamacpp.Server(params)


def contenders(shape: str, rows: int, beams: int) -> list[Contender]:
    def one(name: str, function: str, env: dict[str, str] | None = None, **settings: Any) -> Contender:
        return Contender(name, f"benchmarks.generate:{function}", {"shape": shape, "rows": rows, **settings}, env or {})

    found = [
        one("gristmill f32", "ours", beams=beams, dtype="float32"),
        one("gristmill bf16", "ours", beams=beams, dtype="bfloat16"),
        one("gristmill int8", "ours", beams=beams, dtype="int8"),
        one("transformers", "transformers", beams=beams),
        one("transformers, memory kept", "transformers", KEPT_MEMORY, beams=beams),
    ]
    return found if beams > 1 else [*found, one("llama.cpp f32", "llama_cpp")]


def races(shape: str) -> Iterator[Race]:
    for title, rows, beams in (("batch 1", 1, 1), ("batch 16", 16, 1), ("4 beams", 1, 4)):
        yield Race(f"{shape}, {title}", contenders(shape, rows, beams), "tokens", GOALS[title])


if __name__ == "__main__":
    command_line(__doc__, races)
