"""Local task files: every accepted form becomes lm-eval's own prompt; bad files name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketllm.errors import SourceError
from pocketllm.evaluate import harness, local_tasks
from pocketllm.evaluate.local_tasks import prepare

ARC = {
    "stem": "Where do seeds grow?",
    "choices": [{"text": "soil", "label": "1"}, {"text": "sun", "label": "2"}],
}
NESTED = {"text": ["soil", "sun"], "label": ["1", "2"]}
GROW = "Question: Where do seeds grow?\nAnswer:"
SWAG = {
    "activity_label": "Cooking",
    "ctx_a": "A man cooks.",
    "ctx_b": "he",
    "endings": ["eats.", "[x] runs."],
}
# (task, file, rows as they may come, prompt, choices, number of the right one): of lm-eval 0.4.13
FORMS: list[tuple[str, str, dict[str, Any], Any, Any, Any]] = [
    (
        "piqa",
        "piqa/valid.jsonl",
        {"goal": "Boil", "sol1": "Heat", "sol2": "Cool", "label": "1"},
        "Question: Boil\nAnswer:",
        ["Heat", "Cool"],
        1,
    ),
    (
        "winogrande",
        "winogrande/dev_xl.jsonl",
        {"sentence": "Ann sees Bo so _ waves.", "option1": "Ann", "option2": "Bo", "answer": "1"},
        0,
        ["Ann sees Bo so Ann", "Ann sees Bo so Bo"],
        "waves.",
    ),
    (
        "arc_easy",
        "arc_easy/test.jsonl",
        {"query": GROW, "choices": ["soil", "sun"], "gold": 1},
        GROW,
        ["soil", "sun"],
        1,
    ),
    (
        "arc_easy",
        "arc_easy/validation.jsonl",
        {"question": "Where do seeds grow?", "choices": NESTED, "answerKey": "2"},
        GROW,
        ["soil", "sun"],
        1,
    ),
    (
        "arc_challenge",
        "arc_challenge/ARC-Challenge-Test.jsonl",
        {"question": ARC, "answerKey": "1"},
        GROW,
        ["soil", "sun"],
        0,
    ),
    (
        "boolq",
        "boolq/val.jsonl",
        {"question": "is it", "passage": "It is.", "answer": True},
        "It is.\nQuestion: is it?\nAnswer:",
        ["no", "yes"],
        1,
    ),
    (
        "boolq",
        "boolq/dev.jsonl",
        {"question": "is it", "passage": "It is.", "title": "It", "label": 0},
        "It -- It is.\nQuestion: is it?\nAnswer:",
        ["no", "yes"],
        0,
    ),
    (
        "openbookqa",
        "openbookqa/test.jsonl",
        {"question": {**ARC, "stem": "Seeds need"}, "answerKey": "2"},
        "Seeds need",
        ["soil", "sun"],
        1,
    ),
    (
        "openbookqa",
        "openbookqa/test.jsonl",
        {"question_stem": "Seeds need", "choices": NESTED, "answerKey": "1"},
        "Seeds need",
        ["soil", "sun"],
        0,
    ),
    ("lambada_openai", "lambada/test.jsonl", {"text": "one two three"}, "one two", None, " three"),
    (
        "hellaswag",
        "hellaswag/validation.jsonl",
        {**SWAG, "label": 1},
        "Cooking: A man cooks. He",
        ["eats.", " runs."],
        1,
    ),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize(("name", "file", "row", "prompt", "choices", "target"), FORMS)
def test_prompts(
    name: str, file: str, row: dict[str, Any], prompt: Any, choices: Any, target: Any, tmp_path: Path
) -> None:
    write(tmp_path / file, row, row)
    task = local_tasks.local_tasks()[name]
    place = task.find(tmp_path)
    assert place is not None
    ready = prepare(task, *place)
    assert ready.source == file
    [loaded] = harness.load_tasks(str(ready.yaml))
    document = loaded.eval_docs[1]
    assert len(loaded.eval_docs) == 2
    assert loaded.doc_to_text(document) == prompt
    if choices is not None:
        assert loaded.doc_to_choice(document) == choices
    found = loaded.doc_to_target(document)
    assert (int(found) if isinstance(target, int) else found) == target


@pytest.mark.parametrize("name", sorted(local_tasks.local_tasks()))
def test_everything_but_the_data_is_lm_evals_own(name: str, tmp_path: Path) -> None:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    task = local_tasks.local_tasks()[name]
    stock = load_yaml(Path(lm_eval.tasks.__file__).parent / task.include)
    form = next(form for form in FORMS if form[0] == name)
    place = task.find(write(tmp_path / form[1], form[2]).parents[1])
    assert place is not None
    own = load_yaml(prepare(task, *place).yaml)
    data = {"dataset_path", "dataset_name", "dataset_kwargs", "fewshot_split"}
    data |= {"training_split", "validation_split", "test_split"}
    assert {k: v for k, v in own.items() if k not in data} == {
        k: v for k, v in stock.items() if k not in data
    }
    split = stock.get("test_split") or stock["validation_split"]
    assert task.files[0][1] == split  # the file preferred is of the split that lm-eval scores


def test_labels_in_a_file_of_their_own(tmp_path: Path) -> None:
    row = {"goal": "g", "sol1": "a", "sol2": "b"}
    file = write(tmp_path / "piqa" / "valid.jsonl", row, row)
    labels = write(tmp_path / "piqa" / "valid-labels.lst", "1", "0")
    ready = prepare(local_tasks.local_tasks()["piqa"], file, "validation")
    [loaded] = harness.load_tasks(str(ready.yaml))
    assert [document["label"] for document in loaded.eval_docs] == [1, 0]
    write(labels, "1")
    with pytest.raises(SourceError, match="has 2 rows, its labels file 1"):
        prepare(local_tasks.local_tasks()["piqa"], file, "validation")


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("piqa", {"goal": "g", "sol1": "a", "label": 0}, "line 2: no field 'sol2'; wanted one JSON object"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}, "label 2 is not one of the 2 choices"),
        ("piqa", "{not json", "line 2: .*wanted one JSON"),
        ("piqa", "[1]", "line 2: .*wanted one JSON"),
        ("winogrande", {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}, "not found"),
        ("arc_easy", {"question": "q", "choices": NESTED, "answerKey": "Z"}, "'Z' is not in list"),
        ("arc_easy", {"query": "q", "choices": ["a"], "gold": 3}, "label 3 is not one of the 1 choices"),
        ("hellaswag", {**SWAG, "label": ""}, "invalid literal"),
    ],
)
def test_bad_rows(name: str, row: Any, words: str, tmp_path: Path) -> None:
    good = next(form[2] for form in FORMS if form[0] == name)
    file = write(tmp_path / "rows.jsonl", good, row)
    with pytest.raises(SourceError, match=words) as error:
        prepare(local_tasks.local_tasks()[name], file, "validation")
    assert "rows.jsonl" in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    task = local_tasks.local_tasks()["lambada_openai"]
    with pytest.raises(SourceError, match="contains no rows"):
        prepare(task, write(tmp_path / "empty.jsonl", ""), "test")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "gr\xfc\xdfe"}')
    with pytest.raises(SourceError, match="cannot be read as UTF-8"):
        prepare(task, tmp_path / "latin.jsonl", "test")
    with pytest.raises(SourceError, match="cannot be read"):
        prepare(task, tmp_path / "nowhere.jsonl", "test")


def test_which_file_is_taken(tmp_path: Path) -> None:
    task = local_tasks.local_tasks()["arc_easy"]
    assert task.find(None) is None and task.find(tmp_path) is None
    validation = write(tmp_path / "arc_easy" / "validation.jsonl", {})
    assert task.find(tmp_path) == (validation, "validation")
    test = write(tmp_path / "arc_easy" / "test.jsonl", {})
    assert task.find(tmp_path) == (test, "test")
