"""`srd axm`: keygen, pack, verify, inspect, extract and attest, as they are typed."""

import json
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from containers import (
    FILES,
    FINGERPRINT,
    OTHER_SECRET,
    SECRET,
    SHORT,
    container,
    key_id,
    signed_entries,
    write_files,
    write_secret,
    write_zip,
)

from srd_modifier.axm.keys import ENVIRONMENT
from srd_modifier.cli import _app

Run = Callable[..., Any]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write_secret(tmp_path / "axm.key")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_files(tmp_path / "model")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "packed.axm"
    path.write_bytes(container())
    return path


# --- keygen ----------------------------------------------------------------------------------------------------------


def test_keygen(srd: Run, tmp_path: Path) -> None:
    path = tmp_path / "new.key"
    done = srd("axm", "keygen", path)
    secret = path.read_bytes()
    assert done.status == 0
    assert done.stdout == f"wrote {path}, key id {key_id(secret)}\n"
    assert done.stderr == ""
    assert secret.hex() not in done.stdout
    assert len(secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert srd("axm", "keygen", path).sentence == f"{path} already exists; a key is never overwritten"
    assert path.read_bytes() == secret


# --- pack ------------------------------------------------------------------------------------------------------------


def test_pack(srd: Run, model: Path, tmp_path: Path, key_file: Path) -> None:
    output = tmp_path / "x.axm"
    done = srd("axm", "pack", model, "--output", output, "--key-file", key_file)
    size = output.stat().st_size
    assert done.stdout.splitlines() == [
        f"wrote {output}: 4 files, {size:,} bytes, key id {key_id(SECRET)}",
        f"fingerprint {FINGERPRINT} (short {SHORT})",
    ]
    assert (done.status, done.stderr) == (0, "")
    again = srd("axm", "pack", model, "--output", output, "--key-file", key_file)
    assert again.sentence == f"{output} already exists; choose another name or pass --overwrite"
    assert srd("axm", "pack", model, "--output", output, "--key-file", key_file, "--overwrite").status == 0


def test_pack_json(srd: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the key of the environment."""
    monkeypatch.setenv(ENVIRONMENT, SECRET.hex())
    output = tmp_path / "x.axm"
    done = srd("axm", "pack", model, "--output", output, "--json")
    assert json.loads(done.stdout) == {
        "output": str(output),
        "size": output.stat().st_size,
        "files": 4,
        "fingerprint": FINGERPRINT,
        "fingerprint_short": SHORT,
        "key_id": key_id(SECRET),
    }


def test_pack_needs_a_key(srd: Run, model: Path, tmp_path: Path) -> None:
    """There is no default."""
    sentence = srd("axm", "pack", model, "--output", tmp_path / "x.axm").sentence
    assert sentence.startswith("no key was given: name a file with --key-file or set SRD_AXM_KEY")
    assert not (tmp_path / "x.axm").exists()


def test_pack_of_what_is_not_there(srd: Run, tmp_path: Path, key_file: Path) -> None:
    sentence = srd("axm", "pack", tmp_path / "no", "--output", tmp_path / "x.axm", "--key-file", key_file).sentence
    assert sentence == f"{tmp_path}/no: there is no such file or directory"


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify(srd: Run, packed: Path, key_file: Path) -> None:
    done = srd("axm", "verify", packed, "--key-file", key_file)
    assert done.stdout.splitlines() == [
        f"integrity      4 files, {packed.stat().st_size:,} bytes, every byte verified",
        f"fingerprint    {FINGERPRINT} (short {SHORT})",
        f"origin         packed by a holder of key {key_id(SECRET)}",
        "public signer  not checked, no public key was given",
    ]
    assert (done.status, done.stderr) == (0, "")


def test_verify_by_what_was_read_aloud(srd: Run, packed: Path) -> None:
    done = srd("axm", "verify", packed, "--fingerprint", SHORT)
    assert "matches        the given fingerprint" in done.stdout
    assert "origin         not checked, no key was given" in done.stdout
    assert "these are other files" in srd("axm", "verify", packed, "--fingerprint", "0" * 64).sentence


def test_verify_json(srd: Run, packed: Path, key_file: Path) -> None:
    done = srd("axm", "verify", packed, "--key-file", key_file, "--fingerprint", FINGERPRINT, "--json")
    assert json.loads(done.stdout) == {
        "path": str(packed),
        "verified": True,
        "size": packed.stat().st_size,
        "files": 4,
        "fingerprint": FINGERPRINT,
        "fingerprint_short": SHORT,
        "key_id": key_id(SECRET),
        "fingerprint_matches": True,
        "attestation_matches": None,
        "signer": None,
    }


def test_a_failed_verify_prints_no_json(srd: Run, packed: Path, tmp_path: Path) -> None:
    other = write_secret(tmp_path / "other.key", OTHER_SECRET)
    assert "was packed with another key" in srd("axm", "verify", packed, "--key-file", other, "--json").sentence


def test_a_key_file_that_others_can_read(srd: Run, packed: Path, key_file: Path) -> None:
    key_file.chmod(0o644)
    done = srd("axm", "verify", packed, "--key-file", key_file)
    assert done.status == 0
    assert done.stderr == f"srd: the key file {key_file} can be read by others; run: chmod 600 {key_file}\n"


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_needs_no_key(srd: Run, packed: Path) -> None:
    done = srd("axm", "inspect", packed)
    assert (done.status, done.stderr) == (0, "")
    for expected in (*FILES, FINGERPRINT, SHORT, key_id(SECRET), f"{packed.stat().st_size:,} bytes", "not verified"):
        assert expected in done.stdout


def test_inspect_json(srd: Run, packed: Path) -> None:
    described = json.loads(srd("axm", "inspect", packed, "--json").stdout)
    assert described["fingerprint"] == FINGERPRINT
    assert described["key_id"] == key_id(SECRET)
    assert [entry["path"] for entry in described["files"]] == list(FILES)
    assert [entry["size"] for entry in described["files"]] == [len(data) for data in FILES.values()]


def test_names_are_printed_as_they_are(srd: Run, tmp_path: Path) -> None:
    """Rich would take what is in brackets for colours, or for an error."""
    path = tmp_path / "x[b].axm"
    path.write_bytes(container({"[red]a.gguf": b"GGUF", "b[/i].txt": b""}))
    done = srd("axm", "inspect", path)
    assert done.status == 0
    assert "[red]a.gguf" in done.stdout
    assert "b[/i].txt" in done.stdout
    assert "x[b].axm" in done.stdout


# --- extract ---------------------------------------------------------------------------------------------------------


def test_extract(srd: Run, packed: Path, tmp_path: Path, key_file: Path) -> None:
    output = tmp_path / "out"
    done = srd("axm", "extract", packed, "--output", output, "--key-file", key_file)
    assert (done.status, done.stdout, done.stderr) == (0, f"wrote {output}: 4 files, verified\n", "")
    assert {name: (output / name).read_bytes() for name in FILES} == FILES


def test_extract_without_a_key(srd: Run, packed: Path, tmp_path: Path) -> None:
    done = srd("axm", "extract", packed, "--output", tmp_path / "out")
    assert done.status == 0
    assert done.stderr == "no key was given, so nothing is known of the origin\n"


def test_extract_of_the_gguf_only(srd: Run, packed: Path, tmp_path: Path, key_file: Path) -> None:
    output = tmp_path / "out.gguf"
    done = srd("axm", "extract", packed, "--gguf", "--output", output, "--key-file", key_file)
    assert done.stdout == f"wrote {output}: 1 files, verified\n"
    assert output.read_bytes() == FILES["model.gguf"]
    again = srd("axm", "extract", packed, "--gguf", "--output", output, "--key-file", key_file)
    assert again.sentence == f"{output} already exists; choose another name or pass --overwrite"


# --- attest ----------------------------------------------------------------------------------------------------------


def test_attest(srd: Run, packed: Path, tmp_path: Path, key_file: Path) -> None:
    path = tmp_path / "attestation.json"
    printed = srd("axm", "attest", packed, "--key-file", key_file)
    assert (printed.status, printed.stderr) == (0, "")
    assert json.loads(printed.stdout)["fingerprint"] == FINGERPRINT
    written = srd("axm", "attest", packed, "--output", path)
    assert written.stdout == f"wrote {path}\n"
    assert path.read_text() == printed.stdout
    done = srd("axm", "verify", packed, "--attestation", path, "--fingerprint", SHORT)
    assert "matches        the given fingerprint and attestation" in done.stdout


def test_attest_reads_every_byte(srd: Run, tmp_path: Path) -> None:
    path, entries = tmp_path / "x.axm", signed_entries()
    path.write_bytes(write_zip(entries).replace(b"What this is.", b"What that is."))
    sentence = srd("axm", "attest", path, "--output", tmp_path / "attestation.json").sentence
    assert "notes/about.txt was changed after it was packed" in sentence
    assert not (tmp_path / "attestation.json").exists()


def test_another_container_than_the_attestation_has(srd: Run, packed: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "attestation.json", tmp_path / "other.axm"
    srd("axm", "attest", packed, "--output", path)
    other.write_bytes(container(FILES | {"z": b""}))
    assert srd("axm", "verify", other, "--attestation", path).sentence == (
        f"{path} is the attestation of another container than {other}: the container has z, the attestation does not"
    )


# --- secrecy ---------------------------------------------------------------------------------------------------------


def options() -> list[str]:
    """The options of all commands of `srd axm`."""
    group = typer.main.get_command(_app()).commands["axm"]
    return [option for command in group.commands.values() for given in command.params for option in given.opts]


def test_no_option_takes_a_key() -> None:
    """It would stand in the list of processes and in the history of the shell."""
    assert {option for option in options() if "key" in option or "secret" in option} == {
        *("--key-file", "--public-key", "--private-key")  # files, all of them
    }


@pytest.mark.slow
def test_the_key_is_in_no_output_log_or_list_of_processes(srd_process: Run, model: Path, tmp_path: Path) -> None:
    """With the key of the environment, in a process of its own, and its traceback asked for."""
    spellings = (SECRET.decode(), SECRET.hex(), SECRET.hex().upper())
    output, environment = tmp_path / "x.axm", {ENVIRONMENT: SECRET.hex(), "SRD_TRACEBACK": "1"}
    runs = [
        srd_process("axm", "pack", model, "--output", output, **environment),
        srd_process("axm", "verify", output, **environment),
        srd_process("axm", "inspect", output, **environment),
        srd_process("axm", "attest", output, **environment),
        srd_process("axm", "verify", output, **environment | {ENVIRONMENT: OTHER_SECRET.hex()}),
        srd_process("axm", "verify", output, **environment | {ENVIRONMENT: SECRET.hex() + "0"}),
        srd_process("axm", "verify", output, **environment | {ENVIRONMENT: SECRET.decode()}),
        srd_process("axm", "verify", output, **environment | {ENVIRONMENT: SECRET[:20].hex()}),
    ]
    assert [run.status for run in runs] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all("Traceback" in run.stderr for run in runs[4:])
    for run in runs:
        assert not any(spelling in run.stdout + run.stderr for spelling in (*spellings, SECRET[:20].hex()))
    assert not any(spelling.encode() in output.read_bytes() for spelling in spellings)


@pytest.mark.slow
def test_the_key_of_a_file_is_not_in_the_list_of_processes(model: Path, tmp_path: Path, key_file: Path) -> None:
    (model / "slow.gguf").write_bytes(bytes(64 << 20))
    command = [str(Path(sys.executable).with_name("srd")), "axm", "pack", str(model)]
    command += ["--output", str(tmp_path / "x.axm"), "--key-file", str(key_file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = set()
    while process.poll() is None:
        with suppress(ProcessLookupError):  # it has ended since
            seen |= {Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ")}
        time.sleep(0.01)
    assert process.returncode == 0
    assert any(str(key_file).encode() in text for text in seen)
    assert not any(spelling in text for text in seen for spelling in (SECRET, SECRET.hex().encode()))
