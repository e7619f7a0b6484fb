"""The cluster's authority and mutual TLS, over real sockets and with a real replica behind them."""

from __future__ import annotations

import contextlib
import datetime
import select
import socket
import ssl
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from serving import tls
from serving.artifacts import ONNX_PLATFORM
from serving.errors import ClusterError
from serving.replica.engine import Engine
from serving.replica.rules import rules_for
from serving.replica.server import ReplicaServer, TlsListener
from tests.replica import models
from tests.replica.client import Client
from tests.replica.conftest import wait_until

Identity = tuple[bytes, bytes, bytes]


def issue(directory: Path) -> Identity:
    """Key, certificate and authority, as a process gets them."""
    ca = tls.ensure_ca(directory)
    key, csr = tls.make_csr()
    return key, tls.sign_csr(directory, csr), ca


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("theirs")


@pytest.fixture
def server(tmp_path: Path, ours: Path):
    backend = models.cpu_backend(models.linear(tmp_path / "m.onnx"), ONNX_PLATFORM, models.LINEAR)
    listener = TlsListener("127.0.0.1", tls.server_context(*issue(ours)))
    engine = Engine(backend, rules_for(backend, 1 << 16))
    server = ReplicaServer(engine, tmp_path / "run" / "r.sock", {"replica": "r"}, listener)
    server.start()
    yield server
    server.stop()


def connect(server: ReplicaServer, context: ssl.SSLContext | None, role: str = "data") -> Client:
    host, port = str(server.tcp_address).rsplit(":", 1)
    sock = socket.create_connection((host, int(port)), timeout=30)
    with contextlib.ExitStack() as stack:
        stack.callback(sock.close)
        if context is not None:
            # A failed handshake is seen here or, in TLS 1.3, at the first read.
            sock = context.wrap_socket(sock)
            stack.callback(sock.close)
        client = Client(sock, role)
        stack.pop_all()
        return client


def still_serves(server: ReplicaServer, ours: Path) -> None:
    with connect(server, tls.client_context(*issue(ours))) as client:
        x = np.ones((2, 4), np.float32)
        np.testing.assert_allclose(client.infer(x)[0], x @ models.LINEAR_W)


def test_a_member_of_the_cluster_is_served(server: ReplicaServer, ours: Path) -> None:
    context = tls.client_context(*issue(ours))
    with connect(server, context) as client, connect(server, context, "heartbeat") as heart:
        assert client.sock.version() == "TLSv1.3"
        for n in (1, 60_000, 3):
            x = np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32)
            np.testing.assert_allclose(
                client.infer(x)[0], x @ models.LINEAR_W, rtol=1e-3, atol=1e-3
            )
        assert heart.ping() == 0


def test_a_client_without_a_certificate_is_refused(server: ReplicaServer, ours: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=tls.ensure_ca(ours).decode())
    with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
        connect(server, context)
    still_serves(server, ours)


def test_a_client_of_another_cluster_is_refused(
    server: ReplicaServer, ours: Path, theirs: Path
) -> None:
    key, certificate, _ = issue(theirs)
    # It trusts our authority, so that only its own certificate is at fault.
    with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
        connect(server, tls.client_context(key, certificate, tls.ensure_ca(ours)))
    still_serves(server, ours)


def test_a_replica_of_another_cluster_is_refused(server: ReplicaServer, theirs: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(server, tls.client_context(*issue(theirs)))


def test_a_client_that_speaks_plain_frames_is_refused(server: ReplicaServer, ours: Path) -> None:
    with pytest.raises((ConnectionError, EOFError)):
        connect(server, None)
    still_serves(server, ours)


def test_tls_1_2_is_refused(server: ReplicaServer, ours: Path) -> None:
    context = tls.client_context(*issue(ours))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        connect(server, context)


def test_strangers_cannot_take_all_threads(server: ReplicaServer, ours: Path) -> None:
    host, port = str(server.tcp_address).rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)
        ]
        # Those beyond the limit are closed at once, before the handshake's timeout.
        closed = select.select(silent, [], [], 5)[0]
        assert closed
        # Members on the node are served all the while.
        with Client.unix(server.unix_path) as client:
            assert len(client.infer(np.ones((1, 4), np.float32))[0]) == 1
        wait_until(lambda: len(select.select(silent, [], [], 0)[0]) == 200 - 64, "64 remain")
    still_serves(server, ours)


def test_a_leaf_certificate_cannot_sign_others(server: ReplicaServer, ours: Path) -> None:
    leaf_key, leaf, ca = issue(ours)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    forged = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "intruder")]))
        .issuer_name(x509.load_pem_x509_certificate(leaf).subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(serialization.load_pem_private_key(leaf_key, None), hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    chain = forged.public_bytes(serialization.Encoding.PEM) + leaf
    with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
        connect(server, tls.client_context(pem, chain, ca))


def test_the_authority_is_made_once_and_private(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    first = tls.ensure_ca(directory)
    assert tls.ensure_ca(directory) == first
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    files = {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.glob("*.pem")}
    assert files == {tls.CA_KEY_FILE: 0o600, tls.CA_CERT_FILE: 0o600}


def test_processes_that_start_at_once_agree_on_one_authority(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(tls.ensure_ca(directory))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    key, csr = tls.make_csr()
    tls.server_context(key, tls.sign_csr(directory, csr), found[0])


def test_a_request_cannot_ask_for_more_than_membership(ours: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "r")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    tls.ensure_ca(ours)
    pem = tls.sign_csr(ours, csr.public_bytes(serialization.Encoding.PEM))
    issued = x509.load_pem_x509_certificate(pem)
    assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not issued.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_bad_requests_and_directories_are_clear_errors(ours: Path, tmp_path: Path) -> None:
    tls.ensure_ca(ours)
    with pytest.raises(ClusterError, match="malformed"):
        tls.sign_csr(ours, b"nonsense")
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    weak = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    pem = weak.sign(rsa_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(ClusterError, match="not signed by its own EC key"):
        tls.sign_csr(ours, pem)
    _, csr = tls.make_csr()
    with pytest.raises(ClusterError, match="authority"):
        tls.sign_csr(tmp_path, csr)
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match="certificate"):
        tls.ensure_ca(tmp_path / "file" / "ca")
