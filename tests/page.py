"""The page's parts as files, to work on them: `make page` takes them out of loadmanager.py, or puts them
back.

    python tests/page.py out DIR   writes each part as DIR/<file>
    python tests/page.py in DIR    puts the files back between their markers in loadmanager.py

Serve them meanwhile with LOADMANAGER_PAGE_DIR=DIR: a reload of the browser shows each change."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import loadmanager

MODULE = Path(loadmanager.__file__)


def part_pattern(constant: str) -> re.Pattern[str]:
    """What stands between the constant's opening and closing quotes."""
    return re.compile(rf'(?<=^{constant} = r""")(\n.*?\n)(?=""")', re.DOTALL | re.MULTILINE)


def take_out(folder: Path) -> None:
    """Write every part of the page into the folder."""
    source = MODULE.read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for constant, name in loadmanager.PAGE_PARTS.items():
        found = part_pattern(constant).search(source)
        if found is None:
            sys.exit(f"{constant} is not in {MODULE.name}")
        (folder / name).write_text(found.group(1)[1:], encoding="utf-8")


def put_back(folder: Path) -> None:
    """Put every part back into loadmanager.py, which is replaced in one step."""
    source = MODULE.read_text(encoding="utf-8")
    for constant, name in loadmanager.PAGE_PARTS.items():
        text = (folder / name).read_text(encoding="utf-8")
        if '"""' in text:
            sys.exit(
                f"{name}: three double quotes in a row would end the part in {MODULE.name}; write them apart"
            )
        source = part_pattern(constant).sub(
            lambda _, text=text: "\n" + text.rstrip("\n") + "\n", source, count=1
        )
    compile(source, MODULE.name, "exec")
    draft = MODULE.with_suffix(".tmp")
    draft.write_text(source, encoding="utf-8")
    draft.chmod(MODULE.stat().st_mode)
    os.replace(draft, MODULE)


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("in", "out"):
        sys.exit(__doc__)
    {"out": take_out, "in": put_back}[sys.argv[1]](Path(sys.argv[2]))


if __name__ == "__main__":
    main()
