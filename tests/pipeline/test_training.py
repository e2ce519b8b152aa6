"""Training through the real stages, on the smoke data: what a restart, a micro batch or a knob may not change."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from model.config import ModelConfig
from model.decoder import Block, Decoder
from model.heads import Classifier, LanguageModel
from model.init import initialize
from model.objectives import Masking, next_token
from pipeline import ledger, metrics
from pipeline.batches import LanguageSampling
from pipeline.bpe import TokenizerConfig
from pipeline.checkpointing import Checkpoints
from pipeline.classify import probabilities
from pipeline.errors import EnvironmentProblem, Preempted, UsageError
from pipeline.guard import Guard
from pipeline.runner import Built, build, submit_here
from pipeline.stage import Stage
from pipeline.stages.corpus import CorpusConfig, CorpusStage
from pipeline.stages.finetune import Finetune, FinetuneConfig
from pipeline.stages.labels import Labels, LabelsConfig, LabelsStage
from pipeline.stages.pretrain import Pretrain, PretrainConfig
from pipeline.stages.shards import ShardsConfig, ShardsStage
from pipeline.stages.tokenizer import TokenizerStage
from pipeline.state import join
from pipeline.store import Store
from pipeline.tracking import read_journal
from pipeline.train import train
from pipeline.training import TrainingConfig
from tests.pipeline.recipes import SIMPLE
from tests.pipeline.test_batches import ToyStream, sampling

MODEL = ModelConfig(vocab_size=320, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32, seq_len=16, dropout=0.1)
TRAINING = {"lr": 1e-2, "precision": "fp32", "checkpoint_seconds": 0.0, "log_every": 2}


class Cut(Exception):
    pass


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pretraining(**changes: object) -> Pretrain:
    corpus = CorpusStage(config=CorpusConfig(path="data/smoke/corpus.txt"))
    tokenizer = TokenizerStage(config=TokenizerConfig(vocab_size=320), corpus=corpus)
    shards = ShardsStage(config=ShardsConfig(validation_fraction=0.1), corpus=corpus, tokenizer=tokenizer)
    settings = {"steps": 12, "global_batch_tokens": 128, "validate_every": 5, "samples": 1, **TRAINING, **changes}
    return Pretrain(config=PretrainConfig(**settings), model=MODEL, shards=shards, tokenizer=tokenizer)


def finetuning(base: Pretrain | None, **changes: object) -> Finetune:
    labels = LabelsStage(config=LabelsConfig(path="data/smoke/labels.jsonl", split=(0.7, 0.1, 0.2)))
    settings = {**SIMPLE, "epochs": 2, **TRAINING, **changes}
    tokenizer = pretraining().tokenizer
    return Finetune(config=FinetuneConfig(**settings), model=MODEL, base=base, tokenizer=tokenizer, labels=labels)


def built_labels(target: Finetune, store: Store) -> Labels:
    return target.labels.load(store.path("labels", built(target.labels, store.home).key))


def built(target: Stage, home: Path) -> Built:
    return [e for e in build([target], Store(home), submit_here) if isinstance(e, Built)][-1]


def cut_to(model: Classifier, seq_len: int) -> Classifier:
    """The same classifier, reading no more of a text."""
    shorter = Classifier(Decoder(replace(model.cfg, seq_len=seq_len)), model.head.n_labels, model.head.pooling)
    shorter.load_state_dict(model.state_dict())
    return shorter


def cut_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training stop dead after so many steps of this process."""
    done = iter(range(steps))
    save = Checkpoints.save

    def save_then_stop(self: Checkpoints, next_step: int) -> None:
        save(self, next_step)
        self._wait()
        if next(done, None) is None:
            raise Cut

    monkeypatch.setattr(Checkpoints, "save", save_then_stop)


@pytest.mark.parametrize("target", [pretraining(), finetuning(None)], ids=["pretrain", "finetune"])
@pytest.mark.parametrize("steps", [1, 6, 9])
def test_cut_twice_and_gone_on_gives_the_same_bits(
    tmp_path: Path, target: Stage, steps: int, monkeypatch: pytest.MonkeyPatch
):
    whole = built(target, tmp_path / "whole")
    for done in (steps, 1):
        with monkeypatch.context() as patch:
            cut_after(done, patch)
            with pytest.raises(Cut):
                built(target, tmp_path / "cut")
    again = built(target, tmp_path / "cut")
    assert again.digest == whole.digest

    def points(home: Path) -> list[tuple[int, dict[str, float]]]:
        kept = read_journal(Store(home).journal(target.kind, whole.key))
        return [(p.step, {n: v for n, v in p.metrics.items() if not n.endswith("per_second")}) for p in kept]

    assert points(tmp_path / "cut") == points(tmp_path / "whole")


