"""`zero_sft.data.sources.splits`: what is held out is not trained on because it lies in the same folder.

The reference is the library `datasets`, which reads the same folders.
"""

import json

import pytest

from tests.data.tiny import byte_tokenizer, make_pipeline, prepare
from tests.errors import raises
from zero_sft.data.dataset import prepare_source
from zero_sft.data.sources.data_path import parse_sources, require_sources
from zero_sft.data.sources.local_files import LocalFiles
from zero_sft.data.sources.splits import split_of


def folder_of(tmp_path, *names):
    """Each file holds its name as text."""
    import datasets

    folder = tmp_path / "data set"
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list([{"text": name}]).to_parquet(path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")
    return folder


def read(folder, split=None):
    return [each["text"] for each, _ in LocalFiles(path=folder, split=split).objects()]


SHARDS = ("data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
LAYOUTS = [
    SHARDS,
    ("train.jsonl", "test.jsonl", "dev.jsonl"),
    ("my_train.jsonl", "my-validation.jsonl"),
    ("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"),
    ("training.jsonl", "eval.jsonl"),
    ("en/train.jsonl", "en/val.jsonl", "de/train.jsonl"),
]


@pytest.mark.parametrize("names", LAYOUTS, ids=str)
def test_train_is_taken_as_the_library_does(tmp_path, names):
    import datasets

    folder = folder_of(tmp_path, *names)
    expected = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))["text"]
    assert sorted(read(folder)) == sorted(expected)
    (line,) = [line for line in prepare(folder, byte_tokenizer(), model_max_length=100).lines() if "left out" in line]
    assert line.startswith("split train read; left out: ")


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_is_named_after_the_folder(tmp_path, split):
    import datasets

    folder = folder_of(tmp_path, *SHARDS, "data/validation-00000-of-00001.parquet")
    expected = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))["text"]
    for text, weight in ((f"{folder}:{split}", None), (f"{folder}:{split}:0.5,{folder}:train:0.5", 0.5)):
        source, *_ = parse_sources(text)
        assert (source.data.name, source.weight) == (f"{folder}:{split}", weight)
        prepared = prepare_source(source.data, make_pipeline(byte_tokenizer(), model_max_length=100), tmp_path / "rows")
        assert [byte_tokenizer().decode(ids, skip_special_tokens=True) for ids in prepared.rows["input_ids"]] == expected
    with raises("data.no_such_split", "'tests'", "test, train, validation"):
        read(folder, "tests")
    with raises("data.no_such_split", "'train'"):
        read(folder_of(tmp_path / "other", "a.json"), "train")


def test_several_splits_without_a_train_are_asked_for(tmp_path):
    names = [f"data/{each}-00000-of-00001.parquet" for each in ("train_sft", "test_sft", "train_gen", "test_gen")]
    folder = folder_of(tmp_path, *names)
    with raises("data.no_train_split", "test_gen, test_sft, train_gen, train_sft", "data set", "train_gen"):
        read(folder)
    assert read(folder, "train_sft") == [names[0]]


@pytest.mark.parametrize(
    ("names", "taken", "note"),
    [
        (("a.json", "b.json"), 2, ""),
        (("test/a.json", "test/b.json"), 2, ""),
        (("train.json", "more.json"), 2, ""),
        (("chats.json", "test.json"), 1, "files that name no split read; left out: test (1 file)"),
        (("latest.json", "contest.json", "trainer.json"), 3, ""),
        (("en-00000-of-00001.jsonl", "de-00000-of-00001.jsonl"), 2, "splits de, en: all are read"),
    ],
    ids=str,
)
def test_folders_without_several_splits(tmp_path, names, taken, note):
    folder = folder_of(tmp_path, *names)
    assert read(folder) == sorted(read(folder)) == sorted(names)[:taken]
    assert LocalFiles(path=folder).chosen().note.startswith(note)
    assert bool(LocalFiles(path=folder).chosen().note) == bool(note)


