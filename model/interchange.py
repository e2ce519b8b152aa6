"""To and from the Hugging Face Llama layout: safetensors and JSON, and the only place that knows their names."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.config import ModelConfig
from model.decoder import Decoder
from model.heads import Classifier, LanguageModel

CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our field -> theirs, where only the name differs."""

WEIGHT_NAMES = (
    ("body.embed.", "model.embed_tokens."),
    ("body.blocks.", "model.layers."),
    ("body.norm.", "model.norm."),
    (".attention_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
    ("head.score.", "score."),
    ("head.weight", "lm_head.weight"),
)
"""Parts of our weight names -> theirs."""

FIXED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
}
"""What every model of ours has in their config, and every model of theirs must have to be read."""

CALIBRATION = "calibration_temperature"
"""Our key in a classifier's config: the temperature that its head is already divided by."""

PROBLEM_TYPES = {False: "single_label_classification", True: "multi_label_classification"}
"""What transformers calls a classifier, by whether a text may have several labels."""

BUFFER = "rotary_emb.inv_freq"
"""How the names end of what older versions of transformers saved although rope_theta gives it."""

ARCHITECTURES = ("LlamaForCausalLM", "LlamaForSequenceClassification")

Special = Mapping[str, str]
Model = TypeVar("Model", bound=nn.Module)


def write_causal_lm(folder: Path, model: LanguageModel, tokenizer_json: Path, special: Special) -> None:
    """Write `model` as a stock LlamaForCausalLM folder, weights bit for bit and in their dtype.

    `special` names tokens by role, {"bos_token": "<|bos|>", "eos_token": ..., "pad_token": ...}; their ids are looked
    up in `tokenizer_json`. Raises ValueError naming the setting or the token that such a folder cannot express.
    """
    ids = _special_ids(tokenizer_json, special)
    config = _to_config(model.cfg, model, "LlamaForCausalLM") | ids
    _write(folder, model, config, tokenizer_json, special, padding_side="left")
    _write_json(folder / "generation_config.json", ids)


