"""A file for llama.cpp: architecture llama, float32, tokenizer inside.

llama.cpp keeps no classification head for this architecture: its `cls.output.weight` belongs to a few encoders and
rerankers, and a llama file that has one is refused. So the head stands where a language model has its own, in
`output.weight`: after a text, the logit of token i is the logit of label i, and that of every other token is 0. Any
binding that gives the logits of the last token gives the classifier's; pooling `last` gives the vector under them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.config import ModelConfig
from model.interchange import CALIBRATION
from pipeline.encoder import prepared
from pipeline.errors import StageFailed, UsageError
from pipeline.export import Subject, hf
from pipeline.export._verify import ALONE, Expected, Logits, check_labels
from pipeline.tokens import BOS, EOS, PAD, SpecialIds, special_ids

if TYPE_CHECKING:
    from gguf import GGUFWriter

PROGRAM = "llama.cpp"
PACKAGES = ("gguf", "xllamacpp")
FILE, RECORD = "model.gguf", "classifier.json"
AS_TEXT = "as texts"

TENSORS = {
    "attention_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Parts of a block: our names -> llama.cpp's."""

refusal = hf.refusal


def write(folder: Path, subject: Subject) -> None:
    from gguf import GGUFWriter

    tokenizer = json.loads(subject.tokenizer.read_text(encoding="utf-8"))
    model, labels = subject.loaded.model, subject.loaded.labels
    _check(tokenizer, model.cfg, labels)
    writer = GGUFWriter(folder / FILE, "llama")
    _write_shape(writer, model.cfg)
    writer.add_classifier_output_labels(labels)
    _write_tokenizer(writer, tokenizer, special_ids(subject.loaded.tokenizer), model.cfg.vocab_size)
    for name, tensor in _tensors(dict(model.named_parameters()), model.cfg):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    record = {
        "labels": labels,
        **({"multi_label": True} if model.head.multi_label else {}),
        CALIBRATION: subject.temperature,
        "seq_len": model.cfg.seq_len,
        **subject.loaded.windows.record,
        "text": {"prefix": _prefix(tokenizer), "lowercase": tokenizer["normalizer"] is not None},
        "logits": "the logit of label i is that of token i after the text; those of all other tokens are 0",
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(tokenizer: dict[str, Any], cfg: ModelConfig, labels: list[str]) -> None:
    """Raises UsageError for what GGUF has no words for."""
    if tokenizer["model"]["type"] != "BPE" or (tokenizer["pre_tokenizer"] or {}).get("type") != "ByteLevel":
        raise UsageError("the tokenizer is no byte-level BPE, so the classifier cannot be exported as gguf")
    if (tokenizer["normalizer"] or {"type": "Lowercase"})["type"] != "Lowercase":
        raise UsageError("the tokenizer normalises texts in a way that gguf has no word for. Export as hf or onnx")
    if len(labels) >= cfg.vocab_size:
        raise UsageError(f"{len(labels)} labels are not fewer than vocab_size={cfg.vocab_size}. Export as hf or onnx")


def _prefix(tokenizer: dict[str, Any]) -> str:
    return " " if tokenizer["pre_tokenizer"]["add_prefix_space"] else ""


def _write_shape(writer: "GGUFWriter", cfg: ModelConfig) -> None:
    from gguf import LlamaFileType, PoolingType

    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(cfg.seq_len + 1)  # programs that generate want room for the token after the text
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layers)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_pooling_type(PoolingType.LAST)


