import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from model.beam_search import beam_search
from model.heads import swap_head
from model.interchange import read_causal_lm, read_classifier, write_causal_lm, write_classifier
from tests.model.toys import language_model, tokens

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "unk_token": "<|unk|>"}
LABELS = {0: "quiet", 1: "loud", 2: "both"}
PAD = 2


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    special = [{"id": i, "content": token, "special": True} for i, token in enumerate(SPECIAL.values())]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocab = {token: i for i, token in enumerate([*SPECIAL.values(), *(f"w{i}" for i in range(44))])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [token | flags for token in special],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unk|>"},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer))
    return path


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "rope_theta": 500.0, "norm_eps": 1e-6}])
def test_transformers_computes_our_logits(tmp_path: Path, tokenizer_json: Path, changes: dict):
    model, text = language_model(**changes), tokens(2, 12)
    write_causal_lm(tmp_path / "out", model, tokenizer_json, SPECIAL)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(theirs(text).logits, model(text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_labels_padded_texts_as_we_do(tmp_path: Path, tokenizer_json: Path, side: str):
    model, text = swap_head(language_model(), 3, "last", seed=0), tokens(3, 8).clamp(min=4)
    write_classifier(tmp_path / "out", model, tokenizer_json, SPECIAL, LABELS)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pad = (4, 0) if side == "left" else (0, 4)
    padded = torch.nn.functional.pad(text, pad, value=PAD)
    labels = theirs(padded, attention_mask=(padded != PAD).long()).logits
    ids = torch.zeros_like(padded).masked_fill(padded == PAD, -1).int()
    torch.testing.assert_close(labels, model(padded, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(labels, model(text), atol=1e-5, rtol=1e-5)
    assert theirs.config.id2label == LABELS


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_transformers_finds_what_our_beams_find(
    tmp_path: Path, tokenizer_json: Path, beams: int, length_penalty: float
):
    model = language_model(scale=4.0)
    write_causal_lm(tmp_path / "out", model, tokenizer_json, SPECIAL)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for prompt in ([3], [5, 9, 1, 30, 2], [7, 7], [11, 4, 40]):
        for eos in (5, 17):
            ids = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                num_beams=beams,
                max_new_tokens=8,
                do_sample=False,
                length_penalty=length_penalty,
                eos_token_id=eos,
                pad_token_id=PAD,
            )
            expected = ids[0, len(prompt) :].tolist()
            (found,) = beam_search(
                model, [prompt], beams=beams, max_new_tokens=8, eos_id=eos, length_penalty=length_penalty
            )
            assert found == (expected[: expected.index(eos)] if eos in expected else expected)


def test_transformers_generates_what_we_generate(tmp_path: Path, tokenizer_json: Path):
    from model.generate import generate

    model, text = language_model(), tokens(1, 5)
    write_causal_lm(tmp_path / "out", model, tokenizer_json, SPECIAL)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    answer = theirs.generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=5, do_sample=False, eos_token_id=99
    )
    assert generate(model, text.tolist(), max_new_tokens=5) == [answer[0, 5:].tolist()]


def test_transformers_loads_the_tokenizer_with_its_special_tokens(tmp_path: Path, tokenizer_json: Path):
    write_causal_lm(tmp_path / "out", language_model(), tokenizer_json, SPECIAL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, PAD)
    assert tokenizer("w0 w3").input_ids == [4, 7]
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "rope_theta": 500.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_comes_back_bit_for_bit(
    tmp_path: Path, tokenizer_json: Path, changes: dict, dtype: torch.dtype
):
    model = language_model(**changes).to(dtype)
    write_causal_lm(tmp_path / "out", model, tokenizer_json, SPECIAL)
    again = read_causal_lm(tmp_path / "out")
    assert again.cfg == model.cfg
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    assert (again.head.weight is again.body.embed.weight) == model.cfg.tie_embeddings


def test_a_classifier_comes_back_bit_for_bit(tmp_path: Path, tokenizer_json: Path):
    model = swap_head(language_model(), 3, "last", seed=0)
    write_classifier(tmp_path / "out", model, tokenizer_json, SPECIAL, LABELS)
    again, id2label = read_classifier(tmp_path / "out")
    assert id2label == LABELS
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_what_transformers_saves_can_be_read(tmp_path: Path, tokenizer_json: Path):
    model, text = language_model(tie_embeddings=False), tokens(1, 6)
    write_causal_lm(tmp_path / "out", model, tokenizer_json, SPECIAL)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert torch.equal(read_causal_lm(tmp_path / "theirs")(text), model(text))


def test_a_model_that_stock_llama_cannot_express_names_the_setting(tmp_path: Path, tokenizer_json: Path):
    for changes, message in [({"causal": False}, "causal=False"), ({"sliding_window": 4}, "sliding_window=4")]:
        with pytest.raises(ValueError, match=message):
            write_causal_lm(tmp_path / "out", language_model(**changes), tokenizer_json, SPECIAL)
    with pytest.raises(ValueError, match="pooling='mean'"):
        write_classifier(tmp_path / "out", swap_head(language_model(), 3, "mean", 0), tokenizer_json, SPECIAL, LABELS)
    assert not (tmp_path / "out").exists()


def test_wrong_labels_and_wrong_tokens_are_refused(tmp_path: Path, tokenizer_json: Path):
    model = swap_head(language_model(), 3, "last", 0)
    with pytest.raises(ValueError, match=r"id2label has keys \[0\]; n_labels=3 needs 0 to 2"):
        write_classifier(tmp_path / "out", model, tokenizer_json, SPECIAL, {0: "quiet"})
    with pytest.raises(ValueError, match="lacks pad_token"):
        write_classifier(tmp_path / "out", model, tokenizer_json, {}, LABELS)
    with pytest.raises(ValueError, match="eos_token='</s>' is not in"):
        write_causal_lm(tmp_path / "out", language_model(), tokenizer_json, {"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ({"head_dim": 64}, "head_dim=64 is not supported"),
        ({"architectures": ["BertModel"]}, "architectures="),
        ({"num_hidden_layers": 3}, "weights missing"),
        ({"num_hidden_layers": 1}, "unknown"),
    ],
)
def test_a_folder_we_cannot_compute_is_refused(tmp_path: Path, tokenizer_json: Path, change: dict, message: str):
    write_causal_lm(tmp_path / "out", language_model(), tokenizer_json, SPECIAL)
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_causal_lm(tmp_path / "out")


def test_a_folder_without_safetensors_is_refused(tmp_path: Path, tokenizer_json: Path):
    write_causal_lm(tmp_path / "out", language_model(), tokenizer_json, SPECIAL)
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no model\*.safetensors"):
        read_causal_lm(tmp_path / "out")


def test_rotary_buffers_of_older_files_are_passed_over(tmp_path: Path, tokenizer_json: Path):
    model = language_model()
    write_causal_lm(tmp_path / "out", model, tokenizer_json, SPECIAL)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "out" / "model.safetensors")
    assert torch.equal(read_causal_lm(tmp_path / "out")(tokens(1, 3)), model(tokens(1, 3)))


def test_a_tied_model_saved_with_both_matrices_can_be_read(tmp_path: Path, tokenizer_json: Path):
    model = language_model()
    write_causal_lm(tmp_path / "out", model, tokenizer_json, SPECIAL)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "out" / "model.safetensors")
    assert torch.equal(read_causal_lm(tmp_path / "out")(tokens(1, 3)), model(tokens(1, 3)))
