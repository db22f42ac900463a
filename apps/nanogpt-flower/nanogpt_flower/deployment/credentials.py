"""Make the credentials of a deployment: one directory for the server, and one for each party."""

import datetime
import hashlib
import ipaddress
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nanogpt_flower.local.app_directory import write_app

PORT = 9092  # the port of Flower's SuperLink
LIFETIME = datetime.timedelta(days=365)
# The files of a party.
CA_FILE, KEY_FILE, SECRET_FILE, NODE_FILE = "ca.crt", "key", "superexec-secret", "node.toml"
HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
# All that an authenticated SuperNode asks for. It is registered on the server, so "register-node"
# and "unregister-node" are not among these.
FLEET_PATHS = (
    *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
    *("get-run", "get-fab", "pull-object", "push-object", "confirm-message-received"),
)
NGINX = """\
# Passes the messages of SuperNodes to the SuperLink, and nothing else.
# Start: nginx -e stderr -p DIRECTORY/ -c nginx.conf
worker_processes 2;
daemon off;
pid nginx/nginx.pid;
error_log stderr warn;

events {{ worker_connections 1024; }}

http {{
    server_tokens off;
    client_body_temp_path nginx/body;
    proxy_temp_path nginx/proxy;
    fastcgi_temp_path nginx/fastcgi;
    uwsgi_temp_path nginx/uwsgi;
    scgi_temp_path nginx/scgi;

    # The log has the requests that were refused, but not those above the limits below.
    map $status $refused {{ ~^[23] 0; 429 0; default 1; }}
    map $request $brief {{ "~^(?<start>.{{0,100}})" $start; }}
    log_format refused '$time_iso8601 $remote_addr $status $request_length "$brief"';
    access_log nginx/refused.log refused if=$refused;

    # A request holds at most one part of an array, which Flower cuts into parts of 5 MiB. Bodies
    # stay in memory: no update of a client is written to disk here.
    client_max_body_size 5200k;
    client_body_buffer_size 5200k;
    proxy_max_temp_file_size 0;
    client_header_timeout 5s;
    client_header_buffer_size 1k;
    large_client_header_buffers 4 4k;
    client_body_timeout 20s;
    send_timeout 30s;
    keepalive_timeout 75s;
    reset_timedout_connection on;

    # Limits for each address. A SuperNode holds two connections. A message needs two requests for
    # each array.
    limit_conn_zone $binary_remote_addr zone=connections:1m;
    limit_req_zone $binary_remote_addr zone=requests:1m rate=200r/s;
    limit_conn connections {connections};
    limit_req zone=requests burst=2000 nodelay;
    limit_req_log_level info;
    limit_conn_log_level info;
    limit_conn_status 429;
    limit_req_status 429;

    ssl_certificate server.crt;
    ssl_certificate_key server.key;
    ssl_protocols TLSv1.2 TLSv1.3;

    server {{
        listen {listen} ssl;

        location / {{ deny all; }}  # "return" would come before the limits

        location ~ ^/v1/fleet/({paths})$ {{
            limit_except POST {{ deny all; }}
            # The path is written anew, so no "..", "%" or query reaches the SuperLink.
            proxy_pass https://127.0.0.1:{superlink_port}/v1/fleet/$1;
            proxy_ssl_trusted_certificate ca.crt;
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_read_timeout 60s;
        }}
    }}
}}
"""


class CredentialsError(ValueError):
    """The error for credentials that cannot be made or used. The message names file or option."""


