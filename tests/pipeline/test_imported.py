"""Starting from a language model of somebody else's: a folder as transformers saves it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pipeline.ancestry import chain
from pipeline.assemble import Graph, assemble
from pipeline.classify import probabilities
from pipeline.config import load
from pipeline.errors import DataError, UsageError
from pipeline.pipeline_config import PipelineConfig
from pipeline.publish import combined
from pipeline.runner import Built, build, submit_here
from pipeline.stages.imported import model_config
from pipeline.store import Store
from pipeline.tokens import import_tokenizer, special_ids
from pipeline.weights import ClassifierFiles
from tests.pipeline.toy_export import classifier_folder
from tests.pipeline.toy_llama import SIZES, llama_folder

ONLY_TUNED = """
extends: SMOKE
init_from: START
corpus: null
pretrain: null
model: {d_model: null, n_layers: null, n_heads: null, n_kv_heads: null, d_ff: null, seq_len: 32}
finetune: {epochs: 1, batch_size: 32}
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("start"))


def graph(tmp_path: Path, start: Path, text: str = ONLY_TUNED, *overrides: str) -> Graph:
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("SMOKE", str(Path("configs/smoke.yaml").absolute())).replace("START", str(start)))
    return assemble(load(PipelineConfig, path, overrides).config)


def opened(home: Path, stage: Any) -> Any:
    built = [event for event in build([stage], Store(home), submit_here) if isinstance(event, Built)][-1]
    return stage.load(Store(home).path(stage.kind, built.key))


