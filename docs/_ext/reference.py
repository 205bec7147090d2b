"""The API reference as Markdown pages, from the package itself: one page per public module.

A name is public if it has no leading underscore, stands in a module without one, and is defined
there or re-exported from a private module beside it. Nothing is listed by hand.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import kdtl_jax

# Commands and recipes are described by their settings, on the command-line pages.
ELSEWHERE = ("kdtl_jax.cli", "kdtl_jax.recipes")
BUT_HERE = ("kdtl_jax.recipes.worked_examples",)
SECTIONS = (
    "Args",
    "Returns",
    "Raises",
    "References",
    "Yields",
    "Attributes",
    "Example",
    "Examples",
)


class Entry(NamedTuple):
    """A public name and the source that defines it."""

    name: str  # "kdtl_jax.losses.mse"
    node: ast.AST
    module: ModuleType  # where it is written
    comment: str = ""  # that stands beside an assignment


def modules() -> list[str]:
    """Names of the public modules that have a page."""
    found = ["kdtl_jax"] + [
        module.name
        for module in pkgutil.walk_packages(kdtl_jax.__path__, "kdtl_jax.")
        if not any(part.startswith("_") for part in module.name.split("."))
    ]
    return [
        name
        for name in found
        if name in BUT_HERE or not any(name == e or name.startswith(f"{e}.") for e in ELSEWHERE)
    ]


def entries(name: str) -> list[Entry]:
    """What a module makes public, in the order of its source."""
    module = importlib.import_module(name)
    tree = _tree(module)
    found: dict[str, Entry] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                if alias.asname == alias.name and node.module.split(".")[-1].startswith("_"):
                    origin = importlib.import_module(node.module)
                    defined = _definition(origin, alias.name)
                    if defined is not None:
                        found[alias.name] = Entry(f"{name}.{alias.name}", *defined)
        else:
            for known in _names(node):
                if not known.startswith("_"):
                    found[known] = Entry(f"{name}.{known}", node, module, _comment(module, node))
    return list(found.values())


def public() -> list[str]:
    """Every public name of the library, dotted, with its modules."""
    return [n for name in modules() for n in (name, *(entry.name for entry in entries(name)))]


def pages() -> Iterator[tuple[str, str]]:
    """`(path, Markdown)` of every page, the index first."""
    names = modules()
    lines = ["# API reference", "", "Every public name, from the source.", ""]
    lines += ["| module | what is in it |", "|---|---|"]
    for name in names:
        summary = _summary(importlib.import_module(name))
        lines.append(f"| [{_short(name)}]({_short(name)}.md) | {markdown(summary)} |")
    tree = "\n".join(_short(name) for name in names)
    lines += ["", f"```{{toctree}}\n:hidden:\n\n{tree}\n```", ""]
    yield "api/index.md", "\n".join(lines)
    for name in names:
        yield f"api/{_short(name)}.md", page(name)


def page(name: str) -> str:
    """One module's page; entries stand under the heading of the file they are written in."""
    module = importlib.import_module(name)
    parts = [f"# {_short(name)}", f"```{{py:module}} {name}\n```", markdown(module.__doc__ or "")]
    listed = entries(name)
    of_file: dict[str, list[Entry]] = {}
    for entry in listed:
        of_file.setdefault(entry.module.__name__, []).append(entry)
    for origin, found in of_file.items():
        if origin != name and len(of_file) > 1:
            doc = (importlib.import_module(origin).__doc__ or "").strip()
            first, _, rest = doc.partition("\n\n")
            parts.append(f"## {markdown(' '.join(first.split())).rstrip('.')}")
            parts.append(markdown(rest))
        parts += [_entry(entry) for entry in found]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(text: str) -> str:
    """A docstring in Markdown: section titles become bold, argument names become list items."""
    blocks: list[str] = []
    section = ""
    for chunk in filter(str.strip, re.split(r"\n[ \t]*\n", inspect.cleandoc(text))):
        head = re.match(rf"({'|'.join(SECTIONS)}):\n", chunk)
        if head:
            section = head[1]
            blocks.append(f"**{section}**")
            chunk = textwrap.dedent(chunk[head.end() :])
            blocks.append(
                _items(chunk) if section in ("Args", "Raises", "Attributes") else _escape(chunk)
            )
        elif all(line.startswith("|") for line in chunk.splitlines()):  # already a Markdown table
            blocks.append(chunk)
        elif chunk.lstrip().startswith(">>> "):
            blocks.append(f"```pycon\n{textwrap.dedent(chunk)}\n```")
        elif all(line.startswith("    ") for line in chunk.splitlines()):
            blocks.append(f"```text\n{textwrap.dedent(chunk)}\n```")
        else:
            blocks.append(_escape(textwrap.dedent(chunk)))
    return "\n\n".join(block for block in blocks if block.strip())


