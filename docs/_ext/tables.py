"""Tables of methods, pages of commands and of benchmarks, as Markdown, from the package."""

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reference

from kdtl_jax import language, methods
from kdtl_jax.cli import COMMANDS

NEEDS = {
    "logits": "Logits",
    "labels": "Labels alone",
    "features": "Features",
    "maps": "Feature maps",
    "networks": "Derivatives of both networks",
    "tokens": "Hidden states and attention of transformers",
}


def pages(root: Path) -> Iterator[tuple[str, str]]:
    """`(path, Markdown)` of every page; `root` holds the benchmarks."""
    yield "methods/index.md", methods_index()
    for needs, title in NEEDS.items():
        yield f"methods/{needs}.md", methods_page(needs, title)
    yield "methods/language.md", language_page()
    yield from commands()
    yield "benchmarks.md", benchmarks(root / "benchmarks")


def methods_index() -> str:
    """The families of published methods."""
    counts = {needs: 0 for needs in NEEDS}
    for entry in methods.table():
        counts[entry.needs] += 1
    rows = "\n".join(
        f"| [{title}]({needs}.md) | {counts[needs]} |" for needs, title in NEEDS.items()
    )
    tree = "\n".join([*NEEDS, "language"])
    return f"""# Methods

A loss is an equation. A method is a paper: the terms it adds, the weights its authors used, the
connectors it trains along with the student, and its memory. Every method is a function of a
`methods.setup`, so it works for any two model functions. {{doc}}`../guides/features` is a complete
program with one, and {{doc}}`../guides/methods` compares and combines several.

| what the method reads | methods |
|---|---|
{rows}
| [Token distributions of language models](language.md) | {len(language.methods())} |

{{doc}}`../losses` lists the losses themselves, with the constants that convert their values to
those of other systems.

```{{toctree}}
:hidden:

{tree}
```
"""


def methods_page(needs: str, title: str) -> str:
    """One family: equation, function, paper, and what the docstring says of weights."""
    lines = [
        f"# {title}",
        "",
        "Equations are those of the method's own terms; `S` is the student, `T` the teacher (as a "
        "factor, the temperature).",
        "Weights are the defaults of the function.",
        "",
        "| Method, paper | Equation | Weights and differences |",
        "|---|---|---|",
    ]
    for entry in methods.table():
        if entry.needs != needs:
            continue
        equation, rest = split(inspect.getdoc(entry.build) or "")
        glue = " Trains a connector beside the student." if entry.connector else ""
        name = f"{{py:func}}`{entry.name} <kdtl_jax.methods.{entry.name}>`"
        cells = (f"{name}<br>{entry.title}<br>{entry.paper}", equation, f"{rest}{glue}".strip())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def language_page() -> str:
    """The methods of language models."""
    lines = [
        "# Token distributions of language models",
        "",
        "Each is a function of a `language.Setup`: two decoders and how to sample from them.",
        "",
        "| Method, paper | What it minimizes | Notes |",
        "|---|---|---|",
    ]
    for found in language.methods():
        text = inspect.getdoc(found.build) or ""
        text = re.split(r"\n\n(?:Args|References):", text)[0]
        first, _, rest = text.partition("\n\n")
        name = f"{{py:func}}`{found.build.__name__} <kdtl_jax.language.{found.build.__name__}>`"
        named = "<br>".join(filter(None, (name, found.title, found.paper)))
        lines.append(f"| {named} | {equations(first)} | {cell(rest)} |")
    return "\n".join(lines) + "\n"


def split(text: str) -> tuple[str, str]:
    """The equation at the start of a docstring, and what follows as a table's cell."""
    text = re.split(r"\n\n(?:Args|Raises|Returns):", text)[0]
    first, _, rest = text.partition("\n\n")
    # The paper has a column of its own.
    rest = re.sub(r"^[^`]{5,150}?(?:\(\d{4}\.\d{4,5}\)|\b(?:19|20)\d\d)\.(?:\s+|$)", "", rest)
    return equations(first), cell(rest)


def equations(text: str) -> str:
    """A cell in which what is code because it is an equation becomes one."""

    def equation(found: re.Match[str]) -> str:
        inside = " ".join(found[1].split())
        is_name = " " not in inside or '"' in inside
        return f"`{inside}`" if is_name else f"{{formula}}`{inside}`".replace("|", "\\|")

    return re.sub(r"`([^`]+)`", equation, cell(text))


