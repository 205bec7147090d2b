"""Tokenizers and chat templates: transformers' text, the assistant's tokens, hostile templates."""

import json
from pathlib import Path
from typing import Any

import pytest
from bounds import bounded

from kdtl_jax import language
from kdtl_jax.interop import decoders
from kdtl_jax.recipes import _language_text
from kdtl_jax.recipes._language_text import Shape

STORED = json.loads((Path(__file__).parent / "data" / "chat_templates.json").read_text("utf-8"))
MESSAGES = STORED["messages"]
CASES = {case["name"]: case for case in STORED["cases"]}
BYTES = language.byte_tokenizer()._replace(
    special={"bos_token": "<s>", "eos_token": "</s>"}
)  # fmt: skip


def with_template(template: str) -> language.Tokenizer:
    return BYTES._replace(chat_template=template)


def learned_text(chat: language.Chat) -> str:
    return BYTES.decode(chat.tokens[chat.learned].tolist())


@pytest.mark.parametrize("name", CASES)
def test_text_and_prompt_are_those_of_transformers(name: str) -> None:
    case = CASES[name]
    tokenizer = with_template(case["template"])
    assert language.chat_text(tokenizer, MESSAGES, case["variables"]) == case["text"]
    assert language.chat_prompt(tokenizer, MESSAGES[:-1], case["variables"]) == case["prompt"]
    chat = language.chat(tokenizer, MESSAGES, case["variables"])
    assert BYTES.decode(chat.tokens.tolist()) == case["text"]
    assert chat.tokens.shape == chat.learned.shape


def test_learned_is_what_the_assistant_says_and_its_end() -> None:
    marked = language.chat(with_template(CASES["generation"]["template"]), MESSAGES)
    assert learned_text(marked) == "4</s>7</s>"
    # Without marks: what a reply adds to the prompt for it.
    actual = language.chat(with_template(CASES["chatml"]["template"]), MESSAGES)
    assert learned_text(actual) == " 4 <|im_end|>\n7<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ (1, 2)[none.x.y] }}", "undefined|None"),
        ("{{ range(10000000) | length }}", "too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[-1].content }}{% if add_generation_prompt %}?{% endif %}", "does not begin"),
    ],
)
def test_a_template_that_raises_or_reaches_out_is_one_line(template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        language.chat(with_template(template), MESSAGES)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


def test_json_in_a_template_is_that_of_transformers() -> None:
    """Its filter's arguments in its order: `tojson(false, 1)` escapes nothing and indents."""

    def made(call: str) -> str:
        template = "{{ {'b': 'é<', 'a': [1]} | " + call + " }}"
        return language.chat_text(with_template(template), MESSAGES)

    assert made("tojson") == '{"b": "é<", "a": [1]}'
    assert made("tojson(true)") == '{"b": "\\u00e9<", "a": [1]}'
    assert made("tojson(false, 1)") == '{\n "b": "é<",\n "a": [\n  1\n ]\n}'
    assert made("tojson(separators=(',', ':'), sort_keys=true)") == '{"a":[1],"b":"é<"}'
    with pytest.raises(ValueError, match="default"):
        made("tojson(default=1)")


def test_each_text_is_rendered_once() -> None:
    calls = 0

    def count(text: str) -> str:
        nonlocal calls
        calls += 1
        return text

    template = "{{ count('') }}" + CASES["chatml"]["template"]
    language.chat(
        with_template(template), MESSAGES, {**CASES["chatml"]["variables"], "count": count}
    )
    replies = sum(message["role"] == "assistant" for message in MESSAGES)
    assert calls == 2 * replies + (MESSAGES[-1]["role"] != "assistant")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "passes"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
         "passes"),
        ("{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}"
         "{% endfor %}", "characters"),
        ("{% set n = namespace(x=[1]) %}{% for i in range(50) %}{% set n.x = n.x + n.x %}"
         "{% endfor %}", "entries"),
        ("{{ 'a' * 10**9 }}", "characters"),
        ("{{ 2 ** (10 ** 9) }}", "characters"),
        ("{{ '%1000000000d' % 1 }}", "too wide"),
        ("{{ '{:1000000000}'.format(1) }}", "too wide"),
        ("{{ 'x' | center(10**9) }}", "above 100,000 in center"),
        ("{{ 'x'.ljust(10**9) }}", "above 100,000 in ljust"),
        ("{{ range(9999) | join('x' * 9999) }}", "characters"),
        ("{{ ('x' * 9999).join(range(9999) | map('string')) }}", "characters"),
        ("{{ ('x' * 9999).replace('x', 'y' * 9999) }}", "characters"),
    ],
)  # fmt: skip
def test_a_template_that_would_take_hours_or_terabytes(template: str, says: str) -> None:
    with bounded(), pytest.raises(ValueError, match=f"chat_template: .*{says}"):
        language.chat_text(with_template(template), MESSAGES)