@dataclass(frozen=True)
class Credentials:
    """The credentials of a deployment, as they were made.

    Attributes:
        directory: holds `server` and one directory for each party.
        address: the address that SuperNodes connect to, as HOST:PORT.
        superlink_port: the port on which the SuperLink listens, on 127.0.0.1 alone.
        supernodes: the number of parties.
        expires: the end of the server's certificate.
    """

    directory: Path
    address: str
    superlink_port: int
    supernodes: int
    expires: datetime.date

    @property
    def server(self) -> Path:
        """The directory of the server."""
        return self.directory / "server"

    @property
    def app(self) -> Path:
        """The directory of the app, which `flwr run` packs into the FAB of each run."""
        return self.server / "app"

    @property
    def parties(self) -> list[Path]:
        """The directories of the parties."""
        return [self.directory / f"party-{number}" for number in self._numbers]

    @property
    def _numbers(self) -> range:
        return range(1, self.supernodes + 1)

    @property
    def flower_home(self) -> Path:
        """The directory with Flower's `config.toml`, which `FLWR_HOME` must name."""
        return self.server / "flwr"

    @property
    def proxy_command(self) -> list[str]:
        """The command that starts the proxy."""
        return [nginx() or "nginx", "-e", "stderr", "-p", f"{self.server}/", "-c", "nginx.conf"]

    @property
    def superlink_command(self) -> list[str]:
        """The command that starts the SuperLink."""
        address = ["--host", "127.0.0.1", "--port", str(self.superlink_port)]
        files = {"--ssl-ca-certfile": CA_FILE, "--ssl-certfile": "server.crt"}
        files |= {"--ssl-keyfile": "server.key", "--superexec-auth-secret-file": SECRET_FILE}
        options = [part for name, file in files.items() for part in (name, str(self.server / file))]
        isolation = ["--isolation", "process", "--enable-supernode-auth"]
        return ["flower-superlink", *address, *options, *isolation]

    @property
    def superexec_command(self) -> list[str]:
        """The command that starts the SuperExec, which starts the ServerApp of each run."""
        address = ["--runtime-api-address", f"127.0.0.1:{self.superlink_port}"]
        files = ["--root-certificates", str(self.server / CA_FILE)]
        files += ["--superexec-auth-secret-file", str(self.server / SECRET_FILE)]
        return ["flower-superexec", *address, *files]

    @property
    def register_commands(self) -> list[list[str]]:
        """The commands that register the SuperNodes."""
        keys = [(self.server / f"party-{n}.pub", f"party-{n}") for n in self._numbers]
        return [["flwr", "supernode", "register", str(key), "--name", name] for key, name in keys]

    @property
    def run_command(self) -> list[str]:
        """The command that starts a run."""
        return ["flwr", "run", str(self.app), "--stream"]

    def explained(self) -> str:
        """Return who gets which directory, and the commands of each party."""
        home = f"FLWR_HOME={shlex.quote(str(self.flower_home))} "
        server, secret = shlex.quote(str(self.server)), "It holds private keys."
        lines = [
            f"{server} stays on the server. {secret} Start each of these in a terminal:",
            *(f"  {shlex.join(c)}" for c in (self.proxy_command, self.superlink_command)),
            f"  {home}{shlex.join(self.superexec_command)}",
            "Register the SuperNodes once the SuperLink runs, and again after each of its starts:",
            *(f"  {home}{shlex.join(command)}" for command in self.register_commands),
            "Start a run when the parties have started their nodes:",
            f"  {home}{shlex.join(self.run_command)}",
        ]
        for party in self.parties:
            given = shlex.quote(str(party))
            lines += [
                "",
                f"{given} goes to one party, over a channel that you trust, and to nobody else. "
                f"{secret} The party starts:",
                f"  nanogpt-flower node {given} --data DIRECTORY",
            ]
        lines += [
            "",
            f"The server's certificate expires on {self.expires}. Then make new credentials: the "
            "key of the CA was not kept.",
        ]
        return "\n".join(lines)


