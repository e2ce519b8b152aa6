"""Beam search (Graves 2012) without copies of keys and values: the lines of a search are branches of one tree.

All lines of a prompt share its keys. Each step adds one kept token a line; a mask says which of them are a line's own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from model.decode import Decoding, Frozen, freeze
from model.generate import left_padded, refuse_empty, unseen_by
from model.heads import LanguageModel

Answer = tuple[float, list[int]]


@torch.inference_mode()
def beam_search(
    model: LanguageModel | Frozen,
    prompts: list[list[int]],
    *,
    beams: int,
    max_new_tokens: int,
    eos_id: int | None = None,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """The new tokens of each prompt, without `eos_id`: those of the highest log-probability over length to a power.

    The power is `length_penalty`; the length counts `eos_id`. A prompt is done once `beams` answers have ended and no
    line that goes on is better as it stands than the worst of them, or at `max_new_tokens`, where lines count as
    answers as they are (as in transformers with early_stopping=False). Raises ValueError for an empty prompt, or less
    than one beam.
    """
    refuse_empty(prompts)
    if beams < 1:
        raise ValueError(f"beams={beams} must be >= 1")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    frozen = freeze(model)
    tokens, padding = left_padded(prompts, frozen.embed.device)
    tree = Tree(frozen, tokens, padding, beams, max_new_tokens)
    searches = [Search(beams, eos_id, length_penalty) for _ in prompts]
    scores = tree.first()
    for step in range(max_new_tokens):
        best = scores.flatten(1).topk(min(2 * beams, scores[0].numel()))
        origin, token = best.indices // scores.shape[2], best.indices % scores.shape[2]
        rows = zip(searches, best.values.tolist(), origin.tolist(), token.tolist(), strict=True)
        chosen = torch.tensor([search.go_on(*row) for search, *row in rows], device=tokens.device)
        if step + 1 == max_new_tokens or all(search.done for search in searches):
            break
        picked = chosen.clamp(min=0)
        kept_scores = best.values.gather(1, picked).masked_fill(chosen < 0, float("-inf"))
        scores = tree.grow(token.gather(1, picked), origin.gather(1, picked), kept_scores)
    return [search.best() for search in searches]


class Tree:
    """The lines of some prompts: `grow` reads one more token of each."""

    def __init__(self, frozen: Frozen, tokens: Tensor, padding: Tensor | None, beams: int, steps: int) -> None:
        rows, self._prompt = tokens.shape
        room = self._prompt + beams * steps
        self._beams, self._tokens, self._padding = beams, tokens, padding
        self._decoding = Decoding(frozen, rows, room)
        self._window = frozen.cfg.sliding_window
        self._unseen: Bool[Tensor, "rows beams room"] = torch.ones(
            rows, beams, room, dtype=torch.bool, device=tokens.device
        )
        self._unseen[:, :, : self._prompt] = False if padding is None else padding[:, None]
        self._positions = torch.arange(room, device=tokens.device)
        self._positions[self._prompt :] = self._prompt + torch.arange(steps).repeat_interleave(beams).to(tokens.device)
        self._own = torch.eye(beams, dtype=torch.bool, device=tokens.device)

    def first(self) -> Float32[Tensor, "rows 1 vocab"]:
        """Log-probabilities of what follows the prompts."""
        forbidden = unseen_by(self._decoding, self._prompt, self._padding)
        return self._decoding.read(self._tokens, forbidden=forbidden).float().log_softmax(-1)

    def grow(
        self, token: Int64[Tensor, "rows beams"], origin: Int64[Tensor, "rows beams"], scores: Float32[Tensor, "r b"]
    ) -> Float32[Tensor, "rows beams vocab"]:
        """Give each line a token after what its `origin` had; the scores of its continuations."""
        begin = self._decoding.length
        end = begin + self._beams
        if begin > self._prompt:  # a first token follows the prompt, whatever its origin
            self._unseen[:, :, :begin] = self._unseen[:, :, :begin].gather(1, origin[..., None].expand(-1, -1, begin))
        self._unseen[:, :, begin:end] = ~self._own
        unseen = self._unseen[:, None, None, :, :end]
        position = self._prompt + (begin - self._prompt) // self._beams
        if self._window is not None:
            unseen = unseen | (position - self._positions[:end] >= self._window)
        logits = self._decoding.read(token, slice(position, position + 1), unseen, last=self._beams)
        return scores[..., None] + logits.float().log_softmax(-1)


class Search:
    """The lines and answers of one prompt."""

    def __init__(self, beams: int, eos_id: int | None, length_penalty: float) -> None:
        self._beams, self._eos, self._penalty = beams, eos_id, length_penalty
        self._lines: list[Answer] = [(0.0, [])]
        self._answers: list[Answer] = []
        self.done = False

    def go_on(self, scores: Sequence[float], origin: Sequence[int], token: Sequence[int]) -> list[int]:
        """Take the best candidates, which come in order, as answers or lines; which are lines now, filled up by -1."""
        chosen: list[int] = []
        lines: list[Answer] = []
        for rank, (score, line, new) in enumerate(zip(scores, origin, token, strict=True)):
            before = self._lines[line][1]
            if new != self._eos:
                chosen.append(rank)
                lines.append((score, [*before, new]))
            elif rank < self._beams and not self.done:
                self._answers.append((score / (len(before) + 1) ** self._penalty, before))
            if len(lines) == self._beams:
                break
        self._answers = sorted(self._answers, key=lambda answer: -answer[0])[: self._beams]
        self._lines = lines
        self.done = self.done or self._is_done()
        return chosen + [-1] * (self._beams - len(chosen))

    def _is_done(self) -> bool:
        if len(self._answers) < self._beams:
            return False
        return not self._lines or self._answers[-1][0] >= self._worth(self._lines[0])

    def _worth(self, line: Answer) -> float:
        return line[0] / len(line[1]) ** self._penalty

    def best(self) -> list[int]:
        """The best answer, or line where not enough have ended."""
        open_ = [] if self.done else [(self._worth(line), line[1]) for line in self._lines]
        return max([*self._answers, *open_], key=lambda answer: answer[0])[1]
