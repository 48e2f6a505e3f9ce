"""Signed containers: a checkpoint, a GGUF file or both in one file, verified before anything in it is used.

names          which paths a container may hold
keys           the secret and what is derived from it
manifest       the files and their digests; the fingerprint
header         axm.json: version, key id, and the HMAC that binds the manifest
layout         every byte around the files, from names, sizes and checksums
streams        hashing and copying on all cores, each byte once
sources, pack  from files to a container
container      an open one, its structure verified
faults         what happened to one that is refused, in a sentence
extract        from a container to files
entries        the files in a container as paths
attestation    a statement of what a container holds
signatures     public signatures with OpenSSF model-signing
verification   all of it against what the reader holds
"""

from srd_modifier.axm.attestation import attest
from srd_modifier.axm.container import Container
from srd_modifier.axm.entries import mount
from srd_modifier.axm.extract import extract, extract_gguf
from srd_modifier.axm.keys import Key, find_key, write_key
from srd_modifier.axm.pack import pack
from srd_modifier.axm.verification import Verified, verify

__all__ = [
    "Container",
    "Key",
    "Verified",
    "attest",
    "extract",
    "extract_gguf",
    "find_key",
    "mount",
    "pack",
    "verify",
    "write_key",
]
