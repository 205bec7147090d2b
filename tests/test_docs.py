"""Every Python block of the documentation runs, page by page."""

from pathlib import Path

import pytest
from documents import DOCS, WRITTEN, blocks

PRETRAINED = {"encoder": "huggingface/bert", "decoder": "decoders/llama"}
WITH_CODE = [path for path in WRITTEN if blocks(path.read_text(), "python")]


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
