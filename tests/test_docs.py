"""Every Python block of the documentation runs, page by page; every link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = ("_build", "_ext", "api", "methods", "commands")
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if path.relative_to(DOCS).parts[0] not in GENERATED and path.name != "benchmarks.md"
)
PRETRAINED = {"encoder": "huggingface/bert", "decoder": "decoders/llama"}


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


WITH_CODE = [path for path in PAGES if blocks(path.read_text(), "python")]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(DOCS)))
def test_the_python_of_a_page_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in PRETRAINED.items():  # the checkpoints that pages speak of
        (tmp_path / name).symlink_to(Path(__file__).parent / "data" / folder)
    namespace: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks(path.read_text(), "python")):
        exec(compile(block, f"{path.name}, python block {number}", "exec"), namespace)
