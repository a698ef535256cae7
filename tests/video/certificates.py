"""A private key and a certificate chain as C2PA wants them, made for a test."""

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM


def write_certificates(folder, days=30, use=ExtendedKeyUsageOID.EMAIL_PROTECTION):
    """Write key.pem, chain.pem (signer, root) and root.pem; their paths.

    Args:
      days: how long they are valid from now; negative: expired so long ago.
      use: what the signer may do.
    """
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate("test root", root_key.public_key(), root_key, days, None)
    signer = _certificate("test signer", key.public_key(), root_key, days, use)
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths = [folder / f"{name}.pem" for name in ("key", "chain", "root")]
    for path, content in zip(paths, (private, signer + root, root), strict=True):
        path.write_bytes(content)
    return paths


def _certificate(name, public, issuer_key, days, use):
    def named(common):
        organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "loki_jax tests")
        return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common)])

    is_root, now = use is None, datetime.datetime.now(datetime.UTC)
    signs = dict.fromkeys(("key_cert_sign", "crl_sign"), is_root) | {"digital_signature": not is_root}
    others = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder(named("test root"), named(name), public, x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=90))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(is_root, None), True)
        .add_extension(x509.KeyUsage(**signs, **others), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
    )
    if not is_root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(PEM)
