"""The documentation is whole: public names have entries, links and names lead somewhere."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from documents import DOCS, GENERATED, README, ROOT, WRITTEN, blocks, leads_somewhere, prose

from kdtl_jax import losses, methods

sys.path.insert(0, str(DOCS / "_ext"))
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|\{doc\}`(?:[^`<]*<)?([^`>]+)>?`")
TARGET = re.compile(r"\{py:\w+\}`[^`<]*<([\w.]+)>`")
# What stands before a dot in code spans beside modules: the reader's values, a file's name, and
# PyTorch, which need not be installed.
FILES = {"csv", "json", "jsonl", "npy", "npz"}
VALUES = {"adapter", "config", "setup", "tc", "torch", "x"}


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The generator of the reference, which is no package."""
    return importlib.import_module("reference")


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """Every generated page by its path below docs/."""
    return importlib.import_module("pages").everything(ROOT)


@pytest.fixture(scope="module")
def pages(made: dict[str, str]) -> dict[str, str]:
    """Every page by its path below docs/, written and generated."""
    notebooks = ["index", *(path.stem for path in (DOCS / "notebooks").glob("*.py"))]
    made = made | {f"gallery/{name}.md": "" for name in notebooks}  # by sphinx-gallery
    return {str(path.relative_to(DOCS)): path.read_text() for path in WRITTEN} | made


def test_pages_no_longer_made_are_deleted(tmp_path: Path) -> None:
    write = importlib.import_module("pages").write
    write(tmp_path, {"api/a.md": "a", "api/old.md": "old", "top.md": "top"})
    (tmp_path / "written.md").write_text("by hand")
    write(tmp_path, {"api/a.md": "b", "top.md": "top"})
    left = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.md")}
    assert left == {"api/a.md": "b", "top.md": "top", "written.md": "by hand"}


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


def anchors(text: str) -> set[str]:
    """What `#...` can follow the name of a page: its headings in lower case, with hyphens."""
    headings = re.findall(r"^#{1,3} (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def bad_links(page: str, text: str, pages: dict[str, str]) -> list[str]:
    """Links of a page (its path below docs/) that lead nowhere."""
    bad = []
    for link, document in LINK.findall(prose(text)):
        place, _, anchor = (link or f"{document}.md").partition("#")
        if re.match(r"https?:|mailto:", place):
            continue
        path = DOCS / page if not place else DOCS / page / ".." / place
        result = (DOCS / place[1:] if place.startswith("/") else path).resolve()
        inside = str(result.relative_to(DOCS)) if result.is_relative_to(DOCS) else ""
        target = text if not place else pages.get(inside)
        if target is None and result.exists() and inside.split("/")[0] not in GENERATED:
            target = result.read_text() if result.suffix == ".md" else ""
        if target is None or (anchor and anchor not in anchors(target)):
            bad.append(f"{page}: {link or document}")
    return bad


def test_links_resolve(pages: dict[str, str]) -> None:
    texts = {**pages, **{f"../{path.name}": path.read_text() for path in ROOT.glob("*.md")}}
    bad = [link for page, text in texts.items() for link in bad_links(page, text, pages)]
    assert not bad, "\n".join(bad)


def test_links_that_lead_nowhere_are_found() -> None:
    pages = {"a.md": "# One: two\n", "api/b.md": "# B\n"}
    good = "[a](a.md) [a](a.md#one-two) {doc}`api/b` [x](#here) [r](../README.md#set-up)\n# Here\n"
    assert bad_links("page.md", good, pages) == []
    for bad in ("[a](a.md#one)", "[a](api/gone.md)", "{doc}`b`", "[x](#there)", "[r](../NO.md)"):
        assert len(bad_links("page.md", bad, pages)) == 1, bad


def imported(text: str) -> dict[str, str]:
    """The modules of a page's Python by the names that it gives them."""
    results = {}
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                inside = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    results[alias.asname or alias.name] = inside + alias.name
    return results


def unknown_names(text: str, public: set[str]) -> list[str]:
    """Dotted names in the code spans of a page that lead nowhere."""
    ours = {name.split(".")[1] for name in public if "." in name}
    roots = {root: f"kdtl_jax.{root}" for root in ours}
    roots |= {root: root for root in ("equinox", "flax", "jax", "kdtl_jax")} | imported(text)
    missing = [name for name in TARGET.findall(text) if name not in public]
    for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`", text):
        root, _, rest = name.partition(".")
        if rest in FILES or root in VALUES:
            continue
        if not (root in roots and leads_somewhere(f"{roots[root]}.{rest}")):
            missing.append(name)
    return missing


def test_names_in_the_documentation_exist(reference: ModuleType, pages: dict[str, str]) -> None:
    public = set(reference.public())
    missing = [
        f"{page}: {name}"
        for page, text in {**pages, "../README.md": README.read_text()}.items()
        # Those made of docstrings are read by tests/test_references.py.
        if not page.startswith(("api/", "commands/")) and page != "benchmarks.md"
        for name in unknown_names(text, public)
    ]
    assert not missing, "\n".join(missing)


def test_names_that_lead_nowhere_are_found(reference: ModuleType) -> None:
    public = set(reference.public())
    text = "```python\nfrom kdtl_jax.train import sweep\n```\n`sweep.vmap` `losses.mse` `x.batch`"
    assert unknown_names(text, public) == []
    text = "`trasforms.lora` `losses.msee` `sweep.vmap` {py:func}`a <kdtl_jax.losses.msee>`"
    assert len(unknown_names(text, public)) == 4


def unmade_figures(text: str) -> list[str]:
    """Figures of a page without the command that writes them; the dark form goes with the light."""
    missing = []
    for figure in re.findall(r"(?:\(|\"|\{image\} )[^\s)\"]*?([\w-]+\.svg)", text):
        written = re.escape(figure.replace("-dark.svg", "-light.svg"))
        scripts = re.findall(rf"python (docs/\S+\.py)[^\n]*/{written}", text)
        if not scripts or not (ROOT / scripts[0]).exists() or not list(DOCS.rglob(figure)):
            missing.append(figure)
    return missing


def test_every_figure_names_its_command(pages: dict[str, str]) -> None:
    texts = {**pages, "../README.md": README.read_text()}
    missing = {page: result for page, text in texts.items() if (result := unmade_figures(text))}
    assert not missing


def test_figures_without_their_command_are_found() -> None:
    text = README.read_text()
    assert unmade_figures(text.replace("demo-light.svg`", "other.svg`")) == [
        "demo-dark.svg",
        "demo-light.svg",
    ]
    assert unmade_figures(text.replace("docs/demo_chart.py", "docs/other.py"))
    assert unmade_figures("```{image} _static/temperatures.svg\n```") == ["temperatures.svg"]


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


def unknown_losses(text: str) -> list[str]:
    """Names in the first column of a table of losses that are neither losses nor dotted names."""
    first = re.findall(r"^\| (`.*?)(?:<br>| \|)", text, re.MULTILINE)
    names = [name for cell in first for name in re.findall(r"`([a-z]\w*(?:\.\w+)*)`", cell)]
    assert names, "the table has no names"
    places = {name: "kdtl_jax" if "." in name else "kdtl_jax.losses" for name in names}
    return [name for name, place in places.items() if not leads_somewhere(f"{place}.{name}")]


def test_every_line_of_the_table_of_losses_is_a_loss() -> None:
    text = (DOCS / "losses.md").read_text()
    assert unknown_losses(text) == []
    assert unknown_losses(text.replace("`reverse_kl`<br>", "`reverse_kls`<br>")) == ["reverse_kls"]