def _write_tokenizer(writer: "GGUFWriter", tokenizer: dict[str, Any], ends: SpecialIds, vocab_size: int) -> None:
    """The vocabulary by id, as long as the embedding: what no text is made of comes as unused tokens."""
    from gguf import TokenType

    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    token_of = {number: token for token, number in {**tokenizer["model"]["vocab"], **special}.items()}
    numbers = range(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token_of.get(number, f"[unused{number}]") for number in numbers])
    kinds = dict.fromkeys(special.values(), TokenType.CONTROL)
    writer.add_token_types(
        [kinds.get(number, TokenType.NORMAL if number in token_of else TokenType.UNUSED) for number in numbers]
    )
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(ends.bos)
    writer.add_eos_token_id(ends.eos)
    writer.add_pad_token_id(ends.pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def _tensors(params: Mapping[str, torch.Tensor], cfg: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by llama.cpp's name, float32."""
    weights = {name: parameter.detach().numpy() for name, parameter in params.items()}
    yield "token_embd.weight", weights["body.embed.weight"]
    for layer in range(cfg.n_layers):
        for ours, theirs in TENSORS.items():
            weight = weights[f"body.blocks.{layer}.{ours}.weight"]
            heads = {"attention.q_proj": cfg.n_heads, "attention.k_proj": cfg.n_kv_heads}.get(ours)
            yield f"blk.{layer}.{theirs}.weight", _interleaved(weight, heads) if heads else weight
    yield "output_norm.weight", weights["body.norm.weight"]
    head = np.zeros_like(weights["body.embed.weight"])
    head[: len(weights["head.score.weight"])] = weights["head.score.weight"]
    yield "output.weight", head


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows reordered for llama.cpp, which turns channel 2i with 2i + 1 where we turn i with i + head_dim / 2."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def logits(folder: Path, expected: Expected) -> Mapping[str, Logits]:
    """What llama.cpp makes of the file: of every text by our token ids, and by its own reading where that is the same.

    It reads special tokens in a text as tokens and cuts nothing, so texts that spell them or are too long go by ids.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    check_labels(record["labels"], expected)
    program = _program(folder / FILE, record["seq_len"])
    by_ids = torch.stack([_logits(program, ids, expected) for ids in expected.documents])
    by_text = by_ids.clone()
    readable = [i for i, text in enumerate(expected.texts) if _is_read_alike(text, len(expected.documents[i]), record)]
    if not readable:
        raise StageFailed("none of the texts can be given to llama.cpp as a text. Nothing was published")
    for i in readable:
        by_text[i] = _logits(program, _prepared(expected.texts[i], record["text"]), expected)
    return {ALONE: by_ids, AS_TEXT: by_text}


def _is_read_alike(text: str, n_tokens: int, record: Mapping[str, Any]) -> bool:
    return n_tokens < record["seq_len"] and not any(token in text for token in (BOS, EOS, PAD))


def _prepared(text: str, how: Mapping[str, Any]) -> str:
    """A text as llama.cpp must be given it, since a GGUF cannot say so: it begins with the prefix, once."""
    text = prepared(how["lowercase"], False, text)
    return text if text.startswith(how["prefix"]) else how["prefix"] + text


def _program(file: Path, seq_len: int) -> Any:
    """llama.cpp's own server, in this process, computing in float32."""
    import importlib

    xllamacpp: Any = importlib.import_module("xllamacpp")  # compiled, without types
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = seq_len + 1
    params.n_batch = params.n_ubatch = seq_len + 1
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.verbosity = -1
    params.warmup = params.fit_params = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise StageFailed(f"llama.cpp cannot load {file.name}: {error}. Nothing was published") from error


def _logits(program: Any, prompt: str | list[int], expected: Expected) -> torch.Tensor:
    """Logits of the labels. llama.cpp gives log-probabilities of tokens; that of a token with logit 0 is the offset."""
    n_labels = len(expected.labels)
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": _EVERY_TOKEN, "temperature": 0.0, "cache_prompt": False}
    answer = program.handle_completions(asked)
    if "choices" not in answer:
        raise StageFailed(f"llama.cpp gives no logits: {answer}. Nothing was published")
    rows = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    by_token = {row["id"]: row["logprob"] for row in rows}
    return torch.tensor([by_token[label] - by_token[n_labels] for label in range(n_labels)])


_EVERY_TOKEN = 1 << 30
