"""The documentation is whole: public names have entries, links and names lead somewhere."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kdtl_jax import losses, methods

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|\{doc\}`(?:[^`<]*<)?([^`>]+)>?`")
TARGET = re.compile(r"\{py:\w+\}`[^`<]*<([\w.]+)>`")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The generator of the reference, which is no package."""
    sys.path.insert(0, str(DOCS / "_ext"))
    return importlib.import_module("reference")


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    """Every page by its path below docs/, written and generated."""
    tables = importlib.import_module("tables")
    made = dict([*reference.pages(), *tables.pages(ROOT)])
    written = {
        str(path.relative_to(DOCS)): path.read_text()
        for path in DOCS.rglob("*.md")
        if path.relative_to(DOCS).parts[0] != "_build"
    }
    return written | made


def test_every_public_name_has_an_entry(reference: ModuleType, pages: dict[str, str]) -> None:
    for name in reference.modules():
        module = importlib.import_module(name)
        text = pages[f"api/{name.removeprefix('kdtl_jax.')}.md"]
        entries = set(re.findall(r"^:{5}\{py:\w+\} (\w+)", text, re.MULTILINE))
        public = {
            key
            for key, value in vars(module).items()
            if not key.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
            and (value.__module__ == name or value.__module__.startswith(f"{name}._"))
        }
        assert public <= entries, f"{name}: {sorted(public - entries)}"


def test_every_method_has_a_row(pages: dict[str, str]) -> None:
    for entry in methods.table():
        assert f"<kdtl_jax.methods.{entry.name}>" in pages[f"methods/{entry.needs}.md"]


def test_links_resolve(pages: dict[str, str]) -> None:
    texts = {**pages, **{f"../{path.name}": path.read_text() for path in ROOT.glob("*.md")}}
    missing = []
    for page, text in texts.items():
        for link, document in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            place = (link or f"{document}.md").partition("#")[0]
            if not place or re.match(r"https?:|mailto:", place):
                continue
            path = DOCS / page / ".." / place if not place.startswith("/") else DOCS / place[1:]
            found = path.resolve()
            known = found.is_relative_to(DOCS) and str(found.relative_to(DOCS)) in pages
            if not known and not found.exists():
                missing.append(f"{page}: {place}")
    assert not missing, "\n".join(missing)


def test_names_in_the_documentation_exist(reference: ModuleType, pages: dict[str, str]) -> None:
    public = set(reference.public())
    roots = {name.split(".")[1] for name in public if "." in name}
    missing = []
    for page, text in pages.items():
        missing += [f"{page}: {name}" for name in TARGET.findall(text) if name not in public]
        if page.startswith(("api/", "commands/")) or page == "benchmarks.md":
            continue  # made of docstrings, which tests/test_references.py reads
        for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`", text):
            known = f"kdtl_jax.{name}" in public or name.split(".")[0] not in roots
            if not known and not _attribute(f"kdtl_jax.{name}"):
                missing.append(f"{page}: {name}")
    assert not missing, "\n".join(missing)


def _attribute(name: str) -> bool:
    """Whether a dotted name leads to a module, or to an attribute of a public name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_every_figure_names_its_command(pages: dict[str, str]) -> None:
    texts = {**pages, "../README.md": (ROOT / "README.md").read_text()}
    for page, text in texts.items():
        for figure in re.findall(r"([\w-]+\.svg)\)", text) + re.findall(r"([\w-]+\.svg)\"", text):
            commands = re.findall(
                rf"^.*python docs/\S+\.py.*{re.escape(figure)}", text, re.MULTILINE
            )
            if page == "../README.md":
                commands = commands or re.findall(r"python docs/\S+\.py", text)
            assert commands, f"{page}: {figure}"
            script = re.findall(r"docs/\S+\.py", commands[0])[0]
            assert (ROOT / script).exists()
            assert list(DOCS.rglob(figure)), figure


# Public callables of kdtl_jax.losses that are pieces of a listed loss, and stand with it.
PIECES = {
    *("answers_first", "causal_shift", "head_logits", "token_log_probs"),  # aligning tokens
    *("soften_top_k", "stored_top_k", "top_k_buckets", "top_k_targets"),  # making top-k teachers
    *("unit_classes", "unit_features"),
    *("attention_map", "taid_start", "jacobian_matching_exact"),
}


def test_every_loss_has_a_line_in_the_table() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)`", (DOCS / "losses.md").read_text()))
    public = {n for n, f in vars(losses).items() if inspect.isfunction(f) and n[0] != "_"}
    assert public - named - PIECES == set()
    assert not PIECES - public, "no longer public"
