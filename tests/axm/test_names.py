"""Names that a container may hold, and those that it may not."""

import pytest

from srd_modifier.axm.names import MAX_FILES, NameFault, check_name, check_names

GOOD = (
    *(
        "config.json",
        "srd/residual-00001-of-00002.safetensors",
        ".hidden",
        "a b.txt",
        "größe/模型.gguf",
        "...x",
        "x..y",
    ),
    *("[/b] $(x) 'y' \"z\".txt", "x" * 255, "/".join(["y" * 127] * 8), "nullable.json", "console/x", "🧪.bin"),
)
BAD = {
    "": "is empty",
    "/etc/passwd": "is an absolute path",
    "//server/share": "is an absolute path",
    "C:/x": "names a drive",
    "c:x": "names a drive",
    "x.gguf:hidden": "has a colon, behind which Windows hides bytes",
    "a\\b": "has a backslash",
    "..": "leads out of the folder with `..`",
    "../x": "leads out of the folder with `..`",
    "a/../../x": "leads out of the folder with `..`",
    "a/..": "leads out of the folder with `..`",
    ".": "has an empty part or a `.`",
    "a/./b": "has an empty part or a `.`",
    "a//b": "has an empty part or a `.`",
    "a/": "has an empty part or a `.`",
    "a\nb": "has a control character",
    "a\0b": "has a control character",
    "a\x7fb": "has a control character",
    "a\x9bb": "has a control character",
    "a\u2028b": "has a control character",
    "a\u202efugg.txt": "has a control character",
    "x\udc80": "is not valid UTF-8",
    "x.": "has a part that ends in a dot or a space, which Windows leaves out",
    "x /y": "has a part that ends in a dot or a space, which Windows leaves out",
    ". ./x": "has a part that ends in a dot or a space, which Windows leaves out",
    "NUL": "is a device on Windows",
    "a/aux.json": "is a device on Windows",
    "com1.txt": "is a device on Windows",
    "x" * 256: "is too long",
    "ü" * 128: "is too long",
    "/".join(["y" * 128] * 8): "is too long",
    "/".join("x" * 33): "is too deep",
}


@pytest.mark.parametrize("name", GOOD)
def test_good_names(name: str) -> None:
    check_name(name)
    check_names([name])


@pytest.mark.parametrize(("name", "fault"), BAD.items(), ids=map(repr, BAD))
def test_bad_names(name: str, fault: str) -> None:
    with pytest.raises(NameFault) as error:
        check_name(name)
    assert str(error.value) == fault
    with pytest.raises(NameFault) as error:
        check_names(["good", name])
    assert str(error.value) == f"{name!r} {fault}"


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["a", "b", "a"], "'a' is there twice"),
        (["a/B", "A/b"], "'A/b' differs from 'a/B' only in spelling"),
        (["straße", "STRASSE"], "'STRASSE' differs from 'straße' only in spelling"),
        (["\u00fc", "u\u0308"], "'u\u0308' differs from '\u00fc' only in spelling"),
        (["a", "a/b"], "'a' is both a file and the folder of 'a/b'"),
        (["x/A/b/c", "X/a"], "'X/a' is both a file and the folder of 'x/A/b/c'"),
        (["axm.json"], "'axm.json' is a name that the container keeps for itself"),
        (["manifest.json"], "'manifest.json' is a name that the container keeps for itself"),
    ],
)
def test_names_that_do_not_go_together(names: list[str], fault: str) -> None:
    with pytest.raises(NameFault) as error:
        check_names(names)
    assert str(error.value) == fault


def test_names_that_go_together() -> None:
    check_names(["a", "b/a", "b/c", "b.c", "srd/axm.json", "ab/c", "met.json"])


def test_too_many_names() -> None:
    check_names(str(number) for number in range(MAX_FILES))
    with pytest.raises(
        NameFault, match=f"^'{MAX_FILES}' is one too many: a container holds at most {MAX_FILES} files$"
    ):
        check_names(str(number) for number in range(MAX_FILES + 1))
