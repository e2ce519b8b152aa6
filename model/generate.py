"""Text from a language model: many prompts at once, none of which reads another."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.functional import pad

from model import counter
from model.decode import Decoding, Frozen, freeze
from model.decoding import Logits, Transform, greedy, is_greedy
from model.heads import LanguageModel

Chosen = Int64[Tensor, " batch"]


@torch.inference_mode()
def generate(
    model: LanguageModel | Frozen,
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
    token t of its answer depends on that seed, on t and on the logits. In float32 these are the same with other prompts
    and without, up to the order of sums; in bfloat16 and int8 how they are rounded depends on how many tokens are read
    at once, so that an answer may depend on how many prompts there are. Raises ValueError for an empty prompt.
    """
    refuse_empty(prompts)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    frozen = freeze(model)
    keys = _keys(seed, len(prompts)).to(frozen.embed.device)
    stop = -1 if eos_id is None else eos_id  # -1 is no token
    answers = _answers(frozen, *left_padded(prompts, frozen.embed.device), keys, transforms, max_new_tokens, stop)
    return [_before(stop, answer) for answer in answers.tolist()]


def refuse_empty(prompts: list[list[int]]) -> None:
    """Raises ValueError for an empty prompt."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty; begin it with the beginning-of-text token")


def _answers(
    frozen: Frozen,
    tokens: Int64[Tensor, "batch seq"],
    padding: Bool[Tensor, "batch seq"] | None,
    keys: Chosen,
    transforms: Sequence[Transform],
    max_new_tokens: int,
    stop: int,
) -> Int64[Tensor, "batch new"]:
    """Tokens until every row has met `stop`; what a row has after it means nothing."""
    decoding = Decoding(frozen, len(tokens), tokens.shape[1] + max_new_tokens)
    done = torch.zeros_like(keys, dtype=torch.bool)
    chosen: list[Tensor] = []
    for step in range(max_new_tokens):
        logits = decoding.read(tokens, forbidden=unseen_by(decoding, tokens.shape[1], padding))
        chosen.append(_choose(logits[:, 0].float(), transforms, keys, step))
        done |= chosen[-1] == stop
        if done.all():
            break
        tokens = chosen[-1][:, None]
    return torch.stack(chosen, dim=1)


def unseen_by(decoding: Decoding, new: int, padding: Tensor | None) -> Tensor | None:
    """What the new tokens must not see: padding too, but that it sees itself, so that no softmax is over nothing."""
    if padding is None:
        return None
    length = decoding.length
    unseen = pad(padding, (0, length + new - padding.shape[1]))[:, None, None, None]
    itself = torch.arange(length + new, device=padding.device) == torch.arange(length, length + new)[:, None]
    return (unseen & ~itself) | decoding.later(new)


def _choose(logits: Logits, transforms: Sequence[Transform], keys: Chosen, step: int) -> Chosen:
    """Draw from softmax(logits) by the Gumbel-max trick: noise is made per element, so rows share none."""
    for transform in transforms:
        logits = transform(logits)
    if transforms and is_greedy(transforms[-1]):
        return logits.argmax(dim=-1)
    bits = counter.bits(keys, step, 1, logits.shape[1])[:, 0]
    uniform = (bits.double() + (2**31 + 0.5)) / 2**32
    return (logits - (-uniform.log()).log()).argmax(dim=-1)


def _keys(seed: int | Sequence[int], n_prompts: int) -> Chosen:
    seeds = [seed + i for i in range(n_prompts)] if isinstance(seed, int) else list(seed)
    if len(seeds) != n_prompts:
        raise ValueError(f"seed has {len(seeds)} entries for {n_prompts} prompts; give one each, or a single integer")
    return torch.tensor(seeds, dtype=torch.int64)


def left_padded(
    prompts: list[list[int]], device: torch.device
) -> tuple[Int64[Tensor, "batch seq"], Bool[Tensor, "batch seq"] | None]:
    """Tokens, prompts flush right so that all their next tokens are at one position, and where there is padding.

    Rotary attention knows distances alone, so it does not matter where a prompt begins.
    """
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padding = torch.arange(width, device=device) < width - lengths[:, None]
    return tokens, padding if len({*map(len, prompts)}) > 1 else None


def _before(stop: int, answer: list[int]) -> list[int]:
    return answer[: answer.index(stop)] if stop in answer else answer
