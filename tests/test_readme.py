"""The commands of README.md, run as they stand there.

An HTML comment directly above a fenced block says what it is: `<!-- tested -->` a bash or Python block that is run,
`<!-- recipe -->` a YAML recipe. `make` is not run, but its targets must exist.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.peers.publish import with_table
from srd_modifier.quantizing import load_recipe

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"

_BLOCK = re.compile(r"(?:^<!-- (?P<mark>\w+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
_MAKE = re.compile(r"^make\b(?P<targets>[^#\n]*)", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: its mark or None, its language, its code, and the line of the file it begins at."""

    mark: str | None
    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(found["mark"], found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1)
        for found in _BLOCK.finditer(text)
    ]


def readme() -> list[Block]:
    return blocks(README.read_text(encoding="utf-8"))


def make_targets(code: str) -> list[str]:
    """What `make` is asked for, in all lines that call it."""
    words = [word for found in _MAKE.finditer(code) for word in found["targets"].split()]
    return [word for word in words if "=" not in word and not word.startswith("-")]


def run(block: Block, output: Path) -> None:
    """Run a block from the root of the repository, with `out/` somewhere else."""
    code = re.sub(r"(?<![\w/.-])out/", f"{output}/", block.code)
    if block.language == "bash":
        code = _MAKE.sub(":", code)
        command = ["bash", "-e", "-u", "-o", "pipefail", "-c", code]
    else:
        command = [sys.executable, "-c", code]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "XDG_CACHE_HOME": str(output / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{README}, the block at line {block.line}:\n{code}\n{done.stdout}\n{done.stderr}"


# the reading of a page

PAGE = """\
Text, and `code` in it.

```bash
make demo  # unmarked
```

<!-- tested -->
```bash
make test-fast WORKERS=4 lint
srd inspect out/x && cat examples/out/y
```

<!-- tested -->

```bash
echo "a mark must stand directly above"
```
<!-- recipe -->
```yaml
a_stage: {}
```

```
no language
```
"""


def test_blocks_are_found_with_their_marks():
    assert [(block.mark, block.language, block.line) for block in blocks(PAGE)] == [
        (None, "bash", 4),
        ("tested", "bash", 9),
        (None, "bash", 16),
        ("recipe", "yaml", 20),
        (None, "", 24),
    ]
    assert blocks(PAGE)[3].code == "a_stage: {}\n"


def test_make_targets_are_found():
    assert [make_targets(block.code) for block in blocks(PAGE)][:2] == [["demo"], ["test-fast", "lint"]]


def test_a_block_that_fails_fails(tmp_path):
    with pytest.raises(AssertionError, match="the block at line 7"):
        run(Block("tested", "bash", "false\ntrue\n", 7), tmp_path)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(Block("tested", "python", "1 / 0\n", 7), tmp_path)


def test_a_block_writes_to_another_place_than_out(tmp_path):
    run(Block("tested", "bash", "make demo\nmkdir -p out/a\necho text > out/a/b\n", 1), tmp_path)
    run(Block("tested", "python", "open('out/c', 'w').write('text')\n", 1), tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/b", "c"]


# README.md


def test_there_is_something_to_test():
    marks = [(block.mark, block.language) for block in readme()]
    assert ("tested", "bash") in marks
    assert ("tested", "python") in marks
    assert ("recipe", "yaml") in marks


def test_every_mark_is_known_and_stands_above_its_block():
    text = README.read_text(encoding="utf-8")
    marked = [block for block in readme() if block.mark]
    assert text.count("<!-- tested -->") + text.count("<!-- recipe -->") == len(marked)
    assert {(block.mark, block.language) for block in marked} <= {
        ("tested", "bash"),
        ("tested", "python"),
        ("recipe", "yaml"),
    }


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    text = README.read_text(encoding="utf-8")
    asked = [target for block in readme() for target in make_targets(block.code)]
    asked += [target for words in re.findall(r"`make ([^`]+)`", text) for target in words.split()]
    assert asked
    assert sorted(set(asked) - targets) == []


def test_files_that_are_named_exist():
    text = README.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:recipes|examples|docs|benchmarks)/[\w./-]*\w", text)
    assert named
    assert sorted({name for name in named if not (REPOSITORY / name).exists()}) == []


def test_the_table_of_peers_is_the_generated_one():
    page = README.read_text(encoding="utf-8")
    assert page.count("<!-- peers -->\n|") == page.count("<!-- end of peers -->") == 1
    assert with_table(page) == page


def test_recipes_load(tmp_path):
    for block in readme():
        if block.mark == "recipe":
            path = tmp_path / f"line-{block.line}.yaml"
            path.write_text(block.code, encoding="utf-8")
            assert load_recipe(path).modifiers


@pytest.mark.slow
def test_commands_run(tmp_path):
    """In their order, since one block may use what another has made."""
    for block in readme():
        if block.mark == "tested":
            run(block, tmp_path)
    assert any(tmp_path.iterdir())
