"""Reading the user's files: every kind, every bad one, with the place of each row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from launcher.errors import DataError
from launcher.facts.files import data_files, is_dataset_id
from launcher.facts.formats import detect_format, read_examples, to_example
from launcher.facts.rows import Located, read_rows
from launcher.recipe.schema import DataSource

ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"text": "three"}]


def source(path: Path, **fields: str) -> DataSource:
    return DataSource(path=str(path), **fields)


def texts(path: Path, **fields: str) -> list[str]:
    return [located.row["text"] for located in read_rows(source(path, **fields))]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def problems(path: Path, **fields: str) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        list(read_examples(source(path, **fields)))
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", lines(ROWS)),
        ("blank lines.jsonl", lines(ROWS).replace("\n", "\n\n")),
        ("crlf.jsonl", lines(ROWS).replace("\n", "\r\n")),
        ("bom.jsonl", "\ufeff" + lines(ROWS)),
        ("list.json", json.dumps(ROWS)),
        ("object.json", json.dumps({"version": 1, "data": ROWS}, indent=1)),
        ("bom.json", "\ufeff" + json.dumps(ROWS)),
        ("lines under another name.json", lines(ROWS)),
        ("rows.csv", "text\none\nzwei ü\nthree\n"),
        ("bom.csv", '\ufefftext\r\none\r\n"zwei ü"\r\nthree\r\n'),
        ("rows.tsv", "text\tid\none\t1\nzwei ü\t2\nthree\t3\n"),
        ("documents.txt", "one\n\n\nzwei ü\n \nthree"),
    ],
)
def test_every_text_kind_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    """A row is a row, however it was written down, also when compressed."""
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert texts(path) == ["one", "zwei ü", "three"]
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    assert texts(packed) == ["one", "zwei ü", "three"]


def test_parquet_and_saved_datasets_give_the_same_rows(tmp_path: Path) -> None:
    """Columnar files are read batch by batch; a save_to_disk folder through its own list of files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == ["one", "zwei ü", "three"]

    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    with (
        pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (saved / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert texts(tmp_path / "saved") == ["one", "zwei ü", "three"]
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        texts(tmp_path / "saved", split="test")


def test_a_text_document_keeps_its_lines_and_the_line_it_starts_at(tmp_path: Path) -> None:
    """In .txt files a blank line ends a document."""
    path = tmp_path / "book.txt"
    path.write_text("\nfirst line\nsecond line\n\nnext document\n")
    found = list(read_rows(source(path)))
    assert [(row.line, row.row["text"]) for row in found] == [(2, "first line\nsecond line"), (5, "next document")]


def test_a_corpus_without_blank_lines_is_broken_at_line_ends(tmp_path: Path) -> None:
    """Three million characters in one block would be tokenized in one piece otherwise; nothing is lost."""
    path = tmp_path / "corpus.txt"
    written = [f"sentence number {number} of a long corpus" for number in range(80_000)]
    path.write_text("\n".join(written))
    found = list(read_rows(source(path)))
    assert 3 <= len(found) <= 5
    assert "\n".join(row.row["text"] for row in found) == "\n".join(written)
    assert found[1].row["text"].startswith(f"sentence number {found[1].line - 1} ")


def test_rows_know_their_place(tmp_path: Path) -> None:
    """Line files count lines, others count rows."""
    (tmp_path / "a.jsonl").write_text("\n" + lines(ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert next(row.where for row in read_rows(source(tmp_path / "a.jsonl"))) == f"{tmp_path}/a.jsonl:2"
    assert next(row.where for row in read_rows(source(tmp_path / "a.json"))) == f"{tmp_path}/a.json: row 1"


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    """Hidden files and the side files of data sets are no data."""
    (tmp_path / "b.jsonl").write_text(lines([{"text": "2"}]))
    (tmp_path / "a.jsonl").write_text(lines([{"text": "1"}]))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.txt").write_text("3")
    (tmp_path / "dataset_info.json").write_text('{"not": "rows"}')
    (tmp_path / ".hidden.jsonl").write_text("not json")
    (tmp_path / "README.md").write_text("not data")
    assert texts(tmp_path) == ["1", "2", "3"]


def test_a_folder_with_splits_gives_only_the_asked_one(tmp_path: Path) -> None:
    """Training on the test file of a downloaded data set would go unnoticed."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test", "validation"):
        (tmp_path / "data" / f"{split}-00000-of-00001.jsonl").write_text(lines([{"text": split}]))
    assert texts(tmp_path) == ["train"]
    assert texts(tmp_path, split="test") == ["test"]
    assert texts(tmp_path, split="val") == ["validation"]


def test_malformed_rows_are_listed_with_their_lines_and_counted(tmp_path: Path) -> None:
    """The first five are shown, all are counted, and good rows between them do not hide them."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + '{"text": "trailing",}\n' * 6 + "[1]\n")
    found = problems(path)
    assert len(found) == 6
    assert found[0].startswith(f"{path}:2: not JSON: ")
    assert found[4].startswith(f"{path}:6: ")
    assert "7 bad rows in all" in found[5]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("latin1.jsonl", '{"text": "gr\xfcn"}\n'.encode("latin-1"), ":1: not UTF-8: byte 0xfc at byte 13 of the line"),
        ("utf16.jsonl", lines(ROWS).encode("utf-16"), ":1: UTF-16 text; save the file as UTF-8"),
        ("latin1.csv", b"text\nok\ngr\xfcn\n", ": not UTF-8 after line"),
        ("latin1.json", b'["gr\xfcn"]', ": not UTF-8: byte 0xfc at byte 5"),
        ("cut.json", b'[{"text": "one"},\n {"te', ":2:3: not JSON: "),
        ("number.json", b"17", 'expected a list of rows or {"data": [...]}, found a number 17'),
        ("object.json", b'{"version": 1}', "found an object with 'version'"),
        ("strings.json", b'["one"]', ': row 1: a row must be an object, found a string "one"'),
        ("short.csv", b"a,b\n1,2\n1\n", ":3: fewer fields than the 2 of the header"),
        ("long.csv", b"a,b\n1,2,3\n", ":2: more fields than the 2 of the header"),
        ("quote.csv", b'a,b\n"1"x,2\n', ":2: not CSV: "),
        ("cut.parquet", b"PAR1 and then nothing", ": not a complete parquet file"),
        ("cut.arrow", b"\xff\xff\xff\xff\x10\x00", ": not a complete arrow stream"),
        ("cut.jsonl.gz", gzip.compress(lines(ROWS * 50).encode(), mtime=0)[:60], ": damaged or truncated gzip file"),
        ("no.jsonl.gz", lines(ROWS).encode(), ": damaged or truncated gzip file"),
        ("empty.jsonl", b"", ": no rows"),
        ("blank.jsonl", b"\n \n", ": no rows"),
        ("header.csv", b"text\n", ": no rows"),
        ("empty.json", b"", ": no rows"),
        ("list.json", b"[]", ": no rows"),
        ("rows.xlsx", b"PK", ": cannot read this kind of file; expected one of .jsonl"),
    ],
)
def test_unreadable_files_say_what_and_where(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    """Never a traceback, never silence."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(source(path)))
    assert caught.value.problems[0].startswith(str(path))
    assert expected in caught.value.problems[0]
    assert caught.value.exit_code == 3


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    """Most missing files are typos."""
    (tmp_path / "chats.jsonl").write_text(lines(ROWS))
    with pytest.raises(DataError, match=r"chat\.jsonl: no such file or folder; did you mean .*/chats\.jsonl\?"):
        list(read_rows(source(tmp_path / "chat.jsonl")))
    with pytest.raises(DataError, match=r"the folder .*/elsewhere does not exist either"):
        list(read_rows(source(tmp_path / "elsewhere" / "chats.jsonl")))


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(DataError, match=r"no data file in this folder; expected \.jsonl.*found notes\.md"):
        data_files(source(tmp_path))


@pytest.mark.parametrize(
    ("path", "is_id"),
    [
        ("tatsu-lab/alpaca", True),
        ("HuggingFaceH4/ultrachat_200k", True),
        ("data/chats.jsonl", False),
        ("data/chats.jsonl.gz", False),
        ("./data/chats", False),
        ("/shared/chats", False),
        ("chats", False),
        ("a/b/c", False),
    ],
)
def test_ids_are_owner_slash_name(path: str, is_id: bool) -> None:
    assert is_dataset_id(path) is is_id


def test_an_existing_path_is_never_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert not is_dataset_id("owner/name")


def test_ids_are_left_to_the_job() -> None:
    with pytest.raises(DataError, match="only the job can read it"):
        list(read_rows(DataSource(path="tatsu-lab/alpaca")))


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def located(row: dict) -> Located:
    return Located("data.jsonl", 7, row)


@pytest.mark.parametrize(
    ("row", "format", "turns"),
    [
        ({"messages": CHAT}, "messages", ["user: Hi", "assistant: Hello"]),
        ({"conversations": CHAT}, "messages", ["user: Hi", "assistant: Hello"]),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            },
            "sharegpt",
            ["system: Be kind.", "user: Hi", "assistant: Hello"],
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "alpaca",
            ["user: Add.\n\n1 2", "assistant: 3"],
        ),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "alpaca", ["user: Sing.", "assistant: La"]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt_completion", ["user: Hi", "assistant: Hello"]),
    ],
)
def test_chat_formats_are_recognised_and_become_messages(row: dict, format: str, turns: list[str]) -> None:
    """Five ways to write a chat, one way to train it."""
    assert detect_format([located(row)]) == format
    example = to_example(located(row), "auto")
    assert [f"{message['role']}: {message['content']}" for message in example.messages] == turns


def test_plain_formats_keep_their_text() -> None:
    example = to_example(located({"prompt": "2+2=", "completion": "4"}), "auto")
    assert (example.prompt, example.completion, example.messages) == ("2+2=", "4", ())
    assert to_example(located({"text": "A story."}), "auto").text == "A story."


def test_system_and_tool_turns_are_kept_for_the_template() -> None:
    """OpenAI's tool calls: null content beside a call is allowed, extra keys reach the template."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    result = {"role": "tool", "content": "3", "tool_call_id": "1", "name": None}
    row = {
        "messages": [{"role": "system", "content": "S"}, *CHAT[:1], call, result, CHAT[1]],
        "tools": '[{"type": "f"}]',
    }
    example = to_example(located(row), "messages")
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["content"] == ""
    assert "name" not in example.messages[3]
    assert example.tools == ({"type": "f"},)


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"text": "x"}, "messages", "column 'messages' is missing (format messages needs messages; found: text)"),
        ({"messages": None}, "messages", "column 'messages' is null"),
        ({"messages": "Hi"}, "messages", "'messages' must be a list of messages, found a string \"Hi\""),
        ({"messages": []}, "messages", "'messages' is an empty list"),
        ({"messages": ["Hi"]}, "messages", "messages[0] must be an object with 'role' and 'content'"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "messages",
            "messages[0]: unknown role 'bot'; expected one of",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages",
            "messages[0]: 'content' must be text, found a number 3",
        ),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0]: 'content' must be text, found null"),
        ({"messages": CHAT[:1]}, "messages", "no assistant turn: nothing to train on"),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": " "}]},
            "messages",
            "every assistant turn is empty",
        ),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "sharegpt", "conversations[0]: unknown from 'bot'"),
        ({"instruction": "Add.", "output": ""}, "alpaca", "'output' is empty"),
        ({"instruction": "Add."}, "alpaca", "column 'output' is missing"),
        ({"instruction": "Add.", "input": 3, "output": "x"}, "alpaca", "'input' must be text, found a number 3"),
        ({"prompt": "x", "completion": " "}, "prompt_completion", "'completion' is empty: nothing to train on"),
        ({"prompt": "x", "completion": CHAT}, "prompt_completion", "must be both text or both lists of messages"),
        ({"prompt": CHAT, "completion": CHAT[:1]}, "prompt_completion", "no assistant turn"),
        ({"text": ""}, "text", "'text' is empty"),
        ({"messages": CHAT, "tools": "["}, "messages", "'tools' is not JSON"),
        ({"question": "x", "answer": "y"}, "auto", "no format has these columns: answer, question"),
    ],
)
def test_rows_of_the_wrong_shape_say_why(row: dict, format: str, expected: str) -> None:
    """Place, reason, value found."""
    with pytest.raises(DataError) as caught:
        to_example(located(row), format)
    assert str(caught.value).startswith("data.jsonl:7: ")
    assert expected in str(caught.value)


def test_schema_problems_and_unreadable_lines_are_reported_together(tmp_path: Path) -> None:
    """One pass shows everything that is wrong with a file."""
    path = tmp_path / "mixed.jsonl"
    path.write_text(lines([{"messages": CHAT}]) + "{oops\n" + lines([{"messages": CHAT[:1]}]))
    found = problems(path)
    assert found[0].startswith(f"{path}:2: not JSON")
    assert found[1] == f"{path}:3: no assistant turn: nothing to train on"
