"""Be one rank of some pretrainings, alone or under torchrun. Arguments: home, name:zero_stage ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.gang_ray import as_rank
from model.config import ModelConfig
from pipeline.bpe import TokenizerConfig
from pipeline.runner import build, submit_here
from pipeline.stage import RankContext
from pipeline.stages.corpus import CorpusConfig, CorpusStage
from pipeline.stages.pretrain import Pretrain, PretrainConfig
from pipeline.stages.shards import ShardsConfig, ShardsStage
from pipeline.stages.tokenizer import TokenizerStage
from pipeline.store import Store

STEPS, ROWS, SEQ_LEN, SEED = 50, 5, 16, 3
# An embedding of more than 1e5 elements: ZeRO-3 leaves smaller parameters whole. Sizes that two ranks do not divide.
MODEL = ModelConfig(vocab_size=320, d_model=330, n_layers=1, n_heads=3, n_kv_heads=1, d_ff=95, seq_len=SEQ_LEN)


def pretraining(zero_stage: int) -> Pretrain:
    corpus = CorpusStage(config=CorpusConfig(path="data/smoke/corpus.txt"))
    tokenizer = TokenizerStage(config=TokenizerConfig(vocab_size=320), corpus=corpus)
    shards = ShardsStage(config=ShardsConfig(validation_fraction=0.1), corpus=corpus, tokenizer=tokenizer)
    config = PretrainConfig(
        steps=STEPS,
        lr=1e-3,
        precision="fp32",
        global_batch_tokens=ROWS * SEQ_LEN,
        micro_batch_size=2,
        engine="auto",
        zero_stage=zero_stage,
        checkpoint_seconds=0,
        log_every=1,
        validate_every=25,
        ledger=True,
    )
    return Pretrain(config=config, model=MODEL, shards=shards, tokenizer=tokenizer, seed=SEED)


def build_inputs(home: Path) -> dict[str, str]:
    """Build what a pretraining needs; the key of each stage by name."""
    return {event.stage.name: event.key for event in build([pretraining(0).shards], Store(home), submit_here)}


def train(home: Path, name: str, zero_stage: int) -> None:
    """Be this rank of the pretraining called `name`, or go on with it."""
    store = Store(home)
    context = RankContext(
        store=store, kind="pretrain", key=name, keys=build_inputs(home), work=store.work("pretrain", name), cpus=1
    )
    as_rank(pretraining(zero_stage).train, context)


if __name__ == "__main__":
    for job in sys.argv[2:]:
        called, _, stage = job.partition(":")
        train(Path(sys.argv[1]), called, int(stage))
