"""Which model writes a text, and what it goes on after."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from jobs import cli_use
from model.config import ModelConfig
from model.heads import LanguageModel
from model.init import initialize
from pipeline.stage import Context, Stage
from pipeline.store import Store
from pipeline.weights import write_language_model
from tests.jobs.conftest import Run
from tests.pipeline.toy_export import classifier_folder
from tests.pipeline.toy_llama import llama_folder

CFG = ModelConfig(
    vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=16, seq_len=32, tie_embeddings=False
)


@dataclass(frozen=True, kw_only=True)
class ImportModel(Stage[Path]):
    """Random weights, after those of another base if there is one."""

    files: str
    causal: bool = True
    base: Stage[Path] | None = None

    def run(self, ctx: Context) -> None:
        model = LanguageModel(replace(CFG, causal=self.causal))
        initialize(model, 0 if self.base is None else 1)
        write_language_model(ctx.out, dict(model.named_parameters()), model.cfg, Path(self.files) / "tokenizer.json")

    def load(self, path: Path) -> Path:
        return path


class Pretrain(ImportModel):
    pass


def test_a_name_means_the_last_base_that_can_write(
    home: Path, run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("GRISTMILL_HOME", str(home))
    files = str(classifier_folder(tmp_path / "files"))
    trained = Pretrain(files=files, base=ImportModel(files=files))
    both_ways = Pretrain(files=files, base=trained, causal=False, label="midtrain")
    record = run_toy([both_ways])
    by_name = {stage.name: Store(home).path(stage.kind, str(stage.key)) for stage in record.stages}

    def written(model: str) -> str:
        cli_use.generate(model, ["the cat"], temperature=0, max_new_tokens=8)
        return capsys.readouterr().out

    assert written("toy") == written(str(by_name["pretrain"])) != written(str(by_name["importmodel"]))


@pytest.mark.parametrize("reads", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_llama_folder_writes_what_transformers_does_after_the_whole_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reads: str
):
    folder = llama_folder(tmp_path / "llama", reads)
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[0, *tokenizer("the sea was", add_special_tokens=False).input_ids]])
    answer = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=1)[0, prompt.shape[1] :]
    capsys.readouterr()  # where libraries that transformers loads have had their say
    cli_use.generate(str(folder), ["the sea was"], temperature=0, max_new_tokens=8)
    assert capsys.readouterr().out == f"the sea was{tokenizer.decode(answer, skip_special_tokens=True)}\n"