def cell(text: str) -> str:
    """Markdown on one line."""
    return " ".join(
        reference.markdown(text).replace("```text", "").replace("```", "").split()
    ).replace("**References**", "")


def commands() -> Iterator[tuple[str, str]]:
    """A page per command, from its settings."""
    listed: list[tuple[str, str, Any]] = []
    for command in COMMANDS:
        module = importlib.import_module(command.module)
        if hasattr(module, "Settings"):
            listed.append((command.name, command.summary, module))
        else:
            listed += [
                (
                    f"{command.name} {inner.name}",
                    inner.summary,
                    importlib.import_module(inner.module),
                )
                for inner in module.COMMANDS
            ]
    rows = "\n".join(f"| [kdtl {n}]({slug(n)}.md) | {s} |" for n, s, _ in listed)
    tree = "\n".join(slug(name) for name, _, _ in listed)
    yield (
        "commands/index.md",
        f"""# Command line

`kdtl COMMAND --help` prints what these pages say. Every flag is also a key of a `--config`
file; `--print-config` prints such a file. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 and
143 interrupted, with the state saved.

A run folder holds `config.yaml`, `metrics.jsonl`, `results.json`, `report.html`, `env.json`, and
any weights and checkpoints. `--resume` continues the run in such a folder, and `--list` shows the
methods of a command, for commands that have these flags.

| command | what it does |
|---|---|
{rows}

```{{toctree}}
:hidden:

{tree}
```
""",
    )
    for name, summary, module in listed:
        yield f"commands/{slug(name)}.md", command_page(name, summary, module)


def command_page(name: str, summary: str, module: Any) -> str:
    """One command: examples, then its flags by group."""
    examples = _one_line(module.EXAMPLES)

    def kept(block: re.Match[str]) -> str:  # commands that are not among the examples
        return "" if _one_line(block[1]) in examples else block[0]

    said = reference.markdown(module.__doc__ or "")
    about = re.sub(r"```text\n(kdtl .*?)```\n*", kept, said, flags=re.DOTALL)
    parts = [f"# kdtl {name}", f"{summary[0].upper()}{summary[1:]}.", about]
    parts.append(f"```text\n{inspect.cleandoc(module.EXAMPLES)}\n```")
    groups: dict[str, list[Any]] = {}
    for field in dataclasses.fields(module.Settings):
        groups.setdefault(field.metadata.get("group") or "", []).append(field)
    for title, fields in groups.items():
        parts.append(f"## {title[0].upper()}{title[1:]}" if title else "## Flags")
        lines = ["| Flag | What it is | Default |", "|---|---|---|", *map(_flag, fields)]
        parts.append("\n".join(lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def _one_line(commands: str) -> str:
    return " ".join(commands.replace("\\\n", " ").split())


def _flag(field: Any) -> str:
    about = field.metadata
    name = field.name.removesuffix("_").replace("_", "-")
    flag = name.upper() if "positional" in about else f"--{name}"
    shown = " ".join([flag, about.get("metavar", "")]).strip()
    if "short" in about:
        shown += f", {about['short']}"
    default = about["default"]
    if isinstance(default, dict):
        default = " ".join(f"{k}={v}" for k, v in default.items())
    if isinstance(default, (tuple, list)):
        default = ",".join(map(str, default))
    said = "" if default in (None, False, "", ()) else f"`{default}`"
    about_it = re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"`\g<0>`", about["help"])
    return f"| `{shown}` | {cell(about_it)} | {said} |"


def slug(name: str) -> str:
    """A command as a file name."""
    return name.replace(" ", "-")


def benchmarks(folder: Path) -> str:
    """The headers of the benchmark scripts: command, machine, versions, result."""
    parts = [
        "# Benchmarks",
        "Each script prints what its header records; the header names the command, the machine and "
        "the versions. Times are compared within one run, in alternating rounds, because two runs "
        "on a shared machine differ more than two programs do.",
    ]
    for path in sorted(folder.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        first, _, rest = text.partition("\n\n")
        title = " ".join(first.split())
        parts += [f"## {path.name}", reference.markdown(title)]
        for chunk in filter(str.strip, rest.split("\n\n")):
            is_table = re.search(r"^ {2}|: {2}", chunk, re.MULTILINE) is not None
            parts.append(f"```text\n{chunk}\n```" if is_table else reference.markdown(chunk))
    return "\n\n".join(parts) + "\n"
