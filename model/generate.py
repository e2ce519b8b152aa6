"""Text from a language model: many prompts at once, each as if it were alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from model import counter, documents
from model.decoding import Logits, Transform, greedy
from model.heads import LanguageModel
from model.kv_cache import KVCache

Chosen = Int64[Tensor, " batch"]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    transforms: Sequence[Transform] = (greedy.transform,),
    eos_id: int | None = None,
    seed: int | Sequence[int] = 0,
) -> list[list[int]]:
    """The new tokens of each prompt: up to `max_new_tokens`, ending before `eos_id`.

    `transforms` apply to the float32 logits in the order given; `decoding.chain` gives the usual one (temperature,
    top_k, top_p, greedy). Then a token is drawn from softmax(logits). Prompt i has the seed `seed[i]`, or `seed + i`;
    token t of its answer depends on that seed, on t and on the logits, so never on the other prompts.
    Raises ValueError for an empty prompt.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty; begin it with the beginning-of-text token")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    keys = _keys(seed, len(prompts)).to(model.body.embed.weight.device)
    stop = -1 if eos_id is None else eos_id  # -1 is no token
    answers = _answers(model, *_left_padded(prompts, keys.device), keys, transforms, max_new_tokens, stop)
    return [_before(stop, answer) for answer in answers.tolist()]


def _answers(
    model: LanguageModel,
    tokens: Int64[Tensor, "batch seq"],
    ids: Int32[Tensor, "batch seq"],
    keys: Chosen,
    transforms: Sequence[Transform],
    max_new_tokens: int,
    stop: int,
) -> Int64[Tensor, "batch new"]:
    """Tokens until every row has met `stop`; what a row has after it means nothing."""
    cache = KVCache(model.cfg.n_layers, tokens.shape[1] + max_new_tokens)
    done = torch.zeros_like(keys, dtype=torch.bool)
    chosen: list[Tensor] = []
    for step in range(max_new_tokens):
        hidden = model.body(tokens, ids, cache=cache)[:, -1:]
        chosen.append(_choose(model.head(hidden)[:, 0].float(), transforms, keys, step))
        done |= chosen[-1] == stop
        if done.all():
            break
        tokens, ids = chosen[-1][:, None], torch.zeros_like(ids[:, :1])
    return torch.stack(chosen, dim=1)


def _choose(logits: Logits, transforms: Sequence[Transform], keys: Chosen, step: int) -> Chosen:
    """Draw from softmax(logits) by the Gumbel-max trick: noise is made per element, so rows stay independent."""
    for transform in transforms:
        logits = transform(logits)
    bits = counter.bits(keys, step, 1, logits.shape[1])[:, 0]
    uniform = (bits.double() + (2**31 + 0.5)) / 2**32
    return (logits - (-uniform.log()).log()).argmax(dim=-1)


def _keys(seed: int | Sequence[int], n_prompts: int) -> Chosen:
    seeds = [seed + i for i in range(n_prompts)] if isinstance(seed, int) else list(seed)
    if len(seeds) != n_prompts:
        raise ValueError(f"seed has {len(seeds)} entries for {n_prompts} prompts; give one each, or a single integer")
    return torch.tensor(seeds, dtype=torch.int64)


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and document ids, prompts flush right so that all their next tokens are at one position."""
    width = max(map(len, prompts))
    padding = [[documents.PADDING] * (width - len(prompt)) for prompt in prompts]
    tokens = [[0] * len(pad) + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    ids = [pad + [0] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(tokens, device=device), torch.tensor(ids, dtype=torch.int32, device=device)


def _before(stop: int, answer: list[int]) -> list[int]:
    return answer[: answer.index(stop)] if stop in answer else answer
