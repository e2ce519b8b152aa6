"""A stage of the races over shards. It has a file of its own because worker processes import that, and torch not."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.stage import Context, Stage
from pipeline.stages.tokenizer import TokenizerFile


@dataclass(frozen=True, kw_only=True)
class Learnt(Stage[TokenizerFile]):
    """A tokenizer that was learned before: the race is about the shards."""

    file: str

    def run(self, ctx: Context) -> None:
        shutil.copyfile(self.file, ctx.out / "tokenizer.json")

    def load(self, path: Path) -> TokenizerFile:
        return TokenizerFile(path)