def test_a_readme_says_which_files_are_which(tmp_path):
    folder = folder_of(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl")
    one = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [a.jsonl, c*]\n"
    (folder / "README.md").write_text(one + '  - split: test\n    path: "b.jsonl"\n---\n# Data\n')
    assert (read(folder), read(folder, "test")) == (["a.jsonl", "c.jsonl"], ["b.jsonl"])
    (folder / "README.md").write_text(one + "- config_name: other\n  data_files: b.jsonl\n---\n")
    with raises("data.several_configurations", "default, other"):
        read(folder)


def declaring(tmp_path, yaml, *names):
    folder = folder_of(tmp_path, *names)
    (folder / "README.md").write_text(f"---\n{yaml}\n---\n# Data\n")
    return folder


def config(**keys):
    return "configs: " + json.dumps([{"config_name": "default", **keys}])


A_SPLIT = [{"split": "train", "path": "a.jsonl"}, {"split": "test", "path": ["b.jsonl"]}]
DECLARED = [
    (config(data_files="train.jsonl"), ("train.jsonl", "test.jsonl"), ["train.jsonl"]),
    (config(data_files="./a.jsonl"), ("a.jsonl", "b.jsonl"), ["a.jsonl"]),
    (config(data_files=["a.jsonl", "c*"]), ("a.jsonl", "b.jsonl", "c1.jsonl", "d/c.jsonl"), ["a.jsonl", "c1.jsonl"]),
    (config(data_files=A_SPLIT), ("a.jsonl", "b.jsonl", "c.jsonl"), ["a.jsonl"]),
    (
        config(data_files=[{"split": "train", "path": "**/good.jsonl"}, {"split": "test", "path": "**/held.jsonl"}]),
        ("good.jsonl", "a/b/good.jsonl", "held.jsonl", "a/held.jsonl"),
        ["a/b/good.jsonl", "good.jsonl"],
    ),
    (config(data_files="data/*.jsonl"), ("data/a.jsonl", "data/old/b.jsonl", "c.jsonl"), ["data/a.jsonl"]),
    (config(data_files="data/**"), ("data/a.jsonl", "data/old/b.jsonl", "c.jsonl"), ["data/a.jsonl", "data/old/b.jsonl"]),
    (config(data_files="**"), ("a.jsonl", "__old__/b.jsonl"), ["a.jsonl"]),
    (config(data_files=["[a-m]*.jsonl", "x?.jsonl"]), ("b.jsonl", "n.jsonl", "x1.jsonl"), ["b.jsonl", "x1.jsonl"]),
    (config(data_files=[{"split": name, "path": "a.jsonl"} for name in ("train", "t")]), ("a.jsonl", "b.jsonl"), ["a.jsonl"]),
    (config(data_dir="good"), ("good/a.jsonl", "bad/b.jsonl"), ["good/a.jsonl"]),
    (config(data_dir="train"), ("train/a.jsonl", "train/test.jsonl", "bad/b.jsonl"), None),
    (config(data_dir="good"), ("good/train.jsonl", "good/test.jsonl", "train.jsonl"), ["good/train.jsonl"]),
    (config(drop_labels=True), ("train.jsonl", "test.jsonl"), ["train.jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize(("yaml", "names", "taken"), DECLARED, ids=str)
def test_declared_files_alone_are_read_as_the_library_does(tmp_path, yaml, names, taken):
    import datasets

    folder = declaring(tmp_path, yaml, *names)
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    if taken is None:  # the library reads test.jsonl alone, here the files that name no split are read
        assert list(found) == ["test"]
        taken = ["train/a.jsonl"]
    else:
        assert sorted(found["train"]["text"]) == taken
    assert read(folder) == taken
    assert "left out: " in LocalFiles(path=folder).chosen().note


def test_the_log_says_what_is_not_declared(tmp_path):
    folder = declaring(tmp_path, config(data_files=A_SPLIT), "a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")
    assert LocalFiles(path=folder).chosen().note == (
        f"split train read; left out: not declared in README.md (2 files), test (1 file). Name another as {folder}:test"
    )
    with raises("data.eval_split_unnamed"):
        require_sources(parse_sources(str(folder)), to_evaluate=True)
    folder = declaring(tmp_path / "other", config(data_files="a.jsonl"), "a.jsonl", "test.jsonl")
    assert LocalFiles(path=folder).chosen().note == "split train read; left out: not declared in README.md (1 file)"
    require_sources(parse_sources(str(folder)), to_evaluate=True)


def test_a_split_that_is_not_read_may_be_missing(tmp_path):
    folder = declaring(tmp_path, config(data_files=A_SPLIT), "a.jsonl")
    assert read(folder) == ["a.jsonl"]
    with raises("data.declared_files_missing"):
        read(folder, "test")


@pytest.mark.parametrize(
    ("yaml", "code"),
    [
        *((f"configs: {value}", "readme_not_understood") for value in ("5", "x", "{data_files: a.jsonl}", "[5]")),
        *((config(data_files=value), "readme_not_understood") for value in (
            {"train": "a.jsonl"}, 5, [], [5], ["a.jsonl", {"split": "test", "path": "b.jsonl"}], [{"split": "train"}],
            [{"split": "train", "path": 5}], [{"split": 7, "path": "a.jsonl"}], [A_SPLIT[0], A_SPLIT[0]], "**.jsonl",
            "/a.jsonl", "../a.jsonl", "https://hub/a.jsonl", "", [{"split": "a-b", "path": "a.jsonl"}],
        )),
        *((config(data_dir=value), "readme_not_understood") for value in (5, "..", "/", "hf://x")),
        ("configs: [", "readme_not_understood"),
        ("- a", "readme_not_understood"),
        *((config(data_files=value), "declared_files_missing") for value in (
            "gone.jsonl", ["a.jsonl", "gone*"], "{a,b}.jsonl", "README.md", "*.csv", "data", "A.jsonl",
        )),
        (config(data_dir="gone"), "declared_files_missing"),
    ],
)  # fmt: skip
def test_a_readme_that_is_not_understood_is_refused(tmp_path, yaml, code):
    folder = declaring(tmp_path, yaml, "a.jsonl", "b.jsonl")
    with raises(f"data.{code}", "README"):
        read(folder)


@pytest.mark.parametrize("readme", ["# Data\n", "---\n---\n# Data\n", "---\nlicense: mit\nconfigs:\n---\n", "---\nno end\n"])
def test_a_readme_that_declares_nothing(tmp_path, readme):
    folder = folder_of(tmp_path, "a.jsonl", "b.jsonl")
    (folder / "README.md").write_text(readme)
    assert read(folder) == ["a.jsonl", "b.jsonl"]
    (folder / ".huggingface.yaml").write_text(config(data_files="b.jsonl"))  # the library reads this, too
    assert read(folder) == ["b.jsonl"]


def test_what_the_library_writes_about_data_is_not_data(tmp_path):
    import datasets

    folder = folder_of(tmp_path, *SHARDS, "dataset_infos.json")
    assert len(read(folder)) == 2
    datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "a"}])).save_to_disk(tmp_path / "saved")
    with raises("data.saved_to_disk", "saved"):
        read(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("my_dev.jsonl", "validation"),
        ("chats.json", None),
        ("Test.JSON", "test"),
        ("train/test/a.json", "test"),
        ("attest.json", None),
        ("train2024.jsonl.gz", "train"),
    ],
)
def test_split_of(name, split):
    assert split_of(name) == split


def test_what_is_evaluated_on_is_named(tmp_path):
    """A folder's training split is not held out, so it is not evaluated on unless it is asked for."""
    folder = folder_of(tmp_path, "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")
    require_sources(parse_sources(str(folder)))
    with raises("data.eval_split_unnamed", "test"):
        require_sources(parse_sources(str(folder)), to_evaluate=True)
    for split in ("test", "train"):
        require_sources(parse_sources(f"{folder}:{split}"), to_evaluate=True)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "chats.json").write_text('[{"text": "x"}]')
    require_sources(parse_sources(str(tmp_path / "one")), to_evaluate=True)


def test_a_model_inside_the_data_is_named(tmp_path):
    folder = folder_of(tmp_path, "a.jsonl", "run/checkpoint-1/trainer_state.json", "run/checkpoint-1/config.json")
    with raises("data.model_inside_data", "checkpoint-1/config.json"):
        read(folder)
    (folder / "README.md").write_text(f"---\n{config(data_files='a.jsonl')}\n---\n")
    assert read(folder) == ["a.jsonl"]
    assert [each["text"] for each, _ in LocalFiles(path=folder / "run/checkpoint-1/config.json").objects()] == [
        "run/checkpoint-1/config.json"
    ]
