"""Certificates, keys and a secret for a trial: ``certificates.py FOLDER NAME...``.

A real deployment takes them from its own authority (cert-manager, step-ca, ...).
"""

import sys
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from secrets import token_hex

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PEM = serialization.Encoding.PEM
_PLAIN = serialization.NoEncryption()


def make_certificates(folder: Path, names: list[str], hosts: list[str]) -> None:
    """Write ``ca.pem``, and ``NAME.pem`` and ``NAME.key`` for servers on some hosts.

    Each server is reached by its name, too.
    """
    authority = ec.generate_private_key(ec.SECP256R1())
    root = _certificate("ca", authority.public_key(), authority, hosts=None)
    (folder / "ca.pem").write_bytes(root.public_bytes(_PEM))
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate(name, key.public_key(), authority, hosts=[name, *hosts])
        (folder / f"{name}.pem").write_bytes(made.public_bytes(_PEM))
        form = serialization.PrivateFormat.PKCS8
        _write_secret(folder / f"{name}.key", key.private_bytes(_PEM, form, _PLAIN))


def make_node_key(folder: Path, name: str) -> None:
    """Write the key pair ``NAME`` and ``NAME.pub`` of a SuperNode."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    _write_secret(folder / name, key.private_bytes(_PEM, form, _PLAIN))
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / f"{name}.pub").write_bytes(public + b"\n")


def make_secret(path: Path) -> None:
    """Write a random secret."""
    _write_secret(path, token_hex(32).encode())


def _write_secret(path: Path, data: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(data)


def _certificate(name, public_key, authority, *, hosts):
    """Sign a certificate; without hosts, it is the authority's own."""
    now = datetime.now().astimezone()
    made = (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named("ca"))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(hosts is None, None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False
        )
    )
    if hosts is None:
        usage = x509.KeyUsage(
            *(False,) * 5,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        made = made.add_extension(usage, critical=True)
    else:
        names = x509.SubjectAlternativeName(list(map(_host, hosts)))
        made = made.add_extension(names, critical=False)
    return made.sign(authority, hashes.SHA256())


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not (target / "ca.pem").exists():
        make_certificates(target, sys.argv[2:], ["localhost", "127.0.0.1"])
        make_secret(target / "edge.secret")
        for number in range(3):
            make_node_key(target, f"device-{number}")