def test_an_imported_model_computes_the_logits_of_transformers(tmp_path: Path, start: Path):
    tokenizer, base = graph(tmp_path, start).trunk
    loaded = opened(tmp_path, base).load()
    text = torch.randint(0, 390, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(start)
    torch.testing.assert_close(loaded.model(text), theirs(text).logits, atol=1e-5, rtol=1e-5)
    ids = special_ids(opened(tmp_path, tokenizer).load())
    assert (ids.bos, ids.eos) == (0, 1)
    assert ids.pad != ids.eos


def test_where_both_come_from_is_told_by_folder_and_digest(tmp_path: Path, start: Path):
    made = graph(tmp_path, start).trunk[-1]
    built = [event for event in build([made], Store(tmp_path), submit_here) if isinstance(event, Built)][-1]
    told = {link.kind: link.sources for link in chain(Store(tmp_path), [(made.kind, built.key)])}
    for kind, stage in (("importmodel", made), ("importtokenizer", made.tokenizer)):
        digest = combined({name: {"blake3": value} for name, value in stage.sources().items()})
        assert told[kind] == [{"name": start.name, "source": str(start), "digest": digest, "context": "init_from"}]


def test_it_is_fine_tuned_and_exported_as_what_it_was(tmp_path: Path, start: Path):
    made = graph(tmp_path, start).branches[""]
    tuned = opened(tmp_path, made.finetune).load()
    assert (tuned.model.cfg.seq_len, tuned.model.cfg.n_kv_heads) == (32, 2)
    export = opened(tmp_path, made.export)
    scores = opened(tmp_path, made.evaluate).scores
    theirs = AutoModelForSequenceClassification.from_pretrained(export.path)
    text = "the sea was calm"
    read = PreTrainedTokenizerFast.from_pretrained(export.path)(text, return_tensors="pt")
    expected = torch.from_numpy(probabilities(tuned, [text])).log() / scores["temperature"]
    torch.testing.assert_close(theirs(**read).logits.softmax(-1), expected.softmax(-1), atol=1e-5, rtol=1e-4)


def test_pretraining_goes_on_from_it(tmp_path: Path, start: Path):
    text = ONLY_TUNED.replace("corpus: null\npretrain: null", "pretrain: {steps: 12, objective: masked}")
    made = graph(tmp_path, start, text).trunk[-1]
    untouched = replace(made, base=None)
    before, after = opened(tmp_path, made.base).load().model, opened(tmp_path, made).load().model
    from_nothing = opened(tmp_path, untouched).load().model
    moved = (after.body.embed.weight[:390] - before.body.embed.weight[:390]).abs().mean()
    assert moved < (from_nothing.body.embed.weight[:390] - before.body.embed.weight[:390]).abs().mean() / 2
    assert after.cfg.vocab_size == 401


def test_the_body_of_a_classifier_will_do(tmp_path: Path, start: Path):
    folder = tmp_path / "classifier"
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((start / name).read_bytes())
    loaded = opened(tmp_path, graph(tmp_path, folder).trunk[-1]).load().model
    theirs = LlamaForSequenceClassification.from_pretrained(folder)
    text = torch.arange(10)[None]
    torch.testing.assert_close(loaded.body(text), theirs.model(text).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_that_transformers_has_no_class_for_will_do(tmp_path: Path, tied: bool):
    shape = {"causal": False, "seq_len": 48, "tie_embeddings": tied}
    folder = classifier_folder(tmp_path / "ours", pooling="mean", ngrams=2, **shape)
    theirs = ClassifierFiles(folder).load()
    tokenizer, base = graph(tmp_path, folder).trunk
    loaded = opened(tmp_path, base).load().model
    assert torch.equal(loaded.body.embed.weight, theirs.model.body.embed.weight)
    assert torch.equal(loaded.head.weight, theirs.model.body.embed.weight)
    assert not loaded.cfg.causal
    text = "the cat sat"
    assert opened(tmp_path, tokenizer).load().encode(text).ids == theirs.tokenizer.encode(text).ids


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": None}, {"hidden_size": "64"}, {"rope_parameters": "linear"}, {"architectures": 5}],
)
def test_a_config_that_is_none_is_refused_by_name(tmp_path: Path, start: Path, change: dict[str, Any]):
    config = json.loads((start / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError, match=r"(?s)init_from=.*Give a folder in the Llama layout"):
        model_config(str(tmp_path))


def test_what_a_config_leaves_empty_is_what_transformers_takes_it_for(tmp_path: Path, start: Path):
    config = json.loads((start / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": None, "rope_theta": None}))
    found = model_config(str(tmp_path))
    assert found.n_kv_heads == found.n_heads


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{", "tokenizer_config.json: cannot be read"),
        ("[]", "tokenizer_config.json: no JSON object"),
        ('{"eos_token": 5}', "its eos_token is 5. Write the token itself"),
        ('{"bos_token": {"a": 1}}', "its bos_token is {'a': 1}. Write"),
    ],
)
def test_a_tokenizer_whose_ends_are_unclear_is_refused(tmp_path: Path, start: Path, written: str, message: str):
    (tmp_path / "tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(written)
    with pytest.raises(DataError, match=re.escape(message)):
        import_tokenizer(tmp_path)


def test_what_cannot_be_read_is_refused_before_anything_is_built(tmp_path: Path, start: Path):
    with pytest.raises(DataError, match=r"init_from=.*nowhere: .*Give a folder in the Llama layout"):
        graph(tmp_path, tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((start / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(DataError, match="GPT2LMHeadModel"):
        graph(tmp_path, other)
    for name in ("config.json", "tokenizer_config.json"):
        (other / name).write_bytes((start / name).read_bytes())
    with pytest.raises(DataError, match=r"init_from=.*other: holds no tokenizer.json. .*save_pretrained"):
        list(build(graph(tmp_path, other).trunk, Store(tmp_path), submit_here))
    (other / "config.json").write_text("[]")
    with pytest.raises(DataError, match=r"init_from=.*other: its config.json is no JSON object"):
        graph(tmp_path, other)
    with pytest.raises(UsageError, match="init_from brings the shape of the model: leave out d_model, tie_embed"):
        graph(tmp_path, start, ONLY_TUNED, "model.d_model=64", "model.tie_embeddings=false")
    with pytest.raises(UsageError, match="pretrain: required, and not given"):
        graph(tmp_path, start, ONLY_TUNED.replace("corpus: null\n", ""))
