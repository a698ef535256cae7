"""Content credentials, read back with the certificates of the test."""

import json
from fractions import Fraction

import numpy as np
import pytest

from loki_jax.video import MediaError, open_output
from loki_jax.video.credentials import COMPOSITE, COMPOSITE_TRAINED, read_credentials, signed

c2pa = pytest.importorskip("c2pa", reason="needs the sign extra (c2pa-python)")
pytest.importorskip("cryptography", reason="needs the sign extra (cryptography)")

from cryptography.x509.oid import ExtendedKeyUsageOID  # noqa: E402

from tests.video.certificates import write_certificates  # noqa: E402


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return write_certificates(tmp_path_factory.mktemp("certificates"))


def write(path, credentials, source=COMPOSITE):
    with signed(path, credentials, source) as name, open_output(name, Fraction(25)) as writer:
        for level in (0,) if path.suffix == ".png" else (0, 60, 120):
            writer.write(np.full((32, 48, 3), level, np.uint8))


def read_manifest(path, root):
    """Validation state and the manifest of a file."""
    context = c2pa.Context.from_dict({"trust": {"user_anchors": root.read_text()}})
    with open(path, "rb") as file, c2pa.Reader(path.suffix[1:], file, context=context) as reader:
        found = json.loads(reader.json())
        return reader.get_validation_state(), found["manifests"][found["active_manifest"]]


@pytest.mark.parametrize("suffix", [".mp4", ".m4v", ".mov", ".gif", ".png"])
def test_the_manifest_says_who_made_the_file_and_how(tmp_path, certificates, suffix):
    key, chain, root = certificates
    out = tmp_path / f"out{suffix}"
    write(out, read_credentials(key, chain), COMPOSITE_TRAINED)
    state, manifest = read_manifest(out, root)
    assert state == "Trusted" and manifest["title"] == out.name
    assert manifest["claim_generator_info"][0]["name"] == "loki_jax"
    (actions,) = (a for a in manifest["assertions"] if a["label"].startswith("c2pa.actions"))
    (action,) = actions["data"]["actions"]
    assert action["action"] == "c2pa.created" and action["digitalSourceType"] == COMPOSITE_TRAINED
    assert list(tmp_path.iterdir()) == [out]


def test_a_changed_file_is_found_out(tmp_path, certificates):
    key, chain, root = certificates
    out = tmp_path / "out.mp4"
    write(out, read_credentials(key, chain))
    content = bytearray(out.read_bytes())
    content[-20] ^= 1
    out.write_bytes(content)
    assert read_manifest(out, root)[0] == "Invalid"


def test_nothing_is_left_of_what_is_not_finished(tmp_path, certificates):
    credentials = read_credentials(*certificates[:2])
    with pytest.raises(KeyboardInterrupt), signed(tmp_path / "out.mp4", credentials) as name:
        name.write_bytes(b"half a file")
        raise KeyboardInterrupt
    with pytest.raises(MediaError, match="out.mp4: cannot be signed"):
        with signed(tmp_path / "out.mp4", credentials) as name:
            name.write_bytes(b"no video")
    with pytest.raises(MediaError, match=r"out.webm: cannot be signed. Name one file, .mp4"):
        with signed(tmp_path / "out.webm", credentials):
            pytest.fail("work before the check")
    assert not list(tmp_path.iterdir())


def test_bad_keys_and_certificates_are_one_clear_error(tmp_path, certificates):
    key, chain, root = certificates
    (tmp_path / "text.pem").write_text("no key")
    folders = [tmp_path / name for name in ("other", "expired", "server")]
    for folder in folders:
        folder.mkdir()
    other = write_certificates(folders[0])
    expired = write_certificates(folders[1], days=-10)
    server = write_certificates(folders[2], use=ExtendedKeyUsageOID.CODE_SIGNING)
    for pair, message in [
        ((tmp_path / "none.pem", chain), "none.pem: not a readable private key"),
        ((tmp_path / "text.pem", chain), "text.pem: not a readable private key"),
        ((key, tmp_path / "text.pem"), "text.pem: no readable certificates"),
        ((key, root), "root.pem: its first certificate is not of the key"),
        ((key, other[1]), "chain.pem: its first certificate is not of the key"),
        (expired[:2], "chain.pem: the signer's certificate expired on"),
        (server[:2], "chain.pem: cannot sign content"),
    ]:
        with pytest.raises(MediaError, match=message):
            read_credentials(*pair)
