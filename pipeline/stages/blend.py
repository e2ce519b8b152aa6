"""N-grams beside the network: what both say of a text, as one classifier."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.blend import Blend
from pipeline.blend import fit, logits_of
from pipeline.classify import document_probabilities, tokenize_windows
from pipeline.metrics import validated
from pipeline.ngrams import features, fill
from pipeline.spelling import blank_ngrams
from pipeline.stage import Context, Resources, Stage
from pipeline.stages.finetune import Finetune
from pipeline.stages.labels import Labels
from pipeline.stages.ngrams import NGramsStage
from pipeline.targets import Probabilities
from pipeline.weights import TOKENIZER, ClassifierFiles, write_classifier
from pipeline.windows import mean_over_windows


@dataclass(frozen=True, kw_only=True)
class BlendStage(Stage[ClassifierFiles]):
    """Makes of a network one that reads n-grams too (wide and deep, arXiv:1606.07792).

    How much n-grams of the training texts count beside the network, the new validation texts say. Then the n-grams of
    both take their place. What was said before that of the validation texts is kept: only by it can one tell how sure
    the classifier may be.
    """

    VERSION = 2
    network: Finetune
    ngrams: NGramsStage
    labels: Stage[Labels]

    def __post_init__(self) -> None:
        network, ngrams = self.network, self.ngrams
        read = (network.tokenizer, network.shape.seq_len, network.config.reading)
        assert (ngrams.tokenizer, ngrams.seq_len, ngrams.reading) == read, "both read the same tokens"

    @property
    def resources(self) -> Resources:
        return Resources(cpus=0)

    def load(self, path: Path) -> ClassifierFiles:
        return ClassifierFiles(path)

    def run(self, ctx: Context) -> None:
        torch.set_num_threads(ctx.cpus)
        labels, files, learned = ctx.open(self.labels), ctx.open(self.network), ctx.open(self.ngrams)
        loaded, asked = files.load(), labels.new_validation()
        model, tokenizer = loaded.model, loaded.tokenizer
        texts = tokenize_windows(tokenizer, asked.texts, model.cfg.seq_len, loaded.windows)
        windows, counts = [window for text in texts for window in text], [len(text) for text in texts]
        by_window = document_probabilities(model, [[window] for window in windows])
        network = logits_of(by_window, multi_label=labels.multi_label)
        ngrams = blank_ngrams(learned.shape, len(labels.names), tokenizer, model.cfg.vocab_size)
        of_train, of_both = learned.tables()
        wide = features(ngrams, windows) @ of_train
        fit(ngrams.blend, asked.targets, network, wide, counts)

        def said(logits: Tensor) -> Probabilities:
            """The probabilities of each text, given the logits of its windows."""
            return model.probabilities(mean_over_windows(logits.float(), counts)).numpy()

        with torch.inference_mode():
            both = ngrams.blend(torch.from_numpy(network), torch.from_numpy(wide), multi_label=labels.multi_label)
            alone, held_out = said(torch.from_numpy(network)), said(both)
        model.ngrams = ngrams
        fill(ngrams, of_both)
        write_classifier(
            ctx.out,
            dict(model.named_parameters()),
            model.cfg,
            labels.names,
            model.head.pooling,
            files.path / TOKENIZER,
            loaded.windows,
            multi_label=labels.multi_label,
            ngrams=ngrams,
            held_out=held_out,
        )
        _note(ctx, ngrams.blend, *(validated(asked.targets, table) for table in (alone, held_out)))
        ctx.notes["datasets"] = [ctx.dataset(self.labels, split) for split in ("train", "validation")]


def _note(ctx: Context, blend: Blend, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    ctx.notes["metrics"] = {
        **{f"val/{name}": value for name, value in after.items()},
        **{f"val/network_{name}": value for name, value in before.items()},
        **{f"blend/deep_{n}": by[0].item() for n, by in enumerate(blend.by, 1)},
        **{f"blend/wide_{n}": by[1].item() for n, by in enumerate(blend.by, 1)},
        "blend/share_1": blend.share.sigmoid().item(),
    }
    ctx.notes["headline"] = (
        f"validation macro-F1 {before['macro_f1']:.3f} -> {after['macro_f1']:.3f}, "
        f"log loss {before['log_loss']:.3f} -> {after['log_loss']:.3f}"
    )
    ctx.notes["model"] = {"role": "classifier-weights"}