def _items(chunk: str) -> str:
    """`name: text` lines, each with the lines indented below it, as a list."""
    lines = []
    for line in chunk.splitlines():
        named = re.match(r"(\*{0,2}\w[\w., ]*?): (.*)", line)
        if named:
            lines.append(f"- `{named[1]}`: {named[2]}")
        else:
            lines.append(f"  {line.strip()}")
    return _escape("\n".join(lines))


def _escape(text: str) -> str:
    """Markdown's own signs are plain characters outside of backticks and of `*emphasis*`."""
    parts = re.split(r"(`[^`]+`|(?<![\w*])\*[A-Za-z][A-Za-z ]*\*(?![\w*]))", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*_<\[\]${}|#~])", r"\\\1", parts[i])
        parts[i] = re.sub(r"^(\s*)([+=]|\d+[.)])(\s)", r"\1\\\2\3", parts[i], flags=re.MULTILINE)
    for i in range(1, len(parts), 2):
        parts[i] = " ".join(parts[i].split())
    return "".join(parts)


def _entry(entry: Entry) -> str:
    node, name = entry.node, entry.name.rpartition(".")[2]
    if isinstance(node, ast.FunctionDef):
        return _directive("function", name, _signature(node), ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        body = markdown(ast.get_docstring(node) or "")
        if fields:
            body += f"\n\n```python\n{_source(entry.module, fields)}\n```"
        members = []
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and _is_shown(member):
                kind = "attribute" if _is_property(member) else "method"
                shown = "" if kind == "attribute" else _signature(member, bound=True)
                doc = ast.get_docstring(member) or ""
                members.append(_directive(kind, member.name, shown, doc, fence=4))
        body = "\n\n".join([body, *members])
        return f":::::{{py:class}} {name}\n\n{body}\n:::::"
    body = markdown(entry.comment)
    shown = ast.unparse(node)
    if len(shown) < 600:
        body += f"\n\n```python\n{shown}\n```"
    return f":::::{{py:data}} {name}\n\n{body}\n:::::"


def _directive(kind: str, name: str, signature: str, doc: str, *, fence: int = 5) -> str:
    colons = ":" * fence
    return f"{colons}{{py:{kind}}} {name}{signature}\n\n{markdown(doc)}\n{colons}"


def _signature(node: ast.FunctionDef, *, bound: bool = False) -> str:
    arguments = node.args
    if bound and arguments.args and not _has(node, "staticmethod"):
        arguments = ast.arguments(**{**vars(arguments), "args": arguments.args[1:]})
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def _is_shown(member: ast.FunctionDef) -> bool:
    return not member.name.startswith("_") or (
        member.name == "__call__" and ast.get_docstring(member) is not None
    )


def _is_property(member: ast.FunctionDef) -> bool:
    return _has(member, "property") or _has(member, "cached_property")


def _has(member: ast.FunctionDef, decorator: str) -> bool:
    return any(ast.unparse(d).split(".")[-1] == decorator for d in member.decorator_list)


_text = functools.cache(inspect.getsource)


@functools.cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(_text(module))


def _definition(module: ModuleType, name: str) -> tuple[Any, ModuleType, str] | None:
    """Where a name is written: its syntax, its module, the comment beside it."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if any(alias.asname == name or alias.name == name for alias in node.names):
                return _definition(importlib.import_module(node.module), name)
        elif name in _names(node):
            return node, module, _comment(module, node)
    return None


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def _comment(module: ModuleType, node: ast.AST) -> str:
    """The comment above an assignment, and at the end of its line."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return ""
    lines = _text(module).splitlines()
    above = node.lineno - 2
    said: list[str] = []
    while above >= 0 and lines[above].startswith("# "):
        said.insert(0, lines[above][2:])
        above -= 1
    beside = re.search(r"\s# (?!type:|noqa|fmt:|pyright:)(.*)", lines[node.lineno - 1])
    return "\n".join([*said, *([beside[1]] if beside else [])])


def _source(module: ModuleType, nodes: list[ast.AnnAssign]) -> str:
    """The fields of a class with their comments, as written."""
    lines = _text(module).splitlines()
    found = lines[nodes[0].lineno - 1 : nodes[-1].end_lineno]
    kept: list[str] = []
    inside = {n for node in nodes for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    for number, line in enumerate(found, nodes[0].lineno):
        if number in inside or line.strip().startswith("#"):
            kept.append(line)
    return textwrap.dedent("\n".join(kept))


def _summary(module: ModuleType) -> str:
    return " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())


def _short(name: str) -> str:
    return name.removeprefix("kdtl_jax.")
