"""The shape of a model: every value that decides which numbers it computes, checked once, when it is made."""

from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_type_hints

from annotated_types import Ge, Gt, Lt

from model import variants

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-compatible transformer. Raises ValueError, naming field, value and remedy, for a shape that cannot be."""

    vocab_size: Count
    """Rows of the embedding: how many distinct tokens there are."""
    d_model: Count
    """Width of the residual stream."""
    n_layers: Count
    """Blocks, each one attention and one MLP."""
    n_heads: Count
    """Query heads of each attention; each is d_model / n_heads wide."""
    n_kv_heads: Count
    """Key and value heads, shared by n_heads / n_kv_heads query heads each (grouped-query attention)."""
    d_ff: Count
    """Hidden width of the gated MLP; about 8/3 of d_model has the parameters of a plain MLP at 4 times d_model."""
    seq_len: Count
    """Tokens in a training row, and the context length that an export declares."""
    rope_theta: Annotated[float, Gt(0)] = 10_000.0
    """Base of the rotary wavelengths: larger values tell far positions apart better."""
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = True
    """Whether the language-model head reuses the embedding matrix."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability of zeroing an element of the embedding, and of each attention's and each MLP's output."""
    sliding_window: Count | None = None
    """Tokens that a token sees, itself included, counting backwards (and forwards when not causal); null is all."""
    causal: bool = True
    """Whether a token sees only itself and what precedes it."""
    attention: str = field(default="auto", metadata={"identity": False})
    """Kernel: a module name in model/attention. It is how attention runs, so changing it rebuilds nothing."""
    activation_checkpointing: bool = field(default=False, metadata={"identity": False})
    """Whether training keeps only the input of each block and computes the rest again; the numbers are the same."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            _check_range(name, getattr(self, name), hint)
        _check_multiple("d_model", self.d_model, "n_heads", self.n_heads)
        _check_multiple("n_heads", self.n_heads, "n_kv_heads", self.n_kv_heads)
        if self.head_dim % 2:
            raise ValueError(
                f"d_model={self.d_model} / n_heads={self.n_heads} gives heads of {self.head_dim} channels; "
                "rotary embedding turns them in pairs, so make that number even"
            )
        kernels = variants.names("model.attention")
        if self.attention not in kernels:
            raise ValueError(f"attention={self.attention!r} must be one of {', '.join(kernels)}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.d_model // self.n_heads


def _check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name}={value} must be a multiple of {of}={divisor}")


def _check_range(name: str, value: Any, hint: Any) -> None:
    """Enforce the annotated_types bounds of a field; None passes, NaN does not."""
    for bound in _bounds(hint) if value is not None else ():
        inside, sign, limit = _compare(value, bound)
        if not inside:
            raise ValueError(f"{name}={value} must be {sign} {limit:g}")


def _bounds(hint: Any) -> list[Ge | Gt | Lt]:
    here = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Ge | Gt | Lt)]
    return here + [bound for member in get_args(hint) if hasattr(member, "__metadata__") for bound in _bounds(member)]


def _compare(value: Any, bound: Ge | Gt | Lt) -> tuple[bool, str, Any]:
    match bound:
        case Ge(ge=limit):
            return value >= limit, ">=", limit
        case Gt(gt=limit):
            return value > limit, ">", limit
        case Lt(lt=limit):
            return value < limit, "<", limit
