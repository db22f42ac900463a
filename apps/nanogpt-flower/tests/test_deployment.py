"""Credentials, the SuperNode of a party, and everybody who must be shut out of a deployment."""

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from nanogpt_flower.cli import main
from nanogpt_flower.deployment import flower
from nanogpt_flower.deployment.credentials import (
    FLEET_PATHS,
    Credentials,
    CredentialsError,
    fab_digest,
    make_credentials,
    nginx,
)
from nanogpt_flower.deployment.node import read_node, run_node
from nanogpt_flower.local.app_directory import write_app
from nanogpt_flower.local.deployment import start_server
from nanogpt_flower.local.federation import Federation, LocalRunError, free_port
from shakespeare_data import load_corpus, partition

LIMIT = 5200 * 1024  # bytes in a request that the proxy passes
needs_nginx = pytest.mark.skipif(nginx() is None, reason="nginx is not installed")


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    directory = tmp_path_factory.mktemp("made") / "credentials"
    return make_credentials(directory, host="gpt.example.org", supernodes=2)


def test_keys_and_secrets_are_readable_by_their_owner_alone(made: Credentials) -> None:
    secret = ("key", "superexec-secret", "server.key")
    files = [path for path in made.directory.rglob("*") if path.name in secret]
    assert len(files) == 2 * 2 + 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (made.server, *made.parties)} == {0o700}
    texts = [path.read_bytes() for path in files]
    assert len(set(texts)) == len(texts)  # no key or secret is there twice
    assert not [path for path in made.directory.rglob("*") if path.name == "ca.key"]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_party_gets_no_file_of_another_party(made: Credentials) -> None:
    for party in made.parties:
        assert {path.name for path in party.iterdir()} == {
            *("ca.crt", "key", "superexec-secret", "node.toml")
        }
        key = load_ssh_private_key((party / "key").read_bytes(), password=None)
        assert key.curve.name == "secp384r1"
        public = subprocess.run(
            ["ssh-keygen", "-y", "-f", party / "key"], capture_output=True, text=True
        ).stdout
        assert public.split()[:2] == (made.server / f"{party.name}.pub").read_text().split()[:2]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_accepts_the_server_under_its_names_alone(made: Credentials) -> None:
    def verifies(*options: str) -> bool:
        files = ["-CAfile", made.server / "ca.crt", made.server / "server.crt"]
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", *options, *files]
        return subprocess.run(command, capture_output=True).returncode == 0

    assert verifies("-verify_hostname", "gpt.example.org")
    assert verifies("-verify_hostname", "localhost")
    assert verifies("-verify_ip", "127.0.0.1")
    assert not verifies("-verify_hostname", "example.org")
    certificate = x509.load_pem_x509_certificate((made.server / "server.crt").read_bytes())
    assert certificate.not_valid_after_utc.date() == made.expires
    assert f"expires on {made.expires}" in made.explained()


