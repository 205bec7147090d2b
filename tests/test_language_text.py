"""Text for language models: files to records, documents and rows; what is refused, by name."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from kdtl_jax import _files, language
from kdtl_jax.recipes import _language_text
from kdtl_jax.recipes._language_text import Shape, Text
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import data

BYTES = language.byte_tokenizer()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HINT = {"privileged": "123456 "}
CHATTY = BYTES._replace(chat_template=TEMPLATE)


def rows_of(file: Path, length: int, prompt: int, held_out: float) -> Text:
    shape = Shape(length, prompt, held_out)
    return _language_text.read([str(file)], BYTES, shape, file.parent / "rows")


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def text_of(document: language.Document) -> tuple[str, str]:
    """All of a document, and what is learned of it."""
    return BYTES.decode(document.tokens), BYTES.decode(document.tokens[document.learned])


def documents(*values: dict[str, Any]) -> list[language.Document]:
    results = [language.Record(f"line {i}", value) for i, value in enumerate(values, 1)]
    return list(language.documents(results, CHATTY))


def test_a_broken_line_is_named_by_its_number(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    for line, says in (
        ('{"text": ', "line 2 is not JSON"),
        ('{"words": "?"}', "line 2 has neither"),
        ("[1]", "line 2 has neither"),
        ('{"text": 5}', "line 2: 'text' must be text"),
        ('{"text": ""}', "line 2: 'text' is empty"),
        ('{"prompt": "a", "completion": "b"}', "line 2 has a different form from .* line 1"),
    ):
        file.write_text(f'{{"text": "a good one"}}\n{line}\n')
        with pytest.raises(ValueError, match=says):
            rows_of(file, 4, 2, 0.01)
    file.write_text('{"text": "a good one"}\n{"text": "cut sh')
    with pytest.raises(ValueError, match="line 2 is not JSON.*The file ends within it: complete"):
        rows_of(file, 4, 2, 0.01)
    file.write_bytes(b'{"text": "a good one"}\n\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 3 is not UTF-8"):
        rows_of(file, 4, 2, 0.5)


def test_lines_end_at_newlines_alone_and_documents_end_in_every_part(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "ab\u2028cd"}\n{"text": "efgh"}\n', encoding="utf-8")
    text = rows_of(file, 5, 2, 0.5)
    assert text.train.inputs["tokens"].tolist() == [list(b"ab\xe2\x80\xa8")]
    assert text.held_out.inputs["tokens"].tolist() == [[*b"efgh", 256]]
    for content, says in (
        ("", "no row of --length 5"),
        ('{"text": "alone"}\n', "no row of --length 5 tokens held out"),
        (
            '{"prompt": "", "completion": ""}\n' * 2,
            "line 1: prompt and completion must not be empty",
        ),
        ('{"prompt": [], "completion": 5}\n' * 2, "line 1: messages must be a list"),
    ):
        file.write_text(content)
        with pytest.raises((ValueError, UsageError), match=says):
            rows_of(file, 5, 2, 0.5)


def test_a_line_cannot_call_itself_a_chat(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "a", "completion": "b", "is_chat": true}\n' * 2)
    rows = rows_of(file, 4, 2, 0.5).train
    assert rows.inputs["tokens"].tolist() == [[0, *b"ab", 256]]


def test_answers_stand_after_their_prompts_and_end(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "ab", "completion": "cde"}\n' * 2)
    text = rows_of(file, 8, 3, 0.5)
    rows = text.train
    tokens = [0, *b"abcde", 256, 0]
    assert rows.inputs["tokens"].tolist() == [tokens]
    assert rows.inputs["segments"].tolist() == [[0, 1, 1, 1, 1, 1, 1, 0]]
    assert rows.inputs["learned"].tolist() == [[False] * 3 + [True] * 4 + [False]]
    assert _language_text.learned_bytes(rows.inputs, BYTES) == text.held_out_bytes == 3
    assert rows.inputs["privileged"]["tokens"].tolist() == [[0, 0, 0, *b"cdeab"]]
    assert rows.cut == 0 and rows_of(file, 5, 2, 0.5).train.cut == 1
    # The text alone, for measuring on it; and what a self-taught teacher is told.
    assert (
        _language_text.pieces(rows).tolist() == [[*b"abcde", 256]]
        and text.teacher_context == "its answer"
    )
    [row] = language.after_prompts(documents({"prompt": "a", "completion": "b"} | HINT), 6, 2)
    assert row.privileged is not None and row.is_cut
    assert BYTES.decode(row.privileged[0]) == "3456 a"


def test_documents_in_a_row_are_segments_of_their_own(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "abc"}\n{"text": "defg"}\n{"text": "hijklmnop"}\n')
    rows = rows_of(file, 8, 2, 0.3).train
    assert rows.inputs["tokens"].tolist() == [[*b"abc", 256, *b"defg"]]
    assert rows.inputs["segments"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]]
    # The first byte of a text is not predicted.
    assert _language_text.learned_bytes(rows.inputs, BYTES) == 2 + 3


def test_what_is_told_before_a_row_is_of_the_same_document():
    rows = list(language.concatenated(documents({"text": "abcdefg"}, {"text": "hi"}), 4, prompt=2))
    assert [bytes(row.tokens.tolist()[:3]) for row in rows] == [b"abc", b"efg"]
    contexts = [tuple(x.tolist() for x in row.privileged or ()) for row in rows]
    assert contexts == [([0, 0, *b"ab"], [0, 0, 1, 1]), ([*b"cdef"], [1, 1, 1, 1])]


def test_conversations_learn_what_the_assistant_says_and_only_the_completion_where_there_is_one():
    talk = [
        said("user", "2+2?"),
        said("assistant", "4"),
        said("user", "so?"),
        said("assistant", "5"),
    ]
    whole, answer, secret = documents(
        {"messages": talk},
        {"prompt": talk[:3], "completion": talk[3:]},
        {"messages": talk[:2], "privileged": "psst"},
    )
    assert text_of(whole) == ("<user>2+2?;<assistant>4;<user>so?;<assistant>5;", "4;5;")
    assert text_of(answer) == (text_of(whole)[0], "5;")
    assert BYTES.decode(answer.privileged) == "5;" and BYTES.decode(secret.privileged) == "psst"
    [row] = language.after_prompts([whole], 60, 50)
    assert BYTES.decode(row.tokens[row.learned]) == "5;"
    for value, says in (
        ({"messages": talk[:1]}, "line 1: there is no reply to learn"),
        ({"messages": [{"content": "?"}]}, "line 1: messages must be a list"),
    ):
        with pytest.raises(ValueError, match=says):
            documents(value)
    refusing = CHATTY._replace(chat_template="{{ raise_exception('no system prompt') }}")
    with pytest.raises(ValueError, match="here: .*no system prompt"):
        list(language.documents([language.Record("here", {"messages": talk})], refusing))


def test_packed_rows_lose_nothing_that_is_learned():
    rng = np.random.default_rng(0)
    given, rest = [], []
    for i, size in enumerate(rng.integers(2, 30, 40)):
        learned = rng.random(size) < 0.5
        given.append(language.document(np.arange(size) + 100 * i, learned))
        rest += given[-1].tokens[1:][learned[1:]].tolist()
    rows = language.batch(language.packed(given, 12, window=16))
    targets, where = language.next_tokens(rows)
    assert sorted(np.asarray(targets)[np.asarray(where)].tolist()) == sorted(rest)
    full = (rows["segments"] > 0).mean()
    assert full > 0.85, full
    with pytest.raises(ValueError, match="length"):
        list(language.packed(given, 1))


def test_the_parts_of_files_are_disjoint_and_whole(tmp_path: Path):
    lines = [f"line {i} of the fox: é" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "one line.txt").write_text("é" * 101, encoding="utf-8")
    for file in tmp_path.iterdir():
        for share in (0.33, 0.5, 0.951):
            parts = [
                "".join(record.value["text"] for record in language.records(file, between))
                for between in ((0.0, share), (share, 1.0))
            ]
            assert "".join(parts) == file.read_text(encoding="utf-8") and all(parts)
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no")
    names = [file.name for file in language.text_files(tmp_path)]
    assert names == ["a.txt", "b.jsonl", "one line.txt"]
    assert [r.value for r in language.records(tmp_path / "b.jsonl", (0.5, 1))] == [{"text": "b"}]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        language.text_files([tmp_path / "nowhere"])


def test_long_texts_come_in_pieces_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdtl_jax.language._records.CHUNK_BYTES", 7)
    file = tmp_path / "a.txt"
    file.write_text("ab\ncd\nefghé\nij\n" + "é" * 20, encoding="utf-8")
    actual = list(language.records(file))
    assert "".join(r.value["text"] for r in actual) == file.read_text(encoding="utf-8")
    assert actual[0].value["text"] == "ab\ncd\nefghé\n" and len(actual) > 3
    assert [r.begins for r in actual] == [True] + [False] * (len(actual) - 1)
    assert [r.ends for r in actual] == [False] * (len(actual) - 1) + [True]
    file.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="from byte 0 on is not UTF-8"):
        list(language.records(file))


def test_parquet_is_read_by_row_groups(tmp_path: Path):
    file = tmp_path / "a.parquet"
    talks = [[said("user", f"{i}?"), said("assistant", str(i))] for i in range(7)]
    parquet.write_table(arrow.table({"messages": talks, "id": range(7)}), file, row_group_size=2)
    actual = list(language.records(file, (0.5, 1)))
    places = [record.place.rsplit(": ")[1] for record in actual]
    assert places == ["row 4", "row 5", "row 6", "row 7"]
    assert [text_of(d)[1] for d in language.documents(actual, CHATTY)] == ["3;", "4;", "5;", "6;"]
    parquet.write_table(arrow.table({"words": ["a"]}), file)
    with pytest.raises(ValueError, match="its columns are 'words', but neither 'text'"):
        list(language.records(file))
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="a.parquet"):
        list(language.records(file))


def test_rows_on_disk_are_those_in_memory_in_an_order_of_key_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"prompt": f"{i}", "completion": "x" * (i % 5 + 1)}) for i in range(20)]
    file.write_text("\n".join(lines))
    inside = rows_of(file, 8, 3, 0.2)
    monkeypatch.setattr(_language_text, "IN_MEMORY", 10)
    outside = rows_of(file, 8, 3, 0.2)
    assert isinstance(outside.train.inputs["tokens"], np.memmap)
    jax.tree.map(np.testing.assert_array_equal, outside.train.inputs, inside.train.inputs)

    def source(step: int) -> Any:
        def read(epoch: int, rows: np.ndarray) -> Any:
            return {"inputs": data.take_rows(outside.train.inputs, rows)}

        return data.stream(read, 16, 3, key=jax.random.key(1))(step)

    straight = [batch["inputs"]["tokens"] for batch, _ in zip(source(0), range(9), strict=False)]
    resumed = [batch["inputs"]["tokens"] for batch, _ in zip(source(4), range(5), strict=False)]
    np.testing.assert_array_equal(np.stack(straight[4:]), np.stack(resumed))
    # The same text is not read again; another one replaces it; a damaged one is written anew.
    folder = tmp_path / "rows" / "train"
    assert language.write_rows(folder, iter(()), made_from={"text": ""}) == 16
    [row] = language.after_prompts(documents({"prompt": "a", "completion": "b"}), 4, 2)
    (folder / f".tokens.bin.a{_files.TEMPORARY}").write_bytes(b"left by a kill")
    (folder / ".draft.tmp").touch()
    assert language.write_rows(folder, [row], made_from={"text": "another"}) == 1
    assert [path.name for path in folder.glob(".*")] == [".draft.tmp"]
    (folder / "tokens.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="no complete rows"):
        language.open_rows(folder)
    with pytest.raises(ValueError, match="there are no rows"):
        language.write_rows(folder, iter(()), made_from={"text": "another"})


def test_rows_in_memory_take_little_more_than_their_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdtl_jax.language._packing.ROWS_PER_STACK", 100)
    text = language.document(np.arange(16_000) % 50)
    want = [*language.concatenated([text], 8, prompt=2)]
    tracemalloc.start()
    actual = language.batch(language.concatenated([text], 8, prompt=2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * sum(x.nbytes for x in jax.tree.leaves(actual))
    assert actual["tokens"].shape == (2000, 8) and actual["learned"].dtype == np.bool_
    for i in (0, 99, 100, 1999):
        for name in ("tokens", "segments", "learned"):
            np.testing.assert_array_equal(actual[name][i], getattr(want[i], name))
        context = actual["privileged"]["tokens"][i], actual["privileged"]["segments"][i]
        np.testing.assert_array_equal(context, want[i].privileged)


def test_masks_of_completions_are_by_position():
    tokens = jnp.asarray([[7, 2, 2, 2]])
    actual = language.completion_mask(tokens, padding=2, ends=(2,))
    assert actual.tolist() == [[True, True, False, False]]
    assert language.completion_mask(tokens, padding=None).all()
    zero = language.completion_mask(jnp.asarray([[5, 6, 0, 0]]), padding=0, ends=(2,))
    assert zero.tolist() == [[True, True, False, False]], "0 is a padding as any other"