def test_without_a_template() -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        language.chat(BYTES, MESSAGES)


def folder_with(tmp_path: Path, about: Any, config: Any) -> Path:
    language.write_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_is_the_bytes_that_were_written(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the hub extra is not installed")
    about = {
        "eos_token": {"content": "<|endoftext|>"},
        "pad_token": "<|endoftext|>",
        "chat_template": [{"name": "rag", "template": "?"}, {"name": "default", "template": "!"}],
    }
    folder = folder_with(tmp_path, about, {"bos_token_id": 7, "eos_token_id": [256, 3]})
    actual = language.tokenizer(folder)
    text = "naïve 🙂 text\n\ttwo"
    assert actual.encode(text) == BYTES.encode(text) and actual.decode(actual.encode(text)) == text
    assert actual.vocabulary == dict(BYTES.vocabulary) and actual.size == 257
    assert (actual.bos, actual.eos, actual.pad, actual.chat_template) == (7, 256, 256, "!")
    assert actual.special == dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
    (folder / "chat_template.jinja").write_text("from a file")
    assert language.tokenizer(folder / "tokenizer.json").chat_template == "from a file"
    assert "chat_template.jinja" in decoders.TOKENIZER_FILES
    # Padding and truncation that a file asks for would change texts behind one's back.
    asked = json.loads((folder / "tokenizer.json").read_text())
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    for about in ({"truncation": cut}, {"padding": padding}):
        (folder / "tokenizer.json").write_text(json.dumps({**asked, **about}))
        plain = language.tokenizer(folder)
        assert plain.encode("four") == list(b"four") == plain.framed("four", 9)
        assert plain.framed("four", 2) == BYTES.framed("four", 2) == list(b"fo")
    language.write_byte_tokenizer(folder)
    assert language.tokenizer(folder).fingerprint == actual.fingerprint != BYTES.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", "\x00" * 9, "is not a tokenizer"),
        ("tokenizer_config.json", "[" * 90_000, "is not JSON"),
        ("config.json", "[1]", "must hold a JSON object"),
    ],
)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, name: str, content: str, says: str) -> None:
    pytest.importorskip("tokenizers", reason="the hub extra is not installed")
    folder = folder_with(tmp_path, {}, {})
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=says) as error:
        language.tokenizer(folder)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        language.tokenizer(tmp_path / "nowhere")


def read(file: Path, tokenizer: language.Tokenizer) -> _language_text.Text:
    return _language_text.read([str(file)], tokenizer, Shape(10, 6, 0.5), file.parent / "rows")


def test_lines_of_messages_are_prompts_and_replies(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    line = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yz"}]}
    pair = {"prompt": line["messages"][:1], "completion": line["messages"][1:]}
    for each in (line, pair):
        file = tmp_path / "lines.jsonl"
        file.write_text(f"{json.dumps(each)}\n" * 2)
        rows = read(file, with_template(template)).train
        assert rows.inputs["tokens"][0, :6].tolist() == [*b"u:x;a:"]
        assert rows.inputs["tokens"][0, 6:9].tolist() == [*b"yz;"]
        assert rows.inputs["learned"].tolist() == [[False] * 6 + [True] * 3 + [False]]
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl: line 1: there is no reply to learn"):
        read(file, with_template(template))