def test_credentials_are_never_overwritten(made: Credentials) -> None:
    before = (made.parties[0] / "key").read_bytes()
    with pytest.raises(CredentialsError, match="exists; keys are never overwritten"):
        make_credentials(made.directory, host="gpt.example.org", supernodes=2)
    assert (made.parties[0] / "key").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"host": "a b"}, "--host is 'a b'"),
        ({"host": "x;return"}, "--host is 'x;return'"),
        ({"supernodes": 0}, "--supernodes is 0"),
        ({"port": 65535}, "--port is 65535"),
    ],
)
def test_an_option_that_cannot_work_is_named(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(CredentialsError, match=named):
        make_credentials(tmp_path / "new", **{"host": "h", "supernodes": 1, **options})
    assert not (tmp_path / "new").exists()


def test_the_command_prints_who_gets_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    options = ["--host", "::1", "--supernodes", "2", "--output", str(output), "--port", "7000"]
    assert main(["credentials", *options]) == 0
    printed = capsys.readouterr().out
    assert f"{output}/party-2 goes to one party" in printed
    assert f"flwr supernode register {output}/server/party-2.pub" in printed
    assert read_node(output / "party-1")["superlink"] == "[::1]:7000"
    assert main(["credentials", *options]) == 2


def test_equal_apps_give_equal_fabs_and_other_apps_give_others(
    made: Credentials, tmp_path: Path
) -> None:
    write_app(tmp_path / "app")
    os.utime(tmp_path / "app" / "pyproject.toml", (0, 0))
    digest = fab_digest(tmp_path / "app")
    assert read_node(made.parties[0])["fabs"] == [digest]
    (tmp_path / "app" / "nanogpt_flower" / "more.py").write_text("")
    assert fab_digest(tmp_path / "app") != digest


def test_a_node_wants_a_whole_party_that_others_cannot_read(
    made: Credentials, tmp_path: Path
) -> None:
    party = tmp_path / "party"
    shutil.copytree(made.parties[0], party)
    (party / "key").chmod(0o640)
    with pytest.raises(CredentialsError, match="has mode 0640, so others can read it"):
        read_node(party)
    (party / "key").unlink()
    with pytest.raises(CredentialsError, match="has no key"):
        read_node(party)
    with pytest.raises(CredentialsError, match="'abc' is no SHA-256"):
        run_node(made.parties[0], tmp_path, allowed=["abc"])


def test_the_pinned_flower_has_all_names() -> None:
    assert flower.missing_names() == []


def test_a_node_does_not_start_on_a_flower_without_the_names(
    made: Credentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(flower.NAMES, flower.CLIENTAPP, ("run_clientapp", "install"))
    monkeypatch.setitem(flower.NAMES, "flwr.gone", ("anything",))
    assert flower.missing_names() == [f"{flower.CLIENTAPP}.install", "flwr.gone"]
    with pytest.raises(CredentialsError, match="start Flower's own programs with --stock"):
        run_node(made.parties[0], tmp_path)


def test_pauses_grow_while_the_superlink_has_no_message_and_begin_anew_with_each() -> None:
    slept: list[float] = []
    pauses = flower.ShortPauses(slept.append)
    for _ in range(40):
        pauses.sleep(3)
    assert slept[0] == 0.1
    assert slept == sorted(slept)
    assert slept[-1] == 3
    assert all(pause <= max(0.1, 0.2 * sum(slept[:at])) for at, pause in enumerate(slept))
    pauses.sleep(0.5)
    pauses.sleep(3)
    assert slept[-2:] == [0.02, 0.1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork")
def test_a_copy_of_a_process_that_has_imported_everything_computes_as_a_new_process() -> None:
    compute = (
        "import os, threading, torch\n"
        "from nanogpt_flower.deployment.flower import import_everything\n"
        "import_everything()\n"
        "assert not torch.cuda.is_initialized() and threading.active_count() == 1\n"
        "{fork}"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Linear(512, 512)\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    loss = model(torch.randn(512, 512)).square().mean()\n"
        "loss.backward(); optimizer.step()\n"
        "print(torch.get_num_threads(), model(torch.ones(1, 512)).sum().item(), flush=True)\n"
    )
    fork = (
        "if (child := os.fork()):\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", compute.format(fork=forked)],
            env=os.environ | {"OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for forked in ("", fork)
    ]
    assert len(printed[0].split()) == 2
    assert printed[0] == printed[1]


class Deployment:
    """A server and two nodes on this machine, which are three parties."""

    def __init__(self, federation: Federation, room: Path, parts: list[Path], policy: Path) -> None:
        self.federation, self.room, self.parts, self.policy = federation, room, parts, policy
        self.made = start_server(federation, 2)
        address = read_node(self.made.parties[0])["superlink"]
        self.port = int(address.rpartition(":")[2])  # of the proxy, if there is one
        self.nodes = [self.start_node(party) for party in self.made.parties]

    def start_node(self, party: Path) -> subprocess.Popen[bytes]:
        """Start a node with a FLWR_HOME of its own, which is empty."""
        data = self.parts[1 if party == self.made.parties[1] else 0]
        with self.log(party.name).open("wb") as log:
            return subprocess.Popen(
                [
                    *(program("nanogpt-flower"), "node", str(party), "--data", str(data)),
                    *("--policy", str(self.policy), "--reproducible"),
                ],
                env=os.environ | {"FLWR_HOME": str(self.home(party.name))},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def home(self, name: str) -> Path:
        return self.room / name / "flwr"

    def log(self, name: str) -> Path:
        return self.room / f"{name}.log"

    def intruder(self, name: str, **files: str) -> Path:
        """Return the directory of a party that has other files than the first party."""
        party = self.room / "intruders" / name
        shutil.copytree(self.made.parties[0], party)
        for file, text in files.items():
            (party / file).write_text(text)
        return party


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, policy_file: Path
) -> Iterator[Deployment]:
    room = tmp_path_factory.mktemp("deployment")
    parts = partition(load_corpus(str(text_file)), 2).write(room / "datasets")
    with Federation(room / "home") as federation:
        deployment = Deployment(federation, room, parts, policy_file)
        try:
            yield deployment
        finally:
            for node in deployment.nodes:
                children = psutil.Process(node.pid).children(recursive=True)
                node.send_signal(signal.SIGTERM)
                assert node.wait(30) == 130
                assert not [p for p in children if p.is_running() and p.status() != "zombie"]


def settings(tiny: dict[str, Any], output: Path) -> dict[str, Any]:
    return tiny | {"num-server-rounds": 1, "max-steps": 2, "output-dir": str(output)}


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def output_of_a_node_that_ends(deployment: Deployment, party: Path) -> str:
    """Start a node that must end by itself, and return what it printed."""
    process = deployment.start_node(party)
    try:
        process.wait(60)
    finally:
        process.terminate()
        process.wait()
    printed = deployment.log(party.name).read_text()
    assert process.returncode == 1, printed
    assert "SuperNode ID" not in printed
    return printed


@pytest.mark.slow
@pytest.mark.deployed
def test_a_run_of_the_listed_app_is_answered_and_its_fab_is_not_unpacked(
    deployment: Deployment,
    tiny: dict[str, Any],
    run_app: Callable[..., Path],
    tmp_path: Path,
) -> None:
    changed = settings(tiny, tmp_path / "deployed")
    deployment.federation.run(deployment.made.app, changed)
    (deployed,) = (tmp_path / "deployed").iterdir()
    local = run_app(settings(tiny, tmp_path / "local"), data_paths=deployment.parts)
    assert (deployed / "metrics.jsonl").read_text() == (local / "metrics.jsonl").read_text()
    for party in deployment.made.parties:
        assert not (deployment.home(party.name) / "apps").exists()
        assert "trains on" in deployment.log(party.name).read_text()


def other_app(directory: Path, version: str | None = None) -> Path:
    """Write an app that creates a file when it is imported."""
    app = write_app(directory / "app")
    with (app / "nanogpt_flower" / "client_app.py").open("a") as file:
        file.write(f"\nopen({str(directory / 'ran')!r}, 'w')\n")
    if version is not None:
        project = tomllib.loads((app / "pyproject.toml").read_text())
        project["project"]["version"] = version
        (app / "pyproject.toml").write_text(tomli_w.dumps(project))
    return app


@pytest.mark.slow
@pytest.mark.parametrize("version", [None, "1.0.0/../../x"], ids=["other-code", "path-as-version"])
def test_a_run_of_an_app_that_is_not_listed_is_refused(
    version: str | None, deployment: Deployment, tiny: dict[str, Any], tmp_path: Path
) -> None:
    app = other_app(tmp_path, version)
    with pytest.raises(LocalRunError) as caught:
        deployment.federation.run(app, settings(tiny, tmp_path / "runs"))
    assert str(caught.value).count(flower.REFUSED_APP) >= 2
    assert not (tmp_path / "ran").exists()
    for party in deployment.made.parties:
        home = deployment.home(party.name)
        assert not list(home.rglob("*.py")), "a FAB was unpacked"


@pytest.mark.slow
def test_a_node_with_a_key_that_is_not_registered_ends(
    deployment: Deployment, made: Credentials
) -> None:
    party = deployment.intruder("key", key=(made.parties[0] / "key").read_text())
    printed = output_of_a_node_that_ends(deployment, party)
    assert "Failed to activate SuperNode" in printed


@pytest.mark.slow
def test_a_node_with_another_ca_does_not_connect(deployment: Deployment, made: Credentials) -> None:
    party = deployment.intruder("ca", **{"ca.crt": (made.server / "ca.crt").read_text()})
    assert "CERTIFICATE_VERIFY_FAILED" in output_of_a_node_that_ends(deployment, party)


@pytest.mark.slow
def test_a_supernode_without_tls_does_not_connect(deployment: Deployment, tmp_path: Path) -> None:
    address = ["--superlink", f"127.0.0.1:{deployment.port}", "--port", str(free_port())]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [program("flower-supernode"), "--insecure", "--max-retries", "1", *address],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:  # it does not end, because its own server goes on
        wait_until(lambda: "400 Bad Request" in log.read_text(), log)
        assert "SuperNode ID" not in log.read_text()
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        for found in [*children, process]:
            found.kill()
        process.wait()


@pytest.mark.slow
@needs_nginx
def test_a_run_from_outside_is_refused(deployment: Deployment, tmp_path: Path) -> None:
    home = tmp_path / "flwr"
    home.mkdir()
    connection = {
        "address": f"127.0.0.1:{deployment.port}",
        "root-certificates": str(deployment.made.parties[0] / "ca.crt"),
    }
    config = {"superlink": {"default": "it", "it": connection}}
    (home / "config.toml").write_text(tomli_w.dumps(config))
    finished = subprocess.run(
        [program("flwr"), "run", str(deployment.made.app)],
        env=os.environ | {"FLWR_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode != 0
    assert "403" in finished.stdout + finished.stderr


class Stranger:
    """Somebody who has the CA's certificate and reaches the port of the proxy."""

    def __init__(self, deployment: Deployment) -> None:
        self.port = deployment.port
        self.context = ssl.create_default_context(cafile=deployment.made.parties[0] / "ca.crt")

    def status(self, method: str, path: str, body: bytes = b"") -> int:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context)
        try:
            connection.request(method, path, body, {"Content-Type": "application/protobuf"})
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.mark.slow
@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        *("/", "/docs", "/openapi.json", "/metrics", "/v1/fleet", "/v1/fleet/"),
        *("/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-runs"),
        *("/v1/runtime/acquire-task", "/v1/runtime/pull-task-input"),
        *("/v1/fleet/register-node", "/v1/fleet/unregister-node"),
        *("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run"),
        *("/v1/fleet/..%2fcontrol/start-run", "/v1/fleet/pull-messages/../../control/start-run"),
        *("/v1/fleet/pull-messages/x", "//v1/control/start-run", "/V1/FLEET/pull-messages"),
        *("/v1/fleet/pull-messages%00", "/v1/fleet/pull-messages;/../../control/start-run"),
    ],
)
def test_the_proxy_passes_no_other_path(path: str, deployment: Deployment) -> None:
    status = Stranger(deployment).status("POST", path)
    assert status in (400, 403)


@pytest.mark.slow
@needs_nginx
@pytest.mark.parametrize("path", FLEET_PATHS)
def test_the_proxy_passes_the_messages_of_nodes_and_no_other_method(
    path: str, deployment: Deployment
) -> None:
    # An answer of the SuperLink: the request has no key.
    stranger = Stranger(deployment)
    assert stranger.status("POST", f"/v1/fleet/{path}") == 401
    assert stranger.status("POST", f"/x/../v1/fleet/{path}?query=1") == 401
    assert stranger.status("GET", f"/v1/fleet/{path}") == 403


@pytest.mark.slow
@needs_nginx
def test_a_request_above_the_limit_is_refused_before_it_reaches_the_superlink(
    deployment: Deployment,
) -> None:
    stranger = Stranger(deployment)
    assert stranger.status("POST", "/v1/fleet/push-object", bytes(LIMIT)) == 400  # of the SuperLink
    with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
        # nginx answers and closes the connection while the body is still being sent.
        assert stranger.status("POST", "/v1/fleet/push-object", bytes(LIMIT + 1)) == 413
    log = deployment.made.server / "nginx" / "refused.log"
    wait_until(lambda: " 413 " in log.read_text(), log)


@pytest.mark.slow
def test_the_superlink_listens_on_loopback_alone(deployment: Deployment) -> None:
    port = deployment.federation.port
    for found in deployment.federation.processes():
        listening = [c.laddr for c in found.net_connections() if c.status == psutil.CONN_LISTEN]
        assert all(at.ip == "127.0.0.1" for at in listening if at.port != deployment.port)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_node_that_is_killed_leaves_nothing_running(deployment: Deployment) -> None:
    party = deployment.made.parties[1]
    node = deployment.nodes[1]
    children = psutil.Process(node.pid).children(recursive=True)
    assert len(children) >= 2
    node.kill()
    node.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    deployment.nodes[1] = deployment.start_node(party)
    log = deployment.log(party.name)
    wait_until(lambda: "SuperNode ID" in log.read_text(), log)
