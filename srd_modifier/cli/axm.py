"""`srd axm`: signed containers."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from srd_modifier.cli._progress import byte_bar

if TYPE_CHECKING:
    from srd_modifier.axm import Container, Key, Verified

app = typer.Typer(help="Pack, verify and unpack signed containers.", no_args_is_help=True)

_CONTAINER = typer.Argument(metavar="F.axm", help="Container.")
_KEY_FILE = typer.Option(metavar="FILE", help="Key file; without it the environment variable SRD_AXM_KEY counts.")
_OVERWRITE = typer.Option("--overwrite", help="Replace what is at the output.")
_JSON = typer.Option("--json", help="Print JSON and nothing else.")


@app.callback()
def axm() -> None:
    """Pack, verify and unpack signed containers."""


@app.command("keygen")
def keygen(file: Annotated[Path, typer.Argument(help="Key file to make, readable by its owner only.")]) -> None:
    """Make a key of 32 random bytes."""
    from srd_modifier.axm.keys import write_key

    key = write_key(file)
    typer.echo(f"wrote {file}, key id {key.key_id}")


@app.command("pack")
def pack(
    sources: Annotated[list[Path], typer.Argument(help="Checkpoint directory, GGUF file, or both.")],
    output: Annotated[Path, typer.Option(metavar="F.axm", help="Container to make.", show_default=False)],
    key_file: Annotated[Path | None, _KEY_FILE] = None,
    overwrite: Annotated[bool, _OVERWRITE] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Put a checkpoint, a GGUF file or both into one container."""
    from srd_modifier.axm.manifest import short_fingerprint
    from srd_modifier.axm.pack import pack

    key = _require_key(key_file)
    with byte_bar("packing") as progress:
        manifest = pack(sources, output, key, overwrite=overwrite, progress=progress)
    fingerprint, size = manifest.fingerprint, output.stat().st_size
    if as_json:
        values = {"output": str(output), "size": size, "files": len(manifest.files)}
        _print_json(values | _fingerprints(fingerprint) | {"key_id": key.key_id})
        return
    typer.echo(f"wrote {output}: {len(manifest.files)} files, {size:,} bytes, key id {key.key_id}")
    typer.echo(f"fingerprint {fingerprint} (short {short_fingerprint(fingerprint)})")