def test_a_training_that_is_asked_to_stop_does_so_at_a_checkpoint(tmp_path: Path):
    target = pretraining(checkpoint_seconds=1000.0)
    whole = built(target, tmp_path / "whole")
    store = Store(tmp_path / "asked")
    store.request_stop(target.kind, whole.key)
    with pytest.raises(Preempted, match="stopped on request after step 1; its checkpoint is safe"):
        built(target, store.home)
    store.clear_stop(target.kind, whole.key)
    assert built(target, store.home).digest == whole.digest


def test_the_ledger_has_every_sample_of_every_step_once(tmp_path: Path):
    target = pretraining(ledger=True)
    done = built(target, tmp_path)
    journal = Store(tmp_path).journal(target.kind, done.key)
    read = ledger.read(journal.with_suffix(".ledger"))
    assert sorted(read) == list(range(12))
    assert all(counts.total() == 8 for counts in read.values())
    steps = {step: np.array(sorted(counts.elements())) for step, counts in read.items()}
    assert ledger.check(journal.with_suffix(".ledger"), steps.__getitem__, 12) == []
    steps[3] = steps[3] + 1
    assert len(ledger.check(journal.with_suffix(".ledger"), steps.__getitem__, 12)) == 2  # samples lost and doubled


@pytest.mark.parametrize("make", [pretraining, lambda **changes: finetuning(None, **changes)], ids=["pre", "fine"])
def test_recomputing_activations_runs_blocks_again_and_changes_neither_key_nor_bits(
    tmp_path: Path, make: Callable[..., Stage]
):
    runs = [0, 0]
    found = []
    for i, recomputed in enumerate((False, True)):

        def count(module: torch.nn.Module, *_: object, i: int = i) -> None:
            runs[i] += isinstance(module, Block)

        with register_module_forward_pre_hook(count):
            found.append(built(make(activation_checkpointing=recomputed), tmp_path / str(i)))
    assert runs[1] > runs[0]
    assert (found[0].key, found[0].digest) == (found[1].key, found[1].digest)


def test_compiling_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentProblem, match="no-such-compiler is not here: install it"):
        built(pretraining(compile=True), tmp_path)


def losses(sampling: LanguageSampling, steps: int = 6) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = LanguageModel(MODEL)
    initialize(model, 0)
    config = TrainingConfig(lr=1e-2, precision="fp32")
    engine = config.create_engine(model, next_token.loss, MODEL.n_layers)
    seen = [report.loss for report in train(engine, sampling, lambda _: 1.0, Guard(engine.device), start=0, stop=steps)]
    return seen, dict(join([engine.shard()]).params)


