"""The cluster's own certificate authority, and mutual TLS for frame sockets that leave a node.

The authority is made at first start and its key stays in the controller's directory. A process
makes its own key and a signing request; the controller signs it. Both ends of a connection demand a
certificate of this authority: holding one is what being a member of the cluster means, so host
names are not checked and no other authority is trusted. Keys are EC P-256, TLS is 1.3.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import ssl
import tempfile
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from serving.errors import ClusterError

CA_CERT_FILE: Final = "ca.pem"
CA_KEY_FILE: Final = "ca-key.pem"
_LOCK_FILE: Final = ".lock"

_CA_LIFETIME: Final = datetime.timedelta(days=3650)
# A certificate lives as long as its process, which may be long; the key never leaves that process.
_CERT_LIFETIME: Final = datetime.timedelta(days=825)
_CLOCK_SKEW: Final = datetime.timedelta(hours=1)


def ensure_ca(directory: Path) -> bytes:
    """The authority's certificate (PEM), made together with its key if `directory` has none.

    Raises `ClusterError` if the files cannot be read or written.
    """
    certificate = directory / CA_CERT_FILE
    try:
        if not certificate.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (directory / _LOCK_FILE).open("w") as lock:
                # Of several processes that start at once, one makes the authority.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not certificate.exists():
                    _make_ca(directory)
        return certificate.read_bytes()
    except OSError as error:
        raise ClusterError(f"{directory}: the cluster's certificate: {error}") from error


def make_csr(common_name: str = "serving-replica") -> tuple[bytes, bytes]:
    """A fresh private key and a signing request for it, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return _key_pem(key), csr.public_bytes(serialization.Encoding.PEM)


def sign_csr(directory: Path, csr_pem: bytes) -> bytes:
    """A certificate (PEM) for either end of a connection, signed by the authority in `directory`.

    Raises `ClusterError` if there is no usable authority, or the request is malformed or not signed
    by its key.
    """
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
    except ValueError as error:
        raise ClusterError(f"the signing request is malformed: {error}") from error
    if not csr.is_signature_valid or not isinstance(csr.public_key(), ec.EllipticCurvePublicKey):
        raise ClusterError("the signing request is not signed by its own EC key")
    ca_key, ca = _load_ca(directory)
    now = datetime.datetime.now(datetime.UTC)
    public = csr.public_key()
    # Only the key and the name are taken from the request: what the certificate may do is decided
    # here.
    certificate = (
        x509.CertificateBuilder()
        .subject_name(csr.subject)
        .issuer_name(ca.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(min(now + _CERT_LIFETIME, ca.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(_authority(ca_key), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def server_context(key_pem: bytes, cert_pem: bytes, ca_pem: bytes) -> ssl.SSLContext:
    """TLS for the listening end: a peer without a certificate of this authority is refused."""
    return _context(ssl.PROTOCOL_TLS_SERVER, key_pem, cert_pem, ca_pem)


def client_context(key_pem: bytes, cert_pem: bytes, ca_pem: bytes) -> ssl.SSLContext:
    """TLS for the connecting end: a peer without a certificate of this authority is refused."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, key_pem, cert_pem, ca_pem)


def _context(protocol: int, key_pem: bytes, cert_pem: bytes, ca_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Order matters: verify_mode must not be lowered while check_hostname is on.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=ca_pem.decode())
    with tempfile.TemporaryDirectory(prefix="serving-tls-") as private:
        # OpenSSL reads a chain from files only; this directory is 0700 and gone in a moment.
        path = Path(private) / "pair.pem"
        path.touch(mode=0o600)
        path.write_bytes(key_pem + cert_pem)
        context.load_cert_chain(path)
    return context


def _make_ca(directory: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "serving-gateway cluster")])
    now = datetime.datetime.now(datetime.UTC)
    public = key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    # The certificate comes last: a crash in between leaves no authority, and the next start makes
    # one.
    _write_private(directory / CA_KEY_FILE, _key_pem(key))
    _write_private(directory / CA_CERT_FILE, certificate.public_bytes(serialization.Encoding.PEM))


def _load_ca(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = serialization.load_pem_private_key(
            (directory / CA_KEY_FILE).read_bytes(), password=None
        )
        certificate = x509.load_pem_x509_certificate((directory / CA_CERT_FILE).read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(f"{directory}: the cluster's authority: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ClusterError(f"{directory / CA_KEY_FILE}: is not an EC key")
    return key, certificate


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, durably and in one step."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)
