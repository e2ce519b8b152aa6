"""What stands on a body: a language-model head or a classification head, and the change from one to the other."""

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor, nn

from model.config import ModelConfig
from model.decoder import Decoder
from model.init import initialize
from model.linear import Linear, linear
from model.losses import linear_cross_entropy
from model.ngrams import NGrams
from model.pooling import POOLING, SCORED

Tokens = Int64[Tensor, "batch seq"]
Ids = Int[Tensor, "batch seq"]
Keys = Int64[Tensor, " batch"]
Hidden = Float[Tensor, "batch seq d_model"]


class LanguageHead(nn.Module):
    """Hidden states to logits over the vocabulary, without bias."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(
        self, hidden: Hidden, targets: Tokens | None = None
    ) -> Float[Tensor, "batch seq vocab"] | Float32[Tensor, ""]:
        """The logits; or, given targets, the sum of their cross-entropies in nats, without ever holding all logits.

        The loss is computed in here because engines that shard parameters gather them around a module's forward.
        """
        if targets is None:
            return linear(hidden, self.weight)
        return linear_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten())


class LanguageModel(nn.Module):
    """A body and a head that predicts tokens; they share one matrix if cfg.tie_embeddings."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.body = Decoder(cfg)
        self.head = LanguageHead(cfg.d_model, cfg.vocab_size)
        if cfg.tie_embeddings:
            self.head.register_parameter("weight", self.body.embed.weight)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        tokens: Tokens,
        document_ids: Ids | None = None,
        *,
        dropout_keys: Keys | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the token after each position; arguments as in Decoder.forward."""
        return self.head(self.body(tokens, document_ids, dropout_keys=dropout_keys))


class ClassificationHead(nn.Module):
    """One pooled vector per document to one logit per label, without bias.

    `multi_label`: a document may have several labels, or none, so that each logit is read by itself.
    """

    def __init__(self, d_model: int, n_labels: int, pooling: str, *, multi_label: bool = False) -> None:
        super().__init__()
        if pooling not in POOLING:
            raise ValueError(f"pooling={pooling!r} must be one of {', '.join(POOLING)}")
        if n_labels < 1:
            raise ValueError(f"n_labels={n_labels} must be >= 1")
        self.n_labels, self.pooling, self.multi_label = n_labels, pooling, multi_label
        self.query = Linear(d_model, 1) if pooling in SCORED else None
        self.score = Linear(d_model, n_labels)

    def forward(self, hidden: Hidden, document_ids: Ids | None = None) -> Float[Tensor, "n_documents n_labels"]:
        scores = None if self.query is None else self.query(hidden)
        return self.score(POOLING[self.pooling](hidden, document_ids, scores))


class Classifier(nn.Module):
    """A body and a head that labels documents; with `ngrams`, what these say of a document is blended with that."""

    def __init__(
        self, body: Decoder, n_labels: int, pooling: str, *, multi_label: bool = False, ngrams: NGrams | None = None
    ) -> None:
        super().__init__()
        self.cfg = body.cfg
        self.body = body
        self.head = ClassificationHead(body.cfg.d_model, n_labels, pooling, multi_label=multi_label)
        self.ngrams = ngrams

    def forward(
        self, tokens: Tokens, document_ids: Ids | None = None, *, dropout_keys: Keys | None = None
    ) -> Float[Tensor, "n_documents n_labels"]:
        """Logits of every document (run of one id; -1 is padding) in row-major order of appearance.

        Without `document_ids` each row is one document.
        """
        deep = self.head(self.body(tokens, document_ids, dropout_keys=dropout_keys), document_ids)
        if self.ngrams is None:
            return deep
        return self.ngrams.blend(deep.float(), self.ngrams(tokens, document_ids), multi_label=self.head.multi_label)

    @property
    def logit_weight(self) -> Tensor:
        """The weight that the logits are proportional to."""
        return self.head.score.weight if self.ngrams is None else self.ngrams.blend.scale

    def probabilities(self, logits: Float[Tensor, "n n_labels"]) -> Float[Tensor, "n n_labels"]:
        """The softmax, float32. Of a head with several labels the sigmoid of each, float64.

        A sigmoid near 1 keeps little of its logit in float32, and a temperature fitted later needs it; a softmax
        keeps it in the small ones of its row.
        """
        return logits.double().sigmoid() if self.head.multi_label else logits.float().softmax(-1)


def swap_head(
    language_model: LanguageModel, n_labels: int, pooling: str, seed: int, *, multi_label: bool = False
) -> Classifier:
    """A classifier on the language model's own body, not a copy, with a head drawn from `seed`."""
    body = language_model.body
    classifier = Classifier(body, n_labels, pooling, multi_label=multi_label)
    initialize(classifier.head, seed, prefix="head.")
    return classifier.to(body.embed.weight.device, body.embed.weight.dtype)