def nginx() -> str | None:
    """Return the path of nginx, or None. Debian keeps it outside of a user's PATH."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def make_credentials(
    directory: Path,
    *,
    host: str,
    supernodes: int,
    port: int = PORT,
    superlink_port: int | None = None,
) -> Credentials:
    """Make the credentials of a server and its SuperNodes in a new directory.

    Args:
        directory: must not exist.
        host: the name or the IP address by which the SuperNodes reach the server.
        supernodes: the number of SuperNodes, each of another party.
        port: the port of the proxy, to which the SuperNodes connect.
        superlink_port: the port of the SuperLink on 127.0.0.1, by default the one after `port`.

    Raises:
        CredentialsError: the directory exists, or an argument is not allowed.
    """
    superlink_port = port + 1 if superlink_port is None else superlink_port
    address = _checked_address(host, port)
    if supernodes < 1:
        raise CredentialsError(f"--supernodes is {supernodes}; it must be at least 1")
    if not 1 <= port <= 65534:
        raise CredentialsError(f"--port is {port}; it must be from 1 to 65534")
    if directory.exists():
        raise CredentialsError(
            f"{directory} exists; keys are never overwritten, so give --output a new directory"
        )
    expires = datetime.datetime.now(datetime.UTC) + LIFETIME
    made = Credentials(directory, address, superlink_port, supernodes, expires.date())
    for path in (directory, made.server, made.server / "nginx", made.flower_home, *made.parties):
        path.mkdir(mode=0o700, parents=True)
    ca = _make_certificates(made.server, host, expires)
    _write(made.server / SECRET_FILE, secrets.token_hex(32))
    _write(
        made.server / "nginx.conf",
        NGINX.format(
            listen=_listen(host, port),
            superlink_port=superlink_port,
            connections=16 + 4 * supernodes,  # all SuperNodes may have one address
            paths="|".join(FLEET_PATHS),
        ),
    )
    connection = {
        "address": f"127.0.0.1:{superlink_port}",
        "root-certificates": str((made.server / CA_FILE).resolve()),
    }
    config = {"superlink": {"default": "server", "server": connection}}
    _write(made.flower_home / "config.toml", tomli_w.dumps(config))
    write_app(made.app)
    digest = fab_digest(made.app)
    for party in made.parties:
        _write(party / CA_FILE, ca)
        _write(made.server / f"{party.name}.pub", _make_node_key(party / KEY_FILE))
        _write(party / SECRET_FILE, secrets.token_hex(32))
        _write(party / NODE_FILE, tomli_w.dumps({"superlink": address, "fabs": [digest]}))
    return made


def fab_digest(app: Path) -> str:
    """Return the SHA-256 of the FAB that `flwr run` sends for an app.

    Flower writes no times into a FAB, so one app gives one FAB.

    Raises:
        CredentialsError: `flwr build` has failed. The message quotes its output.
    """
    flwr = Path(sysconfig.get_path("scripts")) / "flwr"
    with tempfile.TemporaryDirectory() as built:
        command = [str(flwr), "build", "--app", str(app.resolve())]
        finished = subprocess.run(command, cwd=built, capture_output=True, text=True, check=False)
        fabs = list(Path(built).glob("*.fab"))
        if finished.returncode or len(fabs) != 1:
            raise CredentialsError(f"`flwr build` failed: {finished.stdout}{finished.stderr}")
        return hashlib.sha256(fabs[0].read_bytes()).hexdigest()


def _checked_address(host: str, port: int) -> str:
    error = CredentialsError(
        f"--host is {host!r}; it must be a host name or an IP address that the parties can reach"
    )
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not HOST_NAME.fullmatch(host) or host.rpartition(".")[2].isdigit():
            raise error from None
        return f"{host}:{port}"
    if address.is_unspecified:
        raise error
    return f"[{host}]:{port}" if address.version == 6 else f"{host}:{port}"


def _listen(host: str, port: int) -> str:
    """Return where the proxy listens: on every address of the server, unless the host is local."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(port)
    if address.version == 6:
        return f"[::1]:{port}" if address.is_loopback else f"[::]:{port}"
    return f"{host}:{port}" if address.is_loopback else str(port)


def _make_certificates(server: Path, host: str, expires: datetime.datetime) -> str:
    """Write a CA's certificate, and the server's key and certificate. Return the CA's certificate.

    The CA's key is not kept, so nobody can make a second server that SuperNodes trust.
    """
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)  # clocks differ
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nanogpt-flower CA")])
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())

    def builder(
        subject: x509.Name, public_key: ec.EllipticCurvePublicKey, is_ca: bool
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(issuer_name=ca_name, subject_name=subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(expires)
            .add_extension(x509.BasicConstraints(is_ca, 0 if is_ca else None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not is_ca,
                    key_cert_sign=is_ca,
                    crl_sign=is_ca,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )

    ca = builder(ca_name, ca_key.public_key(), True).sign(ca_key, hashes.SHA384())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nanogpt-flower server")])
    certificate = (
        builder(name, key.public_key(), False)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )
    ca_text = ca.public_bytes(Encoding.PEM).decode()
    _write(server / CA_FILE, ca_text)
    _write(server / "server.crt", certificate.public_bytes(Encoding.PEM).decode())
    _write(server / "server.key", _private(key, PrivateFormat.PKCS8))
    return ca_text


def _names(host: str) -> list[x509.GeneralName]:
    """Return the names of the server: the host, and those that programs on the server use."""
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys((host, "localhost", "127.0.0.1")):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name))
    return names


def _make_node_key(path: Path) -> str:
    """Write the key of a SuperNode as OpenSSH does, and return its public key."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write(path, _private(key, PrivateFormat.OpenSSH))
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + "\n"


def _private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> str:
    return key.private_bytes(Encoding.PEM, form, NoEncryption()).decode()


def _write(path: Path, text: str) -> None:
    """Write a new file that only its owner can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
