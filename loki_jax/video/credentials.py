"""Content credentials (C2PA): a signed statement in a file that it was generated, and by what.

Needs the extra `sign` (c2pa-python, cryptography). Nothing is sent anywhere: there is no timestamp authority.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import loki_jax
from loki_jax.io import atomic_path
from loki_jax.video.files import MediaError

SIGNED_SUFFIXES = (".mp4", ".m4v", ".mov", ".gif", ".png")

# IPTC's terms: of the pixels of a picture moved by an algorithm, and of what a trained model made of it.
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeSynthetic"
COMPOSITE_TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"

_EC_ALGORITHMS = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}


class Credentials(NamedTuple):
    """Who signs.

    Attributes:
      algorithm: C2PA's name, such as b"es256".
      key: private key, PEM (PKCS #8).
      chain: certificates, PEM, the signer's first.
    """

    algorithm: bytes
    key: bytes
    chain: bytes


def read_credentials(key: str | os.PathLike, chain: str | os.PathLike) -> Credentials:
    """The credentials of a private key and a certificate chain, after a trial that they can sign.

    Args:
      key: PEM file without password: EC (P-256, P-384, P-521), Ed25519 or RSA.
      chain: PEM file: the signer's certificate, then those of the authorities that issued it.

    Raises:
      MediaError: a file is missing or damaged, the two do not belong together, the certificate has expired or
        may not sign content, or the packages are missing.
    """
    try:
        import c2pa
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise MediaError(
            f"signing needs more packages ({error}). Run `pip install loki_jax[sign]`."
        ) from error
    key, chain = Path(key), Path(chain)
    try:
        private: Any = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise MediaError(f"{key}: not a readable private key ({error}). Give PEM, no password.") from error
    try:
        certificates = x509.load_pem_x509_certificates(chain.read_bytes())
    except (OSError, ValueError) as error:
        raise MediaError(f"{chain}: no readable certificates ({error}). Give PEM, signer first.") from error
    if certificates[0].public_key() != private.public_key():
        raise MediaError(f"{chain}: its first certificate is not of the key {key}. Put the signer's first.")
    end = certificates[0].not_valid_after_utc
    if end < datetime.datetime.now(datetime.UTC):
        raise MediaError(f"{chain}: the signer's certificate expired on {end:%Y-%m-%d}. Renew it.")
    curve = getattr(getattr(private, "curve", None), "name", "")
    kind = type(private).__name__
    algorithm = b"ed25519" if "Ed25519" in kind else b"ps256" if "RSA" in kind else _EC_ALGORITHMS.get(curve)
    if algorithm is None:
        raise MediaError(f"{key}: not a kind of key for C2PA. Use P-256, P-384, P-521, Ed25519 or RSA.")
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    credentials = Credentials(algorithm, pem, chain.read_bytes())
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "PNG")
    try:
        _sign(credentials, COMPOSITE, "trial", "image/png", picture, io.BytesIO())
    except c2pa.C2paError as error:
        raise MediaError(
            f"{chain}: cannot sign content ({error}). C2PA wants a certificate that is not self-signed, for "
            "digital signatures, with an extended use such as email protection."
        ) from error
    return credentials


@contextlib.contextmanager
def signed(
    path: str | os.PathLike, credentials: Credentials | None, source: str = COMPOSITE
) -> Iterator[Path]:
    """A name at which the `with` block writes a file, which is then signed and appears at `path`.

    Without credentials it is `path` itself.

    Args:
      source: IPTC's digital source type.

    Raises:
      MediaError: files of this kind cannot be signed, or signing fails; nothing is written then.
    """
    path = Path(path)
    if credentials is None:
        yield path
        return
    check_signable(path)
    folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.", suffix=".partial")
    with folder, atomic_path(path) as partial:
        unsigned = Path(folder.name) / path.name
        yield unsigned
        import c2pa

        try:
            with open(unsigned, "rb") as plain, open(partial, "w+b") as result:
                _sign(credentials, source, path.name, path.suffix[1:].lower(), plain, result)
        except (c2pa.C2paError, OSError) as error:
            raise MediaError(f"{path}: cannot be signed ({error}). Leave --sign out.") from error


def check_signable(path: str | os.PathLike) -> None:
    """Check that a file of this name can be signed.

    Raises:
      MediaError: it cannot.
    """
    path = Path(path)
    if path.suffix.lower() not in SIGNED_SUFFIXES or "%" in path.name:
        raise MediaError(f"{path}: cannot be signed. Name one file, {', '.join(SIGNED_SUFFIXES)}.")


def _sign(credentials: Credentials, source: str, title: str, kind: str, plain: Any, result: Any) -> None:
    import c2pa

    made = {"action": "c2pa.created", "digitalSourceType": source}
    manifest = {
        "title": title,
        "claim_generator_info": [{"name": "loki_jax", "version": loki_jax.__version__}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [made]}}],
    }
    info = c2pa.C2paSignerInfo(credentials.algorithm, credentials.chain, credentials.key, None)
    with c2pa.Signer.from_info(info) as signer, c2pa.Builder(json.dumps(manifest)) as builder:
        builder.sign(signer, kind, plain, result)
