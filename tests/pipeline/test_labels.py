import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.splitting import Example, alike, by_fractions, carve_validation, few_of_each
from pipeline.stages.labels import Labels, LabelsConfig, class_name
from tests.pipeline.data_stages import labels_of, made, opened

FRACTIONS, NO_VALIDATION = (0.8, 0.1, 0.1), (0.7, 0.0, 0.3)


def rows_file(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def two_classes(n: int = 100, **more) -> list[dict]:
    return [{"text": f"text number {i}", "label": "odd" if i % 2 else "even", **more} for i in range(n)]


def split_rows() -> list[dict]:
    names = ["train"] * 8 + ["test"] * 2
    return [{**row, "split": names[i % 10]} for i, row in enumerate(two_classes())]


def labels(path: Path, **fields) -> Labels:
    return opened(labels_of(path, **fields), path.parent / "home")


def refused(path: Path, **fields) -> str:
    with pytest.raises(DataError) as error:
        made(labels_of(path, **fields), path.parent / "home")
    return str(error.value)


def texts_by_split(found: Labels) -> dict[str, list[str]]:
    return {name: found.split(name).texts for name in ("train", "validation", "test")}


def test_texts_with_a_nul_are_counted(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", [*two_classes(), {"text": "a\0b", "label": "odd"}])
    assert made(labels_of(path), tmp_path / "home").notes["metrics"]["texts_with_nul"] == 1


def test_a_split_column_is_obeyed_and_validation_is_carved_from_train(tmp_path):
    found = labels(rows_file(tmp_path / "a.jsonl", split_rows()), split="split")
    texts = texts_by_split(found)
    assert texts["test"] == [row["text"] for row in split_rows() if row["split"] == "test"]
    assert 0 < len(texts["validation"]) < 20
    assert len(texts["train"]) + len(texts["validation"]) == 80
    assert found.counts["rows"] == {name: len(part) for name, part in texts.items()}


def test_given_validation_rows_are_kept(tmp_path):
    rows = [*split_rows(), {"text": "held", "label": "odd", "split": "dev"}]
    assert labels(rows_file(tmp_path / "a.jsonl", rows), split="split").split("validation").texts == ["held"]


def write_splits(folder: Path, names: list[str]) -> Path:
    """Rows of both classes in a file of each name, whose texts begin with the name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows_file(folder / name, [{**row, "text": f"{name} {row['text']}"} for row in two_classes(20)])
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["test.jsonl", "train.jsonl", "dev.jsonl"],
        ["news_test-00000-of-00001.jsonl", "news_Train-00000-of-00001.jsonl", "news_validation-00000-of-00001.jsonl"],
        ["test/a.jsonl", "training/a.jsonl", "val/a.jsonl"],
        ["train-and-test/test.jsonl", "train-and-test/train.jsonl", "train-and-test/valid.jsonl"],
    ],
)
def test_files_that_are_named_after_splits_are_them(tmp_path, names):
    texts = texts_by_split(labels(write_splits(tmp_path / "data", names), split="files"))
    test, train, validation = names
    for split, name in {"train": train, "validation": validation, "test": test}.items():
        assert texts[split] == [f"{name} text number {i}" for i in range(20)]


def test_the_splits_of_a_saved_dataset_are_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {"train": two_classes(40), "test": [{"text": "held out", "label": "odd"}]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(
        tmp_path / "saved"
    )
    assert labels(tmp_path / "saved", split="files").split("test").texts == ["held out"]
    assert "splits test, train" in refused(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").unlink()  # as a job that was sent to a cluster finds it
    assert labels(tmp_path / "saved", split="files").split("test").texts == ["held out"]


@pytest.mark.parametrize("as_parquet", [True, False])
def test_classes_that_a_dataset_keeps_as_numbers_have_their_names(tmp_path, as_parquet):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    classes = datasets.ClassLabel(names=["even", "odd"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes, "all": [classes]})
    rows = [{"text": f"number {i}", "label": i % 2, "all": [i % 2]} for i in range(40)]
    kept = datasets.Dataset.from_list(rows, features=features)
    path = tmp_path / ("a.parquet" if as_parquet else "saved")
    kept.to_parquet(path) if as_parquet else kept.save_to_disk(path)
    assert labels(path, split=NO_VALIDATION).names == ["even", "odd"]
    several = labels(path, split=NO_VALIDATION, label="all", multi_label=True)
    assert several.names == ["even", "odd"]


@pytest.mark.parametrize(
    "told",
    ["not JSON", "[]", "{}", '{"info": {"features": {"label": 5}}}']
    + [
        f'{{"info": {{"features": {{"label": {{"_type": "ClassLabel", "names": {names}}}}}}}}}' for names in (5, "null")
    ],
)
def test_where_somebody_else_wrote_the_metadata_numbers_are_the_classes(tmp_path, told):
    table = pa.table({"text": [f"number {i}" for i in range(20)], "label": [i % 2 for i in range(20)]})
    pq.write_table(table.replace_schema_metadata({"huggingface": told}), tmp_path / "a.parquet")
    assert labels(tmp_path / "a.parquet", split=NO_VALIDATION).names == ["0", "1"]


def test_a_row_whose_class_a_dataset_does_not_know_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = [{"text": "one", "label": 0}, {"text": "two", "label": -1}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    assert "saved:2: label is None: this row has no class" in refused(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rest.jsonl", "rest.jsonl: no word of its name says"),
        ("contest.jsonl", "contest.jsonl: no word of its name says"),
        ("train_test.jsonl", "'train_test.jsonl' says test and train"),
    ],
)
def test_a_file_whose_name_says_no_one_split_is_refused(tmp_path, name, message):
    folder = write_splits(tmp_path / "data", ["train.jsonl", "test.jsonl", name])
    assert message in refused(folder, split="files")


def test_what_files_are_called_is_part_of_the_key_where_it_counts(tmp_path):
    keys = []
    for names in (["a-train.jsonl", "b-test.jsonl"], ["a-test.jsonl", "b-train.jsonl"]):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            rows_file(folder / name, two_classes())
        keys.append([labels_of(folder, split=split).key({}) for split in ("files", FRACTIONS)])
    (files, drawn), (other_files, also_drawn) = keys
    assert files != other_files
    assert drawn == also_drawn


def test_files_named_after_splits_that_are_drawn_anew_are_remarked_on(tmp_path):
    folder = write_splits(tmp_path / "data", ["train.jsonl", "test.jsonl"])
    assert "is labels.split: files meant?" in made(labels_of(folder), tmp_path / "home").notes["headline"]


def test_targets_are_indices_into_sorted_names(tmp_path):
    found = labels(rows_file(tmp_path / "a.jsonl", two_classes()))
    train = found.split("train")
    assert found.names == ["even", "odd"]
    assert train.targets.dtype == np.int64
    assert [found.names[t] for t in train.targets] == [
        "odd" if int(text.split()[-1]) % 2 else "even" for text in train.texts
    ]


def test_fractions_depend_on_the_seed_and_the_text_only(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", two_classes(300))
    back = rows_file(tmp_path / "b.jsonl", two_classes(300)[::-1])
    one, two, three = (texts_by_split(labels(p, split_seed=s)) for p, s in ((path, 0), (back, 0), (path, 1)))
    assert {name: set(part) for name, part in one.items()} == {name: set(part) for name, part in two.items()}
    assert one["test"] != three["test"]
    assert 200 < len(one["train"]) < 280


def test_equal_texts_stay_in_one_split_and_across_given_splits_are_counted(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", two_classes(60) * 3)
    built = made(labels_of(path), tmp_path / "home")
    assert built.notes["duplicates_across_splits"] == 0
    assert built.notes["metrics"]["duplicates"] == 120
    rows = [*split_rows(), {**split_rows()[0], "split": "test"}, {**split_rows()[1], "label": "even"}]
    notes = made(labels_of(rows_file(tmp_path / "b.jsonl", rows), split="split"), tmp_path / "home").notes
    assert notes["duplicates_across_splits"] == 1
    assert notes["metrics"]["conflicting_classes"] == 1
    assert notes["datasets"][0]["context"] == "labels"


def test_equal_input_gives_equal_bytes(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", two_classes())
    assert made(labels_of(path), tmp_path / "one").digest == made(labels_of(path), tmp_path / "two").digest


@pytest.mark.parametrize("pair", [("yes", "no"), ("1", "0"), ("on", "off"), ("null", "~"), ("1e3", "0x10")])
def test_classes_stay_the_strings_they_are(tmp_path, pair):
    body = "".join(f'"text {i}",{pair[i % 2]}\n' for i in range(60))
    (tmp_path / "a.csv").write_text("text,label\n" + body)
    assert labels(tmp_path / "a.csv").names == sorted(pair)


@pytest.mark.parametrize(("value", "name"), [(1, "1"), (0, "0"), (True, "true"), (" a b ", "a b"), (1.5, "1.5")])
def test_a_class_that_is_no_string_becomes_one(value, name):
    assert class_name(value, "here") == name


def test_quoted_csv_keeps_line_ends_quotes_and_lines_of_errors(tmp_path):
    body = "".join(f'"text, ""{i}""\r\nsecond line",{"ab"[i % 2]}\r\n' for i in range(60))
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\n" + body.encode())
    texts = texts_by_split(labels(tmp_path / "a.csv"))
    assert sorted(t for part in texts.values() for t in part) == sorted(f'text, "{i}"\nsecond line' for i in range(60))
    (tmp_path / "b.csv").write_bytes(b"text,label\n" + body.encode() + b'"last\nrow",\n')
    assert refused(tmp_path / "b.csv").startswith(f"{tmp_path}/b.csv:122: label is ''")


@pytest.mark.parametrize("bad", [None, "", "  ", float("nan")])
def test_a_row_without_a_class_is_named(tmp_path, bad):
    table = pa.table({"text": ["a", "b", "c"], "label": pa.array([1.0, 2.0, bad] if bad != bad else ["x", "y", bad])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert f"{tmp_path}/a.parquet:3: label is" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": f"t{i}", "label": "only", "split": "train"} for i in range(5)], "every row has the class 'only'"),
        ([{"text": "t", "label": "a"}], ":1: no column 'split'. There are: 'text', 'label'"),
        ([*split_rows(), {"text": "new", "label": "rare", "split": "test"}], ":101: the class 'rare' of this test row"),
        ([*split_rows(), {"text": "new", "label": "odd", "split": "holdout"}], ":101: split is 'holdout'"),
        ([*split_rows(), {"text": "new", "label": ["odd"], "split": "test"}], ":101: label is ['odd']: not a class"),
        ([{**row, "split": "train"} for row in two_classes()], "no row falls to test"),
        ([{"text": " ", "label": "a", "split": "train"}], "no labelled text"),
        ([], "no labelled text"),
    ],
)
def test_unusable_labels_are_refused_with_file_and_line(tmp_path, rows, message):
    assert message in refused(rows_file(tmp_path / "a.jsonl", rows), split="split")


def test_plain_text_has_no_labels(tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    assert "plain text has no columns" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize("split", [(0.5, 0.1, 0.1), (1.0, 0.0, 0.0), (1.1, -0.2, 0.1)])
def test_fractions_that_make_no_sense_are_refused(split):
    with pytest.raises(ValueError, match="must be fractions"):
        LabelsConfig(path="a.csv", split=split)


def test_a_hundred_thousand_classes_are_read(tmp_path):
    texts = [f"text {i % 100_000} {i // 100_000}" for i in range(200_000)]
    table = pa.table({"text": texts, "label": [i % 100_000 for i in range(200_000)]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert len(labels(tmp_path / "a.parquet").names) == 100_000


texts = st.sampled_from(["a", "A", "a ", *"bcdefghijkl"])
examples = st.lists(
    st.tuples(texts, st.sampled_from("XYZ")).map(lambda pair: Example(*pair, "", "")),
    min_size=1,
)


@given(examples, st.integers(0, 5), st.booleans())
def test_fractions_lose_nothing_keep_texts_together_and_leave_every_class_in_train(rows, seed, in_time_order):
    divided, without = (
        by_fractions(rows, each, seed, in_time_order=in_time_order) for each in (FRACTIONS, NO_VALIDATION)
    )
    for splits in (divided, carve_validation(without, 0.3, seed, in_time_order=in_time_order)):
        assert sorted(row for part in splits.values() for row in part) == sorted(rows)
        assert {row.label for row in splits["train"]} == {row.label for row in rows}
        measured = [*splits["validation"], *splits["test"]]
        assert not {alike(row.text) for row in splits["train"]} & {alike(row.text) for row in measured}


@given(st.integers(0, 100), st.floats(0.001, 0.5))
def test_some_text_is_carved_to_validate_on_where_a_class_has_several(seed, fraction):
    """Ten classes of a single text, which train needs, and one of three."""
    train = [Example(f"text {i}", str(max(i, 2)), "", "") for i in range(13)]
    splits = carve_validation({"train": train, "validation": [], "test": []}, fraction, seed)
    assert {row.label for row in splits["validation"]} == {"2"}
    assert {row.label for row in splits["train"]} == {row.label for row in train}


def test_where_every_class_has_a_single_text_all_are_learned_from():
    train = [Example(f"text {i}", str(i), "", "") for i in range(5)]
    splits = carve_validation({"train": train, "validation": [], "test": []}, 0.5, 0)
    assert splits["train"] == train


@given(rows=st.lists(st.tuples(st.text(max_size=4), st.sampled_from("abc")), max_size=40), most=st.integers(1, 5))
def test_few_of_each_class_are_taken_in_order_and_a_larger_number_keeps_the_smaller_one_s(rows, most):
    examples = [Example(text, label, "", f"row {i}") for i, (text, label) in enumerate(rows)]
    few, more = few_of_each(examples, most, 0), few_of_each(examples, most + 1, 0)
    assert [example for example in examples if example in few] == few
    assert set(few) <= set(more)
    for label in "abc":
        there = sum(example.label == label for example in examples)
        assert sum(example.label == label for example in few) == min(there, most)


def test_few_shot_training_has_as_few_texts_to_validate_on_and_as_many_to_test(tmp_path):
    splits = ("test", "train", "train", "validation")
    rows = [{"text": f"text {i}", "label": str(i % 3), "split": splits[i % 4]} for i in range(80)]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, few = (labels(path, split="split", train_per_class=most) for most in (None, 4))
    assert [len(found.split("train").texts) for found in (whole, few)] == [40, 12]
    assert [len(found.split("validation").texts) for found in (whole, few)] == [20, 6]
    assert few.split("test").texts == whole.split("test").texts


def test_in_time_order_the_last_of_each_class_are_held_out(tmp_path):
    rows = [{"text": f"{label} {i}", "label": label} for label, n in (("a", 20), ("b", 10)) for i in range(n)]
    drawn = labels(rows_file(tmp_path / "drawn.jsonl", rows), split=(0.8, 0.1, 0.1), in_time_order=True)
    assert drawn.split("validation").texts == ["a 16", "a 17", "b 8"]
    assert drawn.split("test").texts == ["a 18", "a 19", "b 9"]
    rows = [{**row, "split": "train"} for row in rows] + [{"text": "later", "label": "a", "split": "test"}]
    carved = labels(rows_file(tmp_path / "carved.jsonl", rows), split="split", in_time_order=True)
    assert carved.split("validation").texts == ["a 18", "a 19", "b 9"]
    assert carved.split("test").texts == ["later"]


def test_a_text_that_came_before_is_not_held_out_when_it_comes_again(tmp_path):
    texts = {"a": [f"a {i % 18}" for i in range(20)], "b": [f"b {i}" for i in range(10)]}
    rows = [{"text": text, "label": label} for label in texts for text in texts[label]]
    drawn = labels(
        rows_file(tmp_path / "a.jsonl", rows), split=(0.9, 0.0, 0.1), validation_fraction=0, in_time_order=True
    )
    assert drawn.split("test").texts == ["b 9"]
    assert drawn.split("train").texts == [*texts["a"], *texts["b"][:9]]


def quoting_rows(n_new: int, n_quoting: int) -> list[dict]:
    """Training texts, validation texts that quote one and add as much, and validation texts of other words."""

    def words(kind: str, number: int) -> str:
        return " ".join(f"{kind}{number}x{i}" for i in range(20))

    train = [{"text": words("t", i), "label": "ab"[i % 2], "split": "train"} for i in range(n_quoting)]
    quoting = [{**row, "text": f"{row['text']} {words('q', i)}", "split": "dev"} for i, row in enumerate(train)]
    new = [{"text": words("n", i), "label": "ab"[i % 2], "split": "dev"} for i in range(n_new)]
    return [*train, *quoting, *new, {"text": "a test", "label": "a", "split": "test"}]


def test_what_quotes_the_training_texts_is_no_new_validation_text(tmp_path):
    found = labels(rows_file(tmp_path / "a.jsonl", quoting_rows(100, 30)), split="split")
    new = found.new_validation()
    assert len(found.split("validation").texts) == 130
    assert len(new.texts) == 100
    assert all(text.startswith("n") for text in new.texts)
    assert new.targets.tolist() == [i % 2 for i in range(100)]


def test_where_few_validation_texts_are_new_all_count(tmp_path):
    found = labels(rows_file(tmp_path / "a.jsonl", quoting_rows(99, 30)), split="split")
    assert found.new_validation().texts == found.split("validation").texts
    none = labels(rows_file(tmp_path / "b.jsonl", split_rows()), split="split", validation_fraction=0.0)
    assert none.new_validation().texts == []