def test_the_micro_batch_changes_neither_loss_nor_weights(tmp_path: Path):
    """Dropout is on: its masks belong to the row, so that accumulation is the big batch to rounding."""
    target = pretraining()
    store = Store(tmp_path)
    keys = {e.stage.name: e.key for e in build([target.shards], store, submit_here) if isinstance(e, Built)}
    stream = target.shards.load(store.path("shards", keys["shards"])).split("train")
    show = partial(next_token.examples, masking=Masking(rate=0.15, mask_id=0, special=()))
    sampling = LanguageSampling(
        stream=stream, seq_len=16, rows_per_step=8, micro_batch_size=8, seed=0, examples=show, dropout=True
    )
    whole, weights = losses(sampling)
    for size in (1, 3):
        parts, same = losses(replace(sampling, micro_batch_size=size))
        assert parts == pytest.approx(whole, abs=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(same[name], value, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("objective", ["masked", "masked_next_token"])
def test_a_masked_base_learns_to_find_hidden_tokens_and_is_fine_tuned(objective: str, tmp_path: Path):
    both_ways = replace(MODEL, causal=False, vocab_size=321)
    base = replace(pretraining(objective=objective, mask_rate=0.4, steps=40), model=both_ways)
    built(replace(finetuning(base), model=both_ways), tmp_path)
    key = built(base, tmp_path).key
    losses = [
        p.metrics["val/loss"] for p in read_journal(Store(tmp_path).journal("pretrain", key)) if "val/loss" in p.metrics
    ]
    assert losses[-1] < losses[0] - 0.1
    assert not (Store(tmp_path).path("pretrain", key) / "samples.txt").exists()  # it cannot write from left to right


def test_a_masked_base_goes_on_with_next_tokens_without_the_token_that_hid_others(tmp_path: Path):
    masked = replace(pretraining(objective="masked"), model=replace(MODEL, causal=False, vocab_size=321))
    after = built(replace(pretraining(steps=1, lr=1e-9), base=masked, label="again"), tmp_path)
    weights = [
        stage.load(Store(tmp_path).path("pretrain", key)).load().model.body.state_dict()["embed.weight"]
        for stage, key in ((masked, built(masked, tmp_path).key), (after.stage, after.key))
    ]
    torch.testing.assert_close(weights[0][:320], weights[1])


def test_head_only_leaves_the_body_bit_for_bit(tmp_path: Path):
    base = pretraining()
    before = built(base, tmp_path).stage.load(Store(tmp_path).path("pretrain", built(base, tmp_path).key)).load().model
    tuned = built(finetuning(base, method="head"), tmp_path)
    after = tuned.stage.load(Store(tmp_path).path("finetune", tuned.key)).load().model
    for name, value in before.body.state_dict().items():
        assert torch.equal(after.body.state_dict()[name], value), name


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_adapters_learn_are_merged_and_can_be_cut_in_two(
    average: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = pretraining()
    target = finetuning(base, method="lora", lora_rank=4, dropout=0.0, average=average)
    whole = built(target, tmp_path / "whole")
    loaded = target.load(Store(tmp_path / "whole").path("finetune", whole.key)).load().model
    store = Store(tmp_path / "whole")
    before = base.load(store.path("pretrain", built(base, store.home).key)).load().model.body.state_dict()
    changed = {name for name, value in loaded.body.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    best = max(
        p.metrics["val/accuracy"]
        for p in read_journal(store.journal("finetune", whole.key))
        if "val/accuracy" in p.metrics
    )
    split = built_labels(target, store).split("validation")
    table = probabilities(target.load(store.path("finetune", whole.key)).load(), split.texts)
    assert (table.argmax(1) == split.targets).mean() == pytest.approx(best)  # merged weights score as adapters did
    cut_after(15, monkeypatch)
    with pytest.raises(Cut):
        built(target, tmp_path / "cut")
    monkeypatch.undo()
    assert built(target, tmp_path / "cut").digest == whole.digest


def test_a_left_to_right_body_can_be_fine_tuned_to_read_both_ways(tmp_path: Path):
    target = finetuning(pretraining(), bidirectional=True, pooling="attention", class_weights="balanced", r_drop=0.5)
    loaded = target.load(Store(tmp_path).path("finetune", built(target, tmp_path).key)).load().model.double()
    text = torch.arange(3, 9)[None]
    hidden, changed = loaded.body(text), loaded.body(text.clone().fill_(5).where(torch.arange(6) == 5, text))
    assert not loaded.cfg.causal
    assert (hidden[0, 0] - changed[0, 0]).abs().max() > 1e-9  # the first token has seen the last one


def test_a_classifier_may_read_longer_texts_than_the_rows_of_pretraining(tmp_path: Path):
    target = finetuning(pretraining(), seq_len=3 * MODEL.seq_len, epochs=1)
    loaded = target.load(Store(tmp_path).path("finetune", built(target, tmp_path).key)).load()
    texts = [f"{'the sea ' * 4}{end}" for end in ("calm", "storm")]  # more tokens than a row of pretraining has
    same, apart = (
        probabilities(replace(loaded, model=cut_to(loaded.model, MODEL.seq_len)), texts),
        probabilities(loaded, texts),
    )
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(apart[0], apart[1])


@pytest.mark.parametrize(("metric", "best"), [("macro_f1", max), ("accuracy", max), ("log_loss", min)])
def test_early_stopping_keeps_the_best_epoch(tmp_path: Path, metric: str, best: Callable[..., float]):
    result = built(finetuning(None, epochs=30, patience=1, lr=3e-2, metric_for_best_model=metric), tmp_path)
    points = [
        p.metrics[f"val/{metric}"]
        for p in read_journal(Store(tmp_path).journal("finetune", result.key))
        if f"val/{metric}" in p.metrics
    ]
    assert len(points) < 30
    assert result.notes["metrics"][f"val/{metric}"] == best(points)


@pytest.mark.parametrize("metric", ["macro_f1", "log_loss"])
def test_without_validation_texts_the_last_epoch_is_kept(tmp_path: Path, metric: str):
    target = finetuning(None, epochs=4, patience=1, metric_for_best_model=metric)
    nothing_held_out = LabelsConfig(path="data/smoke/labels.jsonl", split=(0.8, 0.0, 0.2), validation_fraction=0.0)
    result = built(replace(target, labels=LabelsStage(config=nothing_held_out)), tmp_path)
    assert "(epoch 4)" in result.notes["headline"]


def test_averaged_weights_are_what_is_validated_and_kept_and_a_cut_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings: dict[str, Any] = {"epochs": 3, "patience": 9, "dropout": 0.0, "metric_for_best_model": "log_loss"}
    last, mean = (finetuning(None, average=share, **settings) for share in (0.0, 0.5))
    whole = built(mean, tmp_path / "whole")
    store = Store(tmp_path / "whole")
    split = built_labels(mean, store).split("validation")
    table = probabilities(mean.load(store.path("finetune", whole.key)).load(), split.texts)
    assert metrics.calibrated_log_loss(split.targets, table) == pytest.approx(
        whole.notes["metrics"]["val/log_loss"], rel=1e-4
    )
    cut_after(15, monkeypatch)
    with pytest.raises(Cut):
        built(mean, tmp_path / "cut")
    monkeypatch.undo()
    assert built(mean, tmp_path / "cut").digest == whole.digest
    assert built(last, tmp_path / "whole").digest != whole.digest


def test_few_texts_are_passed_over_until_the_steps_are_done(tmp_path: Path):
    plain = built(finetuning(None, epochs=2, patience=9), tmp_path)
    longer = built(finetuning(None, epochs=2, patience=9, min_steps=35), tmp_path)
    exams = [
        [p.step + 1 for p in read_journal(Store(tmp_path).journal("finetune", r.key)) if "val/accuracy" in p.metrics]
        for r in (plain, longer)
    ]
    per_epoch = exams[0][0]
    assert exams[0] == [per_epoch, 2 * per_epoch]
    assert exams[1][-1] - per_epoch < 35 <= exams[1][-1]


@pytest.mark.parametrize(
    ("length", "steps"), [({"steps": 7}, 7), ({"tokens": 257}, 3), ({"epochs": 1}, 13), ({"epochs": 0.25}, 4)]
)
def test_how_long_to_train_is_given_in_steps_tokens_or_epochs(length: dict[str, float], steps: int):
    rows = sampling(stream=ToyStream([101 * 16]), seq_len=16, rows_per_step=8)
    assert PretrainConfig(**length).total_steps(rows) == steps


def test_a_run_that_cannot_start_says_what_to_change(tmp_path: Path):
    with pytest.raises(ValueError, match="exactly one of steps"):
        PretrainConfig(steps=3, tokens=5)
    with pytest.raises(UsageError, match="shorter row"):
        built(replace(pretraining(), model=replace(MODEL, seq_len=10**6)), tmp_path)


@pytest.mark.parametrize("needs", [{"optimizer": "muon"}, {"average": 0.5}])
def test_what_needs_whole_weights_is_refused_where_zero_cuts_them(needs: dict[str, Any]):
    ((name, value),) = needs.items()
    with pytest.raises(ValueError, match=f"{name}={value} needs whole .*zero_stage=2"):
        FinetuneConfig(**{**SIMPLE, **needs}, zero_stage=2)


def test_golden_keys_of_the_shipped_configs():
    """A key that changes rebuilds everything a user has: let it be on purpose, and write it into the CHANGELOG."""
    from pipeline.assemble import assemble
    from pipeline.config import load
    from pipeline.identity import fingerprint
    from pipeline.pipeline_config import PipelineConfig

    keys = {}
    trained = {"quickstart": ("pretrain", "finetune"), "smoke": ("pretrain", "finetune")}
    trained["english"] = ("pretrain", "midtrain", "adapt", "finetune")
    for name, sections in trained.items():
        overrides = [f"{section}.precision=fp32" for section in sections]  # auto is bf16 on a machine that has it
        config = load(PipelineConfig, Path(f"configs/{name}.yaml"), overrides).config
        graph = assemble(config)
        keys[name] = {stage.name: fingerprint(stage.settings) for stage in graph.targets}
    golden = Path("tests/pipeline/golden_keys.json")
    assert keys == json.loads(golden.read_text())