@app.command("verify")
def verify(
    path: Annotated[Path, typer.Argument(metavar="F.axm|DIR", help="Container, or a signed checkpoint directory.")],
    key_file: Annotated[Path | None, _KEY_FILE] = None,
    fingerprint: Annotated[str | None, typer.Option(help="Whole or short fingerprint that it must have.")] = None,
    attestation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Attestation that it must match: what `attest` wrote.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(metavar="FILE.pem", help="Public key of the signer, whose signature is checked.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The signature, where it is not in or beside the container.")
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Read every byte and compare it with all that is given: key, fingerprint, attestation, public signature."""
    if path.is_dir():
        _verify_directory(path, public_key, signature, as_json=as_json)
        return
    from srd_modifier.axm.verification import verify

    with byte_bar("verifying") as progress:
        found = verify(
            path,
            key=_find_key(key_file),
            fingerprint=fingerprint,
            attestation=attestation,
            public_key=public_key,
            signature=signature,
            progress=progress,
        )
    if as_json:
        _print_json(
            {"path": str(path), "verified": True, "size": found.size, "files": found.files}
            | _fingerprints(found.fingerprint)
            | {
                "key_id": found.key_id,
                "fingerprint_matches": found.by_fingerprint or None,
                "attestation_matches": found.by_attestation or None,
                "signer": found.signer,
            }
        )
    else:
        _print_verified(found)


@app.command("inspect")
def inspect(path: Annotated[Path, _CONTAINER], as_json: Annotated[bool, _JSON] = False) -> None:
    """Show header, fingerprint and contents; needs no key, and proves nothing of the origin."""
    from srd_modifier.axm.container import Container

    with Container(path) as container:
        if as_json:
            _print_json(_description(container))
        else:
            _print_description(container)


@app.command("extract")
def extract(
    path: Annotated[Path, _CONTAINER],
    output: Annotated[Path, typer.Option(help="Directory or, with --gguf, GGUF file to make.", show_default=False)],
    gguf: Annotated[bool, typer.Option("--gguf", help="Only the GGUF files.")] = False,
    key_file: Annotated[Path | None, _KEY_FILE] = None,
    overwrite: Annotated[bool, _OVERWRITE] = False,
) -> None:
    """Unpack a container; every byte is verified before anything appears at the output."""
    from srd_modifier.axm.container import Container
    from srd_modifier.axm.extract import extract, extract_gguf

    key = _find_key(key_file)
    unpack = extract_gguf if gguf else extract
    with Container(path, key=key) as container, byte_bar("unpacking") as progress:
        names = unpack(container, output, overwrite=overwrite, progress=progress)
    typer.echo(f"wrote {output}: {len(names)} files, verified")
    if key is None:
        typer.echo("no key was given, so nothing is known of the origin", err=True)


@app.command("attest")
def attest(
    path: Annotated[Path, _CONTAINER],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; standard output if not given.")
    ] = None,
    key_file: Annotated[Path | None, _KEY_FILE] = None,
) -> None:
    """State what a container holds: fingerprint, files, base digest, recipe and versions, as JSON."""
    from srd_modifier.axm.attestation import attest, encode_attestation
    from srd_modifier.axm.container import Container
    from srd_modifier.checkpoint.atomic import write_text

    with Container(path, key=_find_key(key_file)) as container, byte_bar("verifying") as progress:
        container.verify(progress)
        text = encode_attestation(attest(container))
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_text(output, text)
        typer.echo(f"wrote {output}")


@app.command("sign")
def sign(
    path: Annotated[Path, typer.Argument(metavar="F.axm|DIR", help="Container, or checkpoint directory.")],
    private_key: Annotated[
        Path, typer.Option(metavar="FILE.pem", help="Private EC key of the signer.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The signature; F.axm.sig beside a container, DIR/model.sig if not given."),
    ] = None,
    overwrite: Annotated[bool, _OVERWRITE] = False,
) -> None:
    """Sign a container or a checkpoint directory with OpenSSF model-signing, for everybody who has the public key."""
    from srd_modifier.axm.signatures import sign_container, sign_directory

    signing = sign_directory if path.is_dir() else sign_container
    with byte_bar("hashing") as progress:
        written = signing(path, private_key, output, overwrite=overwrite, progress=progress)
    typer.echo(f"wrote {written}")


def _verify_directory(path: Path, public_key: Path | None, signature: Path | None, *, as_json: bool) -> None:
    from srd_modifier.axm.signatures import verify_directory_signature
    from srd_modifier.errors import SRDError

    if public_key is None:
        raise SRDError(f"{path} is a directory: name the --public-key of who signed it, keys are for containers")
    with byte_bar("verifying") as progress:
        signer = verify_directory_signature(path, public_key, signature, progress=progress)
    if as_json:
        _print_json({"path": str(path), "verified": True, "signer": signer})
        return
    typer.echo("integrity      every file is as it was signed")
    typer.echo(f"public signer  {signer}")


def _print_verified(found: "Verified") -> None:
    from srd_modifier.axm.manifest import short_fingerprint

    known = [
        text
        for text, compared in (("fingerprint", found.by_fingerprint), ("attestation", found.by_attestation))
        if compared
    ]
    typer.echo(f"integrity      {found.files} files, {found.size:,} bytes, every byte verified")
    typer.echo(f"fingerprint    {found.fingerprint} (short {short_fingerprint(found.fingerprint)})")
    if known:
        typer.echo(f"matches        the given {' and '.join(known)}")
    origin = f"packed by a holder of key {found.key_id}" if found.key_id else "not checked, no key was given"
    typer.echo(f"origin         {origin}")
    typer.echo(f"public signer  {found.signer or 'not checked, no public key was given'}")


def _description(container: "Container") -> dict[str, Any]:
    header = container.header
    return {
        "path": str(container.path),
        "size": container.size,
        **_fingerprints(container.fingerprint),
        "key_id": header.key_id,
        "tools": header.tools,
        "files": [
            {"path": record.path, "size": record.size, "sha256": record.sha256} for record in container.manifest.files
        ],
    }


def _print_description(container: "Container") -> None:
    from srd_modifier.axm.manifest import short_fingerprint

    rows = Table(title=escape(str(container.path)), title_justify="left", caption_justify="left")
    rows.add_column("file", overflow="fold")
    rows.add_column("bytes", justify="right")
    rows.add_column("SHA-256", no_wrap=True)
    for record in container.manifest.files:
        rows.add_row(escape(record.path), f"{record.size:,}", f"{record.sha256[:16]}...")
    console = Console()
    console.print(rows)
    tools = ", ".join(f"{name} {version}" for name, version in container.header.tools.items())
    fingerprint = container.fingerprint
    typer.echo(f"fingerprint    {fingerprint} (short {short_fingerprint(fingerprint)})")
    typer.echo(f"key id         {container.header.key_id}")
    typer.echo(f"packed with    {tools}")
    typer.echo(f"size           {container.size:,} bytes")
    typer.echo("not verified: `srd axm verify` reads the files and compares them with a key or the fingerprint")


def _require_key(key_file: Path | None) -> "Key":
    from srd_modifier.axm.keys import require_key

    with _warnings_in_one_line():
        return require_key(key_file)


def _find_key(key_file: Path | None) -> "Key | None":
    from srd_modifier.axm.keys import find_key

    with _warnings_in_one_line():
        return find_key(key_file)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        typer.echo(f"srd: {warning.message}", err=True)


def _fingerprints(fingerprint: str) -> dict[str, str]:
    from srd_modifier.axm.manifest import short_fingerprint

    return {"fingerprint": fingerprint, "fingerprint_short": short_fingerprint(fingerprint)}


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, indent=2))
