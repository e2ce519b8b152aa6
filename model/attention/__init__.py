"""Attention kernels, one module each.

Contract: a module here defines `attend(q, k, v, pattern) -> out` with the shapes below, softmax scale
1/sqrt(head_dim), differentiable, in the dtype of q. Each key-value head serves n_heads / n_kv_heads consecutive query
heads. A module that needs a missing package raises ModuleNotFoundError on import, naming what to install. Adding a
kernel means adding one file; `tests/model/test_attention.py` then compares it with `reference.py` without being edited.
`_native.py` is no choice of its own, since it does not take every dtype: `auto.py` asks it what it takes.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from model import variants
from model.masks import Pattern

Query = Float[Tensor, "batch seq n_heads head_dim"]
KeyValue = Float[Tensor, "batch seq n_kv_heads head_dim"]
Attend = Callable[[Query, KeyValue, KeyValue, Pattern], Query]


def kernel(name: str) -> Attend:
    """The attention function of the variant called `name`."""
    attend: Attend = variants.load("model.attention", name).attend
    return attend