def write_classifier(
    folder: Path,
    classifier: Classifier,
    tokenizer_json: Path,
    special: Special,
    id2label: Mapping[int, str],
    *,
    temperature: float = 1.0,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write `classifier` as a stock LlamaForSequenceClassification folder; arguments as in `write_causal_lm`.

    `temperature` says what the logits were divided by in calibration; it is noted, under a key that transformers keeps
    and does not read, as are further `notes`. Raises ValueError also unless pooling is "last", a pad token is named,
    and `id2label` names labels 0 to n - 1.
    """
    head = classifier.head
    if head.pooling != "last":
        raise ValueError(f"pooling={head.pooling!r} has no stock Llama form; an export needs pooling='last'")
    if "pad_token" not in special:
        raise ValueError("special lacks pad_token, by which a stock Llama classifier finds the last token of a row")
    if sorted(id2label) != list(range(head.n_labels)):
        raise ValueError(
            f"id2label has keys {sorted(id2label)}; n_labels={head.n_labels} needs 0 to {head.n_labels - 1}"
        )
    labels = {
        "id2label": {str(i): id2label[i] for i in sorted(id2label)},
        "label2id": {id2label[i]: i for i in sorted(id2label)},
        "problem_type": PROBLEM_TYPES[head.multi_label],
        CALIBRATION: temperature,
        **(notes or {}),
    }
    config = _to_config(classifier.cfg, classifier, "LlamaForSequenceClassification")
    config |= _special_ids(tokenizer_json, special) | labels
    _write(folder, classifier, config, tokenizer_json, special, padding_side="right")


def read_causal_lm(folder: Path) -> LanguageModel:
    """Read a Hugging Face Llama language model, weights in the dtype of the file.

    Raises ValueError for a folder that holds another kind of model or one this package cannot compute.
    """
    config = _read_config(folder, "LlamaForCausalLM")
    return _with_weights(LanguageModel(_from_config(config)), folder)


def read_config(folder: Path) -> ModelConfig:
    """The shape of the Llama language model or classifier in a folder. Raises ValueError as `read_causal_lm`."""
    return _from_config(_read_config(folder, *ARCHITECTURES))


def read_body(folder: Path, cfg: ModelConfig) -> LanguageModel:
    """A language model of shape `cfg` with the weights of a folder; raises as `read_causal_lm`.

    `cfg` may differ from what the folder says in all that changes no weight. A classifier's head is left behind, and
    the embedding becomes the head, from which it may learn to differ if `cfg` does not tie them.
    """
    weights = _read_weights(folder)
    if weights.pop("score.weight", None) is not None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return _filled(LanguageModel(cfg), weights, folder)


def read_classifier(folder: Path) -> tuple[Classifier, dict[int, str]]:
    """Read a Hugging Face Llama sequence classifier and the names of its labels; otherwise as `read_causal_lm`."""
    config = _read_config(folder, "LlamaForSequenceClassification")
    id2label = {int(i): label for i, label in config["id2label"].items()}
    multi_label = config.get("problem_type") == PROBLEM_TYPES[True]
    classifier = Classifier(Decoder(_from_config(config)), len(id2label), pooling="last", multi_label=multi_label)
    return _with_weights(classifier, folder), id2label


def _to_config(cfg: ModelConfig, model: nn.Module, architecture: str) -> dict[str, Any]:
    if not cfg.causal:
        raise ValueError("causal=False has no stock Llama form; only a causal model can be exported")
    if cfg.sliding_window is not None:
        raise ValueError(f"sliding_window={cfg.sliding_window} has no stock Llama form; an export needs null")
    values = dataclasses.asdict(cfg)
    return {
        "architectures": [architecture],
        **FIXED,
        **{theirs: values[ours] for ours, theirs in CONFIG_NAMES.items()},
        "head_dim": cfg.head_dim,
        "rope_theta": cfg.rope_theta,  # where transformers 4 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},  # where transformers 5 looks
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _read_config(folder: Path, *architectures: str) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: its config.json is no JSON object")
    if not set(architectures) & set(config.get("architectures") or ()):
        raise ValueError(f"{folder}: architectures={config.get('architectures')} is not {' or '.join(architectures)}")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{folder}: {name}={config[name]!r} is not supported; only {value!r} is")
    return config


def _from_config(config: dict[str, Any]) -> ModelConfig:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"rope_type={rope_type!r} is not supported; only 'default' is")
    known = {ours: config[theirs] for ours, theirs in CONFIG_NAMES.items() if config.get(theirs) is not None}
    defaults = {"n_kv_heads": known["n_heads"], "norm_eps": 1e-6, "tie_embeddings": False}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    cfg = ModelConfig(**(defaults | known), rope_theta=float(theta))
    if config.get("head_dim") not in (None, cfg.head_dim):
        raise ValueError(
            f"head_dim={config['head_dim']} is not supported; only hidden_size / heads = {cfg.head_dim} is"
        )
    return cfg


def _write(
    folder: Path, model: nn.Module, config: dict[str, Any], tokenizer_json: Path, special: Special, padding_side: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {_renamed(name): value.detach().cpu().contiguous() for name, value in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    (folder / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    tokenizer: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "padding_side": padding_side,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer)
    _write_json(folder / "special_tokens_map.json", dict(special))


def _renamed(name: str) -> str:
    for ours, theirs in WEIGHT_NAMES:
        name = name.replace(ours, theirs)
    return name


def _with_weights(model: Model, folder: Path) -> Model:
    """Fill the model, which takes on the dtype of the file. Raises ValueError for a missing or an unknown weight."""
    return _filled(model, _read_weights(folder), folder)


def _filled(model: Model, weights: dict[str, Tensor], folder: Path) -> Model:
    parameters = {_renamed(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = len(set(parameters.values())) < len(parameters)
    if tied and "model.embed_tokens.weight" in weights:  # files may hold the shared matrix once or twice
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    missing, unknown = parameters.keys() - weights.keys(), weights.keys() - parameters.keys()
    if missing or unknown:
        raise ValueError(f"{folder}: weights missing {sorted(missing)}, unknown {sorted(unknown)}")
    if misfits := [name for name, parameter in parameters.items() if parameter.shape != weights[name].shape]:
        raise ValueError(f"{folder}: weights of another shape than the config says: {misfits}")
    model = model.to(next(iter(weights.values())).dtype)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, of one file or of several with an index; not the buffers that older files hold too."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no model*.safetensors; other weight formats are not read, as they may run code"
        )
    weights = {name: weight for file in files for name, weight in read_safetensors(file).items()}
    return {name: weight for name, weight in weights.items() if not name.endswith(BUFFER)}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The weights of a file by name. Raises OSError, and ValueError for a file that is damaged."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged: {error}") from error


def _special_ids(tokenizer_json: Path, special: Special) -> dict[str, int]:
    """{"bos_token": "<|bos|>"} -> {"bos_token_id": 0}, for the roles that a model config knows."""
    tokenizer = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    added: dict[str, int] = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    vocab: dict[str, int] = {**tokenizer["model"]["vocab"], **added}
    for role, token in special.items():
        if token not in vocab:
            raise ValueError(f"special: {role}={token!r} is not in {tokenizer_json}; added tokens are {sorted(added)}")
    roles = [role for role in ("bos_token", "eos_token", "pad_token") if role in special]
    return {f"{role}_id": vocab[special[role]] for role in roles}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
